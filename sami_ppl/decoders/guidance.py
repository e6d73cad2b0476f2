"""Guidance: what the latent adds to the score, and the one door to the denoiser of p(x | z), `given`.

∇ log p(x_λ | z) = ∇ log p(x_λ) + ∇ log q(z | x_λ, λ)              (Bayes' rule for scores)
ε̂(x_λ, λ; z)    = ε_θ(x_λ, λ) − σ g,      g = ∇_{x_λ} log q(z | x_λ, λ)
"""

import equinox as eqx
import jax
from jaxtyping import Array, Bool, Float

from sami_ppl.decoders.conditional import AbstractConditionalDenoiser
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

    @property
    def seen(self) -> Bool[Array, "*event"] | None:
        return self.denoiser.seen

    def __call__(self, x_noisy: Float[Array, "*event"], log_snr: Float[Array, ""]) -> Float[Array, "*event"]:
        eps = self.denoiser(x_noisy, log_snr)
        return eps - self.schedule.sigma(log_snr) * guidance(self.encoder, self.z, x_noisy, log_snr)


def given(denoiser: AbstractDenoiser, encoder: AbstractEncoder, z: Float[Array, " D"]) -> AbstractDenoiser:
    """The denoiser of p(x | z), for one z: the denoiser's own where it takes codes, else it is guided by the encoder.

    All that denoises or samples given a code goes by here.
    """
    if isinstance(denoiser, AbstractConditionalDenoiser):
        return denoiser.given(z)
    return GuidedDenoiser(denoiser, encoder, z)


def is_guided(denoiser: AbstractDenoiser) -> bool:
    """Whether the encoder guides, and its noisy posteriors q(z | x_λ, λ) are trained: the denoiser takes no code."""
    return not isinstance(denoiser, AbstractConditionalDenoiser)


def check_guided(denoiser: AbstractDenoiser, what: str) -> None:
    """Raise ValueError, saying `what` needs it, unless the encoder guides the denoiser."""
    if not is_guided(denoiser):
        raise ValueError(
            f"{what} needs a guided decoder: beside {type(denoiser).__name__}, which takes the code itself, noisy "
            'posteriors q(z | x_λ, λ) are not trained; write sp.autoencoder(prior, data, decoder="guided", key=key)'
        )


def check_pair(denoiser: AbstractDenoiser, encoder: AbstractEncoder) -> None:
    """Raise ValueError unless encoder and denoiser agree on observations, noise levels and, where it has one, code."""
    if isinstance(denoiser, AbstractConditionalDenoiser) and denoiser.latent_size != encoder.latent_size:
        raise ValueError(
            f"the denoiser takes codes of {denoiser.latent_size} numbers and the encoder gives {encoder.latent_size}: "
            "build both for one prior, sp.autoencoder(prior, data, decoder=..., key=key)"
        )
    if denoiser.event_shape != encoder.event_shape:
        raise ValueError(
            f"denoiser and encoder must take observations of one shape, got event_shape {denoiser.event_shape} and "
            f"{encoder.event_shape}: build both with the same event_shape"
        )
    if not eqx.tree_equal(denoiser.schedule, encoder.schedule):
        raise ValueError(
            f"denoiser and encoder must share one schedule, got {denoiser.schedule} and {encoder.schedule}"
        )
