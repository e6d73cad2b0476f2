"""Every kind of continuous prior against quadrature: x = Wθ + s₀ n, θ ~ the prior, of one or two coordinates.

Two computations that share nothing: truth in the space of values, by quantiles of scipy's distributions, and SAMI in
the code z, where the exact noisy posterior is the prior's density there times a Gaussian, normalised on a grid. From
truth come the denoiser, the evidence and E[θ | x]; from the grid the encoder.
"""

from collections.abc import Callable
import functools
import zlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
import pytest
from scipy import stats

from sami_ppl.decoders.bound import bound
from sami_ppl.decoders.guidance import GuidedDenoiser
from sami_ppl.diffusion.denoiser import AbstractDenoiser
from sami_ppl.diffusion.schedule import AbstractSchedule, VariancePreserving
from sami_ppl.encoders.encoder import AbstractEncoder
from sami_ppl.encoders.law import DiagonalLaw
from sami_ppl.priors.read import read_prior
from sami_ppl.program.program import Program
from sami_ppl.refinement.target import log_prior

SCHEDULE = VariancePreserving(-10.0, 10.0)
NOISE = 0.5
SIZE = 3


def site(fn):
    return lambda: numpyro.sample("f", fn)


def several():
    numpyro.sample("place", dist.Normal(1.0, 2.0))
    numpyro.sample("share", dist.Beta(2.0, 3.0))


def chained():
    """The scale of b depends on a."""
    a = numpyro.sample("a", dist.Normal(0.0, 1.0))
    numpyro.sample("b", dist.Normal(a, jnp.exp(0.5 * a)))


def two_modes():
    each = dist.Normal(jnp.array([-2.0, 1.5]), jnp.array([0.5, 0.8]))
    numpyro.sample("f", dist.MixtureSameFamily(dist.Categorical(jnp.array([0.3, 0.7])), each))


# Nodes: values (K, e) and their log weights. Quantiles at Φ(t), t evenly spaced, which resolves tails.
T = np.linspace(-5.5, 5.5, 1001)
U, LOG_WEIGHTS = stats.norm.cdf(T), stats.norm.logpdf(T) + np.log(T[1] - T[0])
FEW = slice(None, None, 8)
ONE, OTHER = (u.ravel() for u in np.meshgrid(U[FEW], U[FEW]))
LOG_PAIRS = np.add(*(w.ravel() for w in np.meshgrid(LOG_WEIGHTS[FEW], LOG_WEIGHTS[FEW]))) + 2 * np.log(8)


def quantiles(law):
    return lambda: (law.ppf(U)[:, None], LOG_WEIGHTS)


def dirichlet_nodes():
    """By broken sticks: θ₁ ~ Beta(2, 7), θ₂/(1 − θ₁) ~ Beta(3, 4)."""
    first = stats.beta(2, 7).ppf(ONE)
    second = (1 - first) * stats.beta(3, 4).ppf(OTHER)
    return np.stack([first, second, 1 - first - second], -1), LOG_PAIRS


def correlation_nodes():
    """(r + 1)/2 ~ Beta(η, η) in two dimensions; L = [[1, 0], [r, √(1 − r²)]]."""
    r = 2 * stats.beta(2, 2).ppf(U) - 1
    return np.stack([np.ones_like(r), np.zeros_like(r), r, np.sqrt(1 - r**2)], -1), LOG_WEIGHTS


def mixture_nodes():
    parts = [stats.norm(-2, 0.5).ppf(U), stats.norm(1.5, 0.8).ppf(U)]
    return np.concatenate(parts)[:, None], np.concatenate([LOG_WEIGHTS + np.log(p) for p in (0.3, 0.7)])


def chained_nodes():
    a = stats.norm.ppf(ONE)
    return np.stack([a, a + np.exp(0.5 * a) * stats.norm.ppf(OTHER)], -1), LOG_PAIRS


def correlated_nodes():
    a = stats.norm.ppf(ONE)
    return np.stack([a, 0.8 * a + 0.6 * stats.norm.ppf(OTHER)], -1), LOG_PAIRS


