"""How straight the codes of a moving scene run.

The *curvature* of a trajectory is the mean angle, in degrees, between its successive steps v_t = y_{t+1} − y_t (Hénaff,
Goris & Simoncelli 2019, *Perceptual straightening of natural videos*): 0 along a straight line. In many dimensions
independent points have 120° (their steps have mean cosine −½), a random walk has 90° in any. The mean *cosine* of the
same angles is the other form in use: 1 along a line, 0 of a walk, −½ of independent points, in any dimension.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import Array, Float, Int, Key, Shaped
from matplotlib.figure import Figure
import numpy as np
import pandas as pd
import xarray as xr

from sami_ppl import plots
from sami_ppl._util.keys import check_key
from sami_ppl.analyses.codes import posterior_means
from sami_ppl.program.program import Program

STILL = 1e-5
"""A step shorter than this share of the trajectory's longest has no direction and is left out."""
PROJECTIONS = 16
BESIDE = ("pixels", "components", "projected", "walk", "independent")
"""What codes are compared to, in the order of the Dataset."""
LEVEL = 0.95
STILLS = 10_000
"""Observations whose codes say how much of each direction there is, at most."""
LEAST = 1e-3
"""A direction with a smaller share of the variance of the largest one is not used by a code."""


def curvature(trajectories: Float[np.ndarray, "*clip frame d"]) -> Float[np.ndarray, "*clip"]:
    """Mean angle between successive steps of each trajectory, in degrees; NaN where fewer than two steps have length.

    Steps of no length are left out, and the steps around them are then neighbours. Raises ValueError for fewer than 3
    frames.
    """
    return _means(trajectories)[0]


def mean_cosine(trajectories: Float[np.ndarray, "*clip frame d"]) -> Float[np.ndarray, "*clip"]:
    """Mean cosine of the angles of `curvature`. Raises ValueError as it does."""
    return _means(trajectories)[1]


def _means(trajectories: Float[np.ndarray, "*clip frame d"]) -> tuple[np.ndarray, np.ndarray]:
    """Mean angles, and mean cosines."""
    trajectories = np.asarray(trajectories, float)
    if trajectories.ndim < 2 or trajectories.shape[-2] < 3:
        raise ValueError(f"an angle takes 3 frames: trajectories must be (..., frame, d), got {trajectories.shape}")
    angles = [_angles(one) for one in trajectories.reshape(-1, *trajectories.shape[-2:])]
    shape = trajectories.shape[:-2]
    means = np.array([[f(one).mean() if one.size else np.nan for f in (np.degrees, np.cos)] for one in angles])
    return means[:, 0].reshape(shape), means[:, 1].reshape(shape)


def _angles(trajectory: Float[np.ndarray, "frame d"]) -> Float[np.ndarray, " pair"]:
    """Angles between successive steps that have a length, in radians."""
    steps = np.diff(trajectory, axis=0)
    length = np.linalg.norm(steps, axis=1)
    moving = length > max(STILL * length.max(), 1e-12)
    unit = steps[moving] / length[moving, None]
    # By the half angle: arccos of a cosine near 1 loses half of its digits.
    apart, together = (np.linalg.norm(unit[1:] + sign * unit[:-1], axis=1) for sign in (-1, 1))
    return 2 * np.arctan2(apart, together)


