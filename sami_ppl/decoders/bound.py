"""The evidence bound of a diffusion decoder, in nats, and its gradient.

For any noise prediction ε̂ and any event of dimension d (Kingma et al. 2021, eq. 11 and 17):

    −log p(x | z) ≤ L_prior + L_diffusion + L_reconstruction
    L_prior          = KL( N(αx, σ²I) ‖ N(0, v I) )  at λmin,  v = `schedule.reference_variance()`
    L_diffusion      = ½ ∫ E‖ε − ε̂(x_λ, λ; z)‖² dλ   over [λmin, λmax]
    L_reconstruction = d/2 (log 2πe + log σ²/α²)     at λmax, for continuous x

Nothing here is averaged over pixels: every term is a sum over the event, so that it adds up with KL terms in nats.
Entries of x that are NaN, missing frames of sequences, count nothing (`denoiser.fill_missing`): what is left bounds the
density of what is seen, since frames are independent given z. For other observations NaN stays NaN.

The guidance is itself a gradient, so training differentiates it once more. Reverse over reverse does so in six passes
through the encoder, the least there is: forward, back to x_λ, and through both of these back to the weights, twice the
price each. The other form has seven. With r = ε − ε_θ + σ g and v = stop_gradient(r),

    d‖r‖²/dθ = −2 J_θᵀ v,         d‖r‖²/dφ = 2σ ∂_φ [ d/ds log q_φ(z_φ | x_λ + s v) ]_{s=0},

a forward-mode derivative of a scalar and one reverse pass through it: here it is the independent implementation.
"""

from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sami_ppl.decoders.guidance import guidance
from sami_ppl.diffusion.denoiser import AbstractDenoiser
from sami_ppl.diffusion.schedule import AbstractSchedule
from sami_ppl.encoders.encoder import AbstractEncoder

DenoiserLoss = Literal["guided", "own", "none"]


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
    *,
    denoiser_loss: DenoiserLoss = "guided",
    reverse_over_forward: bool = False,
) -> Float[Array, ""]:
    """‖ε − ε̂(x_λ, λ; z)‖² of one observation at one noise level, with the gradient asked for.

    Without an encoder ε̂ is the denoiser's own; with one and no z it raises ValueError. `denoiser_loss` says what trains
    the denoiser: `"guided"`, this very error (joint training); `"own"`, its error without guidance, ‖ε − ε_θ‖² (its
    value is not returned, its gradient is); `"none"`, nothing. `reverse_over_forward` differentiates the guidance by
    the module's other form, which tests and benchmarks compare.
    """
    schedule = denoiser.schedule
    sigma = schedule.sigma(log_snr)
    x, seen = denoiser.fill_missing(x)
    x_noisy = schedule.add_noise(x, log_snr, eps)
    eps_theta = denoiser(x_noisy, log_snr)
    if denoiser_loss == "none":
        eps_theta = jax.lax.stop_gradient(eps_theta)
    if encoder is None:
        return jnp.sum(seen * (eps - eps_theta) ** 2)
    if z is None:
        raise ValueError("z must be given with an encoder: guidance is the gradient of log q(z | x_λ, λ)")
    own = seen * jax.lax.stop_gradient(eps - eps_theta)

    if not reverse_over_forward:
        trained = eps_theta if denoiser_loss == "guided" else jax.lax.stop_gradient(eps_theta)
        guided = jnp.sum(seen * (eps - trained + sigma * guidance(encoder, z, x_noisy, log_snr)) ** 2)
        return guided + (_gradient_only(-2 * jnp.sum(own * eps_theta)) if denoiser_loss == "own" else 0.0)

    frozen_encoder, frozen_z = jax.lax.stop_gradient((encoder, z))
    residual = own + seen * sigma * jax.lax.stop_gradient(guidance(frozen_encoder, frozen_z, x_noisy, log_snr))
    _, slope = jax.jvp(lambda at: encoder.log_prob(z, at, log_snr), (x_noisy,), (residual,))
    surrogate = 2 * sigma * slope - 2 * jnp.sum((own if denoiser_loss == "own" else residual) * eps_theta)
    return jnp.sum(residual**2) + _gradient_only(surrogate)


