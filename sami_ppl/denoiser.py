"""Denoisers: the noise prediction ε̂(x_λ, λ), hence the score −ε̂/σ and the denoised mean.

The score, the denoised mean and the noise prediction are the same function in three units:

    score = −ε̂ / σ,        x̂ = (x_λ − σ ε̂) / α        (Tweedie's formula).

Denoisers are written for one observation; batches go through `jax.vmap`.
"""

import abc
from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from sami_ppl.schedule import AbstractSchedule


class AbstractDenoiser(eqx.Module):
    """Noise prediction ε̂ from a noisy observation x_λ of shape `event_shape` and its log signal-to-noise ratio λ."""

    schedule: eqx.AbstractVar[AbstractSchedule]
    event_shape: eqx.AbstractVar[tuple[int, ...]]

    @abc.abstractmethod
    def __call__(self, x_noisy: Float[Array, "*event"], log_snr: Float[Array, ""]) -> Float[Array, "*event"]:
        """ε̂(x_λ, λ), of the shape of one observation."""

    def x_hat(self, x_noisy: Float[Array, "*event"], log_snr: Float[Array, ""]) -> Float[Array, "*event"]:
        """Denoised mean E[x | x_λ] = (x_λ − σ ε̂)/α."""
        sigma, alpha = self.schedule.sigma(log_snr), self.schedule.alpha(log_snr)
        return (x_noisy - sigma * self(x_noisy, log_snr)) / alpha

    def score(self, x_noisy: Float[Array, "*event"], log_snr: Float[Array, ""]) -> Float[Array, "*event"]:
        """∇ log p(x_λ) = −ε̂/σ."""
        return -self(x_noisy, log_snr) / self.schedule.sigma(log_snr)


class PreconditionedDenoiser(AbstractDenoiser):
    """A network F wrapped so that its input and its target have unit variance at every noise level.

    With v = α²s² + σ², the variance of the noisy observation when observations have standard deviation s:

        ε̂ = (σ/v) (x_λ − α m) − (α s/√v) F((x_λ − α m)/√v, λ)

    so the optimal linear denoiser of white data is F = 0 (Karras et al. 2022, *Elucidating the Design Space*, sec. 5,
    carried over to any α and σ). `mean` m and `std` s are those of the data.
    """

    network: Callable
    schedule: AbstractSchedule
    event_shape: tuple[int, ...] = eqx.field(static=True)
    mean: float = eqx.field(static=True, default=0.0)
    std: float = eqx.field(static=True, default=1.0)

    def __check_init__(self) -> None:
        if not self.std > 0:
            raise ValueError(f"std must be positive, got {self.std}: give the standard deviation of the data")

    def __call__(self, x_noisy: Float[Array, "*event"], log_snr: Float[Array, ""]) -> Float[Array, "*event"]:
        alpha, sigma = self.schedule.alpha(log_snr), self.schedule.sigma(log_snr)
        variance = (alpha * self.std) ** 2 + sigma**2
        centred = x_noisy - alpha * self.mean
        out = self.network(centred / jnp.sqrt(variance), log_snr)
        return sigma / variance * centred - alpha * self.std / jnp.sqrt(variance) * out


class GaussianDenoiser(AbstractDenoiser):
    """Exact denoiser of x ~ N(mean, cov), a vector: ε̂ = σ (α² Σ + σ² I)⁻¹ (x_λ − α μ). The oracle of the tests."""

    mean: Float[Array, " d"]
    eigenvalues: Float[Array, " d"]
    eigenvectors: Float[Array, "d d"]
    schedule: AbstractSchedule
    event_shape: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, mean: Float[Array, " d"], cov: Float[Array, "d d"], schedule: AbstractSchedule):
        self.mean = mean
        self.eigenvalues, self.eigenvectors = jnp.linalg.eigh(cov)
        self.schedule = schedule
        self.event_shape = mean.shape

    def __call__(self, x_noisy: Float[Array, " d"], log_snr: Float[Array, ""]) -> Float[Array, " d"]:
        alpha, sigma = self.schedule.alpha(log_snr), self.schedule.sigma(log_snr)
        rotated = self.eigenvectors.T @ (x_noisy - alpha * self.mean)
        return sigma * (self.eigenvectors @ (rotated / (alpha**2 * self.eigenvalues + sigma**2)))
