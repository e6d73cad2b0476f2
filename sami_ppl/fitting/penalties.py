"""Penalties: terms of the loss beside the bound, as functions of what a step has. `Stage(penalties={"tc": f})`.

    def f(draw: Draw) -> Array:
        return 5.0 * total_correlation(draw)

There are `total_correlation`, `consistency` and `prior_mmd`, for which a weight is enough, {"total_correlation": 5.0};
yours is a function as they are. They are added to the loss, in nats per observation, and logged apart: no bound and no
KL contains them.
"""

from collections.abc import Mapping
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


def consistency(draw: Draw) -> Float[Array, ""]:
    """−E log q(z | x_λ, λ) in nats, at noise levels spread over the whole range, z ~ q(z | x) taken as given.

    With the average q̄(z | x_λ) = E[q(z | x) | x_λ] over the observations that x_λ may come from, it is

        E KL(q̄(z | x_λ) ‖ q(z | x_λ, λ)) + E H[q̄(z | x_λ)],

    whose second term noisy posteriors do not enter. So at the optimum q(z | x_λ, λ) is the projection of q̄ onto their
    family, the one of least KL(q̄ ‖ q): q̄ itself where the family holds it, of Gaussians the one of its mean and
    variance. Then noisy posteriors are a martingale in λ, E[q(z | x_s) | x_t] = q(z | x_t) for s > t, as exact ones
    are; how far they are from it `diagnostics.consistency` says. Guidance alone asks for the right gradient, and may
    leave their width wrong. No gradient goes through z; but one network serves all noise levels, that of the guide too,
    and a large weight smooths the code away (on disks a weight of 10 did, of 1 did no harm).
    """
    encoder, schedule = draw.program.encoder, draw.program.encoder.schedule
    level_key, noise_key = jax.random.split(draw.key)
    x = jax.vmap(lambda x: draw.program.denoiser.fill_missing(x)[0])(draw.x)
    log_snr = schedule.stratified(level_key, len(x)).log_snr
    x_noisy = jax.vmap(schedule.add_noise)(x, log_snr, jax.random.normal(noise_key, x.shape, x.dtype))
    return -jnp.mean(jax.vmap(encoder.log_prob)(jax.lax.stop_gradient(draw.z), x_noisy, log_snr))


def prior_mmd(draw: Draw) -> Float[Array, ""]:
    """Squared maximum mean discrepancy of the codes of a batch from as many draws of the prior, unbiased.

    0 in the mean where the aggregate posterior is the prior, at most 2, so that weights of tens to thousands of nats
    matter beside a bound. The kernel is exp(−|u − v|² / 2D) for codes of D numbers. The aggregate posterior is asked
    to fill the prior, single posteriors are left as narrow as they are: with beta=0 the objective of InfoVAE (Zhao et
    al. 2017, arXiv:1706.02262) and InfoDiffusion.

    Raises ValueError for a batch of one.
    """
    batch, size = draw.z.shape
    if batch < 2:
        raise ValueError("prior_mmd compares the codes of a batch, got one observation: take a larger batch")
    other = draw.program.prior_codes(draw.key, batch)

    def kernel(u: Array, v: Array) -> Array:
        return jnp.exp(-jnp.sum((u[:, None] - v[None]) ** 2, -1) / (2 * size))

    def within(u: Array) -> Array:  # a code beside itself says nothing of the law
        return (jnp.sum(kernel(u, u)) - batch) / (batch * (batch - 1))

    return within(draw.z) + within(other) - 2 * jnp.mean(kernel(draw.z, other))


LIBRARY: Mapping[str, Penalty] = {
    "total_correlation": total_correlation, "consistency": consistency, "prior_mmd": prior_mmd,
}  # fmt: skip
"""Penalties for which a stage takes a weight."""


def weighed(name: str, penalty: float | Penalty) -> Penalty:
    """A penalty of the library times its weight; a function is one already."""
    if not isinstance(penalty, int | float):
        return penalty
    own = LIBRARY[name]
    return lambda draw: penalty * own(draw)


def check_penalties(penalties: Mapping[str, float | Penalty]) -> None:
    """Raise ValueError for a weight of what is no penalty of the library, or below 0."""
    for name, penalty in penalties.items():
        if not isinstance(penalty, int | float):
            continue
        if name not in LIBRARY or not penalty >= 0:
            raise ValueError(
                f"penalties={{{name!r}: {penalty}}}: a number is the weight, at least 0, of one of "
                f"{', '.join(LIBRARY)}; give another penalty as a function of a draw"
            )
