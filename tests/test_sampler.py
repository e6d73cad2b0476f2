"""Samplers on Gaussians: orders of convergence, exact steps, evaluations. For their laws see test_sampler_law.py."""

from functools import partial

import jax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp
import numpy as np
import pytest

from sami_ppl.diffusion.denoiser import GaussianDenoiser
from sami_ppl.diffusion.sampler import DDIM, Ancestral, DPMSolver, FromPureNoise, Heun, StochasticDPMSolver
from sami_ppl.diffusion.schedule import VarianceExploding, VariancePreserving

# Samplers and their orders.
DETERMINISTIC = {"ddim": (DDIM, 1), "dpm": (DPMSolver, 2), "heun": (Heun, 2)}
STOCHASTIC = {"ancestral": (Ancestral, 1), "sde": (StochasticDPMSolver, 2)}
SCHEDULES = [VariancePreserving(-4.0, 4.0), VarianceExploding(-4.0, 4.0)]
VARIANCES = np.array([2.0, 0.3, 0.05])
MEAN = np.array([0.5, -1.0, 2.0])
STEPS = (40, 80, 160)

by_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=["vp", "ve"])
deterministic = pytest.mark.parametrize(("sampler", "order"), DETERMINISTIC.values(), ids=DETERMINISTIC)
stochastic = pytest.mark.parametrize(("sampler", "order"), STOCHASTIC.values(), ids=STOCHASTIC)
SAMPLERS = [sampler for sampler, _ in (DETERMINISTIC | STOCHASTIC).values()]
every = pytest.mark.parametrize("sampler", SAMPLERS)


def build(sampler, steps):
    return sampler(sampler.evaluations_per_step * steps + 1)


def gaussian(schedule, mean=MEAN):
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    cov = rotation @ np.diag(VARIANCES) @ rotation.T
    return rotation, GaussianDenoiser(jnp.asarray(mean), jnp.asarray(cov), schedule)


def exact_flow(schedule, rotation, start):
    """Probability flow of a Gaussian: each principal axis is carried along with its own standard deviation."""
    low, high = jnp.asarray(schedule.log_snr_min), jnp.asarray(schedule.log_snr_max)
    sd = lambda at: jnp.sqrt(schedule.alpha(at) ** 2 * VARIANCES + schedule.sigma(at) ** 2)  # noqa: E731
    axes = rotation.T @ (start - schedule.alpha(low) * MEAN)
    return rotation @ (axes * sd(high) / sd(low)) + schedule.alpha(high) * MEAN


def last_orders(errors):
    """Of the last two halvings of the steps."""
    return np.log2(np.array(errors[:-1]) / np.array(errors[1:]))[-2:]


@by_schedule
@deterministic
def test_order_of_convergence(sampler, order, schedule, x64):
    """The error against the exact probability flow falls by 2^order when the steps are halved, to 10 % of the order."""
    rotation, denoiser = gaussian(schedule)
    start = jnp.sqrt(schedule.reference_variance()) * jnp.asarray([0.7, -1.3, 0.4])
    truth = denoiser.x_hat(exact_flow(schedule, rotation, start), jnp.asarray(schedule.log_snr_max))
    run = lambda steps: build(sampler, steps).sample(denoiser, jax.random.key(0), start)  # noqa: E731
    errors = [float(jnp.linalg.norm(run(steps) - truth)) for steps in STEPS]
    np.testing.assert_allclose(last_orders(errors), order, atol=0.1 * order)


@pytest.mark.slow
@by_schedule
@stochastic
def test_order_of_the_variance(sampler, order, schedule, x64):
    """The error of the variance at λmax falls by 2^order when the steps are halved, to 10 % of the order."""

    def error(steps, variance):
        denoiser = GaussianDenoiser(jnp.zeros(1), variance[None, None], schedule)
        truth = noisy_variance(denoiser, jnp.asarray(schedule.log_snr_max))
        return abs(variance_of_samples(build(sampler, steps), denoiser) - truth)

    errors = [jax.vmap(partial(error, steps))(jnp.asarray(VARIANCES)) for steps in STEPS]
    np.testing.assert_allclose(last_orders(errors), order, atol=0.1 * order)


def noisy_variance(denoiser, level):
    """Of x_λ, in one dimension."""
    return denoiser.schedule.alpha(level) ** 2 * denoiser.eigenvalues[0] + denoiser.schedule.sigma(level) ** 2


