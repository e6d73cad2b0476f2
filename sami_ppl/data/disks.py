"""Images of one disk on a uniform background: three known factors, and a test for whether an image is in the set.

An image of width 1 has its pixel centres at ((i + ½)/r, (j + ½)/r); y grows downwards, with the row. A disk of
intensity 1, radius R and centre (a, b) on background g is

    x_ij = g + (1 − g) c_ij,      c_ij = clip(½ + r (R − d_ij), 0, 1),      d_ij = distance of pixel centre and (a, b).

The coverage c falls from 1 to 0 over one pixel at the edge, so that the image is a continuous function of the centre
and the factors can be recovered far below the size of a pixel. `fit_disks` projects any image on the set: what a
generative model of disks draws can be measured against all true disks, not only against those it was shown.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key
import numpy as np
import xarray as xr

from sami_ppl._util.keys import check_key

FACTORS = ("centre_x", "centre_y", "background")


def render(
    centre_x: ArrayLike, centre_y: ArrayLike, background: ArrayLike, *, resolution: int = 16, radius: ArrayLike = 0.2
) -> Float[Array, "*batch 1 {resolution} {resolution}"]:
    """Draw disks, one per element of the broadcast factors. Differentiable in all factors.

    Centres and radius are in units of the image width; background and result are intensities in [−1, 1].
    """
    a, b, g = (
        jnp.asarray(factor, jnp.float32)[..., None, None, None]
        for factor in jnp.broadcast_arrays(centre_x, centre_y, background)
    )
    pixel = (jnp.arange(resolution, dtype=jnp.float32) + 0.5) / resolution
    column, row = (jnp.broadcast_to(p, (*a.shape[:-3], 1, resolution, resolution)) for p in (pixel, pixel[:, None]))
    # The floor keeps the gradient finite where a centre meets the centre of a pixel.
    distance = jnp.sqrt(jnp.maximum((column - a) ** 2 + (row - b) ** 2, 1e-12))
    coverage = jnp.clip(0.5 + (jnp.asarray(radius, jnp.float32) - distance) * resolution, 0.0, 1.0)
    return g + (1 - g) * coverage


def disks(
    key: Key[Array, ""],
    n: int,
    *,
    resolution: int = 16,
    radius: float = 0.2,
    centre: tuple[float, float] = (0.2, 0.8),
    background: tuple[float, float] = (-1.0, 0.5),
) -> xr.Dataset:
    """Draw n images with independent uniform factors.

    `centre` is the range of both coordinates, in image widths: by default the disk stays inside the image.
    `background` is a range of intensities. Returns x (obs, channel, row, column) and the factors centre_x, centre_y,
    background (obs), float32. Raises ValueError where an argument is out of range.
    """
    check_key(key)
    if n < 1:
        raise ValueError(f"n must be at least 1 image, got {n}")
    if resolution < 2:
        raise ValueError(f"resolution must be at least 2 pixels, got {resolution}")
    if not radius > 0:
        raise ValueError(f"radius must be positive (a share of the image width), got {radius}")
    _check_range("centre", centre, 0.0, 1.0, "image widths")
    _check_range("background", background, -1.0, 1.0, "intensity; the disk itself is 1")
    low = jnp.asarray([centre[0], centre[0], background[0]], jnp.float32)
    high = jnp.asarray([centre[1], centre[1], background[1]], jnp.float32)
    factors = jax.random.uniform(key, (3, n), jnp.float32) * (high - low)[:, None] + low[:, None]
    x = render(*factors, resolution=resolution, radius=radius)
    return xr.Dataset(
        {
            "x": (("obs", "channel", "row", "column"), np.asarray(x)),
            **{name: ("obs", np.asarray(values)) for name, values in zip(FACTORS, factors, strict=True)},
        },
        attrs={"radius": radius},
    )


def moving_disks(
    key: Key[Array, ""],
    n: int,
    *,
    frames: int = 12,
    speed: float = 0.04,
    resolution: int = 16,
    radius: float = 0.2,
    centre: tuple[float, float] = (0.2, 0.8),
    background: tuple[float, float] = (-1.0, 0.5),
) -> xr.Dataset:
    """Draw n clips of a disk that moves in a straight line at `speed`, in image widths a frame, on a still background.

    Starts, directions and backgrounds are uniform; at the ends of the range `centre` the disk bounces, as light off a
    mirror. Returns x (clip, frame, channel, row, column), centre_x and centre_y (clip, frame), background (clip).
    Raises ValueError where an argument is out of range, as `disks` does.
    """
    check_key(key)
    if frames < 2 or not speed >= 0:
        raise ValueError(f"frames must be at least 2 and speed not negative, got frames={frames}, speed={speed}")
    start_key, direction_key = jax.random.split(key)
    start = disks(start_key, n, resolution=resolution, radius=radius, centre=centre, background=background)
    angle = jax.random.uniform(direction_key, (n, 1), jnp.float32, 0.0, 2 * np.pi)
    way = speed * jnp.arange(frames, dtype=jnp.float32)
    low, width = centre[0], centre[1] - centre[0]

    def bounce(place: np.ndarray, velocity: Array) -> Array:
        free = jnp.asarray(place)[:, None] - low + velocity * way
        # A bouncing path is the straight one folded: up the range, then down again.
        return low + (width - jnp.abs(jnp.mod(free, 2 * width) - width) if width > 0 else 0 * free)

    a, b = bounce(start["centre_x"].values, jnp.cos(angle)), bounce(start["centre_y"].values, jnp.sin(angle))
    sky = jnp.asarray(start["background"].values)
    x = render(a, b, sky[:, None], resolution=resolution, radius=radius)
    return xr.Dataset(
        {
            "x": (("clip", "frame", "channel", "row", "column"), np.asarray(x)),
            "centre_x": (("clip", "frame"), np.asarray(a)),
            "centre_y": (("clip", "frame"), np.asarray(b)),
            "background": ("clip", np.asarray(sky)),
        },
        attrs={"radius": radius, "speed": speed},
    )


def _check_range(name: str, got: Sequence[float], low: float, high: float, unit: str) -> None:
    if len(got) != 2 or not low <= got[0] <= got[1] <= high:
        raise ValueError(f"{name} must be a range (low, high) with {low} <= low <= high <= {high} ({unit}), got {got}")


def fit_disks(
    images: Float[Array | np.ndarray, "n 1 r r"], *, radius: float = 0.2, chunk: int = 512
) -> tuple[Float[Array, "n 3"], Float[Array, " n"]]:
    """The best-fitting true disk of each image, and how far the image is from it.

    A grid of centres one pixel apart, over the whole image, with the best background of each in closed form (the
    image is linear in it); then damped Gauss–Newton steps (Levenberg–Marquardt) on all three factors. `chunk` images
    are fitted at a time, which bounds the memory. Returns the factors (centre_x, centre_y, background) and the root
    mean square difference over pixels. Raises ValueError for images of another shape.
    """
    if images.ndim != 4 or images.shape[1] != 1 or images.shape[2] != images.shape[3]:
        raise ValueError(f"images must have shape (n, 1, resolution, resolution), got {images.shape}")
    return _fit_disks(jnp.asarray(images, jnp.float32), jnp.asarray(radius, jnp.float32), chunk)


@partial(jax.jit, static_argnums=2)
def _fit_disks(images: Array, radius: Array, chunk: int) -> tuple[Array, Array]:
    resolution = images.shape[-1]
    corner = jnp.linspace(0.0, 1.0, resolution + 1, dtype=jnp.float32)
    a, b = (c.reshape(-1) for c in jnp.meshgrid(corner, corner))
    coverage = render(a, b, jnp.zeros_like(a), resolution=resolution, radius=radius).reshape(a.size, -1)

    def fit(image: Array) -> tuple[Array, Array]:
        background, error = _best_background(image.reshape(-1), coverage)
        best = jnp.argmin(error)
        return _refine(image, jnp.stack([a[best], b[best], background[best]]), radius)

    return jax.lax.map(fit, images, batch_size=chunk)


def _best_background(image: Float[Array, " p"], coverage: Float[Array, "c p"]) -> tuple[Array, Array]:
    """Least-squares background in [−1, 1] for each coverage, and the squared error that remains.

    x − c = g (1 − c): one regression per row, from inner products only, so that no (c, p) array is made per image.
    """
    sky = 1 - coverage
    sky_sky, sky_cover, cover_cover = (jnp.sum(p, -1) for p in (sky * sky, sky * coverage, coverage * coverage))
    sky_rest = sky @ image - sky_cover
    rest_rest = image @ image - 2 * (coverage @ image) + cover_cover
    background = jnp.clip(sky_rest / jnp.maximum(sky_sky, 1e-6), -1.0, 1.0)
    return background, rest_rest - 2 * background * sky_rest + background**2 * sky_sky


def _refine(image: Float[Array, "1 r r"], start: Float[Array, "3"], radius: Array) -> tuple[Array, Array]:
    low, high = jnp.asarray([0.0, 0.0, -1.0], jnp.float32), jnp.ones(3, jnp.float32)

    def residual(factors: Array) -> Array:
        return (render(*factors, resolution=image.shape[-1], radius=radius) - image).reshape(-1)

    def step(_: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        factors, error, damping = carry
        jacobian = jax.jacfwd(residual)(factors)
        normal = jacobian.T @ jacobian
        # The constant keeps the system regular where a factor leaves no trace, as the centre on a background of 1.
        damped = normal + jnp.diag(damping * jnp.diag(normal) + 1e-6)
        proposal = jnp.clip(factors - jnp.linalg.solve(damped, jacobian.T @ residual(factors)), low, high)
        proposed = jnp.mean(residual(proposal) ** 2)
        better = proposed < error
        return (
            jnp.where(better, proposal, factors),
            jnp.where(better, proposed, error),
            jnp.where(better, damping / 5, damping * 5),
        )

    start_error = jnp.mean(residual(start) ** 2)
    factors, error, _ = jax.lax.fori_loop(0, 15, step, (start, start_error, jnp.asarray(1e-2, jnp.float32)))
    return factors, jnp.sqrt(error)
