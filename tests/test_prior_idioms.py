"""Priors of one observation, as users of NumPyro write them: several observations get what each gets alone."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
from numpyro import handlers
import pytest

import sami_ppl as sp
from sami_ppl.priors.read import read_prior, sample_prior


def expanded():
    tau = numpyro.sample("tau", dist.HalfNormal(1.0))
    numpyro.sample("z", dist.Normal(0, tau).expand([2]).to_event(1))


def indexed():
    z = numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))
    numpyro.sample("w", dist.Laplace(z[0], jnp.exp(z[1])))


def summed():
    z = numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))
    numpyro.sample("w", dist.Gamma(1 + jnp.sum(z**2), 1.0))


def kinds():
    kind = numpyro.sample("kind", dist.Categorical(jnp.ones(3) / 3))
    law = dist.MultivariateNormal(jnp.arange(3.0)[kind] * jnp.ones(2), jnp.eye(2))
    numpyro.sample("z", dist.MixtureSameFamily(dist.Categorical(jnp.ones(2) / 2), law.expand([2])))


def by_the_plate():
    z = numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))
    numpyro.sample("w", dist.Normal(z[..., 0], 1))


PRIORS = {"expanded": expanded, "indexed": indexed, "summed": summed, "kinds": kinds, "by the plate": by_the_plate}


def laws(prior, count):
    by_rows = read_prior(prior).by_rows
    run = lambda: sample_prior(prior, numpyro.plate("obs", count), by_rows=by_rows)  # noqa: E731
    return handlers.trace(handlers.seed(run, jax.random.key(1))).get_trace()


@pytest.mark.slow
@pytest.mark.parametrize("name", PRIORS)
def test_several_observations_have_the_laws_that_each_has_alone(name):
    """Log densities of every site at the same values, computed together and by NumPyro alone, without a plate."""
    prior = PRIORS[name]
    trace = laws(prior, 8)
    values = {site: s["value"] for site, s in trace.items() if s["type"] == "sample"}
    assert all(len(np.unique(np.asarray(v).reshape(8, -1), axis=0)) > 1 for v in values.values())
    for row in range(8):
        own = {site: v[row] for site, v in values.items()}
        alone = handlers.trace(handlers.seed(handlers.substitute(prior, data=own), jax.random.key(0))).get_trace()
        for site, value in own.items():
            together = trace[site]["fn"].log_prob(values[site])
            assert together.shape == (8,)
            np.testing.assert_allclose(together[row], alone[site]["fn"].log_prob(value), rtol=1e-4)


def test_a_prior_that_takes_the_plate_and_mixes_observations_is_refused_by_name():
    def prior(obs):
        with obs:
            tau = numpyro.sample("tau", dist.HalfNormal(1.0))
            numpyro.sample("z", dist.Normal(0, tau).expand([2]).to_event(1))

    with pytest.raises(ValueError, match=r"after 'tau', [^$]*tau\[\.\.\., None\]"):
        read_prior(prior)


def test_a_prior_that_sums_over_the_plate_is_refused_by_name():
    def prior(obs):
        with obs:
            z = numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))
            numpyro.sample("w", dist.Normal(jnp.sum(z), 1))

    with pytest.raises(ValueError, match="'w' is another beside others than alone"):
        read_prior(prior)


def test_what_a_prior_computes_has_shape_and_dims():
    def prior(obs):
        mean = numpyro.sample("mean", dist.Normal(0, 1))
        numpyro.deterministic("twice", 2 * mean)
        with obs:
            z = numpyro.sample("z", dist.Normal(mean, 1))
            numpyro.deterministic("pair", jnp.stack([z, z], -1))

    twice, pair = read_prior(prior).derived
    assert (twice.name, twice.event_shape, twice.is_global) == ("twice", (), True)
    assert (pair.name, pair.event_shape, pair.dims, pair.is_global) == ("pair", (2,), ("pair_axis",), False)


def test_a_decorating_handler_shows_the_arguments_inside():
    @handlers.reparam(config={})
    def prior(obs):
        with obs:
            numpyro.sample("z", dist.Normal(0, 1))

    assert read_prior(prior).axes == ("z",)


def test_factor_and_scale_are_refused_by_name():
    def factor():
        z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.factor("penalty", -(z**4))

    def scaled():
        with handlers.scale(scale=0.5):
            numpyro.sample("z", dist.Normal(0, 1))

    def constant():
        numpyro.sample("z", dist.Normal(0, 1))
        numpyro.factor("penalty", 1.0)  # which the plate expands

    for prior in (factor, constant):
        with pytest.raises(ValueError, match=r"'penalty' is a numpyro\.factor.*write"):
            read_prior(prior)
    with pytest.raises(ValueError, match=r"'z' is scaled by handlers\.scale.*write"):
        read_prior(scaled)


@pytest.mark.slow
def test_a_prior_of_one_observation_is_fitted_and_what_it_computes_is_in_the_posterior():
    def prior():
        tau = numpyro.sample("tau", dist.HalfNormal(1.0))
        z = numpyro.sample("z", dist.Normal(0, tau).expand([2]).to_event(1))
        numpyro.deterministic("radius", jnp.linalg.norm(z))

    x = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
    program = sp.autoencoder(prior, x, size={"width": 8, "depth": 1}, progress=False, key=jax.random.key(0))
    stage = sp.Stage(steps=1, batch=4)
    program, history = sp.fit(program, x, stage, key=jax.random.key(1), progress=False)
    assert list(history.records[-1]["kl"]) == ["tau", "z"]
    tree = sp.posterior(program, x[:3], key=jax.random.key(2), draws=2, predictive=0, levels=0)
    for group in ("posterior", "prior"):
        assert tree[group]["radius"].dims == ("chain", "draw", "obs")
        np.testing.assert_allclose(tree[group]["radius"], np.linalg.norm(tree[group]["z"], axis=-1), rtol=1e-5)