def variance_of_samples(sampler, denoiser):
    """Of x at λmax, in one dimension and without chance: through the Jacobian of each step, plus the step's noise.

    A step is linear in x and in what is carried along, as the denoiser is; its noise is that of q(x_s | x_t, x), to
    which `test_stochastic_step_draws_from_the_posterior_of_the_forward_process` holds it.
    """
    schedule, key = denoiser.schedule, jax.random.key(0)
    levels = jnp.linspace(schedule.log_snr_min, schedule.log_snr_max, sampler.evaluations)
    values, restore = ravel_pytree((jnp.zeros(1), sampler.init(jnp.zeros(1))))
    cov = jnp.zeros((len(values), len(values))).at[0, 0].set(noisy_variance(denoiser, levels[0]))

    def body(carry, ends):
        def step(values):
            x, state = restore(values)
            return ravel_pytree(sampler.step(denoiser, x, *ends, state, key))[0]

        values, cov = carry
        jacobian = jax.jacfwd(step)(values)
        noise = -(schedule.sigma(ends[1]) ** 2) * jnp.expm1(ends[0] - ends[1])
        return (step(values), (jacobian @ cov @ jacobian.T).at[0, 0].add(noise)), None

    return jax.lax.scan(body, (values, cov), (levels[:-1], levels[1:]))[0][1][0, 0]


@stochastic
def test_mean_of_stochastic_samples(sampler, order, x64):
    """E[sample | start] is the denoised mean of the start in any number of steps: x̂ of a Gaussian is a martingale.

    With equal keys the noise of a Gaussian and of the same one, centred, is equal: the difference is the mean.
    """
    (_, denoiser), (_, centred) = gaussian(SCHEDULES[0]), gaussian(SCHEDULES[0], 0 * MEAN)
    start, key = jnp.asarray([0.7, -1.3, 0.4]), jax.random.key(0)
    mean = sampler(8).sample(denoiser, key, start) - sampler(8).sample(centred, key, 0 * start)
    np.testing.assert_allclose(mean, denoiser.x_hat(start, jnp.asarray(-4.0)), rtol=1e-9)
    assert not np.allclose(DDIM(8).sample(denoiser, key, start), mean, rtol=0.1)  # control: the flow is no mean


@pytest.mark.parametrize(("sampler", "plain"), [(DPMSolver, DDIM), (StochasticDPMSolver, Ancestral)])
def test_orders_differ_as_stated(sampler, plain, x64):
    """Negative control: without memory the solvers of order 2 are those of order 1, and would fail their tests."""

    class Forgetful(sampler):
        def step(self, *args):
            x, _ = super().step(*args)
            return x, self.init(x)

    _, denoiser = gaussian(SCHEDULES[0])
    start = jnp.asarray([0.7, -1.3, 0.4])
    samples = [s(30).sample(denoiser, jax.random.key(0), start) for s in (Forgetful, plain, sampler)]
    np.testing.assert_allclose(samples[0], samples[1], rtol=1e-12)
    assert not np.allclose(samples[0], samples[2], rtol=1e-4)


@by_schedule
def test_heun_is_algorithm_1(schedule, x64):
    """Karras et al. 2022, algorithm 1, line by line, on x/α with the noise level σ/α; without its second half, DDIM."""
    _, denoiser = gaussian(schedule)
    ends = jnp.asarray([-0.5, 0.75])
    (alpha, next_alpha), (t, next_t) = schedule.alpha(ends), schedule.sigma(ends) / schedule.alpha(ends)
    x = jnp.asarray([0.7, -1.3, 0.4])
    d = (x - denoiser.x_hat(alpha * x, ends[0])) / t
    euler = x + (next_t - t) * d
    d_next = (euler - denoiser.x_hat(next_alpha * euler, ends[1])) / next_t
    expected = x + (next_t - t) * (0.5 * d + 0.5 * d_next)
    for sampler, wanted in ((Heun(3), expected), (DDIM(2), euler)):
        got, _ = sampler.step(denoiser, alpha * x, *ends, (), jax.random.key(0))
        np.testing.assert_allclose(got, next_alpha * wanted, rtol=1e-10)
    assert not np.allclose(expected, euler, rtol=1e-2)


@pytest.mark.slow
def test_deterministic_samplers_ignore_their_key_and_end_with_the_denoised_mean(x64, strict):
    """From a given start they are functions; with no noise left to remove, every sampler is exact for a point."""
    point = GaussianDenoiser(jnp.asarray(MEAN), jnp.zeros((3, 3)), SCHEDULES[0])
    _, denoiser = gaussian(SCHEDULES[0])
    for sampler in SAMPLERS:
        np.testing.assert_allclose(sampler(5).sample(point, jax.random.key(0)), MEAN, rtol=1e-9)
        draws = [sampler(5).sample(denoiser, jax.random.key(seed), jnp.ones(3)) for seed in (0, 1)]
        assert np.array_equal(*draws) == (sampler not in (Ancestral, StochasticDPMSolver))


