"""Samplers: reverse diffusion with any denoiser, guided or not.

With ℓ = λ/2 and h = ℓ_s − ℓ_t > 0, one step from the noise level t to the cleaner one s goes in one direction D,

    x_s = (σ_s/σ_t) x_t − α_s (e^{−h} − 1) D                                                (deterministic)
    x_s = (σ_s/σ_t) e^{−h} x_t − α_s (e^{−2h} − 1) D + σ_s √(1 − e^{−2h}) n,    n ~ N(0, I)      (stochastic)

and is exact where D is the denoised mean x̂ all along the step. What a sampler takes for D makes the difference:

    D                                                        deterministic      stochastic
    x̂(x_t)                                                   DDIM               Ancestral
    (1 + 1/(2r)) x̂_i − x̂_{i−1}/(2r),   r = h_{i−1}/h_i       DPMSolver          StochasticDPMSolver
    x̂(x_t) + (e^h/2) (x̂(x_s by DDIM) − x̂(x_t))               Heun

The first row is of order 1, the others of order 2: for deterministic samplers the order of the sample's error, for
stochastic ones, on Gaussians, that of its variance (their mean is exact). Every sampler starts from a Gaussian at λmin,
which `FromPureNoise` corrects, and ends by returning the denoised mean at λmax.
"""

import abc
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from sami_ppl._util.keys import check_key
from sami_ppl.diffusion.denoiser import AbstractDenoiser
from sami_ppl.diffusion.schedule import AbstractSchedule


class AbstractSampler(eqx.Module):
    """Reverse diffusion in `evaluations` calls of the denoiser, on noise levels evenly spaced in λ.

    `init` and `step` are the unbatched core; `sample` runs the loop. Batches go through `jax.vmap`. Raises ValueError
    for a number of evaluations that steps of `evaluations_per_step` and one last denoising do not add up to.
    """

    evaluations: eqx.AbstractVar[int]
    evaluations_per_step: ClassVar[int] = 1
    deterministic: ClassVar[bool] = False
    """Whether it draws nothing but its start, so that it runs backwards too."""

    def __check_init__(self) -> None:
        cost = self.evaluations_per_step
        if self.evaluations <= cost or (self.evaluations - 1) % cost:
            raise ValueError(
                f"evaluations must be {cost} for each step, at least one step, and 1 for the last denoising "
                f"({cost + 1}, {2 * cost + 1}, {3 * cost + 1}, ...), got {self.evaluations}"
            )

    @property
    def coupled(self) -> "AbstractSampler":
        """The sampler to take where samples of several codes have the same noise: they move smoothly with the code."""
        return self

    def init(self, x: Float[Array, "*event"]) -> Any:
        """What the sampler carries from step to step beside x; nothing by default."""
        return ()

    @abc.abstractmethod
    def step(
        self,
        denoiser: AbstractDenoiser,
        x: Float[Array, "*event"],
        log_snr: Float[Array, ""],
        next_log_snr: Float[Array, ""],
        state: Any,
        key: Key[Array, ""],
    ) -> tuple[Float[Array, "*event"], Any]:
        """From x at `log_snr` to x at `next_log_snr`, in `evaluations_per_step` calls of the denoiser."""

    def sample(
        self, denoiser: AbstractDenoiser, key: Key[Array, ""], start: Float[Array, "*event"] | None = None
    ) -> Float[Array, "*event"]:
        """One sample of the denoiser's `event_shape`, NaN where nothing was ever seen.

        `start` replaces the Gaussian draw at λmin.
        """
        check_key(key)
        schedule = denoiser.schedule
        start_key, noise_key = jax.random.split(key)
        if start is None:
            start = jnp.sqrt(schedule.reference_variance()) * jax.random.normal(start_key, denoiser.event_shape)
        start = denoiser.only_seen(start)
        low, high = (jnp.asarray(end, start.dtype) for end in (schedule.log_snr_min, schedule.log_snr_max))
        return denoiser.x_hat(self.carry(denoiser, start, low, high, noise_key), high)

    def carry(
        self,
        denoiser: AbstractDenoiser,
        x: Float[Array, "*event"],
        log_snr: Float[Array, ""],
        to_log_snr: Float[Array, ""],
        key: Key[Array, ""],
    ) -> Float[Array, "*event"]:
        """From x at one noise level to another; towards more noise too, if the sampler is deterministic."""
        check_key(key)
        steps = (self.evaluations - 1) // self.evaluations_per_step
        levels = jnp.linspace(log_snr, to_log_snr, steps + 1)

        def body(carry: tuple, level: tuple) -> tuple[tuple, None]:
            x, state = carry
            log_snr, next_log_snr, step_key = level
            return self.step(denoiser, x, log_snr, next_log_snr, state, step_key), None

        keys = jax.random.split(key, steps)
        (x, _), _ = jax.lax.scan(body, (x, self.init(x)), (levels[:-1], levels[1:], keys))
        return x


