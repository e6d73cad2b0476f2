"""Colour images of one object in a room: six known factors, those of Shapes3D (Burgess & Kim 2018), drawn in JAX.

The object stands on the floor in the middle of the room, a camera looks at it from above and towards a corner of the
room, and turns about it by the azimuth; one distant lamp hangs in the room. A point with normal n has the colour

    c (.35 + .65 max(n · l, 0)) s      (c of floor, walls or object; s < 1 on the floor, where the object shades it)

where l is the direction to the lamp, and colours are a circle about grey: red, green and blue of a hue h are
½ + ½ cos(h − 2πk/3), k = 0, 1, 2. Rays are intersected in closed form, four to a pixel. An image is linear in the three
colours, so that it tells each hue exactly wherever it shows it.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key
import numpy as np
import xarray as xr

from sami_ppl._util.chunks import by_chunks
from sami_ppl._util.keys import check_key

SHAPES = ("cube", "cylinder", "sphere", "capsule")
SCALE, AZIMUTH = (0.7, 1.3), (-np.pi / 6, np.pi / 6)
"""Ranges of the factors, azimuth in radians."""
# Every shape is a box, a cylinder and two balls at the ends of its axis; those of no size are not seen. Columns: height
# of the centre, half the box's edge, radius of the cylinder, half its length, radius of the balls.
PARTS = np.array([[0.8, 0.8, 0, 0, 0], [0.9, 0, 0.8, 0.9, 0], [1, 0, 0, 0, 1], [1.15, 0, 0.6, 0.55, 0.6]], np.float32)
LAMP = np.array([-8, -20, 25], np.float32) / np.float32(33)
ROOM = 3.0
"""Distance of the walls from the middle."""
CAMERA, TARGET, VIEW = np.array([-6.0, 0.0, 3.6]), np.array([0.0, 0.0, 0.9]), 0.36
"""Where the camera is, where it looks, and the tangent of half the angle that it sees."""


@partial(jax.jit, static_argnames="resolution")
def render_scenes(
    floor_hue: ArrayLike,
    wall_hue: ArrayLike,
    object_hue: ArrayLike,
    scale: ArrayLike,
    shape: ArrayLike,
    azimuth: ArrayLike,
    *,
    resolution: int = 64,
) -> Float[Array, "*batch 3 {resolution} {resolution}"]:
    """Draw scenes, one per element of the broadcast factors, in [−1, 1].

    Hues and azimuth are in radians; `shape` counts `SHAPES` from 0; an object of scale 1 is about 2 high, where the
    walls are 3 from the middle of the room.
    """
    factors = jnp.broadcast_arrays(floor_hue, wall_hue, object_hue, scale, shape, azimuth)
    *hues, scale, _, azimuth = (factor.astype(jnp.float32) for factor in factors)
    third = 2 * np.pi / 3 * np.arange(3, dtype=np.float32)
    colours = 0.5 + 0.5 * jnp.cos(jnp.subtract.outer(jnp.stack(hues, -1), third))
    light = jnp.vectorize(partial(_light, resolution=resolution), signature="(),(),()->(k,r,c)")(
        scale, factors[4], azimuth
    )
    return 2 * jnp.einsum("...kp,...krc->...prc", colours, light) - 1


def scenes(key: Key[Array, ""], n: int, *, resolution: int = 64) -> xr.Dataset:
    """Draw images of independent uniform factors.

    Returns x (obs, channel, row, column), `resolution` pixels a side, and the factors on obs: `floor_hue`,
    `wall_hue` and `object_hue` in [−π, π), with `attrs["period"]` = 2π; `scale` in [0.7, 1.3]; `shape`, 0 to 3
    for cube, cylinder, sphere, capsule; `azimuth` of the camera in [−π/6, π/6]. Raises ValueError where an argument is
    out of range.
    """
    check_key(key)
    if n < 1:
        raise ValueError(f"n must be at least 1 image, got {n}")
    if resolution < 2:
        raise ValueError(f"resolution must be at least 2 pixels, got {resolution}")
    hue_key, scale_key, shape_key, azimuth_key = jax.random.split(key, 4)
    hues = jax.random.uniform(hue_key, (3, n), jnp.float32, -np.pi, np.pi)
    scale = jax.random.uniform(scale_key, (n,), jnp.float32, *SCALE)
    shape = jax.random.randint(shape_key, (n,), 0, len(SHAPES), jnp.int32)
    azimuth = jax.random.uniform(azimuth_key, (n,), jnp.float32, *AZIMUTH)
    factors = [np.asarray(f) for f in (*hues, scale, shape, azimuth)]
    x = by_chunks(partial(render_scenes, resolution=resolution), max(1, 2**18 // resolution**2), *factors)
    angle = {"units": "radians"}
    names = ("floor_hue", "wall_hue", "object_hue", "scale", "shape", "azimuth")
    attrs = (*[angle | {"period": 2 * np.pi}] * 3, {}, {}, angle)
    known = {name: ("obs", *pair) for name, *pair in zip(names, factors, attrs, strict=True)}
    return xr.Dataset({"x": (("obs", "channel", "row", "column"), x), **known})


def _light(scale: Array, shape: Array, azimuth: Array, *, resolution: int) -> Float[Array, "3 resolution resolution"]:
    """How much of the colours of floor, walls and object each pixel has."""
    # In the room's own frame: walls are where x or y is ±ROOM, and the camera turns.
    turn = azimuth + np.float32(np.pi / 4)
    cos, sin = jnp.cos(turn), jnp.sin(turn)
    eye, rays = (
        (v[0] * cos - v[1] * sin, v[0] * sin + v[1] * cos, v[2]) for v in (CAMERA.astype(np.float32), _rays(resolution))
    )
    height, edge, radius, length, ball = scale * jnp.asarray(PARTS)[shape]
    middle = (eye[0], eye[1], eye[2] - height)

    # Lambert's cosine on the sides that a ray meets of anything with the room's axes: they face the ray.
    facing = [-jnp.sign(ray) * lamp for ray, lamp in zip(rays, LAMP, strict=True)]
    walls = [(jnp.sign(ray) * ROOM - at) / ray for ray, at in zip(rays[:2], eye[:2], strict=True)]
    floor = jnp.where(rays[2] < 0, -eye[2] / rays[2], jnp.inf)
    on_floor = floor < jnp.minimum(*walls)
    from_middle = (eye[0] + floor * rays[0]) ** 2 + (eye[1] + floor * rays[1]) ** 2
    shade = jnp.where(on_floor, 1 - 0.6 * jnp.exp(-from_middle / (0.9 * scale) ** 2), 1.0)
    room = shade * _lit(jnp.where(on_floor, facing[2], jnp.where(walls[0] < walls[1], facing[0], facing[1])))

    parts = [_box(middle, rays, edge, facing), _cylinder(middle, rays, radius, length, facing[2])]
    parts += [_ball((*middle[:2], middle[2] + end), rays, ball) for end in (length, -length)]
    distance, cosine = parts[0]
    for other, its in parts[1:]:
        distance, cosine = jnp.minimum(distance, other), jnp.where(other < distance, its, cosine)
    seen = distance < jnp.inf
    shares = jnp.stack([
        jnp.where(seen | ~on_floor, 0, room), jnp.where(seen | on_floor, 0, room), jnp.where(seen, _lit(cosine), 0),
    ])  # fmt: skip
    return shares.reshape(3, resolution, 2, resolution, 2).mean((2, 4))


def _rays(resolution: int) -> np.ndarray:
    """Unit vectors (3, 2 resolution, 2 resolution) from the camera, two to a pixel's side; it looks along x."""
    ahead = (TARGET - CAMERA) / np.linalg.norm(TARGET - CAMERA)
    right = np.array([0.0, -1.0, 0.0])
    down = np.cross(ahead, right)
    at = VIEW * ((np.arange(2 * resolution) + 0.5) / resolution - 1)
    rays = ahead[:, None, None] + right[:, None, None] * at + down[:, None, None] * at[:, None]
    return (rays / np.linalg.norm(rays, axis=0)).astype(np.float32)


