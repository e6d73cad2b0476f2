"""Convolutions over three places a side, along one side of signals, two of images, three of volumes, and their norm.

Feature maps are channels-last. On CPUs XLA's gradients of convolutions are fast in a function by itself and ten times
slower inside any compiled loop (jax-ml/jax#12868): there they are written as matrix products over neighbourhoods,
unless `outside_loops(network)` says that there is none, as the training step does.
"""

from collections.abc import Callable
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

Maps = Float[Array, "*sides c"]
Convolved = Float[Array, "*sides c_out"]
Weight = Float[Array, "neighbours c_out"]


def outside_loops[T](networks: T) -> T:
    """The networks for a function that no compiled loop contains: their convolutions take XLA's own form.

    A network's form is no parameter: weights of either fit the other.
    """
    return jax.tree.map(lambda leaf: convolution if leaf is convolution_anywhere else leaf, networks)


class Conv(eqx.Module):
    """Convolution over three places along each of `dims` sides, zeros beyond: (*sides, c_in) → (*sides, c_out).

    `form`: a function of map and weight.
    """

    weight: Weight
    bias: Float[Array, " c_out"]
    form: Callable[[Array, Array], Array]

    def __init__(self, c_in: int, c_out: int, dims: int = 2, *, key: Key[Array, ""]):
        rows = 3**dims * c_in
        self.weight = jax.random.uniform(key, (rows, c_out), minval=-(rows**-0.5), maxval=rows**-0.5)
        self.bias, self.form = jnp.zeros(c_out), convolution_anywhere

    def __call__(self, h: Maps) -> Convolved:
        return self.form(h, self.weight) + self.bias


def convolution_anywhere(h: Maps, weight: Weight) -> Convolved:
    """The form that is fast inside compiled loops too."""
    return (_convolution_in_loops if jax.default_backend() == "cpu" else convolution)(h, weight)


def convolution(h: Maps, weight: Weight) -> Convolved:
    """XLA's own form."""
    dtype, sides = jnp.result_type(h, weight), "DHW"[4 - h.ndim :]  # of the type that a matrix product has
    kernel = weight.reshape(*(3,) * len(sides), h.shape[-1], -1).astype(dtype)
    names = (f"N{sides}C", f"{sides}IO", f"N{sides}C")
    strides = (1,) * len(sides)
    return jax.lax.conv_general_dilated(h[None].astype(dtype), kernel, strides, "SAME", dimension_numbers=names)[0]


@jax.custom_jvp
def _convolution_in_loops(h: Maps, weight: Weight) -> Convolved:
    return convolution(h, weight)


@_convolution_in_loops.defjvp
def _as_matrix_products(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    def product(h: Array, weight: Array) -> Array:
        sides = h.shape[:-1]
        padded = jnp.pad(h, ((1, 1),) * len(sides) + ((0, 0),))
        neighbours = [
            padded[tuple(slice(i, i + side) for i, side in zip(first, sides, strict=True))]
            for first in itertools.product(range(3), repeat=len(sides))
        ]
        return jnp.concatenate(neighbours, axis=-1) @ weight

    (h, weight), (h_dot, weight_dot) = primals, tangents
    return _convolution_in_loops(h, weight), product(h_dot, weight) + product(h, weight_dot)


class GroupNorm(eqx.Module):
    """Group normalisation of a channels-last map (Wu & He 2018), by default up to 8 groups."""

    gain: Float[Array, " c"]
    bias: Float[Array, " c"]
    groups: int = eqx.field(static=True)
    eps: float = eqx.field(static=True)

    def __init__(self, channels: int, groups: int | None = None, eps: float = 1e-5):
        self.groups = groups or next(g for g in range(min(8, channels), 0, -1) if channels % g == 0)
        self.eps = eps
        self.gain, self.bias = jnp.ones(channels), jnp.zeros(channels)

    def __call__(self, h: Maps) -> Maps:
        grouped = h.reshape(-1, self.groups, h.shape[-1] // self.groups)
        mean = grouped.mean((0, 2), keepdims=True)
        centred = grouped - mean
        scaled = centred * jax.lax.rsqrt((centred**2).mean((0, 2), keepdims=True) + self.eps)
        return scaled.reshape(h.shape) * self.gain + self.bias


def pool(h: Maps) -> Float[Array, "*halves c"]:
    """Means over two places along every side."""
    *sides, channels = h.shape
    halved = h.reshape(*(n for side in sides for n in (side // 2, 2)), channels)
    return halved.mean(tuple(range(1, 2 * len(sides), 2)))


def upsample(h: Maps) -> Float[Array, "*doubles c"]:
    """Every place twice along every side."""
    for axis in range(h.ndim - 1):
        h = jnp.repeat(h, 2, axis=axis)
    return h
