"""The bound on log p(x | z) at a noise set that is kept, as a function of z alone: neither network is called again.

With θ (P,) the encoder's parameters at x_λ, guidance is Jᵀ s, J = ∂θ/∂x_λ and s = ∂ log q(z; θ)/∂θ, and only s depends
on z. With r = ε − ε_θ the denoising error is a quadratic form of s:

    ‖r + σ Jᵀ s‖² = ‖r‖² + 2 sᵀ(σ J r) + sᵀ(σ² J Jᵀ) s

Its coefficients cost two passes forward and P backward at every noise level; every draw of z, some products of P × P
matrices. It is the same number as `ScoreDecoder.log_prob` on the same noise, which calls the encoder for every draw.
"""

from typing import Any, NamedTuple

import jax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from sami_ppl.decoders.bound import prior_loss, reconstruction_loss
from sami_ppl.diffusion.denoiser import AbstractDenoiser
from sami_ppl.encoders.encoder import AbstractEncoder


class NoiseTerms(NamedTuple):
    """The encoder's parameters and the coefficients of the denoising error, at one noisy observation or at several."""

    parameters: Any
    own: Float[Array, "*rows"]
    cross: Float[Array, "*rows P"]
    gram: Float[Array, "*rows P P"]


class Table(NamedTuple):
    """The bound of one observation on its noise set: `weight` of each row's error, `ends` that depend on x alone."""

    terms: NoiseTerms
    weight: Float[Array, " rows"]
    ends: Float[Array, ""]


def parameter_count(encoder: AbstractEncoder) -> int:
    """How many numbers P determine q(z | x_λ, λ)."""
    x, log_snr = jnp.zeros(encoder.event_shape), jnp.zeros(())
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(jax.eval_shape(encoder.parameters, x, log_snr)))


def noise_terms(
    denoiser: AbstractDenoiser,
    encoder: AbstractEncoder,
    x: Float[Array, "*event"],
    log_snr: Float[Array, ""],
    eps: Float[Array, "*event"],
) -> NoiseTerms:
    """The coefficients of one observation at one noise level."""
    x, seen = denoiser.fill_missing(x)
    x_noisy = encoder.schedule.add_noise(x, log_snr, eps)
    sigma = encoder.schedule.sigma(log_snr)
    parameters, jacobian = _linearised(encoder, x_noisy, log_snr)
    residual = (seen * (eps - denoiser(x_noisy, log_snr))).reshape(-1)
    cross, gram = sigma * jacobian @ residual, sigma**2 * jacobian @ jacobian.T
    return NoiseTerms(parameters, residual @ residual, cross, gram)


def ends(encoder: AbstractEncoder, x: Float[Array, "*event"]) -> Float[Array, ""]:
    """The parts of the bound that depend on x alone, in nats."""
    return prior_loss(encoder.schedule, x) + reconstruction_loss(encoder.schedule, x)


def tabulated_log_likelihood(encoder: AbstractEncoder, table: Table, z: Float[Array, " D"]) -> Float[Array, ""]:
    """Minus the diffusion bound of the observation given z, in nats."""

    def error(terms: NoiseTerms) -> Array:
        slope = _slope(encoder, terms.parameters, z)
        return terms.own + 2 * slope @ terms.cross + slope @ terms.gram @ slope

    return -table.ends - 0.5 * table.weight @ jax.vmap(error)(table.terms)


def _linearised(
    encoder: AbstractEncoder, x_noisy: Float[Array, "*event"], log_snr: Float[Array, ""]
) -> tuple[Any, Float[Array, "P event"]]:
    """The encoder's parameters, and their derivative in the noisy observation, a row for each number."""

    def flat(x_noisy: Array) -> tuple[Array, Any]:
        parameters = encoder.parameters(x_noisy, log_snr)
        return ravel_pytree(parameters)[0], parameters

    jacobian, parameters = jax.jacrev(flat, has_aux=True)(x_noisy)
    return parameters, jacobian.reshape(len(jacobian), -1)


def _slope(encoder: AbstractEncoder, parameters: Any, z: Float[Array, " D"]) -> Float[Array, " P"]:
    return ravel_pytree(jax.grad(lambda parameters: encoder.distribution(parameters).log_prob(z))(parameters))[0]
