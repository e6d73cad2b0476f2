"""A rotated code: the bound, the divergence and the samples stay what they are; divergences in closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import distributions as dist
from numpyro.infer import Predictive
import pytest
from scipy import stats
from two_priors import PRIORS, Hashed, N, X, losses, traced

from sami_ppl.decoders.decoder import ScoreDecoder
from sami_ppl.encoders.affine import AffineEncoder
from sami_ppl.fitting.objective import ScoreELBO
from sami_ppl.program.kl import site_kl

ROTATION = stats.special_ortho_group(3, seed=1).rvs().astype(np.float32)


@pytest.fixture
def rotated(program):
    p = program()
    return p, p.replace(encoder=AffineEncoder(p.encoder, jnp.asarray(ROTATION)))


@pytest.mark.slow
def test_rotation_leaves_the_bound_unchanged(rotated):
    """N(0, I) does not know its axes: the loss is the same in expectation, by the mean of 2,000 draws; 5 sd, 6e-7."""
    keys = jax.random.split(jax.random.key(4), 2000)
    straight, turned = (np.asarray(losses(ScoreELBO(), Hashed(p), None, p.params(), keys), float) for p in rotated)
    error = np.hypot(straight.std(), turned.std()) / np.sqrt(len(keys))
    assert abs(straight.mean() - turned.mean()) < 5 * error


@pytest.mark.slow
def test_rotation_leaves_the_divergence_unchanged(rotated):
    """KL per observation summed over sites: that of the diagonal posterior is known; 2,000 draws, 5 sd (6e-7).

    Control: a shear in place of the rotation changes it.
    """
    p, q = rotated
    shear = p.replace(encoder=AffineEncoder(p.encoder, jnp.eye(3).at[0, 1].set(1.0)))
    keys = jax.random.split(jax.random.key(4), 2000)

    def divergence(program):
        terms = jax.jit(
            jax.vmap(lambda key: ScoreELBO().terms(key, program.params(), program.model, program.guide, X))
        )(keys)
        total = sum(terms[s.name].sum(-1) for s in program.latents.sites)
        return np.asarray(total, float).mean(), 5 * total.std() / np.sqrt(len(keys)) + 1e-4

    exact, _ = divergence(p)
    turned, tolerance = divergence(q)
    assert abs(turned - exact) < tolerance
    assert abs(divergence(shear)[0] - exact) > 10 * tolerance


@pytest.mark.slow
def test_rotated_code_gives_the_same_samples_and_the_same_error(rotated):
    """x given z' = Rz and a key is x given z and the key: guidance is that of the same density."""
    p, q = rotated
    z = jax.random.normal(jax.random.key(5), (N, 3))

    @functools.partial(jax.jit, static_argnums=0)
    def both(program, code):
        one = program.value
        decoder = ScoreDecoder(one.denoiser, one.encoder, code, sampler=one.sampler, key=jax.random.key(7))
        return decoder.sample(jax.random.key(6)), decoder.log_prob(X)

    turned_program = Hashed(q)
    straight, turned, wrong = both(Hashed(p), z), both(turned_program, z @ ROTATION.T), both(turned_program, z)
    np.testing.assert_allclose(turned[0], straight[0], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(turned[1], straight[1], rtol=1e-3)
    assert not np.allclose(wrong[1], straight[1], rtol=1e-2)  # control: the code not rotated


@pytest.mark.slow
def test_chain_of_conditionals_is_the_joint_gaussian(rotated):
    """The guide writes N(Rμ, R diag(s²) Rᵀ) site by site: its log density at its own draw is that of the joint."""
    p, q = rotated
    trace = traced(q.guide, 8, x=X)
    log_q = sum(trace[name]["fn"].log_prob(trace[name]["value"]) for name in ("a", "b"))
    loc, scale = jax.vmap(p.encoder.posterior)(X)
    z = q.latents.to_code({name: trace[name]["value"] for name in ("a", "b")})
    expected = [
        stats.multivariate_normal(ROTATION @ m, ROTATION @ np.diag(s**2) @ ROTATION.T).logpdf(z_i)
        for m, s, z_i in zip(np.asarray(loc, float), np.asarray(scale, float), z, strict=True)
    ]
    np.testing.assert_allclose(log_q, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", PRIORS)
def test_guide_draws_have_the_law_of_the_encoder(name, program):
    """Draws of the rotated guide, as codes: mean and covariance of R N(μ, s²); 4,000 draws, 5 sd per moment (6e-7)."""
    p = program(name)
    q, n = p.replace(encoder=AffineEncoder(p.encoder, jnp.asarray(ROTATION))), 4000
    draws = Predictive(q.guide, params=q.params(), num_samples=n)(jax.random.key(9), X[:1])
    z = np.asarray(q.latents.to_code(draws))[:, 0]
    loc, scale = (np.asarray(v) for v in p.encoder.posterior(jnp.asarray(X[0])))
    unit = ((z - ROTATION @ loc) @ ROTATION) / scale
    np.testing.assert_allclose(unit.mean(0), 0, atol=5 / np.sqrt(n))
    np.testing.assert_allclose(np.cov(unit.T), np.eye(3), atol=5 * np.sqrt(2 / n))


@pytest.mark.slow
def test_full_normal_divergence_in_closed_form():
    """KL(N(m, LLᵀ) ‖ N(μ, diag s²)) = E_q[log q − log p]: 20,000 draws, 5 sd; batched; zero where q = p."""
    factor = jnp.asarray([[[0.7, 0.0], [0.4, 0.5]], [[1.5, 0.0], [-0.3, 0.2]]])
    q = dist.MultivariateNormal(jnp.asarray([[0.2, -1.0], [0.0, 2.0]]), scale_tril=factor)
    p = dist.Normal(jnp.asarray([0.5, 0.0]), jnp.asarray([1.0, 2.0])).to_event(1)
    draws = q.sample(jax.random.key(0), (20_000,))
    ratio = np.asarray(q.log_prob(draws) - p.log_prob(draws))
    got = site_kl(q, p, draws[0])
    assert got.shape == (2, 1)
    np.testing.assert_array_less(abs(got[:, 0] - ratio.mean(0)), 5 * ratio.std(0) / np.sqrt(20_000))
    same = dist.MultivariateNormal(jnp.asarray([[0.5, 0.0]]), scale_tril=jnp.diag(jnp.asarray([1.0, 2.0]))[None])
    np.testing.assert_allclose(site_kl(same, p, draws[0, :1]), 0, atol=1e-6)


def test_diagonal_divergence_per_axis():
    """Per axis: ½((s² + (m − μ)²)/σ² − 1 − log s²/σ²) for Gaussians; log q − log p at the draw elsewhere."""
    m, s = jnp.asarray([[0.3, -1.0, 0.0]]), jnp.asarray([[0.5, 1.0, 2.0]])
    q, p = dist.Normal(m, s).to_event(1), dist.Normal(0.5, 1.5).expand([3]).to_event(1)
    expected = 0.5 * ((s**2 + (m - 0.5) ** 2) / 1.5**2 - 1 - np.log(s**2 / 1.5**2))
    np.testing.assert_allclose(site_kl(q, p, m), expected, rtol=1e-5, atol=1e-6)
    laplace = dist.Laplace(0, 1).expand([3]).to_event(1)
    value = m + 0.1
    difference = stats.norm.logpdf(value, m, s) - stats.laplace.logpdf(value)
    np.testing.assert_allclose(site_kl(q, laplace, value), difference, rtol=1e-5, atol=1e-6)
