"""Guidance on the linear-Gaussian oracle: Bayes' rule for scores, the score identity, the information identity."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from sami_ppl.decoders.guidance import GuidedDenoiser, check_pair, guidance
from sami_ppl.diffusion.denoiser import AbstractDenoiser
from sami_ppl.diffusion.schedule import VarianceExploding, VariancePreserving

SCHEDULES = [VariancePreserving(-12.0, 16.0), VarianceExploding(-12.0, 16.0)]
LEVELS = (-6.0, -1.0, 0.7, 5.0)
pytestmark = pytest.mark.parametrize("schedule", SCHEDULES, ids=["vp", "ve"])


def breakages(encoder_class):
    """The oracle's encoder, broken one way at a time."""

    class NoAlpha(encoder_class):
        def parameters(self, x_noisy, log_snr):
            loc, scale = super().parameters(x_noisy, log_snr)
            return loc / self.schedule.alpha(log_snr), scale

    class WrongSign(encoder_class):
        def log_prob(self, z, x_noisy, log_snr):
            return -super().log_prob(z, x_noisy, log_snr)

    class StdForVariance(encoder_class):
        def log_prob(self, z, x_noisy, log_snr):
            loc, scale = self(x_noisy, log_snr)
            return -jnp.sum(0.5 * (z - loc) ** 2 / scale + jnp.log(scale))

    return {"no alpha": NoAlpha, "wrong sign": WrongSign, "std for variance": StdForVariance}


def conditional_score(oracle, z, x_noisy, log_snr):
    """∇ log p(x_λ | z) = (αWz − x_λ)/(α²s₀² + σ²)."""
    alpha, sigma = oracle.schedule.alpha(log_snr), oracle.schedule.sigma(log_snr)
    return (alpha * oracle.weights @ z - x_noisy) / (alpha**2 * oracle.noise_variance + sigma**2)


def score_error(oracle, encoder):
    """Largest relative error of unconditional score + guidance over noise levels."""
    x, z = jax.random.normal(jax.random.key(0), (6,)), jnp.asarray([0.3, -1.2])
    worst = 0.0
    for level in map(jnp.asarray, LEVELS):
        x_noisy = oracle.schedule.alpha(level) * x + oracle.schedule.sigma(level)
        exact = conditional_score(oracle, z, x_noisy, level)
        total = oracle.denoiser.score(x_noisy, level) + guidance(encoder, z, x_noisy, level)
        worst = max(worst, float(jnp.linalg.norm(total - exact) / jnp.linalg.norm(exact)))
    return worst


def test_score_plus_guidance_is_the_conditional_score(schedule, oracle, x64, strict):
    """Bayes' rule for scores: exact with the exact posterior."""
    exact = oracle(schedule)
    assert score_error(exact, exact.encoder) < 1e-12


@pytest.mark.parametrize("breakage", ["no alpha", "wrong sign", "std for variance"])
def test_bayes_rule_catches_wrong_encoders(schedule, breakage, oracle, exact_encoder, x64):
    """Negative controls of the test above; for VE α is 1 and there is nothing to forget."""
    exact = oracle(schedule)
    encoder = breakages(exact_encoder)[breakage](exact.encoder.weights, exact.noise_variance, schedule)
    harmless = breakage == "no alpha" and isinstance(schedule, VarianceExploding)
    assert (score_error(exact, encoder) > 1e-2) != harmless


def test_guided_denoiser_is_a_denoiser(schedule, oracle, x64, strict):
    """ε̂ = −σ · conditional score; x̂ = E[x | x_λ, z]; schedule and event shape pass through."""
    exact, z, level = oracle(schedule), jnp.asarray([0.3, -1.2]), jnp.asarray(0.7)
    guided = GuidedDenoiser(exact.denoiser, exact.encoder, z)
    assert isinstance(guided, AbstractDenoiser)
    assert guided.event_shape == (6,)
    assert guided.schedule == schedule
    x_noisy = jnp.arange(6.0)
    score = conditional_score(exact, z, x_noisy, level)
    alpha, sigma = schedule.alpha(level), schedule.sigma(level)
    np.testing.assert_allclose(guided(x_noisy, level), -sigma * score, rtol=1e-12)
    np.testing.assert_allclose(guided.score(x_noisy, level), score, rtol=1e-12)
    # E[x | x_λ, z]: precision-weighted mean of the prior mean Wz and of x_λ/α
    prior_precision, precision = 1 / exact.noise_variance, alpha**2 / sigma**2
    mean = (prior_precision * exact.weights @ z + precision * x_noisy / alpha) / (prior_precision + precision)
    np.testing.assert_allclose(guided.x_hat(x_noisy, level), mean, rtol=1e-12)


