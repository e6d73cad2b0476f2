"""Noise levels: definition of λ, both parametrisations, stratified integration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sami_ppl.diffusion.schedule import VarianceExploding, VariancePreserving

SCHEDULES = [VariancePreserving(-12.0, 16.0), VarianceExploding(-12.0, 16.0)]
ids = lambda s: type(s).__name__  # noqa: E731


@pytest.mark.parametrize("schedule", SCHEDULES, ids=ids)
def test_log_snr_is_log_of_signal_over_noise_variance(schedule, x64, strict):
    """α²/σ² = exp(λ) by definition of λ, over the whole range."""
    log_snr = jnp.linspace(schedule.log_snr_min, schedule.log_snr_max, 57)
    ratio = 2 * (jnp.log(schedule.alpha(log_snr)) - jnp.log(schedule.sigma(log_snr)))
    np.testing.assert_allclose(ratio, log_snr, atol=1e-12)


def test_variance_preserving_and_exploding_differ_in_what_they_keep(x64, strict):
    """VP: α² + σ² = 1. VE: α = 1. At λ = 0 both have α = σ, which fixes the values."""
    log_snr = jnp.linspace(-12.0, 16.0, 57)
    vp, ve = SCHEDULES
    np.testing.assert_allclose(vp.alpha(log_snr) ** 2 + vp.sigma(log_snr) ** 2, 1.0, rtol=1e-14)
    np.testing.assert_array_equal(ve.alpha(log_snr), 1.0)
    zero = jnp.zeros(())
    np.testing.assert_allclose([vp.alpha(zero), vp.sigma(zero)], np.sqrt(0.5), rtol=1e-14)
    np.testing.assert_allclose([ve.alpha(zero), ve.sigma(zero)], 1.0, rtol=1e-14)
    np.testing.assert_allclose(vp.reference_variance(), 1.0, rtol=1e-14)
    np.testing.assert_allclose(ve.reference_variance(), 1 + np.exp(12), rtol=1e-14)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=ids)
def test_alpha_and_sigma_keep_relative_accuracy_in_single_precision(schedule):
    """log α − log σ = λ/2 to 1e-5 in float32 too: 1 − sigmoid(λ) would lose σ at λ = 16."""
    log_snr = jnp.linspace(-12.0, 16.0, 57)
    np.testing.assert_allclose(
        jnp.log(schedule.alpha(log_snr)) - jnp.log(schedule.sigma(log_snr)), log_snr / 2, atol=1e-5
    )
    naive = jnp.sqrt(1 - jax.nn.sigmoid(jnp.float32(16.0)))  # negative control
    assert abs(2 * jnp.log(naive) + jax.nn.softplus(16.0)) > 1e-3


def test_noisy_observation_has_the_moments_of_its_definition(strict):
    """x_λ = αx + σε, for an image as for a scalar λ."""
    schedule = VariancePreserving(-6.0, 6.0)
    x, eps, log_snr = jnp.full((2, 3, 3), 2.0), jnp.full((2, 3, 3), -1.0), jnp.asarray(1.3)
    expected = 2 / np.sqrt(1 + np.exp(-1.3)) - 1 / np.sqrt(1 + np.exp(1.3))
    np.testing.assert_allclose(schedule.add_noise(x, log_snr, eps), expected, rtol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=ids)
def test_reverse_starts_with_the_variance_of_white_data(schedule, x64):
    """α² + σ² at λmin: variance of x_λ for observations of unit variance."""
    key, n = jax.random.key(0), 20_000
    x, eps = jax.random.normal(key, (2, n))
    variance = jnp.var(schedule.add_noise(x, jnp.asarray(schedule.log_snr_min), eps))
    # the variance of n normal draws has relative sd √(2/n) = 0.01: 5 sd, false-alarm rate 6e-7
    np.testing.assert_allclose(variance / schedule.reference_variance(), 1.0, atol=0.05)


INTEGRALS = {
    "constant": (lambda t: np.ones_like(t), 8.0),
    "line": (lambda t: t, 0.5 * (5.0**2 - 3.0**2)),
    "sigmoid": (lambda t: 1 / (1 + np.exp(-t)), np.log1p(np.exp(5.0)) - np.log1p(np.exp(-3.0))),
}


@pytest.mark.parametrize("name", INTEGRALS)
def test_stratified_levels_integrate_without_bias_and_better_than_independent_ones(name, strict):
    """mean(weight · f) estimates ∫f dλ. 400 repetitions of 16 levels; 5 sd, false-alarm rate 6e-7 per integral.

    Stratified variance is that of a shift within strata, O(n⁻²) and less, against O(n⁻¹) for independent levels.
    """
    f, truth = INTEGRALS[name]
    schedule, n, repetitions = VariancePreserving(-3.0, 5.0), 16, 400
    keys = jax.random.split(jax.random.key(1), repetitions)
    log_snr, weight = jax.vmap(lambda key: schedule.stratified(key, n))(keys)
    assert log_snr.shape == weight.shape == (repetitions, n)
    assert log_snr.min() >= -3
    assert log_snr.max() <= 5
    estimates = (np.asarray(weight, float) * f(np.asarray(log_snr, float))).mean(1)
    error = abs(estimates.mean() - truth)
    assert error <= 5 * estimates.std() / np.sqrt(repetitions) + 1e-5 * abs(truth)
    independent = np.random.default_rng(0).uniform(-3, 5, (repetitions, n))
    if name != "constant":
        assert estimates.var() < 0.1 * (8 * f(independent)).mean(1).var()


def test_every_stratum_holds_one_level_and_every_level_is_uniform(strict):
    """One level per stratum of length span/n; each is uniform over keys (Kolmogorov, α = 1e-4)."""
    schedule, n = VariancePreserving(-3.0, 5.0), 8
    levels = np.asarray(jax.vmap(lambda k: schedule.stratified(k, n).log_snr)(jax.random.split(jax.random.key(2), 500)))
    # the shared offset shifts the grid: gaps are all span/n, once around the circle
    np.testing.assert_allclose(np.diff(np.sort(levels, 1), axis=1), 1.0, atol=1e-5)
    position = np.sort((levels[:, 0] + 3) / 8)
    distance = np.abs(position - (np.arange(500) + 0.5) / 500).max() + 0.5 / 500
    assert distance < np.sqrt(-0.5 * np.log(1e-4 / 2) / 500)
    assert np.abs(np.sort(position**2) - (np.arange(500) + 0.5) / 500).max() > 0.1  # control: not uniform


@pytest.mark.parametrize(("low", "high"), [(6.0, -6.0), (1.0, 1.0), (0.0, float("nan"))])
def test_empty_range_is_refused(low, high):
    """Large λ is clean: min below max, or an error that says which is which."""
    with pytest.raises(ValueError, match=r"log_snr_min must be below log_snr_max \(large = clean\), got .*Write"):
        VariancePreserving(low, high)
