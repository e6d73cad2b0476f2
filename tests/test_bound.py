"""The bound in nats against exact densities, and its gradient against reverse mode over reverse mode."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from sami_ppl.decoders import guidance as guidance_module
from sami_ppl.decoders.bound import Bound, bound, noise_error, prior_loss, reconstruction_loss
from sami_ppl.decoders.guidance import guidance
from sami_ppl.decoders.training import Objective
from sami_ppl.diffusion.denoiser import PreconditionedDenoiser
from sami_ppl.diffusion.schedule import NoiseLevels, VarianceExploding, VariancePreserving
from sami_ppl.encoders.encoder import DiagonalEncoder

CLASSES = {"vp": VariancePreserving, "ve": VarianceExploding}
Z = np.array([0.3, -1.2])


def mean_bound(oracle, encoder, z, cov_factor, center, cubature, quadrature, bound=bound):
    """E[bound] over x ~ N(center, F Fᵀ), ε and λ: exact, as the bound is quadratic in x and ε."""
    schedule = oracle.schedule
    levels, weights = quadrature(schedule.log_snr_min, schedule.log_snr_max, 20)
    x_unit, eps = jnp.split(jnp.asarray(cubature(12)), 2, axis=1)
    x = center[None] + x_unit @ cov_factor.T

    @jax.jit
    def parts(level):
        one = lambda x, eps: bound(oracle.denoiser, encoder, x, z, level, jnp.ones(()), eps)  # noqa: E731
        return jax.tree.map(jnp.mean, jax.vmap(one)(x, eps))

    prior, diffusion, reconstruction = jax.lax.map(parts, jnp.asarray(levels))
    return float(prior[0] + weights @ diffusion + reconstruction[0])


def gap(schedule, variances, mean=0.0):
    """Exact excess of the mean bound over the entropy, for x of these variances and exact scores.

    It is the KL of the path of x, ends included, from the model's: at the clean end ½ Σ log(1 + e^(−λmax)/s), the KL
    of p(x | x_λmax) from N(x_λmax/α, σ²/α²); at the noisy end the KL of p(x_λmin) from
    the Gaussian that sampling starts from.
    """
    a, b = schedule.log_snr_min, schedule.log_snr_max
    alpha2, sigma2 = (1 / (1 + np.exp(-a)), 1 / (1 + np.exp(a))) if type(schedule) is CLASSES["vp"] else (1, np.exp(-a))
    v = alpha2 + sigma2
    noisy = (alpha2 * variances + sigma2) / v
    start = 0.5 * np.sum(noisy + alpha2 * mean**2 / v - 1 - np.log(noisy))
    return start + 0.5 * np.sum(np.log1p(np.exp(-b) / variances))


def entropy(variances):
    return 0.5 * np.sum(np.log(2 * np.pi * np.e * variances))


@pytest.mark.parametrize("top", [4.0, 8.0, 12.0, 16.0])
@pytest.mark.parametrize("kind", CLASSES)
def test_excess_over_the_entropy_is_known(kind, top, oracle, cubature, quadrature, x64, strict):
    """Mean bound − entropy of a 6-D Gaussian with the exact denoiser: closed form, e⁴ smaller for each 4 of λmax."""
    exact = oracle(CLASSES[kind](-14.0, top))
    variances, vectors = np.linalg.eigh(exact.cov)
    got = mean_bound(exact, None, None, vectors * np.sqrt(variances), jnp.zeros(6), cubature, quadrature)
    assert got - entropy(variances) == pytest.approx(gap(exact.schedule, variances), rel=1e-4, abs=1e-10)
    assert gap(exact.schedule, variances) < 0.15 * np.exp(4 - top) + 1e-5


def conditional_excess(exact, encoder, cubature, quadrature, bound=bound):
    """Mean bound on −log p(x | z) over x ~ p(x | z), less its entropy and less the excess that is known."""
    variances, mean = np.full(6, exact.noise_variance), exact.weights @ Z
    factor = np.eye(6) * exact.noise_variance**0.5
    got = mean_bound(exact, encoder, jnp.asarray(Z), factor, jnp.asarray(mean), cubature, quadrature, bound)
    return got - entropy(variances) - gap(exact.schedule, variances, mean)


@pytest.mark.parametrize("kind", CLASSES)
def test_guided_bound_is_the_conditional_likelihood(kind, oracle, cubature, quadrature, x64, strict):
    """With the exact posterior, the guided bound on −log p(x | z) exceeds the entropy by the closed-form gap only."""
    exact = oracle(CLASSES[kind](-14.0, 12.0))
    assert abs(conditional_excess(exact, exact.encoder, cubature, quadrature)) < 1e-7


@pytest.mark.parametrize("guided", [False, True], ids=["own", "guided"])
def test_bound_at_one_observation_is_its_negative_log_density(guided, oracle, cubature, quadrature, x64):
    """Not only on average: at a given x the bound tends to −log p(x), or −log p(x | z), as the range grows."""
    exact = oracle(VariancePreserving(-25.0, 25.0))
    x = jnp.linspace(-1.0, 1.5, 6)
    mean, cov = (exact.weights @ Z, exact.noise_variance * np.eye(6)) if guided else (np.zeros(6), exact.cov)
    truth = -stats.multivariate_normal(mean, cov).logpdf(np.asarray(x))
    encoder, z = (exact.encoder, jnp.asarray(Z)) if guided else (None, None)
    got = mean_bound(exact, encoder, z, np.zeros((6, 6)), x, cubature, quadrature)
    assert got == pytest.approx(truth, abs=1e-8)


def broken_encoders(encoder_class):
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

    return [NoAlpha, WrongSign, StdForVariance]


@pytest.mark.parametrize("index", [0, 1, 2], ids=["no alpha", "wrong sign", "std for variance"])
def test_wrong_guidance_is_caught(index, oracle, exact_encoder, cubature, quadrature, x64):
    """Negative controls: each broken encoder costs more than .01 nats in the same check, and never gains."""
    exact = oracle(VariancePreserving(-14.0, 12.0))
    broken = broken_encoders(exact_encoder)[index](exact.encoder.weights, exact.noise_variance, exact.schedule)
    assert conditional_excess(exact, broken, cubature, quadrature) > 1e-2


def test_per_pixel_mean_is_caught(oracle, cubature, quadrature, x64):
    """Negative control: the error averaged over the event instead of summed."""
    exact = oracle(VariancePreserving(-14.0, 12.0))

    def per_pixel(*args):
        parts = bound(*args)
        return Bound(parts.prior, parts.diffusion / 6, parts.reconstruction)

    assert abs(conditional_excess(exact, exact.encoder, cubature, quadrature, per_pixel)) > 1


@pytest.mark.parametrize("kind", CLASSES)
def test_end_terms_are_gaussian_divergences(kind, x64, strict):
    """L_prior = KL(N(αx, σ²) ‖ N(0, v)) at λmin; L_recon = E −log N(x; x_λ/α, σ²/α²) at λmax: by quadrature in 1-D."""
    schedule, x = CLASSES[kind](-2.0, 3.0), jnp.asarray([0.7, -1.5])
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    weights = weights / weights.sum()

    def end(level):
        sigma = float(schedule.sigma(jnp.asarray(level)))
        return float(schedule.alpha(jnp.asarray(level))), sigma

    alpha, sigma = end(-2.0)
    start = np.sqrt(float(schedule.reference_variance()))
    noisy = alpha * np.asarray(x)[:, None] + sigma * nodes
    log_ratio = stats.norm.logpdf(nodes) - np.log(sigma) - stats.norm.logpdf(noisy, scale=start)
    np.testing.assert_allclose(prior_loss(schedule, x), (log_ratio @ weights).sum(), rtol=1e-12)
    alpha, sigma = end(3.0)
    noisy = alpha * np.asarray(x)[:, None] + sigma * nodes
    log_density = stats.norm.logpdf(np.asarray(x)[:, None], noisy / alpha, sigma / alpha)
    np.testing.assert_allclose(reconstruction_loss(schedule, x), -(log_density @ weights).sum(), rtol=1e-12)


@pytest.mark.slow
def test_total_is_the_sum_of_its_three_parts(oracle, x64, strict):
    """Bound.total = prior + diffusion + reconstruction; diffusion = weight/2 · noise error; the ends ignore z."""
    exact = oracle(VariancePreserving(-4.0, 4.0))
    x, eps, level, weight = jnp.arange(6.0), jnp.ones(6), jnp.asarray(0.5), jnp.asarray(8.0)
    arguments = (exact.denoiser, exact.encoder, x, jnp.asarray(Z), level)
    parts = bound(*arguments, weight, eps)
    assert parts.total == parts.prior + parts.diffusion + parts.reconstruction
    np.testing.assert_allclose(parts.diffusion, 4 * noise_error(*arguments, eps), rtol=1e-14)
    own = bound(exact.denoiser, None, x, None, level, weight, eps)
    assert (own.prior, own.reconstruction) == (parts.prior, parts.reconstruction)
    assert own.diffusion != parts.diffusion


# --- gradient ---------------------------------------------------------------------------------------------------------

SCHEDULE, LEVEL = VariancePreserving(-4.0, 4.0), 0.8
X, EPS, NOISE = [0.2, -1.0, 0.5, 1.4], [1.1, 0.3, -0.7, -1.6], [0.4, -0.9]


class MLP(eqx.Module):
    """One hidden layer on (x, λ): enough for every derivative to be there, and quick to compile."""

    inner: jax.Array
    outer: jax.Array

    def __init__(self, out, key):
        self.inner, self.outer = jax.random.normal(key, (5, 6)), jax.random.normal(key, (6, out))

    def __call__(self, x, log_snr):
        return jnp.tanh(jnp.append(x, log_snr) @ self.inner) @ self.outer


def pair():
    keys = jax.random.split(jax.random.key(5), 3)
    denoiser = PreconditionedDenoiser(MLP(4, keys[0]), SCHEDULE, (4,))
    return denoiser, DiagonalEncoder(MLP(5, keys[1]), SCHEDULE, (4,), 2, key=keys[2])


def frozen(tree):
    return jax.tree.map(lambda leaf: jax.lax.stop_gradient(leaf) if eqx.is_inexact_array(leaf) else leaf, tree)


def library(denoiser_loss="guided"):
    """The library's rule, as a function of networks, x and z: a batch of one with weight 2, less the ends."""

    def loss(denoiser, encoder, x, z):
        level, eps = jnp.asarray(LEVEL), jnp.asarray(EPS)
        ends = prior_loss(SCHEDULE, x) + reconstruction_loss(SCHEDULE, x)
        levels, codes = NoiseLevels(level[None], jnp.full(1, 2.0)), None if z is None else z[None]
        return Objective(denoiser_loss).bounds(denoiser, encoder, x[None], codes, levels, eps[None])[0] - ends

    return loss