def several_nodes():
    return np.stack([1 + 2 * stats.norm.ppf(ONE), stats.beta(2, 3).ppf(OTHER)], -1), LOG_PAIRS


COV = jnp.array([[1.0, 0.8], [0.8, 1.0]])
PRIORS: dict[str, tuple[Callable, Callable]] = {
    "normal": (site(dist.Normal(1.0, 2.0)), quantiles(stats.norm(1, 2))),
    "uniform": (site(dist.Uniform(-2.0, 1.0)), quantiles(stats.uniform(-2, 3))),
    "beta": (site(dist.Beta(2.0, 3.0)), quantiles(stats.beta(2, 3))),
    "gamma": (site(dist.Gamma(2.0, 1.5)), quantiles(stats.gamma(2, scale=1 / 1.5))),
    "half normal": (site(dist.HalfNormal(2.0)), quantiles(stats.halfnorm(scale=2))),
    "laplace": (site(dist.Laplace(0.0, 1.0)), quantiles(stats.laplace())),
    "student t": (site(dist.StudentT(5.0)), quantiles(stats.t(5))),
    "lkj": (site(dist.LKJCholesky(2, 2.0)), correlation_nodes),
    "mixture": (two_modes, mixture_nodes),
    "dirichlet": (site(dist.Dirichlet(jnp.array([2.0, 3.0, 4.0]))), dirichlet_nodes),
    "correlated": (site(dist.MultivariateNormal(jnp.zeros(2), COV)), correlated_nodes),
    "several sites": (several, several_nodes),
    "chained": (chained, chained_nodes),
}
BENT = ("uniform", "beta", "gamma", "half normal", "lkj", "dirichlet", "several sites")
"""Priors whose bijection to the code has a Jacobian that is not constant."""


def log_normal(x, mean, variance):
    return -0.5 * jnp.sum((x - mean) ** 2, -1) / variance - 0.5 * SIZE * jnp.log(2 * jnp.pi * variance)


class NodeDenoiser(AbstractDenoiser):
    """−σ ∇ log p(x_λ), p(x_λ) the mean over nodes of N(αWθ, (α²s₀² + σ²)I)."""

    at: jax.Array
    log_weights: jax.Array
    schedule: AbstractSchedule
    event_shape: tuple[int, ...] = (SIZE,)

    def log_prob(self, x_noisy, log_snr):
        alpha, sigma = self.schedule.alpha(log_snr), self.schedule.sigma(log_snr)
        each = log_normal(x_noisy, alpha * self.at, alpha**2 * NOISE**2 + sigma**2)
        return jax.nn.logsumexp(self.log_weights + each)

    def __call__(self, x_noisy, log_snr):
        return -self.schedule.sigma(log_snr) * jax.grad(self.log_prob)(x_noisy, log_snr)


class GridEncoder(AbstractEncoder):
    """p(z | x_λ) on a grid of codes. `wrong`: the likelihood's variance doubled, or the Jacobian left out."""

    means: Callable = eqx.field(static=True)
    prior: Callable = eqx.field(static=True)
    grid: jax.Array
    log_p: jax.Array
    log_cell: float = eqx.field(static=True)
    schedule: AbstractSchedule
    latent_size: int = eqx.field(static=True)
    wrong: str = eqx.field(static=True)
    event_shape: tuple[int, ...] = eqx.field(static=True, default=(SIZE,))

    def likelihood(self, means, x_noisy, log_snr):
        alpha, sigma = self.schedule.alpha(log_snr), self.schedule.sigma(log_snr)
        variance = (alpha**2 * NOISE**2 + sigma**2) * (2 if self.wrong == "variance" else 1)
        return log_normal(x_noisy, alpha * means, variance)

    def log_weights(self, x_noisy, log_snr):
        """Log probability of every cell, and the logarithm of their sum before."""
        joint = self.log_p + self.likelihood(self.means(self.grid), x_noisy, log_snr) + self.log_cell
        total = jax.nn.logsumexp(joint)
        return joint - total, total

    def log_prob(self, z, x_noisy, log_snr):
        joint = self.prior(z) + self.likelihood(self.means(z), x_noisy, log_snr)
        return joint - self.log_weights(x_noisy, log_snr)[1]

    def parameters(self, x_noisy, log_snr):
        """Moments, as of a guide; the density itself is `log_prob`."""
        weight = jnp.exp(self.log_weights(x_noisy, log_snr)[0])
        mean = weight @ self.grid
        return mean, jnp.sqrt(weight @ (self.grid - mean) ** 2)

    def distribution(self, parameters):
        return DiagonalLaw(*parameters)

    def draw(self, key, x):
        """A draw of the clean posterior: a cell, and a place in it."""
        cell_key, place_key = jax.random.split(key)
        cell = jax.random.categorical(cell_key, self.log_weights(*self.clean(x))[0])
        step = jnp.exp(self.log_cell / self.latent_size)
        return self.grid[cell] + step * jax.random.uniform(place_key, (self.latent_size,), minval=-0.5, maxval=0.5)


