"""Networks of observations in which something is missing."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float


class Masked(eqx.Module):
    """A network that takes observations whose missing entries are NaN: they are 0 to it, the mean of what it is given.

    `told`: whether further channels, as many as the observation has, say what is seen (1) and what is missing (0);
    the network must then take twice as many. No gradient goes to what is missing.
    """

    network: Callable
    told: bool = eqx.field(static=True)

    def __init__(self, network: Callable, *, told: bool = True):
        self.network, self.told = network, told

    def __call__(self, x: Float[Array, "c *sides"], log_snr: Float[Array, ""] | None, *code: Array) -> Array:
        """The network's output for one observation and noise level, and a code where it takes one."""
        seen = ~jnp.isnan(x)
        filled = jnp.where(seen, x, 0)
        return self.network(jnp.concatenate([filled, seen.astype(x.dtype)]) if self.told else filled, log_snr, *code)


def unmasked(network: Any) -> Any:
    """The network within a `Masked` one; another as it is."""
    return network.network if isinstance(network, Masked) else network
