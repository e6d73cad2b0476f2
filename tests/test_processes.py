"""Processes in state-space form against dense Gaussians: density, draws, posteriors of sequences, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import distributions as dist
from numpyro.distributions import kl_divergence
import pytest
from scipy import stats

from sami_ppl.distributions.matern import Matern, Smoothed

KEY = jax.random.key(0)
TIMES = np.array([0.0, 0.3, 1.0, 1.1, 4.0])
LENGTHS = np.array([0.7, 3.0])
SMOOTHNESS = (0.5, 1.5)
T, D = len(TIMES), len(LENGTHS)


def kernel(smoothness, lengths=LENGTHS, times=TIMES):
    """Covariance (D, T, T) from the textbook formula."""
    distance = np.abs(times[:, None] - times)[None] / np.asarray(lengths)[:, None, None]
    if smoothness == 0.5:
        return np.exp(-distance)
    return (1 + np.sqrt(3) * distance) * np.exp(-np.sqrt(3) * distance)


def joint(smoothness):
    """Covariance of the flattened (T, D) sequence."""
    return np.einsum("dst,de->sdte", kernel(smoothness), np.eye(D)).reshape(T * D, T * D)


@jax.jit
def answers(process, centre, precision, z):
    q = Smoothed(process, jnp.asarray(centre), jnp.asarray(precision))
    return {
        "mean": q.mean, "variance": q.variance, "log_normaliser": q.log_normaliser, "log_prob": q.log_prob(z),
        "kl": kl_divergence(q, process), "prior": process.log_prob(z),
    }  # fmt: skip


def potentials(missing=()):
    """Centres and full precisions of single times; zero where a frame is missing."""
    rng = np.random.default_rng(1)
    root = rng.normal(size=(T, D, D))
    precision = root @ np.swapaxes(root, 1, 2) + 0.1 * np.eye(D)
    precision[list(missing)] = 0
    return rng.normal(size=(T, D)), precision


def dense_posterior(smoothness, centre, precision):
    """Mean, covariance and log Z by one big Gaussian."""
    big = np.zeros((T, D, T, D))
    big[np.arange(T), :, np.arange(T), :] = precision
    big, cov = big.reshape(T * D, T * D), joint(smoothness)
    after = np.linalg.inv(np.linalg.inv(cov) + big)
    c = centre.reshape(-1)
    mean = after @ big @ c
    log_z = 0.5 * (mean @ np.linalg.inv(after) @ mean - c @ big @ c)
    log_z += 0.5 * (np.linalg.slogdet(after)[1] - np.linalg.slogdet(cov)[1])
    return mean, after, log_z


@pytest.mark.slow
@pytest.mark.parametrize("smoothness", SMOOTHNESS)
def test_density_is_that_of_the_kernel_matrix(smoothness, x64):
    """At irregular times, one lengthscale for each process; the gradient in them is that of the dense density."""
    z = np.random.default_rng(0).normal(size=(3, T, D))

    def dense(lengths):
        distance = jnp.abs(TIMES[:, None] - TIMES)[None] / lengths[:, None, None]
        s = distance if smoothness == 0.5 else np.sqrt(3) * distance
        cov = jnp.exp(-s) * (1 if smoothness == 0.5 else 1 + s)
        return dist.MultivariateNormal(jnp.zeros(T), cov).log_prob(jnp.swapaxes(z, 1, 2)).sum(-1)

    ours = lambda lengths: Matern(TIMES, lengths, smoothness=smoothness).log_prob(z)  # noqa: E731
    both = lambda f: jax.jit(lambda at: (f(at), jax.jacfwd(f)(at)))(jnp.asarray(LENGTHS))  # noqa: E731
    for one, other in zip(both(ours), both(dense), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-8)


def test_ornstein_uhlenbeck_at_whole_times_is_an_autoregression(x64):
    """z_t = a z_{t−1} + √(1 − a²) n with a = exp(−1/ℓ), written down directly."""
    z, a = np.random.default_rng(0).normal(size=(6, 1)), np.exp(-1 / 2.5)
    expected = stats.norm.logpdf(z[0]) + stats.norm.logpdf(z[1:], a * z[:-1], np.sqrt(1 - a**2)).sum(0)
    np.testing.assert_allclose(Matern(np.arange(6.0), 2.5, smoothness=0.5).log_prob(z), expected[0], rtol=1e-12)


@pytest.mark.parametrize("smoothness", SMOOTHNESS)
def test_draws_have_the_kernel_as_covariance(smoothness):
    """20,000 draws; 5 standard errors for every entry (false alarm 6e-7 each); another lengthscale fails."""
    draws = np.asarray(Matern(TIMES, LENGTHS, smoothness=smoothness).sample(KEY, (20_000,)))
    assert draws.shape == (20_000, T, D)
    found, expected = np.cov(draws.reshape(len(draws), -1), rowvar=False), joint(smoothness)
    error = np.sqrt((1 + expected**2) / len(draws))
    assert np.all(np.abs(found - expected) < 5 * error)
    assert np.all(np.abs(draws.mean(0)) < 5 / np.sqrt(len(draws)))
    wrong = kernel(smoothness, 1.2 * LENGTHS)
    assert np.any(np.abs(found.reshape(T, D, T, D)[:, 0, :, 0] - wrong[0]) > 5 * error.max())


def test_a_short_lengthscale_makes_times_independent():
    z = jnp.asarray(np.random.default_rng(0).normal(size=(T, D)), jnp.float32)
    for smoothness in SMOOTHNESS:
        one = Matern(TIMES, 1e-4, smoothness=smoothness, size=D)
        np.testing.assert_allclose(one.log_prob(z), dist.Normal(0, 1).log_prob(z).sum(), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("smoothness", SMOOTHNESS)
def test_single_precision_is_enough(smoothness):
    """Frames a twentieth of the lengthscale apart and sharp potentials, against the same numbers in double precision.

    1 − a² and one minus its polynomial lose most digits at short steps, if computed as they are written.
    """
    rng = np.random.default_rng(0)
    times, lengths = np.arange(20, dtype=np.float32), np.float32([20.0, 5.0])
    centre = np.cumsum(0.1 * rng.normal(size=(20, 2)), 0).astype(np.float32)
    precision = np.float32([np.diag([1000.0, 300.0])] * 20)
    precision[5:9] = 0

    def found(dtype):
        times_, lengths_, *rest = (p.astype(dtype) for p in (times, lengths, centre, precision, centre))
        return answers(Matern(times_, lengths_, smoothness=smoothness), *rest)

    single = found(np.float32)
    with jax.enable_x64(True):
        double = found(np.float64)
    for name, value in single.items():
        np.testing.assert_allclose(value, double[name], rtol=2e-4, atol=2e-3, err_msg=name)


@pytest.mark.slow
def test_variance_does_not_cancel_where_frames_say_little():
    """Frames that hardly know more than the prior have centres far out: squares of these must not be subtracted."""
    rng, shape = np.random.default_rng(0), (50, 12, 2)
    known = rng.random(shape) < 0.7
    excess = np.where(known, 0.05**-2 - 1, 0.02)
    centre = np.where(known, rng.normal(size=shape), 0.14 * rng.normal(size=shape) / excess)
    precision = excess[..., None] * np.eye(2)

    def variance(dtype):
        times, *rest = (jnp.asarray(p, dtype) for p in (np.arange(12), np.full(2, 20.0), centre, precision))
        return Smoothed(Matern(times, rest[0]), *rest[1:]).variance

    single = variance(np.float32)
    with jax.enable_x64(True):
        double = variance(np.float64)
    np.testing.assert_allclose(single, double, rtol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("missing", [(), (1, 2), (0, 4)])
@pytest.mark.parametrize("smoothness", SMOOTHNESS)
def test_posterior_is_the_dense_one(smoothness, missing, x64):
    """Mean, variance, log Z, density and KL from the filter and its derivatives, against one big Gaussian."""
    centre, precision = potentials(missing)
    z = np.random.default_rng(2).normal(size=(T, D))
    found = answers(Matern(TIMES, LENGTHS, smoothness=smoothness), centre, precision, z)
    mean, cov, log_z = dense_posterior(smoothness, centre, precision)
    np.testing.assert_allclose(found["mean"].reshape(-1), mean, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found["variance"].reshape(-1), np.diag(cov), rtol=1e-9)
    np.testing.assert_allclose(found["log_normaliser"], log_z, rtol=1e-10)
    density = stats.multivariate_normal(mean, cov).logpdf(z.reshape(-1))
    np.testing.assert_allclose(found["log_prob"], density, rtol=1e-9)
    prior = joint(smoothness)
    inverse = np.linalg.inv(prior)
    kl = 0.5 * (np.trace(inverse @ cov) + mean @ inverse @ mean - T * D)
    kl += 0.5 * (np.linalg.slogdet(prior)[1] - np.linalg.slogdet(cov)[1])
    np.testing.assert_allclose(found["kl"], kl, rtol=1e-9)


@pytest.mark.slow
def test_nothing_seen_is_the_prior():
    found = answers(Matern(TIMES, LENGTHS), jnp.zeros((T, D)), jnp.zeros((T, D, D)), jnp.zeros((T, D)))
    np.testing.assert_allclose(found["mean"], 0, atol=1e-6)
    np.testing.assert_allclose(found["variance"], 1, rtol=1e-5)
    np.testing.assert_allclose(found["kl"], 0, atol=1e-5)


@pytest.mark.parametrize("smoothness", SMOOTHNESS)
def test_draws_of_the_posterior_have_its_moments(smoothness):
    """20,000 draws with two frames missing; 5 standard errors for every entry; draws of the prior fail."""
    centre, precision = potentials((1, 2))
    process = Matern(TIMES, LENGTHS, smoothness=smoothness)
    q = Smoothed(process, jnp.asarray(centre, jnp.float32), jnp.asarray(precision, jnp.float32))
    mean, cov, _ = dense_posterior(smoothness, centre, precision)
    scale = np.sqrt(np.diag(cov))
    error = np.sqrt((np.outer(scale, scale) ** 2 + cov**2) / 20_000)

    def fits(draws):
        draws = np.asarray(draws).reshape(20_000, -1)
        near = np.abs(draws.mean(0) - mean) < 5 * scale / np.sqrt(20_000)
        return near.all() and (np.abs(np.cov(draws, rowvar=False) - cov) < 5 * error).all()

    assert fits(jax.jit(lambda key: q.sample(key, (20_000,)))(KEY))
    assert not fits(process.sample(KEY, (20_000,)))


@pytest.mark.slow
def test_gradients_of_draws_and_divergence(x64):
    """In lengthscale and potentials, against finite differences."""
    centre, precision = potentials((1, 2))

    def value(lengths, centre, precision):
        q = Smoothed(Matern(TIMES, lengths), centre, precision)
        return jnp.sum(jnp.sin(q.sample(KEY))) + kl_divergence(q, q.process)

    arguments, compiled = tuple(jnp.asarray(p) for p in (LENGTHS, centre, precision)), jax.jit(value)
    for i, slope in enumerate(jax.jit(jax.grad(value, argnums=(0, 1, 2)))(*arguments)):
        way = np.random.default_rng(i).normal(size=slope.shape)
        if i == 2:
            way = (way + np.swapaxes(way, -1, -2)) * (precision != 0)
        step = lambda h, i=i, way=way: compiled(*(p + h * way if j == i else p for j, p in enumerate(arguments)))  # noqa: E731
        np.testing.assert_allclose(jnp.sum(slope * way), (step(1e-6) - step(-1e-6)) / 2e-6, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
def test_batches_are_single_sequences_side_by_side():
    """Times, lengthscales and potentials of their own, as under a plate."""
    times = np.stack([TIMES, 2 * TIMES]).astype(np.float32)
    lengths = np.array([[1.0, 2.0], [0.5, 4.0]], np.float32)
    centre, precision = (np.stack([p, -p if p.ndim == 2 else p]).astype(np.float32) for p in potentials((2,)))
    q = Smoothed(Matern(times, lengths), centre, precision)
    z = np.random.default_rng(0).normal(size=(2, T, D)).astype(np.float32)
    shape = jax.jit(lambda key: q.sample(key, (3,)))(KEY).shape
    assert (q.batch_shape, q.event_shape, shape) == ((2,), (T, D), (3, 2, T, D))
    both = answers(q.process, centre, precision, z)
    for i in range(2):
        one = answers(Matern(times[i], lengths[i]), centre[i], precision[i], z[i])
        for name, value in one.items():
            np.testing.assert_allclose(both[name][i], value, rtol=1e-4, atol=1e-5, err_msg=name)
    wide = Matern(TIMES, 1.0).expand((4,))
    assert (wide.batch_shape, wide.event_shape) == ((4,), (T, 1))


@pytest.mark.slow
def test_processes_may_share_their_potentials():
    """The variance is that of each process, not of all that share them: 1/(1 + 3) of a single time."""
    shared = Smoothed(Matern(np.zeros((2, 1)), 1.0, smoothness=0.5), jnp.zeros((1, 1)), jnp.full((1, 1, 1), 3.0))
    np.testing.assert_allclose(shared.variance, np.full((2, 1, 1), 0.25), rtol=1e-5)


REFUSED = {
    "order": (lambda: Matern([0.0, 2.0, 1.0], 1.0), "times must increase from frame to frame, got"),
    "twice": (lambda: Matern([0.0, 1.0, 1.0], 1.0), "times must increase"),
    "scalar": (lambda: Matern(1.0, 1.0), r"times must be a vector, one for each frame, got shape \(\)"),
    "smoothness": (lambda: Matern(TIMES, 1.0, smoothness=2.5), "smoothness must be 0.5 .* or 1.5, got 2.5"),
    "lengthscale": (lambda: Matern(TIMES, [1.0, 0.0]), "lengthscale must be positive"),
    "size": (lambda: Matern(TIMES, LENGTHS, size=3), "lengthscale has 2 elements for size=3 processes"),
    "potentials": (lambda: Smoothed(Matern(TIMES, 1.0), jnp.zeros((3, 1)), jnp.zeros((3, 1, 1))), "with T, D = "),
    "another": (
        lambda: kl_divergence(
            Smoothed(Matern(TIMES, 1.0), jnp.zeros((T, 1)), jnp.zeros((T, 1, 1))), Matern(TIMES, 1.0, smoothness=0.5)
        ),
        "from the process that it was made of only",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_process_is_refused(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()