@stochastic
def test_stochastic_step_draws_from_the_posterior_of_the_forward_process(sampler, order, x64):
    """q(x_s | x_t, x) by conditioning the joint Gaussian of (x_s, x_t) given x: mean and noise exact, step by step."""
    schedule = VariancePreserving(-4.0, 4.0)
    x, x_t = jnp.asarray([0.8, -1.0]), jnp.asarray([-0.4, 0.1])
    point = GaussianDenoiser(x, jnp.zeros((2, 2)), schedule)
    state = sampler(2).init(x)
    # The second step has another length, so that the extrapolation of what has been seen is tried.
    for low, high in ((-0.5, 0.75), (0.75, 1.25)):
        low, high = jnp.asarray(low), jnp.asarray(high)
        (a_t, s_t), (a_s, s_s) = ((schedule.alpha(at), schedule.sigma(at)) for at in (low, high))
        # x_t = (a_t/a_s) x_s + noise, so cov(x_s, x_t | x) = (a_t/a_s) s_s²
        regression = a_t / a_s * s_s**2 / s_t**2
        mean, variance = a_s * x + regression * (x_t - a_t * x), s_s**2 - regression * a_t / a_s * s_s**2
        key = jax.random.key(0)
        got, state = sampler(2).step(point, x_t, low, high, state, key)
        np.testing.assert_allclose(got, mean + jnp.sqrt(variance) * jax.random.normal(key, (2,)), rtol=1e-10)
        x_t = got


class Start(DDIM):
    """Returns where it would start."""

    def sample(self, denoiser, key, start=None):
        return start


@pytest.mark.parametrize("kind", [VariancePreserving, VarianceExploding], ids=["vp", "ve"])
def test_start_from_pure_noise_has_the_law_at_the_noisiest_level(kind, x64):
    """For N(m, V) in one dimension, start = mean + deviation × noise: its errors against N(α m, α²V + σ²).

    Relative to σ and with e^λmin → 0, that of the mean is of order 3/2 and that of the deviation of order 2; of the
    start of the other samplers, which has mean 0 and deviation √(α² + σ²), they are of order 1/2 and 1.
    """
    key, levels = jax.random.key(0), (-10.0, -12.0)
    noise = jax.random.normal(jax.random.split(key)[0], (1,))[0]

    def errors(level):
        schedule = kind(level, 4.0)
        alpha, sigma = schedule.alpha(jnp.asarray(level)), schedule.sigma(jnp.asarray(level))
        denoisers = [GaussianDenoiser(jnp.asarray([m]), jnp.asarray([[3.0]]), schedule) for m in (2.0, 0.0)]
        start, centred = (FromPureNoise(Start(5)).sample(denoiser, key)[0] for denoiser in denoisers)
        mean, deviation = 2.0 * alpha, jnp.sqrt(3.0 * alpha**2 + sigma**2)
        plain = jnp.sqrt(schedule.reference_variance())
        of = [start - centred - mean, centred / noise - deviation, 0 - mean, plain - deviation]
        return np.abs(np.array(of) / sigma)

    orders = np.log(errors(levels[0]) / errors(levels[1])) / (levels[0] - levels[1])
    np.testing.assert_allclose(orders, [1.5, 2.0, 0.5, 1.0], atol=0.02)


@every
def test_samples_do_not_depend_on_the_schedule(sampler, x64):
    """With one key, variance preserving and exploding reverse diffusions are one another, scaled by α."""
    samples = [sampler(9).sample(gaussian(schedule)[1], jax.random.key(0)) for schedule in SCHEDULES]
    np.testing.assert_allclose(*samples, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", [*SAMPLERS, lambda n: FromPureNoise(DDIM(n - 2))])
def test_evaluations_are_the_calls_of_the_denoiser(sampler):
    """Counted without compilation, where a loop calls its body at each step."""
    calls = []

    class Counted(GaussianDenoiser):
        def __call__(self, x_noisy, log_snr):
            calls.append(log_snr)
            return super().__call__(x_noisy, log_snr)

    denoiser = Counted(jnp.zeros(3), jnp.eye(3), SCHEDULES[0])
    for evaluations in (5, 7):
        calls.clear()
        with jax.disable_jit():
            sampler(evaluations).sample(denoiser, jax.random.key(0))
        assert len(calls) == sampler(evaluations).evaluations == evaluations
        assert (calls[0], calls[-1]) == (-4.0, 4.0)


@every
def test_too_few_evaluations_are_refused(sampler):
    """One step and one last denoising are the least."""
    with pytest.raises(ValueError, match=r"evaluations must be . for each step, at least one step, .* got 1"):
        sampler(1)


def test_evaluations_are_not_rounded():
    """What steps do not add up to is refused, with the numbers that are possible."""
    with pytest.raises(ValueError, match=r"2 for each step, .* \(3, 5, 7, \.\.\.\), got 20"):
        Heun(20)
