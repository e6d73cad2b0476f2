"""A ball under one distant lamp: the direction of the light is a point on the sphere.

With n the normal of the ball at a pixel and l the direction to the lamp, unit vectors,

    x_ij = −1 + 2 c_ij ((1 + n_ij · l) / 2)²      (c the anti-aliased disk)

so that, unlike Lambert's law, the image tells all directions apart, those behind the ball too.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpy as np
import xarray as xr

from sami_ppl._util.keys import check_key

AXES = ("light_x", "light_y", "light_z")
RADIUS = 0.45


def render_balls(
    light: Float[Array | np.ndarray, "*batch 3"], *, resolution: int = 16
) -> Float[Array, "*batch 1 {resolution} {resolution}"]:
    """Draw balls lit from the unit vectors `light`: to the right, down, and towards the viewer."""
    pixel = ((jnp.arange(resolution, dtype=jnp.float32) + 0.5) / resolution - 0.5) / RADIUS
    column, row = jnp.broadcast_arrays(pixel, pixel[:, None])
    height = jnp.sqrt(jnp.maximum(1 - column**2 - row**2, 0))
    normal = jnp.stack([column, row, height])
    normal = normal / jnp.linalg.norm(normal, axis=0)
    coverage = jnp.clip(0.5 + (1 - jnp.sqrt(column**2 + row**2)) * RADIUS * resolution, 0, 1)
    shade = ((1 + jnp.einsum("...k,krc->...rc", jnp.asarray(light, jnp.float32), normal)) / 2) ** 2
    return (-1 + 2 * coverage * shade)[..., None, :, :]


def lit_balls(key: Key[Array, ""], n: int, *, resolution: int = 16) -> xr.Dataset:
    """Draw n images, the direction of the light uniform on the sphere.

    Returns x (obs, channel, row, column) and the components of the direction, `light_x`, `light_y`, `light_z` (obs).
    Raises ValueError where an argument is out of range.
    """
    check_key(key)
    if n < 1:
        raise ValueError(f"n must be at least 1 image, got {n}")
    if resolution < 2:
        raise ValueError(f"resolution must be at least 2 pixels, got {resolution}")
    light = jax.random.normal(key, (n, 3))
    light = np.asarray(light / jnp.linalg.norm(light, axis=1, keepdims=True))
    x = np.asarray(render_balls(light, resolution=resolution))
    factors = {name: ("obs", light[:, j]) for j, name in enumerate(AXES)}
    return xr.Dataset({"x": (("obs", "channel", "row", "column"), x), **factors})