class DDIM(AbstractSampler):
    """Deterministic sampler of order 1 (Song et al. 2021)."""

    evaluations: int = eqx.field(static=True, default=50)
    deterministic: ClassVar[bool] = True

    def step(self, denoiser, x, log_snr, next_log_snr, state, key):
        direction = denoiser.x_hat(x, log_snr)
        return _deterministic_step(denoiser.schedule, x, direction, log_snr, next_log_snr), state


class DPMSolver(AbstractSampler):
    """DPM-Solver++(2M): deterministic, multistep, of order 2 (Lu et al. 2022, algorithm 2)."""

    evaluations: int = eqx.field(static=True, default=50)
    deterministic: ClassVar[bool] = True

    def init(self, x: Float[Array, "*event"]) -> Any:
        return _no_memory(x)

    def step(self, denoiser, x, log_snr, next_log_snr, state, key):
        direction, state = extrapolate(denoiser.x_hat(x, log_snr), next_log_snr - log_snr, state)
        return _deterministic_step(denoiser.schedule, x, direction, log_snr, next_log_snr), state


class Heun(AbstractSampler):
    """Heun's method: deterministic, of order 2, two evaluations a step (Karras et al. 2022, algorithm 1).

    With X = x/α and τ = σ/α the probability flow is dX = ε̂ dτ, ε̂ = (X − x̂)/τ, for any schedule. DDIM is its Euler step
    to X̃; the trapezoidal rule ½(ε̂ + ε̃) adds ½(τ_s − τ_t)(ε̃ − ε̂) = ½(τ_t/τ_s − 1)(x̂(X̃) − x̂) to X̃, which makes the
    direction above. For steps of h ≫ ln 2 it goes beyond x̂(X̃): below some twenty evaluations `DPMSolver` is safer.
    """

    evaluations: int = eqx.field(static=True, default=51)
    evaluations_per_step: ClassVar[int] = 2
    deterministic: ClassVar[bool] = True

    def step(self, denoiser, x, log_snr, next_log_snr, state, key):
        x_hat = denoiser.x_hat(x, log_snr)
        predicted = _deterministic_step(denoiser.schedule, x, x_hat, log_snr, next_log_snr)
        weight = 0.5 * jnp.exp(0.5 * (next_log_snr - log_snr))
        direction = x_hat + weight * (denoiser.x_hat(predicted, next_log_snr) - x_hat)
        return _deterministic_step(denoiser.schedule, x, direction, log_snr, next_log_snr), state


class Ancestral(AbstractSampler):
    """Stochastic sampler: each step draws from q(x_s | x_t, x = x̂) (Ho et al. 2020; Kingma et al. 2021, eq. 9).

    The fresh noise corrects errors of the guidance at high noise, which deterministic samplers carry to the end.
    """

    evaluations: int = eqx.field(static=True, default=50)

    def step(self, denoiser, x, log_snr, next_log_snr, state, key):
        direction = denoiser.x_hat(x, log_snr)
        return _drawn(denoiser.schedule, x, direction, log_snr, next_log_snr, key), state


class StochasticDPMSolver(AbstractSampler):
    """SDE-DPM-Solver++(2M): `Ancestral` with the extrapolated denoised mean of `DPMSolver` (Lu et al. 2022, eq. 19)."""

    evaluations: int = eqx.field(static=True, default=50)

    def init(self, x: Float[Array, "*event"]) -> Any:
        return _no_memory(x)

    def step(self, denoiser, x, log_snr, next_log_snr, state, key):
        direction, state = extrapolate(denoiser.x_hat(x, log_snr), next_log_snr - log_snr, state)
        return _drawn(denoiser.schedule, x, direction, log_snr, next_log_snr, key), state


