"""Bijections that flowjax lacks. Importing this module needs flowjax."""

from flowjax.bijections import AbstractBijection
import jax.numpy as jnp
from jaxtyping import Array

STRETCH = 2.0
"""Bound of the log scale of one layer: a single one cannot make a density stiff, and a few reach any width."""


class BoundedAffine(AbstractBijection):
    """Shift and scale of a number, the log scale between −2 and 2; flowjax's own has no upper bound."""

    loc: Array
    raw: Array
    shape = ()
    cond_shape = None

    def __init__(self):
        self.loc, self.raw = jnp.zeros(()), jnp.zeros(())

    def log_scale(self) -> Array:
        """The bounded log scale."""
        return STRETCH * jnp.tanh(self.raw / STRETCH)

    def transform_and_log_det(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        return x * jnp.exp(self.log_scale()) + self.loc, self.log_scale()

    def inverse_and_log_det(self, y: Array, condition: Array | None = None) -> tuple[Array, Array]:
        return (y - self.loc) * jnp.exp(-self.log_scale()), -self.log_scale()


class Roll(AbstractBijection):
    """Coordinates moved round by a fixed number of places.

    flowjax's permutations are arrays that it checks as it makes them, which fails where a program is loaded.
    """

    shape: tuple[int, ...]
    by: int
    cond_shape = None

    def __init__(self, size: int, by: int):
        self.shape, self.by = (size,), by

    def transform_and_log_det(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        return jnp.roll(x, self.by), jnp.zeros((), x.dtype)

    def inverse_and_log_det(self, y: Array, condition: Array | None = None) -> tuple[Array, Array]:
        return jnp.roll(y, -self.by), jnp.zeros((), y.dtype)
