"""The noise code of an observation: the pure noise from which a deterministic sampler makes it.

The probability flow d(x/σ) = x̂ d(α/σ) is an ordinary differential equation and runs both ways (Song et al. 2021,
*Denoising Diffusion Implicit Models*, sec. 4.3). An observation is taken for x_λmax/α; from λmin to infinite noise the
denoised mean hardly moves any more, and one step of the flow is left, n = (x − α x̂)/σ, which is the noise prediction.
Both ways are exact up to the solver's error, so what z does not say of an image, n does.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sami_ppl.diffusion.denoiser import AbstractDenoiser
from sami_ppl.diffusion.sampler import AbstractSampler

STARTS = 8
"""Iterations for x = σ n + α x̂(x) at λmin; each shrinks the error by Var(x) e^λmin, for images a hundredth."""


def check_deterministic(sampler: AbstractSampler) -> None:
    """Raise ValueError for a sampler that cannot run backwards."""
    if not sampler.deterministic:
        raise ValueError(
            f"sampler must be deterministic to run backwards, got {type(sampler).__name__}: give Heun(101), DPMSolver "
            "or DDIM"
        )


def to_noise(sampler: AbstractSampler, denoiser: AbstractDenoiser, x: Float[Array, "*event"]) -> Float[Array, "*event"]:
    """The noise code of an observation under a denoiser; given z, that of a `GuidedDenoiser`."""
    low, high = _ends(denoiser, x)
    noisy = sampler.carry(denoiser, denoiser.schedule.alpha(high) * x, high, low, jax.random.key(0))
    return denoiser(noisy, low)


def from_noise(
    sampler: AbstractSampler, denoiser: AbstractDenoiser, noise: Float[Array, "*event"]
) -> Float[Array, "*event"]:
    """The observation of a noise code."""
    low, high = _ends(denoiser, noise)
    alpha, start = denoiser.schedule.alpha(low), denoiser.schedule.sigma(low) * denoiser.only_seen(noise)
    noisy = jax.lax.fori_loop(0, STARTS, lambda _, x: start + alpha * denoiser.x_hat(x, low), start)
    return sampler.carry(denoiser, noisy, low, high, jax.random.key(0)) / denoiser.schedule.alpha(high)


def _ends(denoiser: AbstractDenoiser, x: Array) -> tuple[Array, Array]:
    schedule = denoiser.schedule
    return jnp.asarray(schedule.log_snr_min, x.dtype), jnp.asarray(schedule.log_snr_max, x.dtype)