def forward(denoiser_loss="guided"):
    """The independent implementation, reverse over forward mode. With r = ε − ε_θ + σ g and v = stop_gradient(r),

        d‖r‖²/dθ = −2 J_θᵀ v,         d‖r‖²/dφ = 2σ ∂_φ [ d/ds log q_φ(z_φ | x_λ + s v) ]_{s=0},

    a forward-mode derivative of a scalar and one reverse pass through it: seven passes through the encoder.
    """

    def loss(denoiser, encoder, x, z):
        level, eps = jnp.asarray(LEVEL), jnp.asarray(EPS)
        sigma, x_noisy = SCHEDULE.sigma(level), SCHEDULE.add_noise(x, level, eps)
        eps_theta = denoiser(x_noisy, level)
        own = jax.lax.stop_gradient(eps - eps_theta)
        residual = own + sigma * jax.lax.stop_gradient(guidance(frozen(encoder), z, x_noisy, level))
        _, slope = jax.jvp(lambda at: encoder.log_prob(z, at, level), (x_noisy,), (residual,))
        taught = {"guided": residual, "own": own, "none": jnp.zeros_like(own)}[denoiser_loss]
        surrogate = 2 * sigma * slope - 2 * jnp.sum(taught * eps_theta)
        return jnp.sum(residual**2) + surrogate - jax.lax.stop_gradient(surrogate)

    return loss


