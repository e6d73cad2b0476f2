"""Samplers on Gaussians: order of convergence, and the distribution of what comes out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from sami_ppl.denoiser import GaussianDenoiser
from sami_ppl.guidance import GuidedDenoiser
from sami_ppl.sampler import DDIM, Ancestral, DPMSolver
from sami_ppl.schedule import VarianceExploding, VariancePreserving

SCHEDULES = [VariancePreserving(-4.0, 4.0), VarianceExploding(-4.0, 4.0)]
VARIANCES = np.array([2.0, 0.3, 0.05])
MEAN = np.array([0.5, -1.0, 2.0])


def gaussian(schedule):
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    cov = rotation @ np.diag(VARIANCES) @ rotation.T
    return rotation, GaussianDenoiser(jnp.asarray(MEAN), jnp.asarray(cov), schedule)


def exact_flow(schedule, rotation, start):
    """Probability flow of a Gaussian: each principal axis is carried along with its own standard deviation."""
    low, high = jnp.asarray(schedule.log_snr_min), jnp.asarray(schedule.log_snr_max)
    sd = lambda at: jnp.sqrt(schedule.alpha(at) ** 2 * VARIANCES + schedule.sigma(at) ** 2)  # noqa: E731
    axes = rotation.T @ (start - schedule.alpha(low) * MEAN)
    return rotation @ (axes * sd(high) / sd(low)) + schedule.alpha(high) * MEAN


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["vp", "ve"])
@pytest.mark.parametrize(("sampler", "order"), [(DDIM, 1), (DPMSolver, 2)], ids=["ddim", "dpm"])
def test_order_of_convergence(sampler, order, schedule, x64):
    """The error against the exact probability flow falls by 2^order when the steps are halved, to 10 % of the order."""
    rotation, denoiser = gaussian(schedule)
    start = jnp.sqrt(schedule.reference_variance()) * jnp.asarray([0.7, -1.3, 0.4])
    truth = denoiser.x_hat(exact_flow(schedule, rotation, start), jnp.asarray(schedule.log_snr_max))
    run = lambda n: sampler(n + 1).sample(denoiser, jax.random.key(0), start)  # noqa: E731
    errors = np.array([float(jnp.linalg.norm(run(steps) - truth)) for steps in (40, 80, 160, 320)])
    orders = np.log2(errors[:-1] / errors[1:])
    np.testing.assert_allclose(orders[-2:], order, atol=0.1 * order)


def test_orders_differ_as_stated(x64):
    """Negative control: DPM-Solver++ without its memory is DDIM, so the order test above would fail for it."""

    class Forgetful(DPMSolver):
        def step(self, *args):
            x, _ = super().step(*args)
            return x, self.init(x)

    _, denoiser = gaussian(SCHEDULES[0])
    start = jnp.asarray([0.7, -1.3, 0.4])
    samples = [s.sample(denoiser, jax.random.key(0), start) for s in (Forgetful(30), DDIM(30), DPMSolver(30))]
    np.testing.assert_allclose(samples[0], samples[1], rtol=1e-12)
    assert not np.allclose(samples[0], samples[2], rtol=1e-4)


def test_deterministic_samplers_ignore_their_key_and_end_with_the_denoised_mean(x64, strict):
    """From a given start DDIM and DPM-Solver++ are functions; without noise left to remove, for a point exact."""
    point = GaussianDenoiser(jnp.asarray(MEAN), jnp.zeros((3, 3)), SCHEDULES[0])
    for sampler in (DDIM(5), DPMSolver(5), Ancestral(5)):
        first = sampler.sample(point, jax.random.key(0))
        np.testing.assert_allclose(first, MEAN, rtol=1e-9)
    _, denoiser = gaussian(SCHEDULES[0])
    start = jnp.ones(3)
    for sampler, same in ((DDIM(5), True), (DPMSolver(5), True), (Ancestral(5), False)):
        draws = [sampler.sample(denoiser, jax.random.key(seed), start) for seed in (0, 1)]
        assert np.array_equal(*draws) == same


def smallest_p_value(samples, mean, cov):
    """Of χ² tests of the sample against N(mean, cov): of the mean, and of the variance along each principal axis."""
    variances, vectors = np.linalg.eigh(cov)
    axes = (np.asarray(samples, float) - mean) @ vectors / np.sqrt(variances)
    n, d = axes.shape
    p_mean = stats.chi2.sf(n * np.sum(axes.mean(0) ** 2), d)
    squares = np.sum((axes - axes.mean(0)) ** 2, 0)
    p_axes = 2 * np.minimum(stats.chi2.cdf(squares, n - 1), stats.chi2.sf(squares, n - 1))
    correlations = np.corrcoef(axes.T)[np.triu_indices(d, 1)]
    p_correlation = stats.chi2.sf(n * np.sum(correlations**2), len(correlations))
    return min(p_mean, p_axes.min() * d, p_correlation) * 3


# Draws are compared with the distribution of the *last denoised mean*, which all samplers return: of x at λmax = 9 it
# differs from x by .2 % of the smallest variance, well below what 2,000 draws resolve (3 %).
SAMPLERS = {"ancestral": Ancestral(400), "ddim": DDIM(400), "dpm": DPMSolver(60)}
DRAWS, ALPHA = 2_000, 1e-4


def draw(sampler, denoiser):
    keys = jax.random.split(jax.random.key(11), DRAWS)
    return jax.jit(jax.vmap(lambda key: sampler.sample(denoiser, key)))(keys)


@pytest.mark.parametrize("kind", [VariancePreserving, VarianceExploding], ids=["vp", "ve"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_unconditional_samples_have_the_exact_law(name, kind, oracle):
    """x ~ N(0, WWᵀ + s₀²I): 2,000 draws, χ² tests of mean, variances, correlations; false-alarm rate 1e-4."""
    exact = oracle(kind(-9.0, 9.0))
    samples = draw(SAMPLERS[name], exact.denoiser)
    assert smallest_p_value(samples, np.zeros(6), exact.cov) > ALPHA
    assert smallest_p_value(samples, np.zeros(6), exact.cov * 1.3) < ALPHA  # control: 30 % too wide


@pytest.mark.parametrize("kind", [VariancePreserving, VarianceExploding], ids=["vp", "ve"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_guided_samples_have_the_exact_conditional_law(name, kind, oracle):
    """x | z ~ N(Wz, s₀²I) by guidance with the exact posterior: 2,000 draws, χ² tests, false-alarm rate 1e-4."""
    exact, z = oracle(kind(-9.0, 9.0)), jnp.asarray([1.0, -1.5])
    samples = draw(SAMPLERS[name], GuidedDenoiser(exact.denoiser, exact.encoder, z))
    cov = exact.noise_variance * np.eye(6)
    assert smallest_p_value(samples, exact.weights @ z, cov) > ALPHA
    assert smallest_p_value(samples, exact.weights @ -z, cov) < ALPHA  # control: the mean of another z


@pytest.mark.parametrize("name", SAMPLERS)
def test_guidance_of_the_wrong_sign_is_caught(name, oracle, exact_encoder):
    """Negative control of the test above."""

    class WrongSign(exact_encoder):
        def log_prob(self, z, x_noisy, log_snr):
            return -super().log_prob(z, x_noisy, log_snr)

    exact, z = oracle(VariancePreserving(-9.0, 9.0)), jnp.asarray([1.0, -1.5])
    wrong = WrongSign(exact.encoder.weights, exact.noise_variance, exact.schedule)
    samples = np.asarray(draw(SAMPLERS[name], GuidedDenoiser(exact.denoiser, wrong, z)))
    finite = np.isfinite(samples).all()
    assert not finite or smallest_p_value(samples, exact.weights @ z, exact.noise_variance * np.eye(6)) < ALPHA


def test_ancestral_step_draws_from_the_posterior_of_the_forward_process(x64):
    """q(x_s | x_t, x) by conditioning the joint Gaussian of (x_s, x_t) given x: mean exact, variance from two draws."""
    schedule = VariancePreserving(-4.0, 4.0)
    low, high = jnp.asarray(-0.5), jnp.asarray(0.75)
    (a_t, s_t), (a_s, s_s) = ((float(schedule.alpha(at)), float(schedule.sigma(at))) for at in (low, high))
    # x_t = (a_t/a_s) x_s + noise, so cov(x_s, x_t | x) = (a_t/a_s) s_s²
    regression = a_t / a_s * s_s**2 / s_t**2
    x, x_t = 0.8, -0.4
    mean, variance = a_s * x + regression * (x_t - a_t * x), s_s**2 - regression * a_t / a_s * s_s**2
    key = jax.random.key(0)
    ones = jnp.ones(1)
    got, _ = Ancestral(2).step(schedule, x_t * ones, x * ones, low, high, (), key)
    noise = jax.random.normal(key, (1,))
    np.testing.assert_allclose(got, mean + variance**0.5 * noise, rtol=1e-12)


@pytest.mark.parametrize("sampler", [DDIM, DPMSolver, Ancestral])
def test_too_few_evaluations_are_refused(sampler):
    """One step and one last denoising are the least."""
    with pytest.raises(ValueError, match=r"evaluations must be at least 2 .* got 1"):
        sampler(1)
