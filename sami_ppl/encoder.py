"""Encoders: the noisy posterior q(z | x_λ, λ).

One network plays two parts. At the clean end of the noise range it is the guide, q(z | x); along reverse diffusion,
the gradient of its log density guides the denoiser. Encoders are written for one observation; batches go through
`jax.vmap`.
"""

import abc
from collections.abc import Callable
import math
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from sami_ppl.nn.embed import NoiseEmbedding
from sami_ppl.schedule import AbstractSchedule

Noise = Literal["full", "variance", "blind"]


class AbstractEncoder(eqx.Module):
    """Gaussian noisy posterior q(z | x_λ, λ) over the `latent_size` = D unconstrained latent coordinates."""

    schedule: eqx.AbstractVar[AbstractSchedule]
    event_shape: eqx.AbstractVar[tuple[int, ...]]
    latent_size: eqx.AbstractVar[int]

    @abc.abstractmethod
    def __call__(
        self, x_noisy: Float[Array, "*event"], log_snr: Float[Array, ""]
    ) -> tuple[Float[Array, " D"], Float[Array, "*scale"]]:
        """Location (D,) and scale of q: a vector (D,) of standard deviations, or a factor A (D, D), cov = A Aᵀ."""

    @abc.abstractmethod
    def log_prob(
        self, z: Float[Array, " D"], x_noisy: Float[Array, "*event"], log_snr: Float[Array, ""]
    ) -> Float[Array, ""]:
        """Log q(z | x_λ, λ) in nats. Guidance is its gradient in x_λ."""

    def posterior(self, x: Float[Array, "*event"]) -> tuple[Float[Array, " D"], Float[Array, "*scale"]]:
        """The guide: location and scale of q(z | x), the noisy posterior at the clean end, without noise added."""
        log_snr = jnp.asarray(self.schedule.log_snr_max, dtype=x.dtype)
        return self(self.schedule.alpha(log_snr) * x, log_snr)


def diagonal_log_prob(z: Float[Array, " D"], loc: Float[Array, " D"], scale: Float[Array, " D"]) -> Float[Array, ""]:
    """Log N(z; loc, diag(scale²)) in nats."""
    return -jnp.sum(0.5 * ((z - loc) / scale) ** 2 + jnp.log(scale) + 0.5 * jnp.log(2 * jnp.pi))