class FromPureNoise(AbstractSampler):
    """Another sampler, begun at infinite noise instead of at λmin, for two evaluations more.

    Samplers start from N(0, α² + σ²) at λmin, as if x had mean 0 and variance 1 in every direction. Along a principal
    component of variance V ≫ 1, such as the brightness of images, x_λ has the variance α²V + σ². Stochastic samplers
    forget most of the difference, deterministic ones keep it to the end.

    The probability flow d(x/σ) = x̂ d(α/σ) starts at α/σ = 0 from pure noise, x/σ = n, where x̂ is the mean of the data.
    Up to λmin it is one step of the trapezoidal rule, with ½(x̂(n) + x̂(−n)) for that mean:

        x = σ n + α (¾ x̂(n) + ¼ x̂(−n)).
    """

    sampler: AbstractSampler

    @property
    def evaluations(self) -> int:
        return self.sampler.evaluations + 2

    @property
    def deterministic(self) -> bool:
        return self.sampler.deterministic

    def init(self, x: Float[Array, "*event"]) -> Any:
        return self.sampler.init(x)

    def step(self, denoiser, x, log_snr, next_log_snr, state, key):
        return self.sampler.step(denoiser, x, log_snr, next_log_snr, state, key)

    def carry(self, denoiser, x, log_snr, to_log_snr, key):
        return self.sampler.carry(denoiser, x, log_snr, to_log_snr, key)

    def sample(self, denoiser, key, start=None):
        if start is None:
            schedule, log_snr = denoiser.schedule, jnp.asarray(denoiser.schedule.log_snr_min, jnp.result_type(float))
            noise = denoiser.only_seen(jax.random.normal(jax.random.split(key)[0], denoiser.event_shape))
            scale = jnp.sqrt(schedule.reference_variance())
            own, opposite = (denoiser.x_hat(sign * scale * noise, log_snr) for sign in (1, -1))
            start = schedule.sigma(log_snr) * noise + schedule.alpha(log_snr) * (0.75 * own + 0.25 * opposite)
        return self.sampler.sample(denoiser, key, start)


def _deterministic_step(
    schedule: AbstractSchedule, x: Array, direction: Array, log_snr: Array, next_log_snr: Array
) -> Array:
    shrink = schedule.sigma(next_log_snr) / schedule.sigma(log_snr)
    return shrink * x - schedule.alpha(next_log_snr) * jnp.expm1(0.5 * (log_snr - next_log_snr)) * direction


def stochastic_step(
    schedule: AbstractSchedule, x: Array, direction: Array, log_snr: Array, next_log_snr: Array
) -> tuple[Array, Array]:
    """Mean and standard deviation of the Gaussian from which a stochastic sampler draws its next x."""
    gain = -jnp.expm1(log_snr - next_log_snr)
    alpha, next_alpha = schedule.alpha(log_snr), schedule.alpha(next_log_snr)
    # (σ_s/σ_t) e^{−h} = (α_s/α_t) e^{−2h}
    mean = (1 - gain) * next_alpha / alpha * x + gain * next_alpha * direction
    return mean, jnp.sqrt(gain) * schedule.sigma(next_log_snr)


def _drawn(
    schedule: AbstractSchedule, x: Array, direction: Array, log_snr: Array, next_log_snr: Array, key: Key[Array, ""]
) -> Array:
    mean, spread = stochastic_step(schedule, x, direction, log_snr, next_log_snr)
    return mean + spread * jax.random.normal(key, x.shape, x.dtype)


def _no_memory(x: Array) -> tuple[Array, Array]:
    """The denoised mean of the step before and that step's length in λ; a length of 0 marks the first step."""
    return jnp.zeros_like(x), jnp.zeros(())


def extrapolate(x_hat: Array, length: Array, memory: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
    """The denoised mean extrapolated to the middle of the step, and the new memory."""
    before, length_before = memory
    is_first = length_before == 0
    share = jnp.where(is_first, 0.0, length / (2 * jnp.where(is_first, 1.0, length_before)))
    return x_hat + share * (x_hat - before), (x_hat, length)