def _lit(cosine: Array) -> Array:
    return 0.35 + 0.65 * jnp.maximum(cosine, 0)


def _slab(at: Array, ray: Array, half: Array) -> tuple[Array, Array]:
    """Where rays enter and leave the space between two planes."""
    return (-jnp.sign(ray) * half - at) / ray, (jnp.sign(ray) * half - at) / ray


def _box(at: tuple[Array, ...], rays: tuple[Array, ...], half: Array, facing: list[Array]) -> tuple[Array, Array]:
    """Distances of a cube, infinite where a ray misses it, and cosines of normal and lamp; so do those below."""
    (x, y, z), leave = zip(*(_slab(p, ray, half) for p, ray in zip(at, rays, strict=True)), strict=True)
    enter = jnp.maximum(jnp.maximum(x, y), z)
    cosine = jnp.where(enter == z, facing[2], jnp.where(enter == x, facing[0], facing[1]))
    return jnp.where(enter < jnp.minimum(jnp.minimum(*leave[:2]), leave[2]), enter, jnp.inf), cosine


def _cylinder(
    at: tuple[Array, ...], rays: tuple[Array, ...], radius: Array, length: Array, facing: Array
) -> tuple[Array, Array]:
    square = rays[0] ** 2 + rays[1] ** 2
    nearest = -(at[0] * rays[0] + at[1] * rays[1])
    root = nearest**2 - square * (at[0] ** 2 + at[1] ** 2 - radius**2)
    chord = jnp.sqrt(jnp.maximum(root, 0))
    enter, leave = (nearest - chord) / square, (nearest + chord) / square
    top, bottom = _slab(at[2], rays[2], length)
    first = jnp.maximum(enter, top)
    normal = [(at[i] + first * rays[i]) / radius for i in range(2)]
    cosine = jnp.where(top > enter, facing, normal[0] * LAMP[0] + normal[1] * LAMP[1])
    met = (radius > 0) & (root > 0) & (first < jnp.minimum(leave, bottom))
    return jnp.where(met, first, jnp.inf), cosine


def _ball(at: tuple[Array, ...], rays: tuple[Array, ...], radius: Array) -> tuple[Array, Array]:
    nearest = -(at[0] * rays[0] + at[1] * rays[1] + at[2] * rays[2])
    root = nearest**2 - (at[0] ** 2 + at[1] ** 2 + at[2] ** 2 - radius**2)
    first = nearest - jnp.sqrt(jnp.maximum(root, 0))
    normal = [(p + first * ray) / radius for p, ray in zip(at, rays, strict=True)]
    cosine = normal[0] * LAMP[0] + normal[1] * LAMP[1] + normal[2] * LAMP[2]
    return jnp.where((radius > 0) & (root > 0), first, jnp.inf), cosine
