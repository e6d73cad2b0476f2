"""Images of one bar through the centre at some angle: a factor that goes round.

A bar looks the same after half a turn, so its angle is a point on a circle: no code on a line can follow it without a
tear. With d the distance of a pixel centre to the bar's axis (a segment of `length`), on a background g,

    x_ij = g + (1 − g) c_ij,      c_ij = clip(½ + r (width/2 − d_ij), 0, 1),

anti-aliased over one pixel as disks are.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key
import numpy as np
import xarray as xr

from sami_ppl._util.keys import check_key


def render_bars(
    angle: ArrayLike, background: ArrayLike, *, resolution: int = 16, length: float = 0.7, width: float = 0.15
) -> Float[Array, "*batch 1 {resolution} {resolution}"]:
    """Draw bars, one per element of the broadcast factors. `angle` in radians from the row's direction, period π."""
    theta, g = (
        jnp.asarray(factor, jnp.float32)[..., None, None, None] for factor in jnp.broadcast_arrays(angle, background)
    )
    pixel = (jnp.arange(resolution, dtype=jnp.float32) + 0.5) / resolution - 0.5
    column, row = pixel, pixel[:, None]
    along = column * jnp.cos(theta) + row * jnp.sin(theta)
    across = -column * jnp.sin(theta) + row * jnp.cos(theta)
    beyond = jnp.maximum(jnp.abs(along) - length / 2, 0.0)
    distance = jnp.sqrt(jnp.maximum(across**2 + beyond**2, 1e-12))
    coverage = jnp.clip(0.5 + (width / 2 - distance) * resolution, 0.0, 1.0)
    return g + (1 - g) * coverage


def bars(
    key: Key[Array, ""],
    n: int,
    *,
    resolution: int = 16,
    length: float = 0.7,
    width: float = 0.15,
    background: tuple[float, float] = (-1.0, 0.0),
) -> xr.Dataset:
    """Draw n images with uniform angle and background.

    `length` and `width` are shares of the image's side. Returns x (obs, channel, row, column) and the factors `angle`
    (obs) in [−π/2, π/2), with `attrs["period"]` = π, and `background`. Raises ValueError where an argument is out of
    range.
    """
    check_key(key)
    if n < 1:
        raise ValueError(f"n must be at least 1 image, got {n}")
    if resolution < 2:
        raise ValueError(f"resolution must be at least 2 pixels, got {resolution}")
    if not 0 < width < length <= 1:
        raise ValueError(f"length and width must be 0 < width < length <= 1 image sides, got {length} and {width}")
    if not -1 <= background[0] <= background[1] <= 1:
        raise ValueError(f"background must be a range (low, high) within [-1, 1], got {background}")
    angle_key, background_key = jax.random.split(key)
    angle = jax.random.uniform(angle_key, (n,), minval=-jnp.pi / 2, maxval=jnp.pi / 2)
    light = jax.random.uniform(background_key, (n,), minval=background[0], maxval=background[1])
    x = render_bars(angle, light, resolution=resolution, length=length, width=width)
    return xr.Dataset(
        {
            "x": (("obs", "channel", "row", "column"), np.asarray(x)),
            "angle": ("obs", np.asarray(angle), {"units": "radians", "period": float(np.pi)}),
            "background": ("obs", np.asarray(light)),
        },
        attrs={"length": length, "width": width},
    )
