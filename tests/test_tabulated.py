"""The bound as a table, against the decoder's own log density on the same noise, for every family of posteriors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
from numpyro import handlers
from numpyro.infer import log_likelihood
import pytest

from sami_ppl import families
from sami_ppl.decoders.exact import LinearGaussian, LinearMixture
from sami_ppl.diffusion.sampler import DDIM
from sami_ppl.diffusion.schedule import VariancePreserving
from sami_ppl.encoders.affine import AffineEncoder
from sami_ppl.encoders.encoder import encoder_for
from sami_ppl.posteriors import posterior
from sami_ppl.program.program import Program
from sami_ppl.program.tabulated import parameter_count
from tests.discrete_priors import joint

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)


def normal():
    numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))


def angle():
    numpyro.sample("angle", dist.VonMises(0.0, 1.0))


def hierarchical(obs):
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    with obs:
        numpyro.sample("z", dist.Normal(jnp.zeros(2), scale).to_event(1))


def likelihood_by_numpyro(program, tree, levels, x=X):
    """NumPyro's own, at the draws of a tree: every draw calls the encoder."""
    values = {name: jnp.asarray(v.values[0]) for name, v in tree["posterior"].data_vars.items()}
    model = handlers.substitute(program.model, data=program.params())
    return np.asarray(log_likelihood(model, values, x, levels=levels)["x"])


CASES = {
    "diagonal": (normal, None),
    "full": (normal, families.Full),
    "low rank": (normal, families.LowRank),
    "mixture": (normal, partial(families.Mixture, components=3)),
    "directions": (angle, None),
    "a discrete site": (joint, None),
    "global sites": (hierarchical, None),
}


@pytest.fixture
def made(tiny_program, mlp, fill):
    def make(name):
        prior, family = CASES[name]
        denoiser, chosen = tiny_program().denoiser, {} if family is None else {"z": family}
        network = mlp(4, 8, key=KEY)
        encoder = encoder_for(prior, network, denoiser.schedule, (4,), families=chosen, key=jax.random.key(1))
        return Program(prior, fill(denoiser, 0.5), fill(encoder), sampler=DDIM(4))

    return make


@pytest.mark.slow
@pytest.mark.parametrize("name", ["diagonal", *(pytest.param(n, marks=pytest.mark.slow) for n in list(CASES)[1:])])
def test_likelihood_is_that_of_numpyro(made, name):
    """Chunks of other sizes than the data take the noise of a chunk; the control is another noise set, by nats."""
    program = made(name)
    tree = posterior(program, X, key=KEY, draws=40, predictive=0, levels=3, chunk=5)
    assert parameter_count(program.encoder) <= 40, "not tabulated"
    found, known = tree["log_likelihood"]["x"].values[0], likelihood_by_numpyro(program, tree, 3)
    np.testing.assert_allclose(found, known, rtol=1e-4, atol=2e-3)
    assert np.abs(found - likelihood_by_numpyro(program, tree, 4)).max() > 0.3
    assert np.ptp(found, axis=0).min() > 0.01, "the bound does not depend on z"


@pytest.mark.slow
def test_rotated_posteriors_too(made):
    program = made("diagonal")
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(2, 2)))[0]
    turned = program.replace(encoder=AffineEncoder(program.encoder, jnp.asarray(turn, jnp.float32)))
    tree = posterior(turned, X, key=KEY, draws=40, predictive=0, levels=3, chunk=5)
    assert parameter_count(turned.encoder) == 2 + 2, "those of the posterior that is turned"
    known = likelihood_by_numpyro(turned, tree, 3)
    np.testing.assert_allclose(tree["log_likelihood"]["x"][0], known, rtol=1e-4, atol=2e-3)


@pytest.mark.slow
def test_levels_unless_given(made):
    """64 where the table is cheaper than the draws, 8 where it is not."""
    program = made("diagonal")
    for draws, levels in ((4, 64), (3, 8)):
        tree = posterior(program, X, key=KEY, draws=draws, predictive=0)
        assert tree["log_likelihood"]["x"].attrs["noise_levels"] == levels
    few = posterior(program, X, key=KEY, draws=3, predictive=0, levels=3, chunk=5)
    np.testing.assert_allclose(
        few["log_likelihood"]["x"][0], likelihood_by_numpyro(program, few, 3), rtol=1e-4, atol=2e-3
    )


@pytest.mark.slow
def test_a_posterior_of_several_modes_is_tabulated_too():
    """The exact one of a mixture, by the parameters of all its components; a Gaussian of its moments is far off."""
    weights, schedule = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2)), jnp.float32), VariancePreserving()
    modes = {"probs": jnp.ones(2), "locs": jnp.asarray([[-2.0, 0.0], [2.0, 0.5]]), "scales": 0.3 * jnp.ones((2, 2))}
    mixture = LinearMixture(weights, 0.5, schedule, **modes)
    program = Program(normal, mixture.denoiser, mixture.encoder)
    tree = posterior(program, X, key=KEY, draws=40, predictive=0, levels=3, chunk=5)
    assert parameter_count(program.encoder) == 2 * (1 + 2 + 4) <= 40
    known = likelihood_by_numpyro(program, tree, 3)
    np.testing.assert_allclose(tree["log_likelihood"]["x"][0], known, rtol=1e-4, atol=2e-3)
    moments = Program(normal, mixture.denoiser, LinearGaussian(weights, 0.5, schedule).encoder)
    assert np.abs(likelihood_by_numpyro(moments, tree, 3) - known).max() > 0.3


@pytest.mark.slow
def test_pareto_k_of_a_right_guide_is_small_at_the_default(made):
    """Exact networks: every weight is 1 but for the noise set, of which 64 levels leave little, 8 more."""
    weights = jnp.asarray(np.linalg.qr(np.random.default_rng(0).normal(size=(4, 2)))[0], jnp.float32)
    exact = LinearGaussian(weights, 0.5, VariancePreserving(-8.0, 8.0))
    program = Program(normal, exact.denoiser, exact.encoder)
    x = np.asarray(exact.sample(KEY, 32)[0])
    spread = {
        levels: float(posterior(program, x, key=KEY, draws=128, predictive=0, levels=levels)["sample_stats"]
                      ["log_weight"].var("draw").median())
        for levels in (None, 8)
    }  # fmt: skip
    assert spread[None] < 0.3 * spread[8]
