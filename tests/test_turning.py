"""A learned rotation of the code: what does not see it, and what turns it, with the factors known."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
import pytest
from scipy.linalg import expm

from sami_ppl import families
from sami_ppl.diffusion.schedule import AbstractSchedule, VariancePreserving
from sami_ppl.encoders.encoder import AbstractEncoder, DiagonalEncoder, FamilyEncoder
from sami_ppl.encoders.law import DiagonalLaw
from sami_ppl.encoders.rotation import TurningEncoder, soft_uniform
from sami_ppl.fitting.objective import ScoreELBO
from sami_ppl.fitting.start import warm_start
from sami_ppl.priors.read import read_prior
from sami_ppl.saving import save as io

KEY = jax.random.key(0)


def independent(factor, size=2):
    def prior():
        numpyro.sample("z", factor.expand([size]).to_event(1))

    return prior


class FirstTwo(AbstractEncoder):
    """The first two coordinates of x, known to a tenth."""

    schedule: AbstractSchedule = VariancePreserving(-4.0, 4.0)
    event_shape: tuple[int, ...] = eqx.field(static=True, default=(4,))
    latent_size: int = eqx.field(static=True, default=2)

    def parameters(self, x_noisy, log_snr):
        return x_noisy[:2] / self.schedule.alpha(log_snr), jnp.array([0.1, 0.12])

    def distribution(self, parameters):
        return DiagonalLaw(*parameters)


def turned_by(tiny_program, factor, data, steps=400):
    """Degrees by which the divergence from the prior alone turns the axes, from where the data are."""
    program = tiny_program().replace(prior=independent(factor), encoder=TurningEncoder(FirstTwo()))
    params, elbo = program.params(), ScoreELBO()

    def divergence(skew, key):
        moved = eqx.tree_at(lambda p: p.encoder.skew, program, skew)
        return jnp.sum(elbo.terms(key, params | moved.params(), moved.model, moved.guide, data)["z"])

    step = jax.jit(jax.value_and_grad(divergence))
    skew = program.encoder.skew + jnp.array([[0.0, 0.0], [0.01, 0.0]])
    for i in range(steps):
        skew = skew - 0.1 * step(skew, jax.random.fold_in(KEY, i))[1]
    rotation = eqx.tree_at(lambda e: e.skew, program.encoder, skew).linear()
    return float(np.degrees(np.arctan2(rotation[1, 0], rotation[0, 0])))


@pytest.fixture
def uniform_factors():
    """1,000 pairs of uniform factors of variance 1, turned by 30 degrees, as observations of four numbers."""
    factors = np.random.default_rng(0).uniform(-(3**0.5), 3**0.5, (1000, 2))
    angle = np.radians(30)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return np.concatenate([factors @ turn.T, np.zeros((1000, 2))], 1).astype(np.float32)


@pytest.mark.slow
def test_the_prior_decides_where_the_axes_turn(tiny_program, uniform_factors):
    """Bounded factors turned by 30°: light tails turn the axes back by 30, heavy ones to the diagonal, 15 further.

    Control: N(0, I) turns nothing.
    """
    assert turned_by(tiny_program, soft_uniform(), uniform_factors) == pytest.approx(-30, abs=3)
    assert turned_by(tiny_program, dist.Laplace(0, 0.5**0.5), uniform_factors) == pytest.approx(15, abs=4)
    assert turned_by(tiny_program, dist.Normal(0, 1), uniform_factors) == pytest.approx(0, abs=1.5)


@pytest.mark.slow
def test_decoder_does_not_see_the_rotation_draw_by_draw(tiny_program, monkeypatch):
    """Gradient of the reconstruction in A: 0 to rounding at every draw. Control: from a triangular root it is not."""
    program = tiny_program(prior=independent(soft_uniform(), 3))
    turning = TurningEncoder(program.encoder)
    turning = eqx.tree_at(lambda e: e.skew, turning, jnp.array([[0, 0, 0], [0.4, 0, 0], [0.2, -0.3, 0.0]]))
    program = program.replace(encoder=turning)
    x = np.asarray(jax.random.normal(KEY, (5, *program.event_shape)))
    params = program.params()

    def reconstruction(skew, key):
        moved = eqx.tree_at(lambda p: p.encoder.skew, program, skew)
        return jnp.sum(ScoreELBO().terms(key, params | moved.params(), moved.model, moved.guide, x)["x"])

    def slope(key):
        value, gradient = jax.value_and_grad(reconstruction)(program.encoder.skew, key)
        return float(jnp.abs(gradient).max() / jnp.abs(value))

    assert max(slope(jax.random.key(i)) for i in range(3)) < 1e-4
    monkeypatch.setattr(
        "sami_ppl.encoders.law.RootedNormal",
        lambda loc, root: dist.MultivariateNormal(loc, covariance_matrix=root @ jnp.swapaxes(root, -1, -2)),
    )
    assert max(slope(jax.random.key(i)) for i in range(3)) > 1e-3


@pytest.mark.slow
def test_turning_encoder_is_the_encoder_of_the_turned_code(tiny_program):
    """q'(R z) = q(z), location R μ, covariance R diag(s²) Rᵀ; it begins as the encoder itself."""
    base = tiny_program(prior=independent(dist.Normal(0, 1), 3)).encoder
    turning = eqx.tree_at(lambda e: e.skew, TurningEncoder(base, rate=2.0), jnp.arange(9.0).reshape(3, 3) / 10)
    x, z, log_snr = jnp.ones(base.event_shape), jnp.array([0.3, -1.0, 2.0]), jnp.array(1.0)
    rotation = np.asarray(turning.linear())
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-5)
    assert np.linalg.det(rotation) == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(rotation, expm(2.0 * (turning.skew - turning.skew.T)), atol=1e-5)
    loc, scale = base(x, log_snr)
    q = turning.distribution(turning.parameters(x, log_snr))
    turned_loc, root = q.mean, q.root
    np.testing.assert_allclose(turned_loc, rotation @ loc, atol=1e-5)
    np.testing.assert_allclose(root @ root.T, rotation @ np.diag(scale**2) @ rotation.T, atol=1e-5)
    density = dist.MultivariateNormal(turned_loc, covariance_matrix=root @ root.T).log_prob(z)
    np.testing.assert_allclose(turning.log_prob(z, x, log_snr), density, rtol=1e-4)
    np.testing.assert_array_equal(TurningEncoder(base).linear(), np.eye(3))


