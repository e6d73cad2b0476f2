"""Encoders: the noisy posterior q(z | x_λ, λ).

One network plays two parts. At the clean end of the noise range it is the guide, q(z | x); along reverse diffusion,
the gradient of its log density guides the denoiser. Encoders are written for one observation; batches go through
`jax.vmap`.
"""

import abc
from collections.abc import Callable, Mapping
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from sami_ppl._util.keys import check_key
from sami_ppl._util.networks import output_shape
from sami_ppl.diffusion.schedule import AbstractSchedule
from sami_ppl.encoders.families import (
    AbstractFamily,
    Diagonal,
    check_min_scale,
    choose_families,
    squashed_scale,
    with_min_scale,
)
from sami_ppl.encoders.law import CodeLaw, DiagonalLaw, SitewiseLaw
from sami_ppl.nn.embed import NoiseEmbedding
from sami_ppl.priors.latents import Latents
from sami_ppl.priors.read import Given, Prior, read_prior

Noise = Literal["full", "variance", "blind"]


class AbstractEncoder(eqx.Module):
    """Noisy posterior q(z | x_λ, λ) over the `latent_size` = D coordinates of the code z.

    Two methods make an encoder: `parameters`, what the network says of one noisy observation, and `distribution`, the
    law of the code that they determine. Guidance, guide, moments and draws all follow from that law.
    """

    schedule: eqx.AbstractVar[AbstractSchedule]
    event_shape: eqx.AbstractVar[tuple[int, ...]]
    latent_size: eqx.AbstractVar[int]

    @abc.abstractmethod
    def parameters(self, x_noisy: Float[Array, "*event"], log_snr: Float[Array, ""]) -> Any:
        """What determines q at one noisy observation: a tree of arrays."""

    @abc.abstractmethod
    def distribution(self, parameters: Any) -> CodeLaw:
        """Q from its parameters, of one observation or, with leading dims, of a batch."""

    def __call__(
        self, x_noisy: Float[Array, "*event"], log_snr: Float[Array, ""]
    ) -> tuple[Float[Array, " D"], Float[Array, " D"]]:
        """Mean and standard deviation of every coordinate of z at one noisy observation."""
        q = self.distribution(self.parameters(x_noisy, log_snr))
        return jnp.asarray(q.mean), jnp.sqrt(jnp.asarray(q.variance))

    def log_prob(
        self, z: Float[Array, " D"], x_noisy: Float[Array, "*event"], log_snr: Float[Array, ""]
    ) -> Float[Array, ""]:
        """log q(z | x_λ, λ) in nats. Guidance is its gradient in x_λ."""
        return jnp.asarray(self.distribution(self.parameters(x_noisy, log_snr)).log_prob(z))

    def law(self, x: Float[Array, "*event"]) -> CodeLaw:
        """The guide q(z | x) of one observation: the noisy posterior at the clean end, unless a guide of its own is."""
        return self.distribution(self.parameters(*self.clean(x)))

    def posterior(self, x: Float[Array, "*event"]) -> tuple[Float[Array, " D"], Float[Array, " D"]]:
        """Mean and standard deviations of q(z | x)."""
        q = self.law(x)
        return jnp.asarray(q.mean), jnp.sqrt(jnp.asarray(q.variance))

    def clean(self, x: Float[Array, "*event"]) -> tuple[Float[Array, "*event"], Float[Array, ""]]:
        """Noisy observation and noise level of the clean end, without noise added."""
        log_snr = jnp.asarray(self.schedule.log_snr_max, dtype=jnp.result_type(float, x))
        return self.schedule.alpha(log_snr) * x, log_snr

    def guide(self, x: Float[Array, "obs *event"], prior: Callable[[], Any]) -> CodeLaw:
        """The guide q(z | x) of a batch of observations.

        `prior`: a NumPyro function that samples the prior in a plate over the batch; the guide of sequences combines
        the two.
        """
        return self.distribution(jax.vmap(lambda x: self.parameters(*self.clean(x)))(x))

    @property
    def single(self) -> "AbstractEncoder":
        """The encoder of one observation that stands for itself: of sequences that of their frames, else this one."""
        return self

    def family_of(self, site: str) -> str:
        """Name of the family of a site's posterior, for tables."""
        return type(self).__name__.removesuffix("Encoder")

    def check_latents(self, latents: Latents) -> None:
        """Raise ValueError unless the code is that of the prior's sites, each in a family that can hold it."""
        if self.latent_size != latents.size:
            raise ValueError(
                f"encoder.latent_size is {self.latent_size} but the prior has {latents.size} "
                f"unconstrained coordinates ({', '.join(latents.axes)}): build the encoder with "
                f"latent_size=read_prior(prior).size"
            )


