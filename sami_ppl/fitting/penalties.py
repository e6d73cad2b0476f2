"""Penalties: terms of the loss beside the bound, as functions of what a step has. `Stage(penalties={"tc": f})`.

    def f(draw: Draw) -> Array:
        return 5.0 * total_correlation(draw)

They are added to the loss, in nats per observation, and logged apart: no bound and no KL contains them.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from sami_ppl.priors.read import Given
from sami_ppl.program.program import Program


class Draw(NamedTuple):
    """What a penalty sees: the observations of a batch and one draw of their codes from the guide.

    `x` (obs, *event), and `given`, the variables that the prior takes. `z` (obs, D): the codes; gradients go through
    them to the encoder. `program`: with the weights of this step; `program.code_law(x, given)` is the law of
    the codes, `program.denoiser` and `program.encoder` the networks. `model`, `guide`: NumPyro's traces at the draw, by
    site, each with its distribution "fn" and its "value". `total`: observations that the fit has, of which the batch is
    a part. `key`: randomness of the penalty's own.
    """

    x: Float[Array, "obs *event"]
    given: Given
    z: Float[Array, "obs D"]
    program: Program
    model: dict[str, Any]
    guide: dict[str, Any]
    total: int
    key: Key[Array, ""]


@runtime_checkable
class Penalty(Protocol):
    """A pure function of a `Draw`: one number in nats per observation, which is added to the loss."""

    def __call__(self, draw: Draw, /) -> Float[Array, ""]: ...


def total_correlation(draw: Draw) -> Float[Array, ""]:
    """KL of the aggregate posterior q(z) from the product of its marginals, in nats: do its axes depend on each other?

    From one batch, where q(z) = Σ_n q(z | x_n) / N is estimated at each draw: its own observation stands for itself,
    weight 1/N, the others of the batch share the rest (the weighting of Chen et al. 2018, *Isolating Sources of
    Disentanglement*, arXiv:1802.04942, app. C; unbiased for q(z), so consistent for its logarithm as batches grow).
    Raises ValueError for posteriors that are not diagonal Gaussians, and for a batch of one.
    """
    q = draw.program.code_law(draw.x, draw.given)
    loc, scale, batch = q.mean, jnp.sqrt(q.variance), len(draw.x)
    if not q.diagonal or batch < 2:
        raise ValueError(
            f"total_correlation needs diagonal Gaussian posteriors and at least 2 observations in a batch, got a "
            f"{type(q).__name__} and {batch}: take a diagonal encoder, or a larger batch"
        )
    others = (draw.total - 1) / (draw.total * (batch - 1))
    weight = jnp.log(jnp.where(jnp.eye(batch, dtype=bool), 1 / draw.total, others))
    log_q = jax.scipy.stats.norm.logpdf(draw.z[:, None], loc[None], scale[None])  # of z_i under x_j, by axis
    joint = jax.nn.logsumexp(weight + log_q.sum(-1), axis=1)
    marginals = jax.nn.logsumexp(weight[..., None] + log_q, axis=1)
    return jnp.mean(joint - marginals.sum(-1))
