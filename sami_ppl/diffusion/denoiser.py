"""Denoisers: the noise prediction ε̂(x_λ, λ), hence the score −ε̂/σ and the denoised mean.

The score, the denoised mean and the noise prediction are the same function in three units:

    score = −ε̂ / σ,        x̂ = (x_λ − σ ε̂) / α        (Tweedie's formula).

Denoisers are written for one observation; batches go through `jax.vmap`.

What is missing in an observation is NaN, with and without noise. A denoiser of such observations knows the noise of
what is seen, of p(x_seen), and says 0 of the rest.
"""

import abc
from collections.abc import Callable
from typing import ClassVar, Literal

import equinox as eqx
import jax
from jax.core import Tracer
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from sami_ppl._util.networks import output_shape
from sami_ppl.diffusion.schedule import AbstractSchedule
from sami_ppl.nn.unet import UNet


class AbstractDenoiser(eqx.Module):
    """Noise prediction ε̂ from a noisy observation x_λ of shape `event_shape` and its log signal-to-noise ratio λ.

    `marginal`: whether it can be called, as the denoiser of some p(x); there are denoisers of p(x | z) alone.
    """

    marginal: ClassVar[bool] = True
    schedule: eqx.AbstractVar[AbstractSchedule]
    event_shape: eqx.AbstractVar[tuple[int, ...]]

    @property
    def statistics(self) -> tuple[float, float] | None:
        """Mean and standard deviation of the data that it was built for, where it knows them."""
        return None

    @abc.abstractmethod
    def __call__(self, x_noisy: Float[Array, "*event"], log_snr: Float[Array, ""]) -> Float[Array, "*event"]:
        """ε̂(x_λ, λ), of the shape of one observation."""

    def trunk(self, features: int, *, key: Key[Array, ""]) -> Callable | None:
        """A network for an encoder, one observation → `features` numbers, that begins with what this one has learned.

        Called as (x, log_snr), x scaled by `statistics`. None where there is no such network.
        """
        return None

    def bottleneck(self, x_noisy: Float[Array, "*event"], log_snr: Float[Array, ""]) -> Array | None:
        """The activations of its network's narrowest place, (*sides, channels); None where it is no U-Net."""
        return None

    def log_prob(self, x: Float[Array, "*event"]) -> Float[Array, ""] | None:
        """log p(x) in nats, where it is at hand in closed form: the bound then takes it in place of the errors."""
        return None

    @property
    def seen(self) -> Bool[Array, "*event"] | None:
        """Which entries of observations were ever seen; None where nothing may be missing."""
        return None

    def fill_missing(self, x: Float[Array, "*event"]) -> tuple[Float[Array, "*event"], Float[Array, "*event"]]:
        """x to be noised, and 1 where it is seen, 0 where it is missing; all of it is seen where nothing may be."""
        return x, jnp.ones_like(x) if self.seen is None else (~jnp.isnan(x)).astype(x.dtype)

    def only_seen(self, x: Float[Array, "*event"]) -> Float[Array, "*event"]:
        """x with NaN at entries that were never seen, of which there is nothing to sample."""
        return x if self.seen is None else jnp.where(self.seen, x, jnp.nan)

    def x_hat(self, x_noisy: Float[Array, "*event"], log_snr: Float[Array, ""]) -> Float[Array, "*event"]:
        """Denoised mean E[x | x_λ] = (x_λ − σ ε̂)/α."""
        sigma, alpha = self.schedule.sigma(log_snr), self.schedule.alpha(log_snr)
        return (x_noisy - sigma * self(x_noisy, log_snr)) / alpha

    def score(self, x_noisy: Float[Array, "*event"], log_snr: Float[Array, ""]) -> Float[Array, "*event"]:
        """∇ log p(x_λ) = −ε̂/σ."""
        return -self(x_noisy, log_snr) / self.schedule.sigma(log_snr)