def straightness(
    programs: Program | Mapping[str, Program],
    clips: Float[Array | np.ndarray, "clip frame *event"],
    *,
    stills: Float[Array | np.ndarray, "obs *event"] | None = None,
    key: Key[Array, ""],
) -> xr.Dataset:
    """How straight clips run in codes (posterior means) of one or several programs, and in what to compare them to.

    `curvature` in degrees, `cosine`, `shuffled`, the curvature of the same frames in random order, and `whitened`, the
    curvature where all directions of the code count alike, each on (`trajectory`, `clip`); NaN for clips that do not
    move. All trajectories but the pixels themselves have as many dimensions D as the code, since dimension alone
    changes angles. So does the scale of axes: components of little variance, fine detail, turn more than those of
    much, and an autoencoder that hardly uses an axis gives it little variance too, while codes that fill their prior
    have as much of each. `whitened` is of codes and components with unit covariance over `stills`, which no invertible
    linear map of a code changes; NaN for the rest.

    - `codes`, or those of several programs by their names;
    - `pixels`;
    - `components`: the leading D principal components of `stills`;
    - `projected`: pixels projected at random, the mean of 16 projections;
    - `walk`, `independent`: one Gaussian random walk and one set of independent Gaussian points for each clip, of as
      many frames, the nulls near 90° and 120°.

    Args:
        programs: a program, or several by name, whose codes have one size.
        clips: observations over time, as `data.moving_disks(key, 100)["x"].values`, or `data.cut_patches` of a video.
        stills: observations of which principal components are found, as the program was fitted to stills; default the
            frames of the clips themselves.
        key: random key.

    Returns:
        The Dataset; `straightness_table` makes means with intervals of it.

    Raises:
        ValueError: clips or stills of another shape, fewer than 3 frames, codes of several sizes, a program of a name
            that is taken, and all axes of a code collapsed.
    """
    check_key(key)
    named = {"codes": programs} if isinstance(programs, Program) else dict(programs)
    sizes = {name: program.latents.size for name, program in named.items()}
    if len(set(sizes.values())) != 1 or not sizes.keys().isdisjoint(BESIDE):
        raise ValueError(
            "programs must have codes of one size, as dimension alone changes angles, and names other than "
            f"{', '.join(BESIDE)}; got {', '.join(f'{name} of {size}' for name, size in sizes.items())}"
        )
    clips, (size, *_) = np.asarray(clips, np.float32), sizes.values()
    for program in named.values():
        _check_clips(program, clips)
    count, frames = clips.shape[:2]
    flat = clips.reshape(-1, *clips.shape[2:])
    stills = flat if stills is None else np.asarray(stills, np.float32)
    if stills.shape[1:] != flat.shape[1:]:
        raise ValueError(f"stills must be like the frames of the clips, {flat.shape[1:]} each, got {stills.shape[1:]}")
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    pixels = clips.reshape(count, frames, -1)
    bases = rng.standard_normal((PROJECTIONS, pixels.shape[-1], size))
    points = rng.standard_normal((2, count, frames, size))
    order = rng.permuted(np.tile(np.arange(frames), (count, 1)), axis=1)
    some = stills[:STILLS]
    spread = {name: p.encode(p.observed(some))[0] for name, p in named.items()}
    found = {name: [posterior_means(p, p.observed(flat)).reshape(count, frames, -1)] for name, p in named.items()}
    components = _components(stills.reshape(len(stills), -1), size)
    spread["components"] = components(some.reshape(len(some), -1))
    found |= {
        "pixels": [pixels],
        "components": [components(pixels)],
        "projected": [pixels @ basis for basis in bases],
        "walk": [points[1].cumsum(axis=1)],
        "independent": [points[0]],
    }

    def measured(several: list[np.ndarray]) -> np.ndarray:
        mixed = [np.take_along_axis(one, order[..., None], axis=1) for one in several]
        each = [(*_means(one), curvature(other)) for one, other in zip(several, mixed, strict=True)]
        return np.mean(each, axis=0)

    blank = np.full(count, np.nan)
    values = np.stack(
        [
            [*measured(several), curvature(several[0] @ whitening(spread[name])) if name in spread else blank]
            for name, several in found.items()
        ]
    )
    measures = {"curvature": "degrees", "cosine": "1", "shuffled": "degrees", "whitened": "degrees"}
    return xr.Dataset(
        {
            name: (("trajectory", "clip"), values[:, i], {"units": units})
            for i, (name, units) in enumerate(measures.items())
        },
        coords={"trajectory": [*found]},
        attrs={"frames": frames, "dimensions of the code": size},
    )


def _check_clips(program: Program, clips: np.ndarray) -> None:
    if clips.ndim != 2 + len(program.event_shape) or clips.shape[2:] != program.event_shape:
        raise ValueError(
            f"clips must have shape (clip, frame, {', '.join(map(str, program.event_shape))}), got {clips.shape}"
            + ("; add the leading dim: clips[None]" if clips.shape[1:] == program.event_shape else "")
        )


def _components(stills: Float[np.ndarray, "obs d"], size: int) -> Callable[[np.ndarray], np.ndarray]:
    """What takes observations (*clip, frame, d) to the leading components of stills; not scaled, as projections are."""
    from sklearn.decomposition import PCA

    found: Any = PCA(min(size, *stills.shape), random_state=0).fit(stills)
    return lambda x: (x - found.mean_) @ found.components_.T


