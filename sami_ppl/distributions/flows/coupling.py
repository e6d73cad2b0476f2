"""Coupling flows that start as N(0, I), made of flowjax's parts."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from sami_ppl._util.keys import check_key


def coupling_flow(
    size: int,
    *,
    condition: int | None = None,
    layers: int = 8,
    width: int = 32,
    key: Key[Array, ""],
) -> Any:
    """A flow over `size` coordinates that starts as N(0, I), given a vector of `condition` numbers if asked for.

    Affine coupling layers with permutations between them (Dinh, Sohl-Dickstein & Bengio 2017); densities and draws
    cost one pass each. All is smooth, since guidance differentiates log q: the score of a spline flow jumps at its
    knots, which biases the derivatives of reparametrised draws. The flow is a flowjax distribution and an Equinox
    module. Raises ImportError without flowjax, and ValueError for one coordinate, which has none to be coupled to.
    """
    check_key(key)
    for name, value in (("layers", layers), ("width", width)):
        if value < 1:
            raise ValueError(f"{name} must be positive, got {value}")
    if size < 2:
        raise ValueError(
            f"a coupling flow needs two coordinates or more, got {size}: of one it can only make a Gaussian"
        )
    try:
        from flowjax.bijections import Chain, Coupling, Invert, Scan
        from flowjax.distributions import StandardNormal, Transformed

        from sami_ppl.distributions.flows.bijections import BoundedAffine, Roll
    except ImportError as error:
        raise ImportError("coupling_flow needs flowjax: pip install 'sami_ppl[flows]'") from error

    # Near half of the way round, and prime to the size, so that every pair is apart in some layer.
    by = next(step for step in range((size + 1) // 2, 0, -1) if math.gcd(step, size) == 1)
    transformer = BoundedAffine()

    def layer(key: Array) -> Any:
        coupling = Coupling(
            key, transformer=transformer, untransformed_dim=size // 2, dim=size, cond_dim=condition, nn_width=width,
            nn_depth=1, nn_activation=jax.nn.silu,
        )  # fmt: skip
        coupling = eqx.tree_at(lambda one: one.conditioner, coupling, _ending_at_zero(coupling.conditioner))
        return Chain([coupling, Roll(size, by)])

    each = eqx.filter_vmap(layer)(jax.random.split(key, layers))
    return Transformed(StandardNormal((size,)), Invert(Scan(each)))


def _ending_at_zero(mlp: eqx.nn.MLP) -> eqx.nn.MLP:
    """A conditioner with its last layer at zero, where the transformers are the identity."""
    return eqx.tree_at(lambda mlp: mlp.layers[-1], mlp, jax.tree.map(jnp.zeros_like, mlp.layers[-1]))