def plain(denoiser_loss="guided"):
    """‖ε − ε_θ + σ∇log q‖² written down directly, to be differentiated by reverse over reverse."""

    def loss(denoiser, encoder, x, z):
        level, eps = jnp.asarray(LEVEL), jnp.asarray(EPS)
        sigma = jax.nn.sigmoid(-level) ** 0.5
        x_noisy = jax.nn.sigmoid(level) ** 0.5 * x + sigma * eps
        g = jax.grad(lambda x_noisy: encoder.log_prob(z, x_noisy, level))(x_noisy)
        own = eps - denoiser(x_noisy, level)
        if denoiser_loss == "guided":
            return jnp.sum((own + sigma * g) ** 2)
        guided = jnp.sum((jax.lax.stop_gradient(own) + sigma * g) ** 2)
        extra = jnp.sum(own**2)
        return guided + (extra - jax.lax.stop_gradient(extra) if denoiser_loss == "own" else 0.0)

    return loss


def alone(denoiser_loss):
    return lambda denoiser, encoder, x, z: library(denoiser_loss)(denoiser, None, x, None)


LOSSES = {
    **{("reverse", kind): library(kind) for kind in ("guided", "own", "none")},
    **{("forward", kind): forward(kind) for kind in ("guided", "own", "none")},
    **{("plain", kind): plain(kind) for kind in ("guided", "own", "none")},
    **{("alone", kind): alone(kind) for kind in ("guided", "none")},
    "through z": lambda d, e, x, z: library()(d, frozen(e), x, z),
    "given z": lambda d, e, x, z: library()(d, e, x, jax.lax.stop_gradient(z)),
}


