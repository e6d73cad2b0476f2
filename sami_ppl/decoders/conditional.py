"""Denoisers that take the code themselves, where the guided decoder asks the encoder's gradient.

- `ConditionedDenoiser`: the code modulates every block of the denoising network, as in diffusion autoencoders
  (Preechakul et al. 2022, *Diffusion Autoencoders*; Wang et al. 2023, *InfoDiffusion*).
- `IsotropicDenoiser`: p(x | z) = N(m(z), s² I), the likelihood of a variational autoencoder with one learned noise
  level (Rybkin, Daniilidis & Levine 2021, *σ-VAE*), whose denoiser is known given m and s.

Only the clean posterior q(z | x) is trained beside them: the noisy ones, q(z | x_λ, λ), guide nothing.
"""

import abc
from collections.abc import Callable
import math
from typing import ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sami_ppl._util.networks import output_shape
from sami_ppl.diffusion.denoiser import AbstractDenoiser, PreconditionedDenoiser
from sami_ppl.diffusion.schedule import AbstractSchedule

GAIN = 10.0
"""Change of log s by one of the weight behind it: Adam's steps are too small for a single number."""


class AbstractConditionalDenoiser(AbstractDenoiser):
    """A denoiser that knows p(x | z) for codes z of `latent_size` numbers."""

    latent_size: eqx.AbstractVar[int]

    @abc.abstractmethod
    def given(self, z: Float[Array, " D"]) -> AbstractDenoiser:
        """The denoiser of p(x | z), for one z."""


class ConditionedDenoiser(PreconditionedDenoiser, AbstractConditionalDenoiser):
    """A `PreconditionedDenoiser` whose network takes the code, (x, log_snr, z), and none, (x, log_snr).

    By itself it is the denoiser without a code. Training leaves the code of some observations out, so that the network
    learns that too (Ho & Salimans 2022, *Classifier-free diffusion guidance*). Raises ValueError for a network that
    cannot be called so.
    """

    latent_size: int = eqx.field(static=True)

    def __init__(
        self,
        network: Callable,
        schedule: AbstractSchedule,
        event_shape: tuple[int, ...],
        latent_size: int,
        mean: float = 0.0,
        std: float = 1.0,
        predict: Literal["data", "noise"] = "data",
        seen: Bool[Array, "*event"] | None = None,
    ):
        super().__init__(network, schedule, event_shape, mean, std, predict, seen)
        self.latent_size = latent_size

    def __check_init__(self) -> None:
        code, call = (self.latent_size,), "network(x, log_snr, z)"
        _check_output(
            output_shape(self.network, self.event_shape, (), code, of="conditioned", call=call), self.event_shape, call
        )

    def given(self, z: Float[Array, " D"]) -> PreconditionedDenoiser:
        network = _WithCode(self.network, z)
        settings = (self.schedule, self.event_shape, self.mean, self.std, self.predict, self.seen)
        return PreconditionedDenoiser(network, *settings)


class _WithCode(eqx.Module):
    """A network (x, log_snr, z) at one z."""

    network: Callable
    z: Float[Array, " D"]

    def __init__(self, network: Callable, z: Float[Array, " D"]):
        self.network, self.z = network, z

    def __call__(self, x: Float[Array, "*event"], log_snr: Float[Array, ""]) -> Float[Array, "*event"]:
        return self.network(x, log_snr, self.z)


class IsotropicDenoiser(AbstractConditionalDenoiser):
    """The likelihood N(m(z), s² I), m = mean + std · network(z, None), with one learned s, which starts at `std`.

    There is no denoiser without a code, that would be one of p(x). Raises ValueError for a network that does not map a
    code to an observation.
    """

    marginal: ClassVar[bool] = False
    network: Callable
    raw: Float[Array, ""]
    schedule: AbstractSchedule
    event_shape: tuple[int, ...] = eqx.field(static=True)
    latent_size: int = eqx.field(static=True)
    mean: float = eqx.field(static=True)
    std: float = eqx.field(static=True)
    seen: Bool[Array, "*event"] | None = None

    def __init__(
        self,
        network: Callable,
        schedule: AbstractSchedule,
        event_shape: tuple[int, ...],
        latent_size: int,
        mean: float = 0.0,
        std: float = 1.0,
        noise_std: float | None = None,
        seen: Bool[Array, "*event"] | None = None,
    ):
        self.network, self.schedule, self.seen = network, schedule, seen
        self.event_shape, self.latent_size = event_shape, latent_size
        self.mean, self.std = float(mean), float(std)
        self.raw = jnp.asarray(0.0 if noise_std is None else math.log(noise_std / std) / GAIN)

    def __check_init__(self) -> None:
        if not self.std > 0:
            raise ValueError(f"std must be positive, got {self.std}: give the standard deviation of the data")
        call = "network(z, None)"
        _check_output(
            output_shape(self.network, (self.latent_size,), None, of="Gaussian decoder's", call=call),
            self.event_shape, call,
        )  # fmt: skip

    @property
    def statistics(self) -> tuple[float, float] | None:
        return self.mean, self.std

    @property
    def noise_std(self) -> Float[Array, ""]:
        """s, in units of x."""
        return self.std * jnp.exp(GAIN * self.raw)

    def given(self, z: Float[Array, " D"]) -> "NormalDenoiser":
        return NormalDenoiser(self.mean + self.std * self.network(z, None), self.noise_std, self.schedule, self.seen)

    def __call__(self, x_noisy: Float[Array, "*event"], log_snr: Float[Array, ""]) -> Float[Array, "*event"]:
        raise ValueError(
            "a Gaussian decoder knows p(x | z) and has no denoiser without a code: draw codes, sp.generate(program, "
            'size=..., key=key), or build the program with decoder="conditioned" or "guided"'
        )


class NormalDenoiser(AbstractDenoiser):
    """Exact denoiser of x ~ N(mean, std² I): x̂ = (α s² x_λ + σ² m)/(α² s² + σ²), ε̂ = σ (x_λ − α m)/(α² s² + σ²)."""

    mean: Float[Array, "*event"]
    std: Float[Array, ""]
    schedule: AbstractSchedule
    seen: Bool[Array, "*event"] | None = None

    def __init__(
        self,
        mean: Float[Array, "*event"],
        std: Float[Array, ""],
        schedule: AbstractSchedule,
        seen: Bool[Array, "*event"] | None = None,
    ):
        self.mean, self.std, self.schedule, self.seen = mean, std, schedule, seen

    @property
    def event_shape(self) -> tuple[int, ...]:
        return self.mean.shape

    def log_prob(self, x: Float[Array, "*event"]) -> Float[Array, ""]:
        if self.seen is None:
            return jnp.sum(jax.scipy.stats.norm.logpdf(x, self.mean, self.std))
        seen = ~jnp.isnan(x)
        return jnp.sum(seen * jax.scipy.stats.norm.logpdf(jnp.where(seen, x, 0), self.mean, self.std))

    def __call__(self, x_noisy: Float[Array, "*event"], log_snr: Float[Array, ""]) -> Float[Array, "*event"]:
        alpha, sigma = self.schedule.alpha(log_snr), self.schedule.sigma(log_snr)
        noise = sigma / (alpha**2 * self.std**2 + sigma**2) * (x_noisy - alpha * self.mean)
        return noise if self.seen is None else jnp.where(jnp.isnan(x_noisy), 0, noise)


def _check_output(shape: tuple[int, ...], event_shape: tuple[int, ...], call: str) -> None:
    if shape != tuple(event_shape):
        raise ValueError(f"{call} must be one observation of shape {event_shape}, got shape {shape}")