class AbstractWrapper(AbstractEncoder):
    """An encoder that stands on another, `base`, of the same observations, codes and noise levels."""

    base: eqx.AbstractVar[AbstractEncoder]

    @property
    def schedule(self) -> AbstractSchedule:
        return self.base.schedule

    @property
    def event_shape(self) -> tuple[int, ...]:
        return self.base.event_shape

    @property
    def latent_size(self) -> int:
        return self.base.latent_size

    def parameters(self, x_noisy: Float[Array, "*event"], log_snr: Float[Array, ""]) -> Any:
        return self.base.parameters(x_noisy, log_snr)


class NetworkEncoder(AbstractEncoder):
    """A noisy posterior on the features of a network; what the features parametrise is up to the subclass.

    `noise` says what may depend on the noise level:

    - `"full"` (default): everything. Exact for a linear-Gaussian model.
    - `"variance"`: the scale only; the network is called with `log_snr=None`.
    - `"blind"`: nothing, as in the paper; on Gaussian data it collapses at every setting.

    The network is called on the observation scaled to unit variance at each noise level (as the denoiser's is), on
    the noisy observation itself where it must not see λ.
    """

    network: eqx.AbstractVar[Callable]
    noise: eqx.AbstractVar[Noise]
    mean: eqx.AbstractVar[float]
    std: eqx.AbstractVar[float]

    def features(self, x_noisy: Float[Array, "*event"], log_snr: Float[Array, ""]) -> Float[Array, " features"]:
        """What the network says of one noisy observation."""
        if self.noise != "full":
            return self.network(x_noisy, None)
        alpha, sigma = self.schedule.alpha(log_snr), self.schedule.sigma(log_snr)
        scaled = (x_noisy - alpha * self.mean) / jnp.sqrt((alpha * self.std) ** 2 + sigma**2)
        return self.network(scaled, log_snr)


def feature_size(network: Callable, event_shape: tuple[int, ...], *, sees_noise: bool) -> int:
    """Length of the network's feature vector. Raises ValueError unless it maps one observation to a vector."""
    shape = output_shape(network, event_shape, () if sees_noise else None, of="encoder")
    if len(shape) != 1:
        raise ValueError(
            f"the encoder network must map one observation of shape {event_shape} to a feature vector, "
            f"got an output of shape {shape}: end it with a reshape(-1)"
        )
    return shape[0]


