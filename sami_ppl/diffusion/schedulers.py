"""Noise levels of Hugging Face diffusers: what a network trained there is told at log SNR λ, and what its output means.

A scheduler of diffusers says how a network was trained, and how its authors sample. Only the first matters here. With
the input u = x_λ/√(α²s² + σ²), s² being the variance that the data are taken to have, each of the three kinds says

- the time step that the network is told at λ,
- the factor by which u is multiplied to be its input,
- the noise prediction ε̂ that its output F stands for.
"""

import abc
from collections.abc import Mapping
from dataclasses import fields
from functools import lru_cache
import math
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from sami_ppl.diffusion.schedule import AbstractSchedule, VarianceExploding, VariancePreserving


class AbstractScheduler(eqx.Module):
    """What a network is told at log SNR λ, and what its output means."""

    kinds: ClassVar[tuple[str, ...]]
    """Classes of diffusers by which such a network is trained or sampled."""
    std: eqx.AbstractVar[float]
    """Standard deviation that the data are taken to have; their mean is taken to be 0."""

    @property
    @abc.abstractmethod
    def ends(self) -> tuple[float, float]:
        """Least and largest λ at which the network was trained."""

    @abc.abstractmethod
    def schedule(self, log_snr_min: float, log_snr_max: float) -> AbstractSchedule:
        """α and σ as this library has them, on a range."""

    @abc.abstractmethod
    def timestep(self, log_snr: Float[Array, ""]) -> Float[Array, ""]:
        """What the network is told."""

    def factor(self, log_snr: Float[Array, ""]) -> Float[Array, ""]:
        """Of u in the network's input."""
        return jnp.ones_like(log_snr)

    @abc.abstractmethod
    def noise(
        self, x_noisy: Float[Array, "*event"], out: Float[Array, "*event"], log_snr: Float[Array, ""]
    ) -> Float[Array, "*event"]:
        """ε̂ of the network's output at x_λ."""


