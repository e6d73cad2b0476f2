"""Samples against the exact laws of linear-Gaussian and mixture programs, unconditional and given codes.

Along any direction, a mixture of Gaussians is a mixture of Gaussians on the line, so that its distribution function F
is exact and u = F(a·x) is uniform (probability integral transform); all directions together determine the law (Cramér
& Wold 1936). Neyman's smooth test (1937) of u: √n times the mean of an orthonormal polynomial of u is N(0, 1), and the
squares for degrees 1 to 4, which shift, scale, skewness and tails move, add up to χ²₄. A law is rejected at 1e-4 by
the smallest p-value over all directions, times their number.

Power, with 4,000 draws: at least 95 % of samples are rejected that are shifted by .13 standard deviations or scaled by
1.11 along one axis, or of which a mode has probability .57 for .5; 1 % of exact ones at a level of 1 %, or fewer
(`test_power_and_false_alarms`).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import eval_legendre, ndtr
from scipy.stats import chi2

from sami_ppl.decoders.exact import ExactEncoder, LinearGaussian, LinearMixture
from sami_ppl.decoders.guidance import GuidedDenoiser
from sami_ppl.diffusion.denoiser import AbstractDenoiser
from sami_ppl.diffusion.sampler import DDIM, Ancestral, DPMSolver, FromPureNoise, Heun, StochasticDPMSolver
from sami_ppl.diffusion.schedule import AbstractSchedule, VarianceExploding, VariancePreserving

pytestmark = pytest.mark.slow

DRAWS, FALSE_ALARM, DEGREES = 4_000, 1e-4, (1, 2, 3, 4)
# So many evaluations that what is left of the error is well below what the draws resolve.
SAMPLERS = {
    "ddim": DDIM(200), "dpm": DPMSolver(60), "heun": Heun(101), "ancestral": Ancestral(200),
    "sde": StochasticDPMSolver(80),
}  # fmt: skip
# Samples do not depend on the schedule (see test_sampler.py), so that each law has one.
SCHEDULES = {"gaussian": VarianceExploding, "mixture": VariancePreserving}

WEIGHTS = np.array([[1.2, 0.3], [-0.5, 0.9], [0.2, -0.8], [0.6, 0.1]])
MEAN, NOISE = np.array([0.5, -1.0, 0.3, 0.0]), 0.5
# Probabilities, means and scales of the modes of z.
MODES = {
    "gaussian": (np.ones(1), np.zeros((1, 2)), np.ones((1, 2))),
    "mixture": (
        np.array([0.5, 0.2, 0.3]),
        np.array([[-1.5, 0.5], [1.5, 1.5], [1.0, -1.5]]),
        np.array([[0.3, 0.4], [0.5, 0.3], [1.0, 0.6]]),
    ),
}


def build(law, schedule):
    weights, mean, (probs, locs, scales) = jnp.asarray(WEIGHTS), jnp.asarray(MEAN), map(jnp.asarray, MODES[law])
    if law == "gaussian":
        return LinearGaussian(weights, NOISE, schedule, mean=mean)
    return LinearMixture(weights, NOISE, schedule, mean=mean, probs=probs, locs=locs, scales=scales)


def law_of_x(law):
    """Probabilities, means and covariances of x: those of z, carried over by μ + Wz + s₀n."""
    probs, locs, scales = MODES[law]
    covs = np.einsum("id,kd,jd->kij", WEIGHTS, scales**2, WEIGHTS) + NOISE**2 * np.eye(4)
    return probs, MEAN + locs @ WEIGHTS.T, covs


def law_of_residual_and_code(law, last):
    """Probabilities, means and covariances of (r, z), r = x − μ − Wz: r is N(0, c I), independent of z.

    Samplers return the denoised mean at λ = `last`. Given z, that of x_λ = α(μ + Wz + s₀n) + σε is
    μ + Wz + g (s₀n + (σ/α)ε) with g = s₀²/(s₀² + e^{−λ}), hence c = g s₀².
    """
    probs, locs, scales = MODES[law]
    variance = NOISE**4 / (NOISE**2 + np.exp(-last))
    variances = np.concatenate([np.full((len(probs), 4), variance), scales**2], 1)
    means = np.concatenate([np.zeros((len(probs), 4)), locs], 1)
    return probs, means, np.stack([np.diag(v) for v in variances])


def smallest_p_value(samples, probs, means, covs):
    """Of smooth tests of samples (n, d) along the law's principal axes and 8 random directions, times their number.

    0 where samples are not finite.
    """
    samples = np.asarray(samples, float)
    if not np.isfinite(samples).all():
        return 0.0
    centred = means - probs @ means
    principal = np.linalg.eigh(np.einsum("k,kij->ij", probs, covs) + (centred.T * probs) @ centred)[1].T
    directions = np.concatenate([principal, np.random.default_rng(0).normal(size=(8, len(principal)))])
    p_values = []
    for a in directions:
        scales = np.sqrt(np.einsum("kij,i,j->k", covs, a, a))
        u = ndtr(((samples @ a)[:, None] - means @ a) / scales) @ probs
        scores = [np.sqrt((2 * k + 1) * len(u)) * eval_legendre(k, 2 * u - 1).mean() for k in DEGREES]
        p_values.append(chi2.sf(np.sum(np.square(scores)), len(DEGREES)))
    return min(1.0, min(p_values) * len(directions))


def p_unconditional(sampler, law, schedule, change=lambda denoiser: denoiser):
    """Of samples of x; `change` breaks the denoiser on purpose."""
    denoiser = change(build(law, schedule).denoiser)
    keys = jax.random.split(jax.random.key(11), DRAWS)
    samples = jax.jit(jax.vmap(lambda key: sampler.sample(denoiser, key)))(keys)
    return smallest_p_value(samples, *law_of_x(law))


def p_given_codes(sampler, law, schedule, change=lambda denoiser: denoiser, encoder=ExactEncoder):
    """Of samples of x given one draw of z each."""
    model = build(law, schedule)
    z = model.sample(jax.random.key(5), DRAWS)[1]

    def one(key, z):
        return sampler.sample(change(GuidedDenoiser(model.denoiser, encoder(model), z)), key)

    samples = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(12), DRAWS), z)
    residual = np.asarray(samples, float) - MEAN - z @ WEIGHTS.T
    return smallest_p_value(np.concatenate([residual, z], 1), *law_of_residual_and_code(law, schedule.log_snr_max))


@pytest.mark.parametrize("law", MODES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_unconditional_samples_have_the_exact_law(name, law):
    """λmax = 9, where the denoised mean, which samplers return, differs from x by less than .1 % of any scale."""
    assert p_unconditional(SAMPLERS[name], law, SCHEDULES[law](-12.0, 9.0)) > FALSE_ALARM


@pytest.mark.parametrize("law", MODES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_given_codes_have_the_exact_joint_law(name, law):
    """Codes from the prior, guidance with the exact posterior; λmax = 3, so that the last denoising counts."""
    assert p_given_codes(SAMPLERS[name], law, SCHEDULES[law](-12.0, 3.0)) > FALSE_ALARM


@pytest.mark.parametrize("law", MODES)
def test_start_from_pure_noise_leaves_less_of_the_start(law):
    """At λmin = −4 the data still show: a start from N(0, α² + σ²) is seen in the samples, the corrected one is not."""
    schedule = VariancePreserving(-4.0, 9.0)
    assert p_unconditional(FromPureNoise(DPMSolver(60)), law, schedule) > FALSE_ALARM
    assert p_unconditional(DPMSolver(60), law, schedule) < FALSE_ALARM


class Changed(AbstractDenoiser):
    """A denoiser with another denoised mean: `change(x_hat, x_noisy, log_snr)`."""

    denoiser: AbstractDenoiser
    change: object

    @property
    def schedule(self) -> AbstractSchedule:
        return self.denoiser.schedule

    @property
    def event_shape(self):
        return self.denoiser.event_shape

    def __call__(self, x_noisy, log_snr):
        return self.denoiser(x_noisy, log_snr)

    def x_hat(self, x_noisy, log_snr):
        return self.change(self.denoiser.x_hat(x_noisy, log_snr), x_noisy, log_snr)


class EverySecondStep(DPMSolver):
    """Leaves x as it is at every second step, while the noise level goes on."""

    def init(self, x):
        return super().init(x), 0

    def step(self, denoiser, x, log_snr, next_log_snr, state, key):
        memory, count = state
        moved, memory = super().step(denoiser, x, log_snr, next_log_snr, memory, key)
        return jnp.where(count % 2 == 0, moved, x), (memory, count + 1)


class WrongSign(ExactEncoder):
    def log_prob(self, z, x_noisy, log_snr):
        return -super().log_prob(z, x_noisy, log_snr)


class WithoutAlpha(ExactEncoder):
    """Takes x_λ for x_λ/α."""

    def log_prob(self, z, x_noisy, log_snr):
        return super().log_prob(z, self.schedule.alpha(log_snr) * x_noisy, log_snr)


def clipped(denoiser):
    return Changed(denoiser, lambda x_hat, x_noisy, log_snr: jnp.clip(x_hat, -2.0, 2.0))


def without_alpha(denoiser):
    return Changed(denoiser, lambda x_hat, x_noisy, log_snr: denoiser.schedule.alpha(log_snr) * x_hat)


def without_last_denoising(denoiser):
    last = denoiser.schedule.log_snr_max
    return Changed(denoiser, lambda x_hat, x_noisy, log_snr: jnp.where(log_snr < last, x_hat, x_noisy))


DPM = SAMPLERS["dpm"]
UNCONDITIONAL_CONTROLS = {
    "clipped x_hat": {"change": clipped},
    "x_hat without alpha": {"change": without_alpha},
    "half the steps": {"sampler": EverySecondStep(60)},
    "last step only": {"sampler": DPMSolver(2)},
}
CONTROLS_GIVEN_CODES = UNCONDITIONAL_CONTROLS | {
    "wrong sign": {"encoder": WrongSign},
    "guidance without alpha": {"encoder": WithoutAlpha},
    "no last denoising": {"change": without_last_denoising},
}


@pytest.mark.parametrize("law", MODES)
@pytest.mark.parametrize("control", UNCONDITIONAL_CONTROLS)
def test_unconditional_controls_fail(control, law):
    """Negative controls: each known error is rejected."""
    arguments = {"sampler": DPM} | UNCONDITIONAL_CONTROLS[control]
    assert p_unconditional(law=law, schedule=VariancePreserving(-12.0, 9.0), **arguments) < FALSE_ALARM


@pytest.mark.parametrize("law", MODES)
@pytest.mark.parametrize("control", CONTROLS_GIVEN_CODES)
def test_controls_given_codes_fail(control, law):
    """Negative controls: each known error is rejected."""
    arguments = {"sampler": DPM} | CONTROLS_GIVEN_CODES[control]
    assert p_given_codes(law=law, schedule=VariancePreserving(-12.0, 3.0), **arguments) < FALSE_ALARM


def test_power_and_false_alarms():
    """The rates that the module states, in 100 sets of draws from the law itself, exact and changed."""
    probs, means, covs = law_of_x("mixture")
    whole = np.einsum("k,kij->ij", probs, covs) + np.cov(means.T, aweights=probs, ddof=0)
    variances, axes = np.linalg.eigh(whole)
    rng = np.random.default_rng(3)

    def draws(probs=probs):
        k = rng.choice(3, size=DRAWS, p=probs)
        return means[k] + np.einsum("kij,kj->ki", np.linalg.cholesky(covs)[k], rng.normal(size=(DRAWS, 4)))

    def rate(change, level=FALSE_ALARM):
        return np.mean([smallest_p_value(change(), probs, means, covs) < level for _ in range(100)])

    def stretched(factor=1.0, shift=0.0, axis=0):
        x = draws() - probs @ means
        along = x @ axes[:, axis]
        return probs @ means + x + np.outer((factor - 1) * along + shift * variances[axis] ** 0.5, axes[:, axis])

    assert rate(draws, level=0.01) <= 0.05  # 6 of 100 or more come by chance in 1 of 2,000 cases at a rate of 1 %
    assert rate(lambda: stretched(shift=0.13)) >= 0.95
    assert rate(lambda: stretched(factor=1.11)) >= 0.95
    assert rate(lambda: draws(np.array([0.57, 0.2, 0.23]))) >= 0.95
