"""The exact model of a direction: x = W u + noise with WᵀW = c² I, whose posterior is von Mises(–Fisher)."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
from scipy import special

import sami_ppl as sp
from sami_ppl.diffusion.denoiser import AbstractDenoiser
from sami_ppl.diffusion.schedule import AbstractSchedule
from sami_ppl.encoders.encoder import AbstractEncoder
from sami_ppl.encoders.law import CodeLaw, WholeLaw

NOISE, SIZE = 0.5, 1.0
PRIOR = {2: 1.5, 3: 0.0}
"""Concentration of the prior along the first axis."""


def log_normaliser(k, dim):
    """Of exp(⟨k, u⟩) over the circle or the sphere, by ‖k‖."""
    k = jnp.maximum(k, 1e-4)
    if dim == 2:
        return jnp.log(2 * jnp.pi * jax.scipy.special.i0e(k)) + k
    return jnp.log(4 * jnp.pi) + k + jnp.log(-jnp.expm1(-2 * k) / (2 * k))


class VonMises(dist.Distribution):
    """Density exp(⟨k, u⟩) of unit vectors u, normalised."""

    support = dist.constraints.real_vector
    arg_constraints: ClassVar[dict] = {}
    pytree_data_fields = ("k",)

    def __init__(self, k):
        self.k = k
        super().__init__(k.shape[:-1], k.shape[-1:], validate_args=False)

    @property
    def mean(self):
        length = jnp.sqrt(jnp.sum(self.k**2, -1) + 1e-12)
        slope = jnp.vectorize(jax.grad(lambda k: log_normaliser(k, self.k.shape[-1])))(length)
        return slope[..., None] * self.k / length[..., None]

    @property
    def variance(self):
        # Not asked for by itself in what is tested: of the right size.
        return jnp.broadcast_to((1 - jnp.sum(self.mean**2, -1, keepdims=True)) / self.k.shape[-1], self.k.shape)

    def sample(self, key, sample_shape=()):
        """By weights of many uniform directions: exact enough for a start."""
        one = lambda key, k: _by_weights(key, k)  # noqa: E731
        for _ in range(len(self.batch_shape)):
            one = jax.vmap(one)
        draw = lambda key: one(jax.random.split(key, self.batch_shape), self.k)  # noqa: E731
        for _ in sample_shape:
            draw = jax.vmap(draw)
        return draw(jax.random.split(key, sample_shape) if sample_shape else key)

    def log_prob(self, value, intermediates=None):
        length = jnp.sqrt(jnp.sum(self.k**2, -1) + 1e-12)
        return jnp.sum(self.k * value, -1) - log_normaliser(length, self.k.shape[-1])


def _by_weights(key, k):
    v = jax.random.normal(key, (256, len(k)))
    u = v / jnp.linalg.norm(v, axis=-1, keepdims=True)
    return u[jax.random.categorical(jax.random.fold_in(key, 1), u @ k)]


class Model(eqx.Module):
    """z uniform or von Mises, x = W u + N(0, s² I)."""

    weights: jax.Array
    schedule: AbstractSchedule

    def concentration_at(self, x_noisy, log_snr):
        alpha, sigma = self.schedule.alpha(log_snr), self.schedule.sigma(log_snr)
        dim = self.weights.shape[1]
        first = PRIOR[dim] * jnp.eye(dim)[0]
        return first + alpha * (self.weights.T @ x_noisy) / (alpha**2 * NOISE**2 + sigma**2)

    def log_noisy(self, x_noisy, log_snr):
        """log p(x_λ) but for what x_λ does not change."""
        alpha, sigma = self.schedule.alpha(log_snr), self.schedule.sigma(log_snr)
        k = self.concentration_at(x_noisy, log_snr)
        length = jnp.sqrt(jnp.sum(k**2) + 1e-12)
        return log_normaliser(length, len(k)) - 0.5 * jnp.sum(x_noisy**2) / (alpha**2 * NOISE**2 + sigma**2)

    def concentration(self, x):
        """Of the exact posterior of clean observations, (obs, dim)."""
        dim = self.weights.shape[1]
        return PRIOR[dim] * np.eye(dim)[0] + np.asarray(x) @ np.asarray(self.weights) / NOISE**2

    def resultant(self, k):
        """Length of the mean of a direction of concentration k."""
        if self.weights.shape[1] == 2:
            return special.ive(1, k) / special.ive(0, k)
        return 1 / np.tanh(k) - 1 / k

    def sample(self, count):
        rng = np.random.default_rng(3)
        u = rng.normal(size=(count, self.weights.shape[1]))
        u /= np.linalg.norm(u, axis=1, keepdims=True)
        return (u @ np.asarray(self.weights).T + NOISE * rng.normal(size=(count, 4))).astype(np.float32)


class Denoiser(AbstractDenoiser):
    """−σ ∇ log p(x_λ)."""

    model: Model
    event_shape: tuple = (4,)

    @property
    def schedule(self):
        return self.model.schedule

    def __call__(self, x_noisy, log_snr):
        return -self.schedule.sigma(log_snr) * jax.grad(self.model.log_noisy)(x_noisy, log_snr)


class Encoder(AbstractEncoder):
    """The exact noisy posterior as guidance; as a guide, of half the concentration."""

    model: Model
    event_shape: tuple = (4,)

    @property
    def schedule(self):
        return self.model.schedule

    @property
    def latent_size(self):
        return self.model.weights.shape[1]

    def parameters(self, x_noisy, log_snr) -> Any:
        return self.model.concentration_at(x_noisy, log_snr)

    def distribution(self, parameters) -> CodeLaw:
        return WholeLaw(VonMises(parameters))

    def law(self, x):
        return self.distribution(0.5 * self.parameters(*self.clean(x)))

    def guide(self, x, prior):
        return self.distribution(0.5 * jax.vmap(lambda x: self.parameters(*self.clean(x)))(x))


def circle():
    numpyro.sample("place", dist.VonMises(0.0, PRIOR[2]))


def sphere():
    numpyro.sample("place", dist.ProjectedNormal(jnp.zeros(3)))


def oracle(dim):
    """The program of a direction in `dim` dimensions, its guide too wide, and the exact model."""
    columns = np.linalg.qr(np.random.default_rng(1).normal(size=(4, dim)))[0] * SIZE
    model = Model(jnp.asarray(columns, jnp.float32), sp.VariancePreserving(-10.0, 9.0))
    return sp.Program({2: circle, 3: sphere}[dim], Denoiser(model), Encoder(model)), model