class DiscreteScheduler(AbstractScheduler):
    """Noise added in T small steps of variances β (Ho et al. 2020): λ_t = log(ᾱ_t/(1 − ᾱ_t)), ᾱ_t = Π (1 − β).

    The network knows the steps 0 … T − 1; between them, the step is interpolated linearly in λ, and the network is told
    a fraction, which its sines and cosines take. Beyond the ends it is told the step at the end. A last step that has
    no signal left (`rescale_betas_zero_snr`), where λ is infinite, is none of them.
    """

    kinds: ClassVar[tuple[str, ...]] = (
        "DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler",
        "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    )  # fmt: skip
    num_train_timesteps: int = eqx.field(static=True, default=1000)
    beta_start: float = eqx.field(static=True, default=0.0001)
    beta_end: float = eqx.field(static=True, default=0.02)
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = eqx.field(static=True, default="linear")
    trained_betas: tuple[float, ...] | None = eqx.field(static=True, default=None)
    rescale_betas_zero_snr: bool = eqx.field(static=True, default=False)
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = eqx.field(static=True, default="epsilon")
    std: float = eqx.field(static=True, default=1.0)

    def __check_init__(self) -> None:
        _check("prediction_type", self.prediction_type, ("epsilon", "sample", "v_prediction"))
        _check("beta_schedule", self.beta_schedule, ("linear", "scaled_linear", "squaredcos_cap_v2"))

    @property
    def ends(self) -> tuple[float, float]:
        levels = _levels(self)
        return float(levels[-1]), float(levels[0])

    def schedule(self, log_snr_min: float, log_snr_max: float) -> VariancePreserving:
        return VariancePreserving(log_snr_min, log_snr_max)

    def timestep(self, log_snr: Float[Array, ""]) -> Float[Array, ""]:
        levels = _levels(self)[::-1].astype(np.float32)
        steps = np.arange(len(levels), dtype=np.float32)[::-1]
        return jnp.interp(log_snr, jnp.asarray(levels), jnp.asarray(steps))

    def noise(
        self, x_noisy: Float[Array, "*event"], out: Float[Array, "*event"], log_snr: Float[Array, ""]
    ) -> Float[Array, "*event"]:
        alpha, sigma = (jnp.exp(0.5 * jax.nn.log_sigmoid(sign * log_snr)) for sign in (1, -1))
        if self.prediction_type == "epsilon":
            return out
        if self.prediction_type == "sample":
            return (x_noisy - alpha * out) / sigma
        return alpha * out + sigma * x_noisy


@lru_cache(maxsize=16)
def _levels(scheduler: DiscreteScheduler) -> np.ndarray:
    """λ of the steps 0 … T − 1, falling."""
    steps, start, end = scheduler.num_train_timesteps, scheduler.beta_start, scheduler.beta_end
    if scheduler.trained_betas is not None:
        betas = np.asarray(scheduler.trained_betas)
    elif scheduler.beta_schedule == "linear":
        betas = np.linspace(start, end, steps)
    elif scheduler.beta_schedule == "scaled_linear":
        betas = np.linspace(start**0.5, end**0.5, steps) ** 2
    else:  # Nichol & Dhariwal 2021, eq. 17
        squared = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = np.minimum(1 - squared[1:] / squared[:-1], 0.999)
    alphas = np.cumprod(1 - betas)
    if scheduler.rescale_betas_zero_snr:  # Lin et al. 2024, alg. 1
        root = np.sqrt(alphas)
        alphas = (((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2)[:-1]
    return np.log(alphas) - np.log1p(-alphas)


class EDMScheduler(AbstractScheduler):
    """The preconditioning of Karras et al. 2022: x̂ = c_skip x + c_out F(c_in x, ¼ log σ), with α = 1."""

    kinds: ClassVar[tuple[str, ...]] = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
    sigma_min: float = eqx.field(static=True, default=0.002)
    sigma_max: float = eqx.field(static=True, default=80.0)
    sigma_data: float = eqx.field(static=True, default=0.5)
    prediction_type: Literal["epsilon", "v_prediction"] = eqx.field(static=True, default="epsilon")

    def __check_init__(self) -> None:
        _check("prediction_type", self.prediction_type, ("epsilon", "v_prediction"))

    @property
    def std(self) -> float:
        return self.sigma_data

    @property
    def ends(self) -> tuple[float, float]:
        return -2 * math.log(self.sigma_max), -2 * math.log(self.sigma_min)

    def schedule(self, log_snr_min: float, log_snr_max: float) -> VarianceExploding:
        return VarianceExploding(log_snr_min, log_snr_max)

    def timestep(self, log_snr: Float[Array, ""]) -> Float[Array, ""]:
        return -log_snr / 8  # log σ = −λ/2

    def noise(
        self, x_noisy: Float[Array, "*event"], out: Float[Array, "*event"], log_snr: Float[Array, ""]
    ) -> Float[Array, "*event"]:
        sigma = jnp.exp(-0.5 * log_snr)
        variance = sigma**2 + self.sigma_data**2
        sign = 1 if self.prediction_type == "epsilon" else -1
        return sigma / variance * x_noisy - sign * self.sigma_data / jnp.sqrt(variance) * out


class FlowScheduler(AbstractScheduler):
    """Flow matching: x_s = (1 − s) x + s ε, and F = ε − x, at the time step s T. Then λ = 2 log((1 − s)/s).

    The range leaves out s = 1, where λ is infinite: s goes from the first of T steps to the last but one.
    """

    kinds: ClassVar[tuple[str, ...]] = ("FlowMatchEulerDiscreteScheduler",)
    num_train_timesteps: int = eqx.field(static=True, default=1000)
    shift: float = eqx.field(static=True, default=1.0)
    std: float = eqx.field(static=True, default=1.0)

    @property
    def ends(self) -> tuple[float, float]:
        steps = np.array([1 - 1 / self.num_train_timesteps, 1 / self.num_train_timesteps])
        shifted = self.shift * steps / (1 + (self.shift - 1) * steps)
        low, high = 2 * np.log((1 - shifted) / shifted)
        return float(low), float(high)

    def schedule(self, log_snr_min: float, log_snr_max: float) -> VariancePreserving:
        return VariancePreserving(log_snr_min, log_snr_max)

    def timestep(self, log_snr: Float[Array, ""]) -> Float[Array, ""]:
        return jax.nn.sigmoid(-0.5 * log_snr) * self.num_train_timesteps

    def factor(self, log_snr: Float[Array, ""]) -> Float[Array, ""]:
        return jnp.hypot(jax.nn.sigmoid(0.5 * log_snr), jax.nn.sigmoid(-0.5 * log_snr))

    def noise(
        self, x_noisy: Float[Array, "*event"], out: Float[Array, "*event"], log_snr: Float[Array, ""]
    ) -> Float[Array, "*event"]:
        return self.factor(log_snr) * x_noisy + jax.nn.sigmoid(0.5 * log_snr) * out


SCHEDULERS = (DiscreteScheduler, EDMScheduler, FlowScheduler)


def scheduler_of(config: Mapping[str, Any]) -> AbstractScheduler:
    """The noise levels of a `scheduler_config.json`. Raises ValueError, with its name, for what is not supported."""
    kind = config.get("_class_name")
    found = next((made for made in SCHEDULERS if kind in made.kinds), None)
    if found is None:
        names = [name for made in SCHEDULERS for name in made.kinds]
        raise ValueError(f"the scheduler is a {kind}, supported are {', '.join(names)}")
    changed = {"timestep_type": "discrete", "use_flow_sigmas": False, "use_dynamic_shifting": False}
    for name, usual in changed.items():
        if config.get(name, usual) != usual and found is DiscreteScheduler:
            raise ValueError(f"the scheduler has {name} = {config[name]!r}, supported is {usual!r}")
    known = {field.name for field in fields(found)} - {"std"}
    values: dict[str, Any] = {name: config[name] for name in known & config.keys()}
    made: Any = found
    return made(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def _check(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"the scheduler has {name} = {value!r}, supported is {' or '.join(map(repr, allowed))}")