@functools.cache
def build(name, wrong=""):
    """Program with exact networks."""
    prior, nodes = PRIORS[name]
    latents, (values, log_weights) = read_prior(prior), nodes()
    weights = np.random.default_rng(zlib.crc32(name.encode())).normal(size=(SIZE, values.shape[1]))
    weights = jnp.asarray(weights / weights.std(), jnp.float32)

    def means(z):
        found = latents.from_code(z)
        flat = [found[s.name].reshape(*z.shape[:-1], -1) for s in latents.sites]
        return jnp.concatenate(flat, -1) @ weights.T

    def density(z):
        total = log_prior(program, z)
        if wrong == "jacobian":
            for s in latents.sites:
                u = (jnp.asarray(s.shift) + jnp.asarray(s.scale) * z[s.code]).astype(z.dtype)
                u = u.reshape(s.unconstrained_shape)
                total = total - jnp.sum(s.transform.log_abs_det_jacobian(u, s.transform(u)))
        return total

    count, reach = (1201, 12.0) if latents.size == 1 else (121, 7.0)
    line = jnp.linspace(-reach, reach, count)
    grid = jnp.stack([g.ravel() for g in jnp.meshgrid(*[line] * latents.size)], -1)
    log_cell = latents.size * float(np.log(2 * reach / (count - 1)))
    at, log_weights = (jnp.asarray(a, jnp.float32) for a in (values, log_weights))
    denoiser = NodeDenoiser(at @ weights.T, log_weights, SCHEDULE)
    plain = dict(grid=grid, log_cell=log_cell, schedule=SCHEDULE, latent_size=latents.size, wrong=wrong, means=means)
    program = Program(prior, denoiser, GridEncoder(log_p=jnp.zeros(len(grid)), prior=density, **plain))
    encoder = GridEncoder(log_p=jax.jit(jax.vmap(density))(grid), prior=density, **plain)
    return program.replace(encoder=encoder)


def observations(name, count):
    denoiser, rng = build(name).denoiser, np.random.default_rng(0)
    weights = np.exp(np.asarray(denoiser.log_weights, float))
    x = np.asarray(denoiser.at)[rng.choice(len(weights), count, p=weights / weights.sum())]
    return jnp.asarray(x + NOISE * rng.normal(size=x.shape), jnp.float32)


