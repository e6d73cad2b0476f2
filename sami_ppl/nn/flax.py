"""Flax NNX modules as networks."""

from typing import Any

import equinox as eqx
from flax import nnx
from jaxtyping import Array, Float


class FlaxNetwork(eqx.Module):
    """A Flax NNX module called as `module(x, log_snr)`, usable wherever a network of ours is.

    Its arrays become leaves of this Equinox module, so they are trained, saved and frozen like any others. Modules
    with state that changes during a call (batch normalisation, dropout) are refused: a bound on which the state of
    the other observations of a batch acts is no bound on each of them.
    """

    params: Any
    graph: Any = eqx.field(static=True)

    def __init__(self, module: nnx.Module):
        graph, params, rest = nnx.split(module, nnx.Param, ...)
        if nnx.to_flat_state(rest):
            names = ", ".join(".".join(map(str, path)) for path, _ in nnx.to_flat_state(rest))
            raise ValueError(
                f"the Flax module {type(module).__name__} holds variables other than nnx.Param ({names}): "
                "use LayerNorm or GroupNorm in place of BatchNorm, and no Dropout"
            )
        self.graph, self.params = graph, nnx.to_pure_dict(params)

    def __call__(self, x: Float[Array, "*event"], log_snr: Float[Array, ""] | None) -> Array:
        return nnx.merge(self.graph, self.params)(x, log_snr)