class PreconditionedDenoiser(AbstractDenoiser):
    """A network F whose input has unit variance at every noise level, and whose output is either of two targets.

    `mean` m and `std` s are those of the data, v = α²s² + σ² the variance of a noisy observation. With the input
    u = (x_λ − α m)/√v:

    - `predict="data"` (default): x̂ = m + s F(u, λ). For data near a manifold of few dimensions, such as images drawn
      from a few factors: the network puts out what lies on the manifold and none of the noise (Li & He 2025, *Back to
      Basics: Let Denoising Generative Models Denoise*).
    - `predict="noise"`: ε̂ = (σ/v)(x_λ − α m) − (α s/√v) F(u, λ), a target of unit variance at every noise level
      (Karras et al. 2022, *Elucidating the Design Space*, sec. 5, for any α and σ). F = 0 is optimal for white data.
      The better one at high signal-to-noise ratio, so for the bound, at a high `log_snr_max`.

    With `seen`, the entries that were ever seen, observations may have missing ones, NaN, which the network must take
    too (`nn.Masked`).

    Raises ValueError for a network whose output has another shape than an observation, which is found without computing
    anything, for an `std` that is not positive, and another `predict`.
    """

    network: Callable
    schedule: AbstractSchedule
    event_shape: tuple[int, ...] = eqx.field(static=True)
    mean: float = eqx.field(static=True)
    std: float = eqx.field(static=True)
    predict: Literal["data", "noise"] = eqx.field(static=True)
    seen: Bool[Array, "*event"] | None = None

    def __init__(
        self,
        network: Callable,
        schedule: AbstractSchedule,
        event_shape: tuple[int, ...],
        mean: float = 0.0,
        std: float = 1.0,
        predict: Literal["data", "noise"] = "data",
        seen: Bool[Array, "*event"] | None = None,
    ):
        self.network, self.schedule, self.event_shape, self.seen = network, schedule, tuple(event_shape), seen
        self.mean, self.std, self.predict = float(mean), float(std), predict

    @property
    def statistics(self) -> tuple[float, float] | None:
        return self.mean, self.std

    def __check_init__(self) -> None:
        if not self.std > 0:
            raise ValueError(f"std must be positive, got {self.std}: give the standard deviation of the data")
        if self.predict not in ("data", "noise"):
            raise ValueError(f"predict must be 'data' or 'noise', got {self.predict!r}")
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(self.network)):
            return  # made of another one while that is traced, as for each code: looked at once is enough
        if (out := output_shape(self.network, self.event_shape, (), of="denoiser")) != self.event_shape:
            raise ValueError(
                f"the denoiser network must map one observation of shape {self.event_shape} to an output of the same "
                f"shape, got one of shape {out}: write sp.nn.ResidualMLP({self.event_shape}, {self.event_shape}, "
                "key=key), or end your own so"
            )

    def bottleneck(self, x_noisy: Float[Array, "*event"], log_snr: Float[Array, ""]) -> Array | None:
        if not isinstance(self.network, UNet):
            return None
        alpha, sigma = self.schedule.alpha(log_snr), self.schedule.sigma(log_snr)
        scale = jnp.sqrt((alpha * self.std) ** 2 + sigma**2)
        return self.network.bottleneck((x_noisy - alpha * self.mean) / scale, log_snr)

    def __call__(self, x_noisy: Float[Array, "*event"], log_snr: Float[Array, ""]) -> Float[Array, "*event"]:
        alpha, sigma = self.schedule.alpha(log_snr), self.schedule.sigma(log_snr)
        variance = (alpha * self.std) ** 2 + sigma**2
        centred = x_noisy - alpha * self.mean
        out = self.network(centred / jnp.sqrt(variance), log_snr)
        if self.predict == "data":
            noise = (centred - alpha * self.std * out) / sigma
        else:
            noise = sigma / variance * centred - alpha * self.std / jnp.sqrt(variance) * out
        return noise if self.seen is None else jnp.where(jnp.isnan(x_noisy), 0, noise)


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
