"""Guidance: what the latent adds to the score.

∇ log p(x_λ | z) = ∇ log p(x_λ) + ∇ log q(z | x_λ, λ)              (Bayes' rule for scores)
ε̂(x_λ, λ; z)    = ε_θ(x_λ, λ) − σ g,      g = ∇_{x_λ} log q(z | x_λ, λ)
"""

import equinox as eqx
import jax
from jaxtyping import Array, Float

from sami_ppl.diffusion.denoiser import AbstractDenoiser
from sami_ppl.diffusion.schedule import AbstractSchedule
from sami_ppl.encoders.encoder import AbstractEncoder


def guidance(
    encoder: AbstractEncoder, z: Float[Array, " D"], x_noisy: Float[Array, "*event"], log_snr: Float[Array, ""]
) -> Float[Array, "*event"]:
    """g = ∇_{x_λ} log q(z | x_λ, λ), of the shape of one observation."""
    return jax.grad(encoder.log_prob, argnums=1)(z, x_noisy, log_snr)


class GuidedDenoiser(AbstractDenoiser):
    """The denoiser of p(x | z), for one z. It is a denoiser, so every sampler takes it."""

    denoiser: AbstractDenoiser
    encoder: AbstractEncoder
    z: Float[Array, " D"]

    def __init__(self, denoiser: AbstractDenoiser, encoder: AbstractEncoder, z: Float[Array, " D"]):
        self.denoiser, self.encoder, self.z = denoiser, encoder, z

    @property
    def schedule(self) -> AbstractSchedule:
        return self.denoiser.schedule

    @property
    def event_shape(self) -> tuple[int, ...]:
        return self.denoiser.event_shape

    def __call__(self, x_noisy: Float[Array, "*event"], log_snr: Float[Array, ""]) -> Float[Array, "*event"]:
        eps = self.denoiser(x_noisy, log_snr)
        return eps - self.schedule.sigma(log_snr) * guidance(self.encoder, self.z, x_noisy, log_snr)


def check_pair(denoiser: AbstractDenoiser, encoder: AbstractEncoder) -> None:
    """Raise ValueError unless encoder and denoiser agree on observations and noise levels."""
    if denoiser.event_shape != encoder.event_shape:
        raise ValueError(
            f"denoiser and encoder must take observations of one shape, got event_shape {denoiser.event_shape} and "
            f"{encoder.event_shape}: build both with the same event_shape"
        )
    if not eqx.tree_equal(denoiser.schedule, encoder.schedule):
        raise ValueError(
            f"denoiser and encoder must share one schedule, got {denoiser.schedule} and {encoder.schedule}"
        )