def value_and_gradients(loss):
    """Value, and gradients for (θ, φ, x, z), in float64; z is the encoder's own draw, loc + scale · noise, + 0."""
    with jax.enable_x64(True):
        (theta, fixed_d), (phi, fixed_e) = (eqx.partition(n, eqx.is_inexact_array) for n in pair())
        theta, phi = jax.tree.map(lambda a: a.astype(float), (theta, phi))

        def total(theta, phi, x, shift):
            denoiser, encoder = eqx.combine(theta, fixed_d), eqx.combine(phi, fixed_e)
            loc, scale = encoder.posterior(x)
            return loss(denoiser, encoder, x, loc + scale * jnp.asarray(NOISE) + shift)

        value, gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2, 3)))(
            theta, phi, jnp.asarray(X), jnp.zeros(2)
        )
        return float(value), tuple(jax.tree.map(np.asarray, gradients))


@functools.cache
def result(name):
    """(value, gradients) of one of LOSSES, computed once."""
    return value_and_gradients(LOSSES[name])


def largest(tree):
    return max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


def disagreement(got, expected):
    """Largest difference between two gradients over the largest entry of the expected one."""
    return largest(jax.tree.map(np.subtract, got, expected)) / (largest(expected) or 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("denoiser_loss", ["guided", "own", "none"])
@pytest.mark.parametrize("rule", ["reverse", "forward"])
def test_gradient_is_that_of_the_formula(denoiser_loss, rule):
    """Value and gradient for θ, φ, x and z of both forms against the formula written down, to 1e-11 in float64."""
    value, gradients = result((rule, denoiser_loss))
    expected_value, expected = result(("plain", denoiser_loss))
    assert value == pytest.approx(expected_value, rel=1e-12)
    compared = dict(zip(("theta", "phi", "x", "z"), zip(gradients, expected, strict=True), strict=True))
    if denoiser_loss != "guided":
        del compared["x"]  # what x gets is defined by the guided error alone
    for name, (got, want) in compared.items():
        assert disagreement(got, want) < 1e-11, name
    assert (largest(gradients[0]) == 0) == (denoiser_loss == "none")
    assert largest(gradients[1]) > 1e-3


@pytest.mark.slow
def test_own_loss_trains_the_denoiser_as_if_alone():
    """denoiser_loss="own": θ gets ∇‖ε − ε_θ‖², what it gets without an encoder, and φ what it gets under "none"."""
    _, own = result(("reverse", "own"))
    assert disagreement(own[0], result(("alone", "guided"))[1][0]) < 1e-12
    assert disagreement(own[1], result(("reverse", "none"))[1][1]) < 1e-12
    assert disagreement(result(("reverse", "guided"))[1][0], own[0]) > 1e-3


def test_frozen_denoiser_without_encoder_has_no_gradient():
    """denoiser_loss="none" and no encoder: the error keeps its value, all gradients are exactly zero."""
    value, (theta, phi, _, _) = result(("alone", "none"))
    assert value == pytest.approx(result(("alone", "guided"))[0], rel=1e-14)
    assert largest(theta) == largest(phi) == 0


@pytest.mark.slow
def test_encoder_learns_through_z_and_through_guidance():
    """φ's gradient is the sum of two non-zero parts: through guidance at fixed z, and through z_φ."""
    full, guided, latent = (result(n)[1][1] for n in (("reverse", "guided"), "given z", "through z"))
    assert largest(guided) > 1e-3
    assert largest(latent) > 1e-3
    assert disagreement(jax.tree.map(np.add, guided, latent), full) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("breakage", ["detached z", "wrong sign", "no sigma"])
def test_wrong_gradients_are_caught(breakage, monkeypatch):
    """Negative controls: each mistake moves φ's gradient by more than 1 % in the comparison that holds to 1e-11."""
    if breakage == "detached z":
        phi = result("given z")[1][1]
    else:
        factor = -1.0 if breakage == "wrong sign" else 1 / float(SCHEDULE.sigma(LEVEL))
        monkeypatch.setattr(guidance_module, "guidance", lambda *args: factor * guidance(*args))
        phi = value_and_gradients(library())[1][1]
    assert disagreement(phi, result(("plain", "guided"))[1][1]) > 1e-2