def evidence_gap(name, wrong, count=400):
    """Bound − (−log p(x)) of single observations, one noise level, draw and ε each.

    The error of the exact conditional denoiser at the same noise is subtracted and its mean, which gives
    −log p(x | z) = −log N(x; Wθ, s₀²I) (tests of the bound), added: all but what differs cancels.
    """
    program = build(name, wrong)
    denoiser, encoder = program.denoiser, program.encoder
    x = observations(name, count)
    levels, weight = SCHEDULE.stratified(jax.random.key(1), count)

    @jax.jit
    @jax.vmap
    def one(x, level, weight, key):
        z_key, eps_key = jax.random.split(key)
        z = encoder.draw(z_key, x)
        eps = jax.random.normal(eps_key, x.shape)
        found = bound(denoiser, encoder, x, z, level, weight, eps).diffusion
        alpha, sigma = SCHEDULE.alpha(level), SCHEDULE.sigma(level)
        x_noisy, mean = SCHEDULE.add_noise(x, level, eps), encoder.means(z)
        exact = sigma * (x_noisy - alpha * mean) / (alpha**2 * NOISE**2 + sigma**2)
        diffusion = found - 0.5 * weight * jnp.sum((eps - exact) ** 2)
        kl = encoder.log_prob(z, *encoder.clean(x)) - log_prior(program, z)
        evidence = jax.nn.logsumexp(denoiser.log_weights + log_normal(x, denoiser.at, NOISE**2))
        return diffusion - log_normal(x, mean, NOISE**2) + kl + evidence

    return np.asarray(one(x, levels, weight, jax.random.split(jax.random.key(2), count)))


@pytest.mark.slow
@pytest.mark.parametrize("name", PRIORS)
def test_guided_denoiser_is_that_of_the_conditional(name):
    """ε_θ − σ ∇ log q(z | x_λ) = −σ (αWθ − x_λ)/(α²s₀² + σ²) at codes of any value; the Jacobian cannot be left out."""
    program = build(name)
    x, z = observations(name, 20), jax.random.normal(jax.random.key(3), (20, program.latents.size))

    def error(program, level):
        alpha, sigma = SCHEDULE.alpha(level), SCHEDULE.sigma(level)
        x_noisy = alpha * x + sigma * jax.random.normal(jax.random.key(4), x.shape)
        guided = jax.vmap(lambda z, x: GuidedDenoiser(program.denoiser, program.encoder, z)(x, level))
        exact = sigma * (x_noisy - alpha * program.encoder.means(z)) / (alpha**2 * NOISE**2 + sigma**2)
        return np.abs(jax.jit(guided)(z, x_noisy) - exact).max()

    levels = jnp.array([-2.0, 0.0, 3.0])
    found = [float(error(program, level)) for level in levels]
    assert max(found) < 0.02, found
    for wrong in ("variance", "jacobian") if name in BENT else ("variance",):
        assert max(error(build(name, wrong), level) for level in levels) > 0.05, wrong


@pytest.mark.slow
@pytest.mark.parametrize("name", PRIORS)
def test_bound_with_the_exact_posterior_is_the_evidence(name):
    """Bayes' rule, so for every observation and not in the mean alone: root mean square below .15 nats, mean below .02.

    With a wrong family it is nats off.
    """
    gap = evidence_gap(name, "")
    rms = np.sqrt(np.mean(gap**2))
    assert rms < 0.15
    assert abs(gap.mean()) < 0.02
    for wrong in ("variance", "jacobian") if name in BENT else ("variance",):
        assert np.sqrt(np.mean(evidence_gap(name, wrong) ** 2)) > max(0.5, 5 * rms), wrong


@pytest.mark.slow
@pytest.mark.parametrize("name", PRIORS)
def test_posterior_means_are_those_of_the_nodes(name):
    """E[Wθ | x] on the grid of codes and over the nodes, to .02."""
    program = build(name)
    x = observations(name, 20)
    level = jnp.asarray(30.0)  # no noise but the model's own

    def means(program):
        encoder = program.encoder
        log_weights, _ = jax.vmap(lambda x: encoder.log_weights(SCHEDULE.alpha(level) * x, level))(x)
        return jnp.exp(log_weights) @ encoder.means(encoder.grid)

    at, log_p = program.denoiser.at, program.denoiser.log_weights
    log_weights = jax.nn.log_softmax(jax.vmap(lambda x: log_p + log_normal(x, at, NOISE**2))(x), -1)
    exact = np.asarray(jnp.exp(log_weights) @ at)
    np.testing.assert_allclose(means(program), exact, atol=0.02)
    for wrong in ("variance", "jacobian") if name in BENT else ("variance",):
        assert np.abs(means(build(name, wrong)) - exact).max() > 0.04, wrong