def whitening(codes: Float[np.ndarray, "obs D"]) -> Float[np.ndarray, "D D"]:
    """What gives codes unit covariance, and takes directions in which they do not vary to 0."""
    values, vectors = np.linalg.eigh(np.cov(codes.T.astype(float)).reshape(codes.shape[1], -1))
    used = values > max(LEAST * values.max(), 1e-9)
    return vectors * np.where(used, 1 / np.sqrt(np.where(used, values, 1)), 0)


def straightness_table(
    found: xr.Dataset, *, level: float = LEVEL, resamples: int = 2000, key: Key[Array, ""]
) -> pd.DataFrame:
    """Means over clips of what `straightness` found, a row for each trajectory, with bootstrap intervals.

    Columns: `curvature`, `straightening` (that of the pixels − its own, paired), `whitened`, `cosine`, `shuffled`, each
    with `_low` and `_high`, percentiles over `resamples`. Where `found` has the coordinate `video` on `clip`, videos
    are drawn with replacement and then clips within each: clips of one video are alike. Of few videos such intervals
    are too narrow still.
    """
    check_key(key)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    measures = {
        "curvature": found.curvature.values,
        "straightening": found.curvature.sel(trajectory="pixels").values - found.curvature.values,
        "whitened": found.whitened.values,
        "cosine": found.cosine.values,
        "shuffled": found.shuffled.values,
    }
    videos = found.coords["video"].values if "video" in found.coords else np.zeros(found.sizes["clip"])
    rows = resampled_clips(videos, resamples, rng)
    columns = {}
    for name, values in measures.items():
        means = np.array([_mean(values[:, chosen]) for chosen in rows])
        columns[name] = _mean(values)
        columns[f"{name}_low"], columns[f"{name}_high"] = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return pd.DataFrame(columns, index=pd.Index(found.trajectory.values, name="trajectory"))


def _mean(values: Float[np.ndarray, "trajectory clip"]) -> Float[np.ndarray, " trajectory"]:
    """Means over clips that have one; NaN where none has."""
    count = np.isfinite(values).sum(1)
    return np.where(count > 0, np.nansum(values, axis=1) / np.maximum(count, 1), np.nan)


def resampled_clips(
    videos: Shaped[np.ndarray, " clip"], resamples: int, rng: np.random.Generator
) -> list[Int[np.ndarray, " drawn"]]:
    """Rows of clips for a bootstrap in two stages: videos with replacement, then as many clips of each as it has."""
    groups = [np.flatnonzero(videos == video) for video in np.unique(videos)]

    def one() -> np.ndarray:
        chosen = rng.integers(len(groups), size=len(groups))
        return np.concatenate([rng.choice(groups[i], len(groups[i])) for i in chosen])

    return [one() for _ in range(resamples)]


def plot_straightness(found: xr.Dataset) -> Figure:
    """Curvature of every clip, with the mean: codes, pixels, what has the code's dimension, and the nulls."""
    names = {"components": "components", "projected": "pixels, projected", "walk": "random walk",
             "independent": "independent points"}  # fmt: skip
    rows = found.trajectory.values.tolist()
    colours = {"pixels": plots.INK, "components": plots.INK, "projected": plots.INK,
               "walk": plots.GRAY, "independent": plots.GRAY}  # fmt: skip
    figure = plots.Picture(figsize=(plots.WIDTH, 0.5 + 0.36 * len(rows)), layout="constrained")
    panel = plots.style(figure.subplots())
    for i, name in enumerate(rows):
        values = found.curvature.sel(trajectory=name).values
        spread = 0.5 * (np.arange(len(values)) * 0.618 % 1.0 - 0.5)
        panel.scatter(values, i + spread, s=4, lw=0, alpha=0.4, color=colours.get(name, plots.BLUE))
        panel.plot([np.nanmean(values)] * 2, [i - 0.38, i + 0.38], color=plots.VERMILION, lw=2)
    panel.set_yticks(range(len(rows)), [str(names.get(name, name)) for name in rows], fontsize=plots.NORMAL)
    panel.invert_yaxis()
    panel.set_xlim(0, max(150.0, 1.02 * float(np.nanmax(found.curvature))))
    panel.set_xlabel("curvature, degrees (bar: mean)", fontsize=plots.SMALL)
    return figure
