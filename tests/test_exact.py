"""Closed forms of linear-Gaussian SAMI against scipy, quadrature, brute force, and the library's own estimates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from sami_ppl.decoders.bound import bound
from sami_ppl.decoders.exact import LinearGaussian, LinearMixture
from sami_ppl.decoders.guidance import GuidedDenoiser, guidance
from sami_ppl.diffusion.schedule import VarianceExploding, VariancePreserving

pytestmark = pytest.mark.slow

KINDS = {"vp": VariancePreserving, "ve": VarianceExploding}
LEVELS = (-3.0, 0.4, 5.0)


def linear(kind="vp", d=5, size=3, low=-9.0, high=9.0, seed=0):
    rng = np.random.default_rng(seed)
    weights, mean = rng.normal(size=(d, size)), rng.normal(size=d)
    return LinearGaussian(jnp.asarray(weights), 0.6, KINDS[kind](low, high), mean=jnp.asarray(mean))


def mixture(kind="vp", d=4, size=2, components=3, seed=1):
    rng = np.random.default_rng(seed)
    return LinearMixture(
        jnp.asarray(rng.normal(size=(d, size))), 0.5, KINDS[kind](-9.0, 9.0), mean=jnp.asarray(rng.normal(size=d)),
        probs=jnp.asarray([0.5, 0.2, 0.3])[:components], locs=jnp.asarray(2 * rng.normal(size=(components, size))),
        scales=jnp.asarray(rng.uniform(0.3, 1.2, size=(components, size))),
    )  # fmt: skip


def ends(model, level):
    level = jnp.asarray(level)
    return float(model.schedule.alpha(level)), float(model.schedule.sigma(level))


def joint(model, level, weights, mean, prior_mean=None, prior_cov=None):
    """Mean and covariance of (z, x_λ), by the definition of the model."""
    alpha, sigma = ends(model, level)
    size = weights.shape[1]
    prior_mean = np.zeros(size) if prior_mean is None else prior_mean
    prior_cov = np.eye(size) if prior_cov is None else prior_cov
    lift = alpha * weights
    noise = (alpha**2 * float(np.ravel(model_noise(model))[0]) ** 2 + sigma**2) * np.eye(len(weights))
    cov = np.block([[prior_cov, prior_cov @ lift.T], [lift @ prior_cov, lift @ prior_cov @ lift.T + noise]])
    return np.concatenate([prior_mean, alpha * mean + lift @ prior_mean]), cov


def model_noise(model):
    return model.noise_std if isinstance(model, LinearGaussian) else model.components.noise_std


def condition(mean, cov, x_noisy, size):
    gain = cov[:size, size:] @ np.linalg.inv(cov[size:, size:])
    return mean[:size] + gain @ (x_noisy - mean[size:]), cov[:size, :size] - gain @ cov[size:, :size]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
def test_linear_gaussian_is_the_conditioned_joint_gaussian(kind, level, x64):
    """Noisy density, posterior, its density, evidence, information: by conditioning the joint Gaussian of (z, x_λ)."""
    model = linear(kind)
    weights, mean = np.asarray(model.weights), np.asarray(model.mean)
    at, cov = joint(model, level, weights, mean)
    x_noisy, z, log_snr = np.linspace(-2, 1, 5), np.array([0.4, -1.0, 0.2]), jnp.asarray(level)
    loc, spread = condition(at, cov, x_noisy, 3)

    noisy = stats.multivariate_normal(at[3:], cov[3:, 3:])
    np.testing.assert_allclose(model.log_prob_noisy(jnp.asarray(x_noisy), log_snr), noisy.logpdf(x_noisy), rtol=1e-11)
    np.testing.assert_allclose(model.posterior(jnp.asarray(x_noisy), log_snr)[0], loc, rtol=1e-10)
    np.testing.assert_allclose(model.posterior(jnp.asarray(x_noisy), log_snr)[1], spread, rtol=1e-9, atol=1e-12)
    got = model.log_posterior(jnp.asarray(z), jnp.asarray(x_noisy), log_snr)
    np.testing.assert_allclose(got, stats.multivariate_normal(loc, spread).logpdf(z), rtol=1e-10)
    evidence = stats.multivariate_normal(mean, weights @ weights.T + 0.36 * np.eye(5)).logpdf(x_noisy)
    np.testing.assert_allclose(model.log_prob(jnp.asarray(x_noisy)), evidence, rtol=1e-11)
    total = 0.5 * (np.linalg.slogdet(cov[3:, 3:])[1] + 0 - np.linalg.slogdet(cov)[1])
    np.testing.assert_allclose(model.information(log_snr), total, rtol=1e-9)
    np.testing.assert_allclose(model.axis_information(log_snr), -0.5 * np.log(np.diag(spread)), rtol=1e-9)
    encoder = model.encoder
    factor = np.asarray(encoder.distribution(encoder.parameters(jnp.asarray(x_noisy), log_snr)).root)
    np.testing.assert_allclose(factor @ factor.T, spread, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
def test_guided_denoiser_is_that_of_the_conditional(kind, level, x64):
    """Score of p(x_λ) + guidance = score of N(α(μ + Wz), α²s₀² + σ²), which is written down directly."""
    model, z, log_snr = linear(kind), jnp.asarray([0.4, -1.0, 0.2]), jnp.asarray(level)
    alpha, sigma = ends(model, level)
    x_noisy = jnp.linspace(-2.0, 1.0, 5)
    residual = x_noisy - alpha * (model.mean + model.weights @ z)
    got = GuidedDenoiser(model.denoiser, model.encoder, z)(x_noisy, log_snr)
    np.testing.assert_allclose(got, sigma * residual / (alpha**2 * 0.36 + sigma**2), rtol=1e-9)
    # Negative control: the mean-field posterior of a WᵀW that is not diagonal guides elsewhere.
    wrong = GuidedDenoiser(model.denoiser, model.mean_field_encoder, z)(x_noisy, log_snr)
    assert float(jnp.abs(wrong - got).max()) > 1e-3


def test_mean_field_posterior_is_the_nearest_diagonal(x64):
    """It minimises KL(q ‖ p) over diagonal Gaussians: the closed-form gap, no smaller for any neighbour."""
    model, x, level = linear(), jnp.linspace(-1.0, 1.0, 5), jnp.asarray(1.0)
    mean, cov = model.posterior(x, level)
    precision = jnp.linalg.inv(cov)

    def divergence(loc, scale):
        gap = loc - mean
        square = jnp.sum(jnp.diagonal(precision) * scale**2) + gap @ precision @ gap
        return 0.5 * (square - 3 + jnp.linalg.slogdet(cov)[1] - 2 * jnp.sum(jnp.log(scale)))

    loc, scale = model.mean_field_encoder(x, level)
    expected = 0.5 * (jnp.sum(jnp.log(jnp.diagonal(precision))) - jnp.linalg.slogdet(precision)[1])
    assert float(divergence(loc, scale)) == pytest.approx(float(expected), rel=1e-9)
    np.testing.assert_allclose(jax.grad(divergence, argnums=(0, 1))(loc, scale), 0, atol=1e-9)
    aligned = LinearGaussian(jnp.asarray(np.eye(5, 3) * [2.0, 1.0, 0.5]), 0.6, model.schedule)
    np.testing.assert_allclose(
        aligned.mean_field_encoder(x, level)[1] ** 2, jnp.diagonal(aligned.posterior(x, level)[1])
    )


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
def test_mixture_is_the_sum_of_its_components(kind, level, x64):
    """Noisy density and posterior of the mixture by Bayes' rule over components, each a joint Gaussian by itself."""
    model = mixture(kind)
    weights = np.asarray(model.components.weights[0] / model.scales[0][None])
    mean = np.asarray(model.components.mean[0] - weights @ model.locs[0])
    probs, locs, scales = np.exp(model.log_probs), np.asarray(model.locs), np.asarray(model.scales)
    x_noisy, z, log_snr = np.array([0.5, -1.0, 2.0, 0.3]), np.array([0.3, -0.7]), jnp.asarray(level)
    marginal, posterior, moment, second = 0.0, 0.0, 0.0, 0.0
    for p, loc, scale in zip(probs, locs, scales, strict=True):
        at, cov = joint(model, level, weights, mean, loc, np.diag(scale**2))
        density = p * stats.multivariate_normal(at[2:], cov[2:, 2:]).pdf(x_noisy)
        own, spread = condition(at, cov, x_noisy, 2)
        marginal += density
        posterior += density * stats.multivariate_normal(own, spread).pdf(z)
        moment += density * own
        second += density * (spread + np.outer(own, own))
    x_noisy, z = jnp.asarray(x_noisy), jnp.asarray(z)
    np.testing.assert_allclose(model.log_prob_noisy(x_noisy, log_snr), np.log(marginal), rtol=1e-9)
    np.testing.assert_allclose(model.log_posterior(z, x_noisy, log_snr), np.log(posterior / marginal), rtol=1e-9)
    mean, cov = model.posterior(x_noisy, log_snr)
    np.testing.assert_allclose(mean, moment / marginal, rtol=1e-9)
    np.testing.assert_allclose(cov, second / marginal - np.outer(mean, mean), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_mixture_guidance_turns_the_mixture_into_one_conditional(kind, x64):
    """Though p(x_λ) and p(z | x_λ) are mixtures, score + guidance is the score of one Gaussian, N(α(μ + Wz), …)."""
    model, z, log_snr = mixture(kind), jnp.asarray([0.3, -0.7]), jnp.asarray(0.7)
    weights = model.components.weights[0] / model.scales[0][None]
    mean = model.components.mean[0] - weights @ model.locs[0]
    alpha, sigma = ends(model, 0.7)
    x_noisy = jnp.asarray([0.5, -1.0, 2.0, 0.3])
    got = model.denoiser(x_noisy, log_snr) - sigma * guidance(model.encoder, z, x_noisy, log_snr)
    expected = sigma * (x_noisy - alpha * (mean + weights @ z)) / (alpha**2 * 0.25 + sigma**2)
    np.testing.assert_allclose(got, expected, rtol=1e-8)


def test_mixture_of_one_standard_component_is_the_linear_gaussian(x64):
    """K = 1, m = 0, s = 1: densities, posterior and denoiser agree with `LinearGaussian`."""
    single = linear(d=4, size=2)
    model = LinearMixture(
        single.weights, 0.6, single.schedule, mean=single.mean,
        probs=jnp.ones(1), locs=jnp.zeros((1, 2)), scales=jnp.ones((1, 2)),
    )  # fmt: skip
    x, z, level = jnp.linspace(-1.0, 1.0, 4), jnp.asarray([0.2, 0.9]), jnp.asarray(0.3)
    np.testing.assert_allclose(model.log_prob(x), single.log_prob(x), rtol=1e-12)
    np.testing.assert_allclose(model.log_posterior(z, x, level), single.log_posterior(z, x, level), rtol=1e-12)
    np.testing.assert_allclose(model.denoiser(x, level), single.denoiser(x, level), rtol=1e-11)
    np.testing.assert_allclose(model.posterior(x, level)[1], single.posterior(x, level)[1], rtol=1e-11)


@pytest.mark.parametrize("model", [linear(d=3, size=2), mixture()], ids=["gaussian", "mixture"])
def test_samples_have_the_stated_law(model):
    """10,000 draws of x in float32: their mean log density against that of the law by its own draws from scipy.

    z-test of E log p(x) between the model's draws and independent ones built from the definition; false-alarm rate
    1e-4; draws of another law (twice the noise) must fail.
    """
    x, z = (np.asarray(a, float) for a in model.sample(jax.random.key(3), 10_000))
    rng = np.random.default_rng(5)
    if isinstance(model, LinearGaussian):
        weights, mean, noise = np.asarray(model.weights), np.asarray(model.mean), 0.6
        other = rng.normal(size=(10_000, 2))
    else:
        weights = np.asarray(model.components.weights[0] / model.scales[0][None])
        mean, noise = np.asarray(model.components.mean[0] - weights @ model.locs[0]), 0.5
        k = rng.choice(3, size=10_000, p=np.exp(np.asarray(model.log_probs, float)) / np.exp(model.log_probs).sum())
        other = np.asarray(model.locs)[k] + np.asarray(model.scales)[k] * rng.normal(size=(10_000, 2))
    log_prob = jax.vmap(model.log_prob)

    def p_value(a, b):
        a, b = (np.asarray(log_prob(jnp.asarray(v, jnp.float32)), float) for v in (a, b))
        return 2 * stats.norm.sf(abs(a.mean() - b.mean()) / np.hypot(a.std(), b.std()) * 100)

    def law(scale):
        return mean + other @ weights.T + scale * noise * rng.normal(size=(10_000, len(mean)))

    assert p_value(x, law(1.0)) > 1e-4
    assert p_value(x, law(2.0)) < 1e-4
    residual = (x - mean - z @ weights.T) / noise
    np.testing.assert_allclose(residual.std(), 1.0, atol=0.03)
    assert np.abs(np.corrcoef(residual.T, z.T)[: len(mean), len(mean) :]).max() < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_closed_form_bound_is_what_the_estimator_estimates(kind, quadrature, cubature, x64):
    """At one x, by Gauss-Legendre in λ and cubature in (z, ε), exact for the quadratic error; any guide N(loc, cov)."""
    model = linear(kind, d=4, size=2, low=-5.0, high=7.0)
    x, loc = jnp.asarray([0.5, -1.0, 2.0, 0.3]), jnp.asarray([0.3, -0.2])
    factor = jnp.asarray([[0.5, 0.0], [0.2, 0.8]])
    levels, weights = quadrature(-5.0, 7.0, 20)
    noise_z, eps = jnp.split(jnp.asarray(cubature(6)), [2], axis=1)

    @jax.jit
    def at(level):
        def one(noise, eps):
            return bound(model.denoiser, model.encoder, x, loc + factor @ noise, level, jnp.ones(()), eps)

        return jax.tree.map(jnp.mean, jax.vmap(one)(noise_z, eps))

    got = jax.lax.map(at, jnp.asarray(levels))
    parts, kl = model.bound(x, loc, factor @ factor.T)
    np.testing.assert_allclose(got.prior[0], parts.prior, rtol=1e-12)
    np.testing.assert_allclose(weights @ got.diffusion, parts.diffusion, rtol=1e-9)
    np.testing.assert_allclose(got.reconstruction[0], parts.reconstruction, rtol=1e-12)
    by_hand = 0.5 * (np.trace(factor @ factor.T) + float(loc @ loc) - 2) - np.log(0.5 * 0.8)
    assert float(kl) == pytest.approx(by_hand)


@pytest.mark.parametrize("d", [1, 2, 16, 256, 1024])
def test_bound_with_the_exact_posterior_is_the_evidence(d, x64):
    """At every x and in every dimension: E bound + KL → −log p(x), with a difference that falls as e^(−λmax).

    At single x it may have either sign: what is bounded is the density of the model with its two ends, not p itself.
    The guide is the encoder at the clean end, as a program's is.
    """
    x = None
    for high in (12.0, 16.0, 20.0):
        model = linear(d=d, size=min(d, 3), low=-30.0, high=high)
        x = model.sample(jax.random.key(0), 1)[0][0] if x is None else x
        parts, kl = model.bound(x, *model.encoder.parameters(*model.encoder.clean(x)))
        excess = float(parts.total + kl + model.log_prob(x))
        assert abs(excess) < 3 * d * np.exp(-high) / 0.36 + 1e-8 * d


def test_wrong_shapes_are_refused():
    """Messages name the argument, the shape expected and the shape that came."""
    with pytest.raises(
        ValueError, match=r"weights must be a matrix \(d, D\), one column per axis of z, got shape \(3,"
    ):
        LinearGaussian(jnp.ones(3), 0.5, VariancePreserving())
    with pytest.raises(ValueError, match=r"locs \(K, D\) and scales \(K, D\), got \(2,\), \(2, 1\) and \(2, 2\)"):
        LinearMixture(
            jnp.ones((3, 2)), 0.5, VariancePreserving(),
            probs=jnp.ones(2), locs=jnp.ones((2, 1)), scales=jnp.ones((2, 2)),
        )  # fmt: skip
