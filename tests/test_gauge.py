"""Gauge fixing: the axes found, what they save of the KL, and that all else stays as it was."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
import pytest
from sklearn.decomposition import FastICA

from sami_ppl.decoders.decoder import ScoreDecoder
from sami_ppl.decoders.guidance import GuidedDenoiser
from sami_ppl.diffusion.sampler import DDIM, Ancestral
from sami_ppl.diffusion.schedule import VariancePreserving
from sami_ppl.encoders.affine import AffineEncoder
from sami_ppl.fitting.gauge import _in_axes, align, filling, orthogonal_ica, why_axes_stay
from sami_ppl.fitting.objective import ScoreELBO
from sami_ppl.fitting.stage import Stage
from sami_ppl.program.program import Program

pytestmark = pytest.mark.slow

SCHEDULE = VariancePreserving(-5.0, 7.0)
OBS = 2000
MIXING = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))[0]
"""z = MIXING @ sources: the rotation to be undone."""


def prior():
    """Two sites, so that a rotation mixes axes of different ones; the fourth axis is spare."""
    numpyro.sample("a", dist.Normal(0.0, 1.0))
    numpyro.sample("b", dist.Normal(2.0, 3.0).expand([3]).to_event(1))


def make(oracle, exact_encoder, prior=prior, strengths=(2.0, 2.0, 2.0, 0.0), noise_variance=0.05):
    """The exact program of x = Wz + N(0, s₀²) with orthogonal columns of these lengths; equal ones are isotropic."""
    orthonormal = np.linalg.qr(np.random.default_rng(1).normal(size=(6, len(strengths))))[0]
    weights = orthonormal * np.asarray(strengths)
    encoder = exact_encoder(jnp.asarray(weights, jnp.float32), noise_variance, SCHEDULE)
    exact = oracle(SCHEDULE, noise_variance)
    cov = weights @ weights.T + noise_variance * np.eye(6)
    denoiser = type(exact.denoiser)(jnp.zeros(6), jnp.asarray(cov, jnp.float32), SCHEDULE)
    return Program(prior, denoiser, encoder, sampler=DDIM(8))


def observations(program, sources):
    """x = Wz + noise of the sources mixed; the spare axis is at its prior."""
    rng = np.random.default_rng(5)
    z = np.concatenate([sources @ MIXING.T, rng.normal(size=(len(sources), 1))], 1)
    encoder = program.encoder
    noise = rng.normal(size=(len(sources), 6)) * encoder.noise_variance**0.5
    return (z @ np.asarray(encoder.weights).T + noise).astype(np.float32)


SPREAD = np.array([1.8, 1.3, 0.9])
"""Of the sources, in spreads of the prior."""


def uniform_sources():
    """Mean .3 of their spread."""
    return SPREAD * (0.3 + np.random.default_rng(4).uniform(-(3**0.5), 3**0.5, size=(OBS, 3)))


@pytest.fixture(scope="module")
def cache():
    return {}


@pytest.fixture
def fixed(cache, oracle, exact_encoder):
    """The program, its observations and their alignment, computed once."""
    if not cache:
        program = make(oracle, exact_encoder)
        x = observations(program, uniform_sources())
        cache["fixed"] = program, x, align(program, x)
    return cache["fixed"]


def distance_from_permutation(matrix):
    """How far the absolute values are from a permutation matrix: 0 for one."""
    return max(np.abs(np.sort(np.abs(m), axis=1) - [0, 0, 1]).max() for m in (matrix, matrix.T))


def test_finds_the_sources(fixed):
    """ICA of 2000 uniform samples: errors of the angles near 1/√2000 = .02. Each gets an axis, in units of its spread.

    Control: a rotation alone cannot do that.
    """
    _, _, found = fixed
    active = found.matrix[:3, :3]
    assert distance_from_permutation(active @ MIXING * SPREAD) < 0.08
    assert distance_from_permutation(MIXING * SPREAD) > 0.3, "nothing was to be found"
    assert distance_from_permutation(np.linalg.qr(active.T)[0].T @ MIXING * SPREAD) > 0.3
    assert (np.diag(found.matrix) > 0).all()


def test_passive_axes_stay(fixed):
    _, _, found = fixed
    np.testing.assert_array_equal(found.matrix[3], np.eye(4)[3])
    np.testing.assert_array_equal(found.matrix[:, 3], np.eye(4)[3])
    assert found.centre[3] == 0


def test_posteriors_are_those_of_the_new_code(fixed):
    program, x, found = fixed
    (loc, scale), factor = program.encode(x[:50]), found.program.code_law(jnp.asarray(x[:50])).root
    turned, marginal = found.program.encode(x[:50])
    np.testing.assert_allclose(turned, (loc - found.centre) @ found.matrix.T, atol=1e-5)
    want = found.matrix @ (scale[:, :, None] ** 2 * np.eye(4)) @ found.matrix.T
    np.testing.assert_allclose(factor @ np.swapaxes(factor, 1, 2), want, atol=1e-5)
    np.testing.assert_allclose(marginal**2, np.diagonal(want, axis1=1, axis2=2), rtol=1e-4)


def test_the_aggregate_posterior_fills_the_prior_and_no_kl_is_smaller(fixed):
    """Mean 0, covariance I; the KL falls by the gain, and rises where a little is changed of matrix or centre."""
    program, x, found = fixed

    def moments(program):
        q = program.code_law(jnp.asarray(x))
        return np.asarray(q.mean, float)[:, :3], np.asarray(q.root @ jnp.swapaxes(q.root, 1, 2), float)[:, :3, :3]

    def kl(mean, cov):
        trace = np.trace(cov, axis1=1, axis2=2)
        return np.mean(0.5 * (trace + (mean**2).sum(1) - 3 - np.linalg.slogdet(cov)[1]))

    before, after = moments(program), moments(found.program)
    np.testing.assert_allclose(after[0].mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(np.cov(after[0].T, bias=True) + after[1].mean(0), np.eye(3), atol=1e-3)
    assert kl(*before) - kl(*after) == pytest.approx(found.gain, abs=1e-3)
    assert found.gain > 0.5
    for i, change in enumerate([1.05 * np.eye(3), np.eye(3) / 1.05, np.diag([1.1, 1, 1 / 1.1])]):
        worse = kl(after[0] @ change.T, change @ after[1] @ change.T)
        assert worse > kl(*after) + 1e-3, i
    assert kl(after[0] + [0.1, 0, 0], after[1]) > kl(*after) + 1e-3


def test_codes_that_fill_the_prior_gain_nothing():
    """Means N(0, ¾ I), variances ¼: the matrix is 1 and the gain nothing to the error of 2000 draws (its square)."""
    means = np.random.default_rng(0).normal(size=(OBS, 3)) * 0.75**0.5
    matrix, centre, gain = filling(means, np.eye(3) / 4)
    np.testing.assert_allclose(matrix, np.eye(3), atol=0.06)
    np.testing.assert_allclose(centre, 0, atol=0.08)
    assert 0 <= gain < 0.01


def test_prior_networks_and_all_else_stay(fixed):
    program, _, found = fixed
    assert found.program.prior is program.prior
    assert found.program.denoiser is program.denoiser
    assert found.program.encoder.base is program.encoder
    assert found.program.latents.axes == program.latents.axes


@pytest.mark.parametrize("sampler", [DDIM(8), Ancestral(8)])
def test_samples_given_the_new_code_are_the_same(fixed, sampler):
    program, _, found = fixed
    keys, z = jax.random.split(jax.random.key(0), 6), jax.random.normal(jax.random.key(1), (6, 4))

    def draw(encoder, z):
        sample = lambda key, z: sampler.sample(GuidedDenoiser(program.denoiser, encoder, z), key)  # noqa: E731
        return np.asarray(jax.jit(jax.vmap(sample))(keys, z))

    turned = (z - jnp.asarray(found.centre, jnp.float32)) @ jnp.asarray(found.matrix, jnp.float32).T
    before, after = draw(program.encoder, z), draw(found.program.encoder, turned)
    np.testing.assert_allclose(after, before, atol=2e-4)
    assert np.abs(draw(found.program.encoder, z) - before).max() > 0.5, "the axes are the same"


def test_the_decoder_s_part_of_the_bound_is_the_same_with_the_same_noise(fixed):
    """−log p(x | z) bound at z and at A (z − m) on the same noise: equal to rounding."""
    program, x, found = fixed
    x = jnp.asarray(x[:16])
    loc, scale = jax.vmap(program.encoder.posterior)(x)
    z = loc + scale * jax.random.normal(jax.random.key(2), loc.shape)

    @jax.jit
    def log_prob(encoder, z):
        return ScoreDecoder(
            program.denoiser, encoder, z, sampler=program.sampler, key=jax.random.key(3), levels=4
        ).log_prob(x)

    before = log_prob(program.encoder, z)
    turned = (z - jnp.asarray(found.centre, jnp.float32)) @ jnp.asarray(found.matrix, jnp.float32).T
    np.testing.assert_allclose(log_prob(found.program.encoder, turned), before, rtol=1e-4, atol=1e-3)
    assert np.abs(log_prob(found.program.encoder, z) - before).max() > 0.1


@pytest.mark.slow
def test_the_bound_of_the_program_rises_by_the_gain(fixed):
    """Model and guide under NumPyro, correlated sites included: mean of 300 paired differences, four errors."""
    program, x, found = fixed
    x = jnp.asarray(x)

    def totals(program):
        def total(key):
            terms = ScoreELBO().terms(key, program.params(), program.model, program.guide, x)
            return sum(jnp.sum(term) for term in terms.values())

        return np.asarray(jax.jit(jax.vmap(total))(jax.random.split(jax.random.key(4), 8)))

    difference = totals(program) - totals(found.program)
    error = difference.std() / 8**0.5
    assert error < 0.1
    assert abs(difference.mean() - found.gain) < 5 * error + 1e-3


def test_diagonal_cost_is_the_kl_from_the_product_of_marginals(oracle, exact_encoder):
    """Unequal posterior widths, rotated: KL(N(m, C) ‖ Π N(m_j, C_jj)) by NumPyro; nothing where they are equal."""
    program = make(oracle, exact_encoder, strengths=(2.0, 1.0, 0.6, 0.0), noise_variance=0.3)
    x = observations(program, uniform_sources())
    found = align(program, x)
    q = found.program.code_law(jnp.asarray(x))
    loc, cov = q.mean, q.root @ jnp.swapaxes(q.root, 1, 2)
    marginals = jnp.eye(4) * jnp.diagonal(cov, axis1=1, axis2=2)[:, None, :]
    full, product = (dist.MultivariateNormal(jnp.asarray(loc), c) for c in (cov, marginals))
    want = float(dist.kl_divergence(full, product).mean())
    assert want > 0.05
    assert found.diagonal_cost == pytest.approx(want, rel=1e-3)


def test_applied_twice_it_changes_nothing_more(fixed):
    _, x, found = fixed
    again = align(found.program, x)
    np.testing.assert_allclose(again.matrix, np.eye(4), atol=0.02)
    np.testing.assert_allclose(again.centre, 0, atol=1e-3)
    assert again.gain == pytest.approx(0, abs=1e-3)
    assert isinstance(again.program.encoder, AffineEncoder)
    assert not isinstance(again.program.encoder.base, AffineEncoder)
    np.testing.assert_allclose(again.program.encoder.matrix, again.matrix @ found.matrix, atol=1e-5)
    np.testing.assert_allclose(again.program.encode(x[:5])[0], found.program.encode(x[:5])[0], atol=0.1)


def test_affine_in_two_steps_is_affine_in_one(fixed):
    """A second gauge, with a centre of its own, is taken with the first into one encoder."""
    program, x, found = fixed
    matrix, centre = np.eye(4) + 0.3 * np.random.default_rng(0).normal(size=(4, 4)), np.arange(4) / 4
    once = program.replace(encoder=_in_axes(found.program.encoder, matrix, centre))
    want = (found.program.encode(x[:50])[0] - centre) @ matrix.T
    np.testing.assert_allclose(once.encode(x[:50])[0], want, atol=1e-4)
    assert once.encoder.base is program.encoder


def test_same_seed_same_axes(fixed):
    program, x, found = fixed
    np.testing.assert_array_equal(align(program, x).matrix, found.matrix)


def mixed():
    numpyro.sample("light", dist.Uniform(-1.0, 1.0))
    numpyro.sample("b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    numpyro.sample("spare", dist.Normal(0.0, 1.0))


def test_only_axes_with_the_symmetry_are_rotated(oracle, exact_encoder):
    program = make(oracle, exact_encoder, prior=mixed)
    found = align(program, observations(program, uniform_sources())).matrix
    np.testing.assert_array_equal(found[0], np.eye(4)[0])
    np.testing.assert_array_equal(found[:, 0], np.eye(4)[0])
    assert np.abs(found[1:3, 1:3] - np.eye(2)).max() > 0.05


def boxes():
    numpyro.sample("place", dist.Uniform(-1.0, 1.0).expand([4]).to_event(1))


def one_normal():
    numpyro.sample("light", dist.Normal(0.0, 1.0))
    numpyro.sample("place", dist.Uniform(-1.0, 1.0).expand([3]).to_event(1))


def scaled():
    """The spread of `b` depends on `a`: its conditional has no fixed symmetry."""
    a = numpyro.sample("a", dist.Normal(0.0, 1.0))
    numpyro.sample("b", dist.Normal(0.0, jnp.exp(a)).expand([3]).to_event(1))


def parent():
    """The axes of `a` have a normal law by themselves, but `b` follows the first of them: turned they are others."""
    a = numpyro.sample("a", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    numpyro.sample("b", dist.Normal(3 * a[..., 0], 0.1))


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        (parent, r"without that symmetry: a, b, 0 normal axis"),
        (boxes, r"without that symmetry: place, 0 normal axis"),
        (one_normal, r"without that symmetry: place, 1 normal axis"),
        (scaled, r"without that symmetry: a, b, 0 normal axis"),
    ],
)
def test_priors_without_rotation_symmetry_are_refused(oracle, exact_encoder, prior, message):
    program = make(oracle, exact_encoder, prior=prior)
    with pytest.raises(ValueError, match=message):
        align(program, np.zeros((3, 6), np.float32))


def test_a_breakdown_of_the_iteration_leaves_the_axes_and_says_so(monkeypatch):
    """LAPACK met a NaN of FastICA's own making once; a NaN in the means themselves is an error."""
    means = np.random.default_rng(0).uniform(size=(100, 3)).astype(np.float32)

    def breaks(self, x):
        raise ValueError("slice 0 has a NaN entry")

    with pytest.raises(ValueError, match="NaN"):
        orthogonal_ica(np.full_like(means, np.nan), seed=0)
    monkeypatch.setattr(FastICA, "fit", breaks)
    with pytest.warns(UserWarning, match=r"slice 0 .* axes stay"):
        assert np.array_equal(orthogonal_ica(means, seed=0), np.eye(3))


def test_collapsed_axes_leave_the_program_as_it_is(oracle, exact_encoder):
    """No axis active: the identity, at no cost."""
    program = make(oracle, exact_encoder, strengths=(0.0, 0.0, 0.0, 0.0))
    found = align(program, observations(program, uniform_sources()))
    np.testing.assert_array_equal(found.matrix, np.eye(4))
    assert found.gain == 0
    assert found.diagonal_cost == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({}, ""),
        ({"site_beta": {"a": 0.5}}, "weights of single sites, or penalties, may tell them apart"),
        ({"capacity": {"b": 3.0}}, "weights of single sites, or penalties, may tell them apart"),
        ({"penalties": {"mine": lambda draw: jnp.zeros(())}}, "weights of single sites, or penalties, may"),
    ],
)
def test_axes_that_a_stage_tells_apart_stay(oracle, exact_encoder, settings, why):
    """Sites that are weighed apart are no symmetry of the loss, whatever the prior."""
    found = why_axes_stay(make(oracle, exact_encoder), Stage(train=("encoder",), **settings))
    assert found.startswith(why)
    assert bool(found) == bool(why)
    assert "no two that may be turned" in why_axes_stay(make(oracle, exact_encoder, prior=boxes), Stage())
