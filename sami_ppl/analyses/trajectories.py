"""How straight the codes of a moving scene run.

The *curvature* of a trajectory is the mean angle, in degrees, between its successive steps v_t = y_{t+1} − y_t (Hénaff,
Goris & Simoncelli 2019, *Perceptual straightening of natural videos*): 0 along a straight line. In many dimensions
independent points have 120° (their steps have mean cosine −½), a random walk has 90° in any.
"""

import jax
from jaxtyping import Array, Float, Key
from matplotlib.figure import Figure
import numpy as np
import xarray as xr

from sami_ppl import plots
from sami_ppl._util.keys import check_key
from sami_ppl.analyses.codes import posterior_means
from sami_ppl.program.program import Program

STILL = 1e-5
"""A step shorter than this share of the trajectory's longest has no direction and is left out."""
PROJECTIONS = 16


def curvature(trajectories: Float[np.ndarray, "*clip frame d"]) -> Float[np.ndarray, "*clip"]:
    """Mean angle between successive steps of each trajectory, in degrees; NaN where fewer than two steps have length.

    Steps of no length are left out, and the steps around them are then neighbours. Raises ValueError for fewer than 3
    frames.
    """
    trajectories = np.asarray(trajectories, float)
    if trajectories.ndim < 2 or trajectories.shape[-2] < 3:
        raise ValueError(f"an angle takes 3 frames: trajectories must be (..., frame, d), got {trajectories.shape}")
    flat = trajectories.reshape(-1, *trajectories.shape[-2:])
    return np.array([_mean_angle(one) for one in flat]).reshape(trajectories.shape[:-2])


def _mean_angle(trajectory: Float[np.ndarray, "frame d"]) -> float:
    steps = np.diff(trajectory, axis=0)
    length = np.linalg.norm(steps, axis=1)
    moving = length > max(STILL * length.max(), 1e-12)
    unit = steps[moving] / length[moving, None]
    if len(unit) < 2:
        return np.nan
    # By the half angle: arccos of a cosine near 1 loses half of its digits.
    apart, together = (np.linalg.norm(unit[1:] + sign * unit[:-1], axis=1) for sign in (-1, 1))
    return float(np.degrees(2 * np.arctan2(apart, together)).mean())


def straightness(
    program: Program, clips: Float[Array | np.ndarray, "clip frame *event"], *, key: Key[Array, ""]
) -> xr.Dataset:
    """Curvature of clips in pixels and in codes (posterior means), in degrees, with what to compare it to.

    On `clip`: `pixels`; `codes`; `straightening` = pixels − codes; `projected`: pixels projected at random to as many
    dimensions as the code has, the mean of 16 projections, since dimension alone changes angles; `independent` and
    `walk`: one trajectory of independent Gaussian points and one Gaussian random walk per clip, of as many frames and
    dimensions, the two nulls near 120° and 90°. NaN for clips that do not move.

    `clips`: as `data.moving_disks(key, 100)["x"].values`. Raises ValueError for another shape, fewer than 3 frames,
    and if all axes have collapsed.
    """
    check_key(key)
    clips = np.asarray(clips, np.float32)
    if clips.ndim != 2 + len(program.event_shape) or clips.shape[2:] != program.event_shape:
        raise ValueError(
            f"clips must have shape (clip, frame, {', '.join(map(str, program.event_shape))}), got {clips.shape}"
            + ("; add the leading dim: clips[None]" if clips.shape[1:] == program.event_shape else "")
        )
    count, frames = clips.shape[:2]
    codes = posterior_means(program, program.observed(clips.reshape(-1, *program.event_shape)))
    codes, pixels = codes.reshape(count, frames, -1), clips.reshape(count, frames, -1)
    size = codes.shape[-1]
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    bases = rng.standard_normal((PROJECTIONS, pixels.shape[-1], size))
    points = rng.standard_normal((2, count, frames, size))
    in_pixels, in_codes = curvature(pixels), curvature(codes)
    variables = {
        "pixels": in_pixels,
        "codes": in_codes,
        "straightening": in_pixels - in_codes,
        "projected": np.mean([curvature(pixels @ basis) for basis in bases], axis=0),
        "independent": curvature(points[0]),
        "walk": curvature(points[1].cumsum(axis=1)),
    }
    attrs = {"frames": frames, "dimensions of the code": size}
    return xr.Dataset({n: ("clip", v, {"units": "degrees"}) for n, v in variables.items()}, attrs=attrs)


def plot_straightness(found: xr.Dataset) -> Figure:
    """Curvature of every clip, with the mean: codes, pixels, pixels at the code's dimension, and the nulls."""
    rows = [
        ("codes", "codes", plots.BLUE), ("pixels", "pixels", plots.INK), ("projected", "pixels, projected", plots.INK),
        ("walk", "random walk", plots.GRAY), ("independent", "independent points", plots.GRAY),
    ]  # fmt: skip
    figure = plots.Picture(figsize=(plots.WIDTH, 2.3), layout="constrained")
    panel = plots.style(figure.subplots())
    for i, (name, _, colour) in enumerate(rows):
        values = found[name].values
        spread = 0.5 * (np.arange(len(values)) * 0.618 % 1.0 - 0.5)
        panel.scatter(values, i + spread, s=4, lw=0, alpha=0.4, color=colour)
        panel.plot([np.nanmean(values)] * 2, [i - 0.38, i + 0.38], color=plots.VERMILION, lw=2)
    panel.set_yticks(range(len(rows)), [label for _, label, _ in rows], fontsize=plots.NORMAL)
    panel.invert_yaxis()
    panel.set_xlim(0, max(150.0, 1.02 * max(float(np.nanmax(found[name])) for name, _, _ in rows)))
    panel.set_xlabel("curvature, degrees; the bar is the mean over clips", fontsize=plots.SMALL)
    return figure