class DiagonalEncoder(AbstractEncoder):
    """Diagonal Gaussian noisy posterior on the features of a network.

    `noise` says what may depend on the noise level:

    - `"full"` (default): location and scale. Exact for a linear-Gaussian model.
    - `"variance"`: the scale only; the network is called with `log_snr=None`.
    - `"blind"`: nothing, as in the paper; on Gaussian data it collapses at every setting.

    The network is called on the observation scaled to unit variance at each noise level (as the denoiser's is), on
    the noisy observation itself where it must not see λ. Log scales are
    squashed between `min_scale` and 2, in units of the prior's spread, and start at 1: a posterior wider than the prior
    never helps, and one far narrower makes reverse diffusion stiff.
    """

    network: Callable
    loc: eqx.nn.Linear
    log_scale: eqx.nn.Linear
    embedding: NoiseEmbedding | None
    embedded_log_scale: eqx.nn.Linear | None
    schedule: AbstractSchedule
    event_shape: tuple[int, ...] = eqx.field(static=True)
    latent_size: int = eqx.field(static=True)
    noise: Noise = eqx.field(static=True)
    mean: float = eqx.field(static=True)
    std: float = eqx.field(static=True)
    min_scale: float = eqx.field(static=True)

    def __init__(
        self,
        network: Callable,
        schedule: AbstractSchedule,
        event_shape: tuple[int, ...],
        latent_size: int,
        *,
        noise: Noise = "full",
        mean: float = 0.0,
        std: float = 1.0,
        min_scale: float = 0.03,
        key: Key[Array, ""],
    ):
        if not 0 < min_scale < 1:
            raise ValueError(f"min_scale must lie between 0 and 1, the prior's own spread, got {min_scale}")
        if noise not in ("full", "variance", "blind"):
            raise ValueError(f"noise must be 'full', 'variance' or 'blind', got {noise!r}")
        self.network, self.schedule, self.noise = network, schedule, noise
        self.event_shape, self.latent_size = tuple(event_shape), latent_size
        self.mean, self.std, self.min_scale = mean, std, min_scale
        features = self._feature_size()
        loc_key, scale_key, embed_key, embedded_key = jax.random.split(key, 4)
        self.loc = eqx.nn.Linear(features, latent_size, key=loc_key)
        self.log_scale = eqx.nn.Linear(features, latent_size, key=scale_key)
        depends = noise == "variance"
        self.embedding = NoiseEmbedding(64, key=embed_key) if depends else None
        self.embedded_log_scale = eqx.nn.Linear(64, latent_size, key=embedded_key) if depends else None

    def _feature_size(self) -> int:
        x = jax.ShapeDtypeStruct(self.event_shape, jnp.float32)
        log_snr = jax.ShapeDtypeStruct((), jnp.float32) if self.noise == "full" else None
        try:
            features = jax.eval_shape(lambda x, lam: self.network(x, lam), x, log_snr)
        except Exception as error:
            raise ValueError(
                f"the encoder network failed on one observation of shape {self.event_shape}"
                f"{'' if log_snr is not None else ' with log_snr=None'}: {error}"
            ) from error
        if features.ndim != 1:
            raise ValueError(
                f"the encoder network must map one observation of shape {self.event_shape} to a feature vector, "
                f"got an output of shape {features.shape}: end it with a reshape(-1)"
            )
        return features.shape[0]

    def __call__(
        self, x_noisy: Float[Array, "*event"], log_snr: Float[Array, ""]
    ) -> tuple[Float[Array, " D"], Float[Array, " D"]]:
        if self.noise == "full":
            alpha, sigma = self.schedule.alpha(log_snr), self.schedule.sigma(log_snr)
            scaled = (x_noisy - alpha * self.mean) / jnp.sqrt((alpha * self.std) ** 2 + sigma**2)
            features = self.network(scaled, log_snr)
        else:
            features = self.network(x_noisy, None)
        raw = self.log_scale(features)
        if self.embedding is not None and self.embedded_log_scale is not None:
            raw = raw + self.embedded_log_scale(self.embedding(log_snr))
        return self.loc(features), jnp.exp(_squash(raw, math.log(self.min_scale), math.log(2.0)))

    def log_prob(
        self, z: Float[Array, " D"], x_noisy: Float[Array, "*event"], log_snr: Float[Array, ""]
    ) -> Float[Array, ""]:
        return diagonal_log_prob(z, *self(x_noisy, log_snr))


def _squash(raw: Float[Array, " D"], low: float, high: float) -> Float[Array, " D"]:
    """A sigmoid from `low` < 0 to `high` > 0 that maps 0 to 0."""
    return low + (high - low) * jax.nn.sigmoid(raw + math.log(-low / high))


class RotatedEncoder(AbstractEncoder):
    """The encoder of z' = R z for an orthogonal R: the same noisy posterior, in rotated axes.

    q'(z' | x_λ, λ) = q(Rᵀ z' | x_λ, λ) exactly, so guidance, samples and the bound are unchanged wherever the prior
    is invariant under R.
    """

    base: AbstractEncoder
    rotation: Float[Array, "D D"]

    def __init__(self, base: AbstractEncoder, rotation: Float[Array, "D D"]):
        self.base, self.rotation = base, rotation

    @property
    def schedule(self) -> AbstractSchedule:
        return self.base.schedule

    @property
    def event_shape(self) -> tuple[int, ...]:
        return self.base.event_shape

    @property
    def latent_size(self) -> int:
        return self.base.latent_size

    def __call__(
        self, x_noisy: Float[Array, "*event"], log_snr: Float[Array, ""]
    ) -> tuple[Float[Array, " D"], Float[Array, "D D"]]:
        rotation = jax.lax.stop_gradient(self.rotation)
        loc, scale = self.base(x_noisy, log_snr)
        return rotation @ loc, rotation * scale if scale.ndim == 1 else rotation @ scale

    def log_prob(
        self, z: Float[Array, " D"], x_noisy: Float[Array, "*event"], log_snr: Float[Array, ""]
    ) -> Float[Array, ""]:
        return self.base.log_prob(jax.lax.stop_gradient(self.rotation).T @ z, x_noisy, log_snr)