def own_noise(
    denoiser: AbstractDenoiser,
    x: Float[Array, "obs *event"],
    log_snr: Float[Array, " obs"],
    weight: Float[Array, " obs"],
    eps: Float[Array, "obs *event"],
) -> tuple[Float[Array, "obs *event"], Float[Array, "obs *event"], Float[Array, ""]]:
    """ε_θ of a batch without gradient, ε, and a zero whose gradient is that of Σ ½ weight ‖ε − ε_θ‖² in the denoiser.

    What `denoiser_loss="own"` needs of the denoiser, all at once: its gradient does not wait for the guidance, so it is
    taken right after its forward pass, and what backpropagation keeps is freed before the encoder starts. For that, the
    encoder must take its noise from the ε returned here, which is the one given, but not before the gradient is there.
    """
    params, static = eqx.partition(denoiser, eqx.is_inexact_array)
    x, seen = jax.vmap(denoiser.fill_missing)(x)
    x_noisy = jax.vmap(denoiser.schedule.add_noise)(x, log_snr, eps)

    def forward(params: Any, x_noisy: Array, log_snr: Array) -> Array:
        return jax.vmap(eqx.combine(params, static))(x_noisy, log_snr)

    @jax.custom_vjp
    def both(params: Any, x_noisy: Array, log_snr: Array, pull: Array, eps: Array) -> tuple[Array, Array, Array]:
        return forward(params, x_noisy, log_snr), eps, jnp.zeros((), x_noisy.dtype)

    def ahead(params: Any, x_noisy: Array, log_snr: Array, pull: Array, eps: Array) -> tuple[tuple, Any]:
        found, backward = jax.vjp(lambda params: forward(params, x_noisy, log_snr), params)
        (gradient,) = backward(pull * (found - eps))
        # Without the barrier the compiler starts the encoder first, and holds both.
        gradient, found, eps = jax.lax.optimization_barrier((gradient, found, eps))
        return (found, eps, jnp.zeros((), x_noisy.dtype)), gradient

    def later(gradient: Any, cotangents: tuple[Array, Array, Array]) -> tuple:
        return jax.tree.map(lambda leaf: cotangents[2] * leaf, gradient), None, None, None, None

    both.defvjp(ahead, later)
    pull = seen * jnp.reshape(weight, (-1,) + (1,) * (x.ndim - 1))
    found, after, zero = both(params, x_noisy, log_snr, pull, eps)
    return jax.lax.stop_gradient(found), jax.lax.stop_gradient(after), zero


class KnownNoise(AbstractDenoiser):
    """A denoiser whose ε̂ of one noisy observation has been computed."""

    base: AbstractDenoiser
    noise: Float[Array, "*event"]

    def __init__(self, base: AbstractDenoiser, noise: Float[Array, "*event"]):
        self.base, self.noise = base, noise

    @property
    def schedule(self) -> AbstractSchedule:
        return self.base.schedule

    @property
    def event_shape(self) -> tuple[int, ...]:
        return self.base.event_shape

    def __call__(self, x_noisy: Float[Array, "*event"], log_snr: Float[Array, ""]) -> Float[Array, "*event"]:
        return self.noise

    def fill_missing(self, x: Float[Array, "*event"]) -> tuple[Float[Array, "*event"], Float[Array, "*event"]]:
        return self.base.fill_missing(x)


def _gradient_only(value: Array) -> Array:
    """Zero, with the gradient of `value`."""
    return value - jax.lax.stop_gradient(value)


def bound(
    denoiser: AbstractDenoiser,
    encoder: AbstractEncoder | None,
    x: Float[Array, "*event"],
    z: Float[Array, " D"] | None,
    log_snr: Float[Array, ""],
    weight: Float[Array, ""],
    eps: Float[Array, "*event"],
    *,
    denoiser_loss: DenoiserLoss = "guided",
) -> Bound:
    """One-sample estimate of the bound on −log p(x | z), in nats; unbiased for λ, weight from `schedule.stratified`."""
    schedule = denoiser.schedule
    error = noise_error(denoiser, encoder, x, z, log_snr, eps, denoiser_loss=denoiser_loss)
    return Bound(prior_loss(schedule, x), 0.5 * weight * error, reconstruction_loss(schedule, x))
