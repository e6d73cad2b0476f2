"""The evidence bound of a diffusion decoder, in nats, and its gradient.

For any noise prediction ε̂ and any event of dimension d (Kingma et al. 2021, eq. 11 and 17):

    −log p(x | z) ≤ L_prior + L_diffusion + L_reconstruction
    L_prior          = KL( N(αx, σ²I) ‖ N(0, v I) )  at λmin,  v = `schedule.reference_variance()`
    L_diffusion      = ½ ∫ E‖ε − ε̂(x_λ, λ; z)‖² dλ   over [λmin, λmax]
    L_reconstruction = d/2 (log 2πe + log σ²/α²)     at λmax, for continuous x

Nothing here is averaged over pixels: every term is a sum over the event, so that it adds up with KL terms in nats.
Entries of x that are NaN, missing frames of sequences and missing pixels, count nothing (`denoiser.fill_missing`). Of
sequences, what is left bounds the density of what is seen, since frames are independent given z. Of single observations
it bounds −log p(x_seen | z) of the diffusion over what is seen alone: networks are given no value and no noise for the
rest, only which entries these are. So for every set of seen entries the bound is one of a proper density. Where the
networks are exact it is the marginal of p(x | z), and fitted ones are trained towards that; until they are there,
densities of different sets need not be the marginals of one. Where a denoiser takes nothing missing, NaN stays NaN.

Where log p(x | z) is known in closed form (`denoiser.log_prob`), L_diffusion is what makes the sum exact: less than the
integral by what the ends of the noise range cost, and without noise.

The guidance is itself a gradient, so training differentiates it once more. Reverse over reverse does so in six passes
through the encoder, the least there is: forward, back to x_λ, and through both of these back to the weights, twice the
price each.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from sami_ppl.decoders.guidance import given
from sami_ppl.diffusion.denoiser import AbstractDenoiser
from sami_ppl.diffusion.schedule import AbstractSchedule
from sami_ppl.encoders.encoder import AbstractEncoder


class Bound(NamedTuple):
    """Upper bound on −log p(x | z) in nats, by its three parts."""

    prior: Array
    diffusion: Array
    reconstruction: Array

    @property
    def total(self) -> Array:
        return self.prior + self.diffusion + self.reconstruction


def prior_loss(schedule: AbstractSchedule, x: Float[Array, "*event"]) -> Float[Array, ""]:
    """KL of x at λmin from the Gaussian that reverse diffusion starts from, in nats."""
    log_snr = jnp.asarray(schedule.log_snr_min, dtype=x.dtype)
    alpha, sigma, variance = schedule.alpha(log_snr), schedule.sigma(log_snr), schedule.reference_variance()
    ratio = sigma**2 / variance
    each = (alpha * x) ** 2 / variance + ratio - jnp.log(ratio) - 1
    return 0.5 * jnp.sum(jnp.where(jnp.isnan(x), 0, each))


def reconstruction_loss(schedule: AbstractSchedule, x: Float[Array, "*event"]) -> Float[Array, ""]:
    """−E log N(x; x_λ/α, σ²/α² I) at λmax, in nats: the entropy of what noise is left. λ = log α²/σ² by definition."""
    size = jnp.sum(~jnp.isnan(x), dtype=x.dtype)
    return 0.5 * size * jnp.asarray(jnp.log(2 * jnp.pi * jnp.e) - schedule.log_snr_max, x.dtype)


def noise_error(
    denoiser: AbstractDenoiser,
    encoder: AbstractEncoder | None,
    x: Float[Array, "*event"],
    z: Float[Array, " D"] | None,
    log_snr: Float[Array, ""],
    eps: Float[Array, "*event"],
) -> Float[Array, ""]:
    """‖ε − ε̂(x_λ, λ; z)‖² of one observation at one noise level.

    Without an encoder ε̂ is the denoiser's own; with one and no z it raises ValueError.
    """
    x, seen = denoiser.fill_missing(x)
    x_noisy = denoiser.schedule.add_noise(x, log_snr, eps)
    residual = eps - _at(denoiser, encoder, z)(x_noisy, log_snr)
    return jnp.sum(seen * residual**2)


def bound(
    denoiser: AbstractDenoiser,
    encoder: AbstractEncoder | None,
    x: Float[Array, "*event"],
    z: Float[Array, " D"] | None,
    log_snr: Float[Array, ""],
    weight: Float[Array, ""],
    eps: Float[Array, "*event"],
) -> Bound:
    """One-sample estimate of the bound on −log p(x | z), in nats; unbiased for λ, weight from `schedule.stratified`.

    Without an encoder the denoiser's own, on −log p(x); with one and no z it raises ValueError.
    """
    schedule = denoiser.schedule
    start, end = prior_loss(schedule, x), reconstruction_loss(schedule, x)
    if (exact := _at(denoiser, encoder, z).log_prob(x)) is not None:
        return Bound(start, -exact - start - end, end)
    error = noise_error(denoiser, encoder, x, z, log_snr, eps)
    return Bound(start, 0.5 * weight * error, end)


def _at(denoiser: AbstractDenoiser, encoder: AbstractEncoder | None, z: Float[Array, " D"] | None) -> AbstractDenoiser:
    if encoder is None:
        return denoiser
    if z is None:
        raise ValueError("z must be given with an encoder: the denoiser is that of p(x | z)")
    return given(denoiser, encoder, z)
