"""Noise levels.

A noisy observation at log signal-to-noise ratio λ = log(α²/σ²) is

    x_λ = α x + σ ε,      ε ~ N(0, I).

A schedule fixes α and σ as functions of λ and the two ends of the range. The evidence bound depends on the
schedule through those ends only (Kingma et al. 2021, *Variational Diffusion Models*, eq. 17), so a schedule has no
"shape" to tune: how noise levels are drawn is a matter of variance, not of the objective.
"""

import abc
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key


class NoiseLevels(NamedTuple):
    """Noise levels with the weights that turn their mean into an integral over the whole range.

    `mean(weight * f(log_snr))` is an unbiased estimate of ∫ f(λ) dλ from `log_snr_min` to `log_snr_max`.
    """

    log_snr: Array
    weight: Array


class AbstractSchedule(eqx.Module):
    """α and σ as functions of the log signal-to-noise ratio, on [`log_snr_min`, `log_snr_max`]."""

    log_snr_min: eqx.AbstractVar[float]
    log_snr_max: eqx.AbstractVar[float]

    @abc.abstractmethod
    def alpha(self, log_snr: Float[Array, "*n"]) -> Float[Array, "*n"]:
        """Factor of the observation in the noisy observation."""

    @abc.abstractmethod
    def sigma(self, log_snr: Float[Array, "*n"]) -> Float[Array, "*n"]:
        """Standard deviation of the noise in the noisy observation."""

    def __check_init__(self) -> None:
        if not self.log_snr_min < self.log_snr_max:
            raise ValueError(
                "log_snr_min must be below log_snr_max (large = clean), got "
                f"log_snr_min={self.log_snr_min}, log_snr_max={self.log_snr_max}. "
                "Write for instance VariancePreserving(log_snr_min=-6.0, log_snr_max=6.0)."
            )

    @property
    def span(self) -> float:
        """Length of the range of log signal-to-noise ratios, in nats."""
        return self.log_snr_max - self.log_snr_min

    def reference_variance(self) -> Float[Array, ""]:
        """Variance of the Gaussian from which reverse diffusion starts: α² + σ² at `log_snr_min`.

        It is the variance of x_λ for observations of unit variance: 1 when variance is preserved.
        """
        log_snr = jnp.asarray(self.log_snr_min)
        return self.alpha(log_snr) ** 2 + self.sigma(log_snr) ** 2

    def add_noise(
        self, x: Float[Array, "*event"], log_snr: Float[Array, ""], eps: Float[Array, "*event"]
    ) -> Float[Array, "*event"]:
        """x_λ = α x + σ ε."""
        return self.alpha(log_snr) * x + self.sigma(log_snr) * eps

    def stratified(self, key: Key[Array, ""], n: int) -> NoiseLevels:
        """n noise levels, one per stratum of equal length, with one shared random offset.

        λ_i = λmax − span · ((u + i/n) mod 1): each is uniform on the range, together they cover it evenly, which
        cuts the variance of the estimated integral (Kingma et al. 2021, app. I.1).
        """
        u = jax.random.uniform(key)
        position = jnp.mod(u + jnp.arange(n) / n, 1.0)
        return NoiseLevels(self.log_snr_max - self.span * position, jnp.full((n,), self.span))


class NoiseProposal(eqx.Module):
    """A density of noise levels, constant on equal bins of a schedule's range: importance sampling of ∫ f(λ) dλ.

    With `probabilities` (bins,) near the bins' shares of the standard deviation of f, an integral costs less noise
    than with the uniform density; it is unbiased with any positive ones. They are normalised to sum to 1. One bin is
    the uniform density.
    """

    schedule: AbstractSchedule
    probabilities: Float[Array, " bins"]

    def __init__(self, schedule: AbstractSchedule, probabilities: Float[Array, " bins"] | None = None):
        self.schedule = schedule
        self.probabilities = jnp.ones(1) if probabilities is None else probabilities / probabilities.sum()

    def stratified(self, key: Key[Array, ""], n: int) -> NoiseLevels:
        """N noise levels, one per stratum of equal probability, with one shared random offset, and their weights."""
        u = jax.random.uniform(key)
        return self.at(1.0 - jnp.mod(u + jnp.arange(n) / n, 1.0))

    def at(self, position: Float[Array, "*n"]) -> NoiseLevels:
        """The levels at quantiles `position` in [0, 1] of the density, λmin at 0, each with weight 1/density."""
        bins = self.probabilities.shape[0]
        edges = jnp.concatenate([jnp.zeros(1), jnp.cumsum(self.probabilities)])
        index = jnp.clip(jnp.searchsorted(edges, position, side="right") - 1, 0, bins - 1)
        share = self.probabilities[index]
        place = (index + jnp.clip((position - edges[index]) / share, 0, 1)) / bins
        return NoiseLevels(self.schedule.log_snr_min + self.schedule.span * place, self.schedule.span / (bins * share))


class VariancePreserving(AbstractSchedule):
    """α² = sigmoid(λ), σ² = sigmoid(−λ): the noisy observation keeps the variance of a unit-variance one."""

    log_snr_min: float = eqx.field(static=True, default=-6.0)
    log_snr_max: float = eqx.field(static=True, default=6.0)

    def alpha(self, log_snr: Float[Array, "*n"]) -> Float[Array, "*n"]:
        return jnp.exp(0.5 * jax.nn.log_sigmoid(log_snr))

    def sigma(self, log_snr: Float[Array, "*n"]) -> Float[Array, "*n"]:
        return jnp.exp(0.5 * jax.nn.log_sigmoid(-log_snr))


class VarianceExploding(AbstractSchedule):
    """α = 1, σ² = exp(−λ): noise is added and nothing is shrunk."""

    log_snr_min: float = eqx.field(static=True, default=-6.0)
    log_snr_max: float = eqx.field(static=True, default=6.0)

    def alpha(self, log_snr: Float[Array, "*n"]) -> Float[Array, "*n"]:
        return jnp.ones_like(log_snr)

    def sigma(self, log_snr: Float[Array, "*n"]) -> Float[Array, "*n"]:
        return jnp.exp(-0.5 * log_snr)
