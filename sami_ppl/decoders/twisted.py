"""Samples given a code, from several guided ones by weights that make up for the guidance: twisted Monte Carlo.

Guidance makes of the denoiser's model p(x) one of p(x | z) ∝ p(x) q(z | x). With noisy posteriors that are the exact
ones it does so exactly. Those of an encoder are not: at high noise they are of a family, and a sample that went to the
wrong place early stays there. So K particles go down together, guided as before, and are weighed by what they should
have been. With u the denoiser's own step and g the guided one, both Gaussian with the same variance,

    w ← w · u(x_s | x_t) / g(x_s | x_t) · q(z | x_s, s) / q(z | x_t, t),

and where few of them hold most of the weight they are drawn anew by it (resampling). For any noisy posteriors the last
weights are those of p(x) q(z | x) at the clean end, and one of the particles is drawn by them: exact as K grows, and
for K = 1 what guidance alone gives (Wu et al. 2023, *Practical and Asymptotically Exact Conditional Sampling in
Diffusion Models*, arXiv 2306.17775).
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from sami_ppl._util.keys import check_key
from sami_ppl.decoders.guidance import GuidedDenoiser
from sami_ppl.diffusion.denoiser import AbstractDenoiser
from sami_ppl.diffusion.sampler import AbstractSampler, StochasticDPMSolver, extrapolate, stochastic_step
from sami_ppl.encoders.frames import FramewiseDenoiser, FramewiseEncoder


class TwistedSampler(AbstractSampler):
    """`StochasticDPMSolver` with `particles` K of each sample, which is one of them by weight: K times its work.

        program = program.replace(sampler=sp.TwistedSampler(20, particles=4))

    Of guided decoders; what has no noisy posteriors, a denoiser without a code or one that takes it itself, is sampled
    as `StochasticDPMSolver` does. Raises ValueError for fewer than one particle, and as every sampler does.
    """

    evaluations: int = eqx.field(static=True, default=20)
    particles: int = eqx.field(static=True, default=4)

    def __check_init__(self) -> None:
        if self.particles < 1:
            raise ValueError(f"particles must be at least 1, got {self.particles}: 4 go a long way")

    @property
    def coupled(self) -> StochasticDPMSolver:
        """Guidance alone: which particle is taken would change from one code to the next."""
        return StochasticDPMSolver(self.evaluations)

    def init(self, x: Float[Array, "*event"]) -> Any:
        return self.coupled.init(x)

    def step(self, denoiser, x, log_snr, next_log_snr, state, key):
        return self.coupled.step(denoiser, x, log_snr, next_log_snr, state, key)

    def sample(
        self, denoiser: AbstractDenoiser, key: Key[Array, ""], start: Float[Array, "*event"] | None = None
    ) -> Float[Array, "*event"]:
        """One sample; `start` replaces the Gaussian draws at λmin, the same one for all particles."""
        check_key(key)
        if not isinstance(denoiser, GuidedDenoiser):
            return self.coupled.sample(denoiser, key, start)
        if isinstance(denoiser.denoiser, FramewiseDenoiser) and isinstance(denoiser.encoder, FramewiseEncoder):
            return self._frames(denoiser.denoiser, denoiser.encoder, denoiser.z, key, start)
        start_key, path_key, choice_key = jax.random.split(key, 3)
        schedule, shape = denoiser.schedule, (self.particles, *denoiser.event_shape)
        if start is None:
            x = jnp.sqrt(schedule.reference_variance()) * jax.random.normal(start_key, shape)
        else:
            x = jnp.broadcast_to(start, shape)
        x, log_weights, _ = self.population(denoiser, jax.vmap(denoiser.only_seen)(x), path_key)
        chosen = x[jax.random.categorical(choice_key, log_weights)]
        return denoiser.x_hat(chosen, jnp.asarray(schedule.log_snr_max, chosen.dtype))

    def _frames(
        self, denoiser: FramewiseDenoiser, encoder: FramewiseEncoder, z: Array, key: Array, start: Array | None
    ) -> Float[Array, "T *frame"]:
        """Frames, which are independent given their codes: each has particles of its own."""

        def one(z: Array, key: Array, start: Array | None) -> Array:
            return self.sample(GuidedDenoiser(denoiser.frame, encoder.frame, z), key, start)

        count = denoiser.event_shape[0]
        in_axes = (0, 0, None if start is None else 0)
        return jax.vmap(one, in_axes)(z.reshape(count, -1), jax.random.split(key, count), start)

    def population(
        self, denoiser: GuidedDenoiser, x: Float[Array, "K *event"], key: Key[Array, ""]
    ) -> tuple[Float[Array, "K *event"], Float[Array, " K"], Float[Array, " steps"]]:
        """Particles at λmin brought to λmax, their log weights, and the effective number of them before every step."""
        schedule, count, axes = denoiser.schedule, len(x), tuple(range(1, x.ndim))
        levels = jnp.linspace(schedule.log_snr_min, schedule.log_snr_max, self.evaluations).astype(x.dtype)

        def told(x: Array, log_snr: Array) -> tuple[Array, Array]:
            return jax.vmap(jax.value_and_grad(lambda x: denoiser.encoder.log_prob(denoiser.z, x, log_snr)))(x)

        def body(carry: tuple, level: tuple) -> tuple[tuple, Array]:
            x, log_weights, log_q, own_state, guided_state = carry
            log_snr, next_log_snr, step_key = level
            draw_key, noise_key = jax.random.split(step_key)
            now, gradient = told(x, log_snr)
            log_weights = log_weights + now - log_q
            rows, log_weights, effective = _resampled(log_weights, draw_key)
            x, now, gradient, own_state, guided_state = jax.tree.map(
                lambda leaf: leaf[rows], (x, now, gradient, own_state, guided_state)
            )
            alpha, sigma = schedule.alpha(log_snr), schedule.sigma(log_snr)
            own = jax.vmap(lambda x: denoiser.denoiser.x_hat(x, log_snr))(x)
            guided = own + sigma**2 / alpha * gradient
            own, own_state = jax.vmap(extrapolate, (0, None, 0))(own, next_log_snr - log_snr, own_state)
            guided, guided_state = jax.vmap(extrapolate, (0, None, 0))(guided, next_log_snr - log_snr, guided_state)
            noise = jax.random.normal(noise_key, x.shape, x.dtype)
            ahead, spread = stochastic_step(schedule, x, guided, log_snr, next_log_snr)
            alone, _ = stochastic_step(schedule, x, own, log_snr, next_log_snr)
            # log u − log g at ahead + spread · noise
            off = (ahead - alone) / spread
            if denoiser.seen is not None:  # the rest is NaN
                off = jnp.where(denoiser.seen, off, 0)
            log_weights = log_weights - jnp.sum(off * (noise + 0.5 * off), axes)
            return (ahead + spread * noise, log_weights, now, own_state, guided_state), effective

        state = jax.vmap(self.coupled.init)(x)
        keys = jax.random.split(key, self.evaluations - 1)
        begin = (x, jnp.zeros(count, x.dtype), jnp.zeros(count, x.dtype), state, state)
        (x, log_weights, log_q, *_), effective = jax.lax.scan(body, begin, (levels[:-1], levels[1:], keys))
        last = jax.vmap(lambda x: denoiser.encoder.log_prob(denoiser.z, x, levels[-1]))(x)
        return x, log_weights + last - log_q, effective


def _resampled(log_weights: Float[Array, " K"], key: Key[Array, ""]) -> tuple[Array, Array, Array]:
    """Rows to go on with, their log weights, and the effective number; drawn anew where it is below half of all."""
    count = len(log_weights)
    weights = jax.nn.softmax(log_weights)
    effective = 1 / jnp.sum(weights**2)
    # Systematic: one uniform number for all, so that a particle of weight w is taken K w times, rounded up or down.
    position = (jax.random.uniform(key) + jnp.arange(count)) / count
    drawn = jnp.clip(jnp.searchsorted(jnp.cumsum(weights), position), 0, count - 1)
    anew = effective < 0.5 * count
    rows = jnp.where(anew, drawn, jnp.arange(count))
    return rows, jnp.where(anew, jnp.zeros_like(log_weights), log_weights), effective