@pytest.mark.slow
def test_saved_and_warm_started(tiny_program, tmp_path):
    program = tiny_program(prior=independent(soft_uniform(), 3))
    program = program.replace(encoder=TurningEncoder(program.encoder))
    moved = eqx.tree_at(lambda p: p.encoder.skew, program, jnp.arange(9.0).reshape(3, 3) / 10)
    io.save(moved, tmp_path / "model")
    loaded = io.load(tmp_path / "model", program).encoder
    assert isinstance(loaded, TurningEncoder)
    np.testing.assert_array_equal(loaded.skew, moved.encoder.skew)
    x = np.asarray(jax.random.normal(KEY, (40, *program.event_shape)))
    begun = warm_start(program, x, key=KEY, steps=2, progress=False)
    assert isinstance(begun.encoder, TurningEncoder)
    assert isinstance(begun.encoder.base, DiagonalEncoder)


def test_soft_uniform_is_flat_with_soft_edges():
    """Mean 0, variance 1, within 2 % of its height at 0 over the middle; kurtosis below a Gaussian's 3."""
    law, grid = soft_uniform(), np.linspace(-4, 4, 4001)
    density = np.exp(np.asarray(law.log_prob(grid), float))
    moments = [np.trapezoid(density * grid**k, grid) for k in range(5)]
    np.testing.assert_allclose(moments[:3], [1, 0, 1], atol=1e-4)
    assert moments[4] < 2.1
    middle = density[np.abs(grid) < 1.0]
    np.testing.assert_allclose(middle, density[2000], rtol=0.02)
    draws = np.asarray(law.sample(KEY, (20_000,)))
    assert abs(draws.mean()) < 5 / 20_000**0.5
    with pytest.raises(ValueError, match=r"softness must be in \(0, 1\)"):
        soft_uniform(softness=1.5)


def test_bad_input():
    with pytest.raises(ValueError, match="rate must be positive"):
        TurningEncoder(FirstTwo(), rate=float("nan"))


@pytest.mark.slow
def test_what_is_no_gaussian_of_the_whole_code_is_not_turned(tiny_program, mlp):
    """A mixture, whose guide would be a Gaussian and its guidance not; a Gaussian of an angle."""
    schedule, factors = VariancePreserving(-4.0, 4.0), {"z": families.Mixture}
    network, latents = mlp(4, 6, key=KEY), read_prior(independent(dist.Normal(0, 1)))
    with pytest.raises(TypeError, match="of base, a FamilyEncoder, is not Gaussian, but only a Gaussian"):
        TurningEncoder(FamilyEncoder(network, schedule, (4,), latents, families=factors, key=KEY))
    program = tiny_program().replace(encoder=TurningEncoder(tiny_program().encoder))
    with pytest.raises(ValueError, match="'z' lives on a circle, where a Gaussian would tear"):
        program.replace(prior=independent(dist.VonMises(0.0, 1.0), 1))
