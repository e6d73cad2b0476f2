"""Samples along lines in the code, all with the same noise: along axes, directions, posterior eigenvectors, between
images; and samples of an image given draws from its posterior.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Key
from matplotlib.figure import Figure
import numpy as np
import xarray as xr

from sami_ppl import plots
from sami_ppl._util.keys import check_key
from sami_ppl.analyses.codes import CODE_UNITS
from sami_ppl.diffusion.sampler import AbstractSampler
from sami_ppl.posteriors.generate import decode, generate
from sami_ppl.priors.latents import Latents
from sami_ppl.program.program import Program

Direction = str | Mapping[str, float] | Float[np.ndarray, " D"]
"""An axis by its name, a combination of axes such as {"z[0]": 1, "z[2]": -1}, or a vector in the code."""
STEPS = tuple(np.linspace(-2.0, 2.0, 7).tolist())
Origin = Literal["own", "zero"]


def direction_vector(latents: Latents, direction: Direction) -> tuple[Float[np.ndarray, " D"], str]:
    """A direction as a vector in the code, and its label. Raises ValueError for unknown axes, other sizes and zero."""
    if isinstance(direction, str):
        direction = {direction: 1.0}
    if isinstance(direction, Mapping):
        if unknown := [name for name in direction if name not in latents.axes]:
            raise ValueError(f"there is no axis {', '.join(map(repr, unknown))}; the axes are {list(latents.axes)}")
        vector = np.array([float(direction.get(axis, 0.0)) for axis in latents.axes])
        terms = [f"{'−' if w < 0 else '+'} {'' if abs(w) == 1 else f'{abs(w):.3g} '}{a}" for a, w in direction.items()]
        label = " ".join(terms).removeprefix("+ ")
    else:
        vector, label = np.asarray(direction, float), "direction"
    if vector.shape != (latents.size,) or not np.isfinite(vector).all() or not vector.any():
        raise ValueError(
            f"a direction is an axis ({', '.join(latents.axes)}), a combination {{axis: weight}} or a finite vector "
            f"({latents.size},) other than 0, got {direction!r}"
        )
    return vector, label


def line_codes(
    latents: Latents,
    z: Float[np.ndarray, " D"],
    directions: Float[np.ndarray, "path D"],
    steps: Sequence[float],
    *,
    origin: Origin = "own",
) -> Float[np.ndarray, "path step D"]:
    """Codes along lines through or beside z: z + t d, or with `origin="zero"` the code whose share of d is t.

    With "own" steps are counted from z itself. With "zero" they are the values themselves: z is first cleared of its
    component along d, so that an axis is set to t. Directions of a prior (angles, unit vectors) are brought back to
    length 1.
    """
    if origin == "zero":
        along = (directions @ z) / (directions**2).sum(1)
        start = z - along[:, None] * directions
    else:
        start = np.broadcast_to(z, directions.shape)
    codes = start[:, None] + np.asarray(steps, float)[None, :, None] * directions[:, None]
    return np.asarray(latents.onto_support(jnp.asarray(codes, jnp.float32)))


def traverse(
    program: Program,
    x: Float[Array | np.ndarray, "*event"],
    directions: Direction | Sequence[Direction],
    *,
    key: Key[Array, ""],
    steps: Sequence[float] = STEPS,
    origin: Origin = "own",
    sampler: AbstractSampler | None = None,
) -> xr.Dataset:
    """Samples of one observation's code moved along directions, all with one noise, so that only the code differs.

        traverse(program, x[0], ["z[0]", {"z[1]": 1, "z[2]": -1}], key=key)
        found = posterior_covariance_spectrum(program, x[:1], key=key).isel(obs=0)
        traverse(program, x[0], list((found.eigenvector * found.eigenvalue**0.5).values), key=key)

    The code is the posterior mean; `steps` are multiples of the direction, see `line_codes` for `origin`. Dims `path`,
    `step` and those of an observation: `x`, the samples; `z` (path, step, axis), their codes; `start`, the observation.

    Raises ValueError for an unknown axis, a direction of another size, and an observation of another shape.
    """
    check_key(key)
    if isinstance(directions, str | Mapping) or (isinstance(directions, np.ndarray) and directions.ndim == 1):
        directions = [directions]
    vectors, labels = zip(*(direction_vector(program.latents, d) for d in directions), strict=True)
    start = program.observed(np.asarray(x)[None])
    codes = line_codes(program.latents, program.encode(start)[0][0], np.stack(vectors), steps, origin=origin)
    return _sampled(program, codes, labels, steps, key, sampler, "multiples of the direction").assign(
        start=(program.event_dims, start[0])
    )


def interpolate(
    program: Program,
    x_from: Float[Array | np.ndarray, "*event"],
    x_to: Float[Array | np.ndarray, "*event"],
    *,
    key: Key[Array, ""],
    steps: int = 7,
    sampler: AbstractSampler | None = None,
) -> xr.Dataset:
    """Samples along the straight line between the codes of two observations, all with one noise; as `traverse`.

    `step` runs from 0, the code of `x_from`, to 1, that of `x_to`; `start` and `end` are the two. Raises ValueError for
    fewer than 2 steps and observations of another shape.
    """
    check_key(key)
    if steps < 2:
        raise ValueError(f"steps must be at least 2, the two ends, got {steps}")
    ends = program.observed(np.stack([np.asarray(x_from), np.asarray(x_to)]))
    z = program.encode(ends)[0]
    share = np.linspace(0.0, 1.0, steps)
    codes = line_codes(program.latents, z[0], (z[1] - z[0])[None], share.tolist())
    found = _sampled(program, codes, ["between"], share.tolist(), key, sampler, "share of the way")
    return found.assign(start=(program.event_dims, ends[0]), end=(program.event_dims, ends[1]))


def _sampled(
    program: Program,
    codes: Float[np.ndarray, "path step D"],
    labels: Sequence[str],
    steps: Sequence[float],
    key: Array,
    sampler: AbstractSampler | None,
    step_units: str,
) -> xr.Dataset:
    paths, count, size = codes.shape
    sampler = program.sampler.coupled if sampler is None else sampler
    samples = decode(
        program, codes.reshape(-1, size), jnp.broadcast_to(key, (paths * count, *key.shape)), sampler=sampler
    )
    variables = {
        "x": (("path", "step", *program.event_dims), samples.reshape(paths, count, *program.event_shape)),
        "z": (("path", "step", "axis"), codes, {"units": CODE_UNITS}),
    }
    names = [f"{label} {i + 1}" if label == "direction" else label for i, label in enumerate(labels)]
    coords = {
        "path": names, "axis": list(program.latents.axes),
        "step": ("step", np.asarray(steps, float), {"units": step_units}),
    }  # fmt: skip
    return xr.Dataset(variables, coords=coords, attrs={"noise": "one, the same for all samples"})


def plot_traversal(found: xr.Dataset, *, limits: plots.Limits | None = None) -> Figure:
    """One row per path, its samples in the order of the steps; the observation itself in the first column, and last
    the one that it leads to. Raises ValueError where observations are no images.
    """
    x, start = found["x"].values, found["start"].values
    check_images(start.shape)
    limits = own_limits(start) if limits is None else limits
    steps, labels = found["step"].values.tolist(), [str(path) for path in found["path"].values]
    end = found["end"].values if "end" in found else None
    return plots.traversal(x, steps, labels, start=start, end=end, limits=limits)


def conditional_samples(
    program: Program,
    x: Float[Array | np.ndarray, "obs *event"],
    *,
    key: Key[Array, ""],
    draws: int = 4,
    sampler: AbstractSampler | None = None,
) -> xr.Dataset:
    """Samples given draws from the posterior of each observation: what the code keeps is the same in all of them.

    `x` (obs, draw, *event) and `start` (obs, *event), the observations. Raises ValueError for fewer than 1 draw.
    """
    check_key(key)
    x = program.observed(x)
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    samples = generate(program, key=key, x=np.repeat(x, draws, axis=0), sampler=sampler)
    dims = program.event_dims
    return xr.Dataset(
        {"x": (("obs", "draw", *dims), samples.reshape(len(x), draws, *x.shape[1:])), "start": (("obs", *dims), x)}
    )


def plot_conditional_samples(found: xr.Dataset, *, limits: plots.Limits | None = None) -> Figure:
    """The observations in the top row, their samples below, and the mean absolute difference."""
    start = found["start"].values
    check_images(start.shape[1:])
    limits = own_limits(start) if limits is None else limits
    return plots.reconstructions(start, found["x"].values, limits=limits)


def own_limits(images: Any) -> plots.Limits:
    """Values drawn black and white: −1 and 1, or the ends of the images' own range where they leave that."""
    return (-1.0, 1.0) if np.nanmax(np.abs(images)) <= 1.001 else (float(np.nanmin(images)), float(np.nanmax(images)))


def check_images(shape: tuple[int, ...]) -> None:
    """Raise ValueError unless an observation of this shape can be drawn."""
    if not plots.is_drawn(shape):
        raise ValueError(
            f"observations of shape {shape} cannot be drawn: images have shape (channel, row, column) with 1 or 3 "
            'channels, signals (channel, length). Plot the numbers, found["x"].plot()'
        )
