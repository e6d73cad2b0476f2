"""Samplers: reverse diffusion with any denoiser, guided or not.

With ℓ = λ/2 and h = ℓ_s − ℓ_t > 0, one step from the noise level t to the cleaner one s is

    x_s = (σ_s/σ_t) x_t − α_s (e^{−h} − 1) D.

D = x̂(x_t) is DDIM (order 1); D = (1 + 1/(2r)) x̂_i − x̂_{i−1}/(2r), r = h_{i−1}/h_i, is DPM-Solver++(2M) (order 2, Lu
et al. 2022). The ancestral sampler draws from the exact posterior of x_s given x_t and x = x̂ (Ho et al. 2020).
Every sampler ends by returning the denoised mean at λmax.
"""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from sami_ppl.denoiser import AbstractDenoiser
from sami_ppl.schedule import AbstractSchedule


class AbstractSampler(eqx.Module):
    """Reverse diffusion in `evaluations` calls of the denoiser, on noise levels evenly spaced in λ.

    `init` and `step` are the unbatched core; `sample` runs the loop. Batches go through `jax.vmap`.
    """

    evaluations: eqx.AbstractVar[int]

    def __check_init__(self) -> None:
        if self.evaluations < 2:
            raise ValueError(
                f"evaluations must be at least 2 (one step and the last denoising), got {self.evaluations}"
            )

    def init(self, x: Float[Array, "*event"]) -> Any:
        """What the sampler carries from step to step beside x; nothing by default."""
        return ()

    @abc.abstractmethod
    def step(
        self,
        schedule: AbstractSchedule,
        x: Float[Array, "*event"],
        x_hat: Float[Array, "*event"],
        log_snr: Float[Array, ""],
        next_log_snr: Float[Array, ""],
        state: Any,
        key: Key[Array, ""],
    ) -> tuple[Float[Array, "*event"], Any]:
        """From x at `log_snr`, with its denoised mean `x_hat`, to x at `next_log_snr`."""

    def sample(
        self, denoiser: AbstractDenoiser, key: Key[Array, ""], start: Float[Array, "*event"] | None = None
    ) -> Float[Array, "*event"]:
        """One sample of the denoiser's `event_shape`; `start` replaces the Gaussian draw at λmin."""
        schedule = denoiser.schedule
        start_key, noise_key = jax.random.split(key)
        if start is None:
            start = jnp.sqrt(schedule.reference_variance()) * jax.random.normal(start_key, denoiser.event_shape)
        levels = jnp.linspace(schedule.log_snr_min, schedule.log_snr_max, self.evaluations)

        def body(carry: tuple, level: tuple) -> tuple[tuple, None]:
            x, state = carry
            log_snr, next_log_snr, step_key = level
            x_hat = denoiser.x_hat(x, log_snr)
            return self.step(schedule, x, x_hat, log_snr, next_log_snr, state, step_key), None

        keys = jax.random.split(noise_key, self.evaluations - 1)
        (x, _), _ = jax.lax.scan(body, (start, self.init(start)), (levels[:-1], levels[1:], keys))
        return denoiser.x_hat(x, levels[-1])


def _exponential_step(
    schedule: AbstractSchedule, x: Array, direction: Array, log_snr: Array, next_log_snr: Array
) -> Array:
    shrink = schedule.sigma(next_log_snr) / schedule.sigma(log_snr)
    return shrink * x - schedule.alpha(next_log_snr) * jnp.expm1(0.5 * (log_snr - next_log_snr)) * direction


class DDIM(AbstractSampler):
    """Deterministic sampler of order 1 (Song et al. 2021)."""

    evaluations: int = eqx.field(static=True, default=50)

    def step(self, schedule, x, x_hat, log_snr, next_log_snr, state, key):
        return _exponential_step(schedule, x, x_hat, log_snr, next_log_snr), state


class DPMSolver(AbstractSampler):
    """DPM-Solver++(2M): deterministic, multistep, of order 2 (Lu et al. 2022)."""

    evaluations: int = eqx.field(static=True, default=50)

    def init(self, x: Float[Array, "*event"]) -> Any:
        """The denoised mean of the step before and its length in ℓ; a length of 0 marks the first step."""
        return jnp.zeros_like(x), jnp.zeros(())

    def step(self, schedule, x, x_hat, log_snr, next_log_snr, state, key):
        before, h_before = state
        h = 0.5 * (next_log_snr - log_snr)
        extrapolation = jnp.where(h_before > 0, h / (2 * jnp.where(h_before > 0, h_before, 1.0)), 0.0)
        direction = x_hat + extrapolation * (x_hat - before)
        return _exponential_step(schedule, x, direction, log_snr, next_log_snr), (x_hat, h)


class Ancestral(AbstractSampler):
    """Stochastic sampler: each step draws from q(x_s | x_t, x = x̂) (Ho et al. 2020; Kingma et al. 2021, eq. 9).

    The fresh noise corrects errors of the guidance at high noise, which deterministic samplers carry to the end.
    """

    evaluations: int = eqx.field(static=True, default=50)

    def step(self, schedule, x, x_hat, log_snr, next_log_snr, state, key):
        gain = -jnp.expm1(log_snr - next_log_snr)
        alpha, next_alpha = schedule.alpha(log_snr), schedule.alpha(next_log_snr)
        mean = (1 - gain) * next_alpha / alpha * x + gain * next_alpha * x_hat
        noise = jax.random.normal(key, x.shape, x.dtype)
        return mean + jnp.sqrt(gain) * schedule.sigma(next_log_snr) * noise, state
