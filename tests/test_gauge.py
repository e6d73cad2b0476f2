"""Gauge fixing: the rotation found, and that everything but the axes stays as it was."""

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
from sami_ppl.encoders.encoder import RotatedEncoder
from sami_ppl.fitting.gauge import align, orthogonal_ica
from sami_ppl.fitting.objective import ScoreELBO
from sami_ppl.program.kl import site_kl
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


def uniform_sources():
    return np.random.default_rng(4).uniform(-(3**0.5), 3**0.5, size=(OBS, 3))


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


def test_finds_the_rotation_of_independent_sources(fixed):
    """ICA of 2000 uniform samples: errors of the angles near 1/√2000 = .02."""
    _, _, found = fixed
    active = found.rotation[:3, :3]
    np.testing.assert_allclose(found.rotation @ found.rotation.T, np.eye(4), atol=1e-6)
    assert distance_from_permutation(active @ MIXING) < 0.08
    assert distance_from_permutation(MIXING) > 0.3, "nothing was to be found"
    assert (np.diag(found.rotation) > 0).all()


def test_passive_axes_stay(fixed):
    _, _, found = fixed
    np.testing.assert_array_equal(found.rotation[3], np.eye(4)[3])
    np.testing.assert_array_equal(found.rotation[:, 3], np.eye(4)[3])


def test_posterior_means_are_those_of_the_rotated_code(fixed):
    program, x, found = fixed
    (loc, scale), factor = program.encode(x[:50]), found.program.code_law(jnp.asarray(x[:50])).root
    rotated, marginal = found.program.encode(x[:50])
    np.testing.assert_allclose(rotated, loc @ found.rotation.T, atol=1e-5)
    want = found.rotation @ (scale[:, :, None] ** 2 * np.eye(4)) @ found.rotation.T
    np.testing.assert_allclose(factor @ np.swapaxes(factor, 1, 2), want, atol=1e-5)
    np.testing.assert_allclose(marginal**2, np.diagonal(want, axis1=1, axis2=2), rtol=1e-4)


def test_prior_networks_and_all_else_stay(fixed):
    program, _, found = fixed
    assert found.program.prior is program.prior
    assert found.program.denoiser is program.denoiser
    assert found.program.encoder.base is program.encoder
    assert found.program.latents.axes == program.latents.axes


@pytest.mark.parametrize("sampler", [DDIM(8), Ancestral(8)])
def test_samples_given_the_rotated_code_are_the_same(fixed, sampler):
    program, _, found = fixed
    keys, z = jax.random.split(jax.random.key(0), 6), jax.random.normal(jax.random.key(1), (6, 4))

    def draw(encoder, z):
        sample = lambda key, z: sampler.sample(GuidedDenoiser(program.denoiser, encoder, z), key)  # noqa: E731
        return np.asarray(jax.jit(jax.vmap(sample))(keys, z))

    rotated = z @ jnp.asarray(found.rotation, jnp.float32).T
    before, after = draw(program.encoder, z), draw(found.program.encoder, rotated)
    np.testing.assert_allclose(after, before, atol=2e-4)
    assert np.abs(draw(found.program.encoder, z) - before).max() > 0.5, "the rotation does nothing"


def test_bound_is_the_same_with_the_same_noise(fixed):
    """−log p(x | z) bound at z and at Rz on the same noise, and the closed-form KL: equal to rounding."""
    program, x, found = fixed
    x = jnp.asarray(x[:16])
    rotation = jnp.asarray(found.rotation, jnp.float32)
    loc, scale = jax.vmap(program.encoder.posterior)(x)
    z = loc + scale * jax.random.normal(jax.random.key(2), loc.shape)

    @jax.jit
    def log_prob(encoder, z):
        return ScoreDecoder(
            program.denoiser, encoder, z, sampler=program.sampler, key=jax.random.key(3), levels=4
        ).log_prob(x)

    before = log_prob(program.encoder, z)
    np.testing.assert_allclose(log_prob(found.program.encoder, z @ rotation.T), before, rtol=1e-4, atol=1e-3)
    assert np.abs(log_prob(found.program.encoder, z) - before).max() > 0.1

    q = found.program.code_law(x)
    new_loc, factor = q.mean, q.root
    standard = dist.Normal(0.0, 1.0).expand([4]).to_event(1)
    kl = site_kl(dist.Normal(loc, scale).to_event(1), standard, z).sum(-1)
    full = dist.MultivariateNormal(new_loc, factor @ jnp.swapaxes(factor, 1, 2))
    np.testing.assert_allclose(site_kl(full, standard, z).sum(-1), kl, rtol=1e-4, atol=1e-4)
    diagonal = dist.Normal(new_loc, jnp.sqrt((factor**2).sum(-1))).to_event(1)
    assert (site_kl(diagonal, standard, z).sum(-1) < kl + 1e-4).all(), "dropping correlations lowers the KL only"


@pytest.mark.slow
def test_bound_of_the_program_is_the_same_in_expectation(fixed):
    """Model and guide under NumPyro, correlated sites included: mean of 300 paired differences, four errors."""
    program, x, found = fixed
    x = jnp.asarray(x[:8])

    def totals(program):
        def total(key):
            terms = ScoreELBO().terms(key, program.params(), program.model, program.guide, x)
            return sum(jnp.sum(term) for term in terms.values())

        return np.asarray(jax.jit(jax.vmap(total))(jax.random.split(jax.random.key(4), 300)))

    difference = totals(found.program) - totals(program)
    error = difference.std() / 300**0.5
    assert error < 0.1
    assert abs(difference.mean()) < 4 * error


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


def test_diagonal_cost_of_an_isotropic_posterior_is_zero(fixed):
    assert fixed[2].diagonal_cost == pytest.approx(0.0, abs=1e-4)


def test_applied_twice_it_changes_nothing_more(fixed):
    _, x, found = fixed
    again = align(found.program, x)
    np.testing.assert_allclose(again.rotation, np.eye(4), atol=0.02)
    assert isinstance(again.program.encoder, RotatedEncoder)
    assert not isinstance(again.program.encoder.base, RotatedEncoder)
    np.testing.assert_allclose(again.program.encoder.rotation, again.rotation @ found.rotation, atol=1e-6)
    np.testing.assert_allclose(again.program.encode(x[:5])[0], found.program.encode(x[:5])[0], atol=0.1)


def test_same_seed_same_rotation(fixed):
    program, x, found = fixed
    np.testing.assert_array_equal(align(program, x).rotation, found.rotation)


def mixed():
    numpyro.sample("light", dist.Uniform(-1.0, 1.0))
    numpyro.sample("b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    numpyro.sample("spare", dist.Normal(0.0, 1.0))


def test_only_axes_with_the_symmetry_are_rotated(oracle, exact_encoder):
    program = make(oracle, exact_encoder, prior=mixed)
    found = align(program, observations(program, uniform_sources())).rotation
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
    np.testing.assert_array_equal(found.rotation, np.eye(4))
    assert found.diagonal_cost == pytest.approx(0.0, abs=1e-6)