class DiagonalEncoder(NetworkEncoder):
    """Diagonal Gaussian noisy posterior of the whole code.

    Log scales are squashed between `min_scale` and 2, in units of the prior's spread, and start at 1: a posterior wider
    than the prior never helps, and one far narrower makes reverse diffusion stiff.
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
        check_key(key)
        check_min_scale(min_scale)
        if noise not in ("full", "variance", "blind"):
            raise ValueError(f"noise must be 'full', 'variance' or 'blind', got {noise!r}")
        self.network, self.schedule, self.noise = network, schedule, noise
        self.event_shape, self.latent_size = tuple(event_shape), latent_size
        self.mean, self.std, self.min_scale = float(mean), float(std), min_scale
        features = feature_size(network, self.event_shape, sees_noise=noise == "full")
        loc_key, scale_key, embed_key, embedded_key = jax.random.split(key, 4)
        self.loc = eqx.nn.Linear(features, latent_size, key=loc_key)
        self.log_scale = eqx.nn.Linear(features, latent_size, key=scale_key)
        depends = noise == "variance"
        self.embedding = NoiseEmbedding(64, key=embed_key) if depends else None
        self.embedded_log_scale = eqx.nn.Linear(64, latent_size, key=embedded_key) if depends else None

    def parameters(
        self, x_noisy: Float[Array, "*event"], log_snr: Float[Array, ""]
    ) -> tuple[Float[Array, " D"], Float[Array, " D"]]:
        """Location and scale."""
        features = self.features(x_noisy, log_snr)
        raw = self.log_scale(features)
        if self.embedding is not None and self.embedded_log_scale is not None:
            raw = raw + self.embedded_log_scale(self.embedding(log_snr))
        return self.loc(features), squashed_scale(raw, self.min_scale)

    def distribution(self, parameters: tuple[Array, Array]) -> DiagonalLaw:
        return DiagonalLaw(*parameters)

    def check_latents(self, latents: Latents) -> None:
        super().check_latents(latents)
        check_gaussian(latents)


class FamilyEncoder(NetworkEncoder):
    """A noisy posterior with a family of its own for every site of the prior.

    `families`: site name → family, such as `{"z": families.Full}` or `{"z": partial(families.Mixture, components=8)}`;
    sites not named have the one that suits them.
    Raises ValueError for a site that the prior has not, and for a family that does not live on the site's support.
    """

    network: Callable
    families: tuple[AbstractFamily, ...]
    sites: tuple[str, ...] = eqx.field(static=True)
    slices: tuple[tuple[int, int], ...] = eqx.field(static=True)
    schedule: AbstractSchedule
    event_shape: tuple[int, ...] = eqx.field(static=True)
    noise: Noise = eqx.field(static=True)
    mean: float = eqx.field(static=True)
    std: float = eqx.field(static=True)

    def __init__(
        self,
        network: Callable,
        schedule: AbstractSchedule,
        event_shape: tuple[int, ...],
        latents: Latents,
        *,
        families: Mapping[str, Callable] | None = None,
        noise: Noise = "full",
        mean: float = 0.0,
        std: float = 1.0,
        key: Key[Array, ""],
    ):
        check_key(key)
        if noise not in ("full", "blind"):
            raise ValueError(f"noise must be 'full' or 'blind' with families of your own, got {noise!r}")
        self.network, self.schedule, self.event_shape, self.noise = network, schedule, tuple(event_shape), noise
        self.mean, self.std = float(mean), float(std)
        chosen = choose_families(latents, families)
        features = feature_size(network, self.event_shape, sees_noise=noise == "full")
        keys = jax.random.split(key, len(latents.sites))
        self.families = tuple(
            chosen[site.name](features, site, key=k) for site, k in zip(latents.sites, keys, strict=True)
        )
        self.sites = tuple(site.name for site in latents.sites)
        self.slices = tuple((site.start, site.start + site.size) for site in latents.sites)

    @property
    def latent_size(self) -> int:
        return self.slices[-1][1]

    def parameters(self, x_noisy: Float[Array, "*event"], log_snr: Float[Array, ""]) -> dict[str, Any]:
        features = self.features(x_noisy, log_snr)
        return {name: family.parameters(features) for name, family in zip(self.sites, self.families, strict=True)}

    def family_of(self, site: str) -> str:
        families = dict(zip(self.sites, self.families, strict=True))
        return type(families[site]).__name__ if site in families else super().family_of(site)

    def distribution(self, parameters: dict[str, Any]) -> SitewiseLaw:
        return SitewiseLaw(self.families, parameters, tuple(zip(self.sites, self.slices, strict=True)))


def encoder_for(
    prior: Prior,
    network: Callable,
    schedule: AbstractSchedule,
    event_shape: tuple[int, ...],
    *,
    families: Mapping[str, Callable] | None = None,
    given: Given | None = None,
    noise: Noise = "full",
    mean: float = 0.0,
    std: float = 1.0,
    min_scale: float = 0.03,
    key: Key[Array, ""],
) -> NetworkEncoder:
    """The encoder that suits a prior: a `DiagonalEncoder`, or a `FamilyEncoder` where a site needs another family.

    `given`: values of the variables that the prior takes, as for `Program`. `min_scale` is that of families without one
    of their own. Raises what these and `read_prior` raise.
    """
    check_key(key)
    latents = read_prior(prior, given)
    settings: dict[str, Any] = {"noise": noise, "mean": mean, "std": std, "key": key}
    if set(choose_families(latents, families).values()) == {Diagonal}:
        return DiagonalEncoder(network, schedule, event_shape, latents.size, min_scale=min_scale, **settings)
    chosen = choose_families(latents, families)
    scaled = {name: with_min_scale(family, min_scale) for name, family in chosen.items()}
    return FamilyEncoder(network, schedule, event_shape, latents, families=scaled, **settings)


def gaussian(encoder: AbstractEncoder) -> bool:
    """Whether the posterior of the whole code is Gaussian, but for its tails."""

    def root(encoder: AbstractEncoder) -> Any:
        return encoder.law(jnp.zeros(encoder.event_shape)).root

    return eqx.filter_eval_shape(root, encoder) is not None


def check_gaussian(latents: Latents) -> None:
    """Raise ValueError for a site of the prior that cannot have a Gaussian posterior."""
    for site in latents.sites:
        if site.why_not_gaussian:
            raise ValueError(
                f"prior site {site.name!r} {site.why_not_gaussian}: build the encoder with encoder_for(prior, network, "
                "...)"
            )