def test_guidance_has_mean_zero_under_the_posterior(schedule, oracle, x64, strict):
    """E[∇ log p(z | x_λ) | x_λ] = 0. χ² test on the 2-dimensional span, 20,000 draws, false-alarm rate 1e-4 a level."""
    exact, n = oracle(schedule), 20_000
    for level in map(jnp.asarray, LEVELS):
        x_noisy = schedule.alpha(level) * jnp.arange(6.0) + schedule.sigma(level)
        loc, scale = exact.encoder(x_noisy, level)
        draws = jax.random.normal(jax.random.key(3), (n, 2))

        def p_value(z, level=level, x_noisy=x_noisy):
            g = np.asarray(jax.vmap(lambda z: guidance(exact.encoder, z, x_noisy, level))(z))
            on_axes = g @ exact.weights  # guidance lies in the span of W
            statistic = n * on_axes.mean(0) @ np.linalg.solve(np.cov(on_axes.T), on_axes.mean(0))
            return stats.chi2.sf(statistic, 2)

        assert p_value(loc[None] + scale[None] * draws) > 1e-4
        assert p_value(loc[None] + scale[None] * (draws + 0.1)) < 1e-6  # control: posterior off by a tenth of its sd


def information(oracle, encoder, level, cubature, quadrature):
    """½ ∫ σ² E‖g‖² dλ up to `level`; the expectation over (z, noise of x, ε) is exact, the integrand is quadratic."""
    z, own, eps = jnp.split(jnp.asarray(cubature(14)), [2, 8], axis=1)
    x = z @ oracle.weights.T + oracle.noise_variance**0.5 * own

    @jax.jit
    @jax.vmap
    def rate(level):
        x_noisy = oracle.schedule.alpha(level) * x + oracle.schedule.sigma(level) * eps
        g = jax.vmap(lambda z, x_noisy: guidance(encoder, z, x_noisy, level))(z, x_noisy)
        return 0.5 * oracle.schedule.sigma(level) ** 2 * jnp.mean(jnp.sum(g**2, -1))

    levels, weights = quadrature(-30.0, level, 24)
    return float(weights @ rate(jnp.asarray(levels)))


@pytest.mark.parametrize("level", [-2.0, 4.0])
def test_guidance_energy_is_information(schedule, level, oracle, exact_encoder, cubature, quadrature, x64):
    """I-MMSE: I(x_λ; z) = ½ Σ log(1 + α²‖w_j‖²/(α²s₀² + σ²)) = ½ ∫ σ² E‖g‖²; α²/σ² = e^λ makes it free of α and σ."""
    exact = oracle(schedule)
    power = np.sum(exact.weights**2, 0)
    truth = 0.5 * np.log1p(power / (exact.noise_variance + np.exp(-level))).sum()
    assert information(exact, exact.encoder, level, cubature, quadrature) == pytest.approx(truth, rel=1e-8)
    wrong = breakages(exact_encoder)["std for variance"](exact.encoder.weights, exact.noise_variance, schedule)
    assert information(exact, wrong, level, cubature, quadrature) != pytest.approx(truth, rel=1e-2)


def test_pairs_that_do_not_fit_are_refused(schedule, oracle, tiny_program):
    """Event shape and schedule must be shared; the message gives both."""
    exact, program = oracle(schedule), tiny_program()
    with pytest.raises(ValueError, match=r"event_shape \(6,\) and \(4,\)"):
        check_pair(exact.denoiser, program.encoder)
    other = eqx.tree_at(lambda e: e.schedule, exact.encoder, VariancePreserving(-1.0, 1.0))
    with pytest.raises(ValueError, match="must share one schedule"):
        check_pair(exact.denoiser, other)
