"""A bar on a ramp of light: two factors that go round, independently, a torus.

The bar, of period π, is that of `bars`; the ramp grows from one side of the image to the other, in a direction φ of
period 2π. At a pixel centre (column, row), from the middle of the image and in units of its side,

    background = −½ + 0.7 (column cos φ + row sin φ)
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key
import numpy as np
import xarray as xr

from sami_ppl._util.keys import check_key
from sami_ppl.data.bars import render_bars

SLOPE = 0.7


def render_ramps(
    bar: ArrayLike, ramp: ArrayLike, *, resolution: int = 16
) -> Float[Array, "*batch 1 {resolution} {resolution}"]:
    """Draw bars on ramps, one per element of the broadcast angles, in radians from the row's direction."""
    bar, ramp = (jnp.asarray(angle, jnp.float32) for angle in jnp.broadcast_arrays(bar, ramp))
    pixel = (jnp.arange(resolution, dtype=jnp.float32) + 0.5) / resolution - 0.5
    column, row, phi = pixel, pixel[:, None], ramp[..., None, None, None]
    light = -0.5 + SLOPE * (column * jnp.cos(phi) + row * jnp.sin(phi))
    coverage = (render_bars(bar, -1.0, resolution=resolution) + 1) / 2
    return light + (1 - light) * coverage


def ramps(key: Key[Array, ""], n: int, *, resolution: int = 16) -> xr.Dataset:
    """Draw n images, both angles uniform and independent.

    Returns x (obs, channel, row, column) and the factors `bar` in [−π/2, π/2) and `ramp` in [−π, π) (obs), radians,
    with `attrs["period"]` = π and 2π. Raises ValueError where an argument is out of range.
    """
    check_key(key)
    if n < 1:
        raise ValueError(f"n must be at least 1 image, got {n}")
    if resolution < 2:
        raise ValueError(f"resolution must be at least 2 pixels, got {resolution}")
    bar_key, ramp_key = jax.random.split(key)
    bar = jax.random.uniform(bar_key, (n,), minval=-jnp.pi / 2, maxval=jnp.pi / 2)
    ramp = jax.random.uniform(ramp_key, (n,), minval=-jnp.pi, maxval=jnp.pi)
    return xr.Dataset(
        {
            "x": (("obs", "channel", "row", "column"), np.asarray(render_ramps(bar, ramp, resolution=resolution))),
            "bar": ("obs", np.asarray(bar), {"units": "radians", "period": float(np.pi)}),
            "ramp": ("obs", np.asarray(ramp), {"units": "radians", "period": float(2 * np.pi)}),
        }
    )
