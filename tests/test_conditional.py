"""Priors p(z | u): what is read of them, the divergence from the prior of the own u, draws of the marginal."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
from numpyro import handlers
import pytest
import xarray as xr

from sami_ppl import fit
from sami_ppl.diagnostics import noise_end_kl
from sami_ppl.evidence import evidence_bound
from sami_ppl.fitting.objective import ScoreELBO
from sami_ppl.fitting.stage import Stage
from sami_ppl.priors.read import read_prior

KEY = jax.random.key(0)
N = 6
X = np.linspace(-1.5, 1.5, 4 * N, dtype=np.float32).reshape(N, 4)[:, [2, 0, 3, 1]]


U = np.array([0, 1, 2, 2, 1, 0])
CENTRES = np.array([[-3.0, 0.0], [0.0, 3.0], [3.0, 0.0]], np.float32)


def by_class(u):
    numpyro.sample("z", dist.Normal(jnp.asarray(CENTRES)[u], 0.5).to_event(1))


def conditional(tiny_program, prior=by_class):
    program = tiny_program()
    return program.replace(prior=prior, given={"u": U})


def dataset(x=X, u=U):
    return xr.Dataset({"x": (("obs", "feature"), x), "u": ("obs", u)})


@pytest.mark.slow
def test_a_prior_is_read_over_the_variables_it_takes():
    """Centre and spread are of the marginal, a mixture; no fixed Normal, so no closed form is claimed for it."""
    latents = read_prior(by_class, {"u": U})
    assert latents.arguments == ("u",)
    assert not latents.sites[0].standard
    marginal = CENTRES[np.random.default_rng(0).integers(0, 3, 100_000)]
    marginal = marginal + 0.5 * np.random.default_rng(1).normal(size=marginal.shape)
    low, median, high = np.quantile(marginal, [0.25, 0.5, 0.75], axis=0)
    np.testing.assert_allclose(latents.sites[0].shift, median, atol=0.1)
    np.testing.assert_allclose(latents.sites[0].scale, (high - low) / 1.349, rtol=0.1)
    assert read_prior(by_class, {"u": U.copy()}) is latents, "read again: the same object, so that nothing recompiles"


@pytest.mark.slow
def test_the_divergence_is_from_the_prior_of_the_own_u(tiny_program):
    """In closed form, observation by observation; the control is the KL with u of others."""
    program = conditional(tiny_program)
    loc, scale = program.encode(X)
    site = program.latents.sites[0]
    mean, spread = site.shift + site.scale * loc, site.scale * scale

    def kl(u):
        return (np.log(0.5 / spread) + (spread**2 + (mean - CENTRES[u]) ** 2) / (2 * 0.25) - 0.5).sum(1)

    found = evidence_bound(program, dataset(), key=KEY, levels=2, chunk=4)
    np.testing.assert_allclose(found["kl"].sel(site="z"), kl(U), rtol=1e-4)
    assert not np.allclose(found["kl"].sel(site="z"), kl(np.roll(U, 1)), rtol=0.1)
    arguments = (KEY, program.params(), program.model, program.guide, X)
    terms = ScoreELBO().terms(*arguments, given={"u": U})
    np.testing.assert_allclose(terms["z"].sum(), kl(U).mean(), rtol=1e-4)
    tree = program.posterior(dataset(), key=KEY, draws=200, predictive=1, levels=1, chunk=4)
    np.testing.assert_allclose(tree["prior"]["z"].mean(("chain", "draw")), CENTRES[U], atol=5 * 0.5 / 200**0.5)
    end = noise_end_kl(program, dataset(), key=KEY)
    assert np.isfinite(end["z"])


@pytest.mark.slow
def test_codes_are_drawn_from_the_marginal(tiny_program):
    """Half of a mixture's variance lies between its classes: 5 standard errors of 4,000 draws."""
    program = conditional(tiny_program)
    values = program.latents.from_code(program.prior_codes(KEY, 4000))["z"]
    np.testing.assert_allclose(values.mean(0), CENTRES[U].mean(0), atol=5 * 2.5 / 4000**0.5)
    np.testing.assert_allclose(values.var(0), CENTRES[U].var(0) + 0.25, rtol=0.1)


@pytest.mark.slow
def test_a_fit_follows_u(tiny_program):
    """Codes of the two classes move to the two centres, with only u to tell them apart in the objective."""
    rng = np.random.default_rng(0)
    u = rng.integers(0, 2, 256)
    x = (2.0 * u[:, None] - 1 + 0.3 * rng.normal(size=(256, 4))).astype(np.float32)

    def two(u):
        numpyro.sample("z", dist.Normal(jnp.stack([4.0 * u - 2, jnp.zeros(len(u))], -1), 0.5).to_event(1))

    program = tiny_program().replace(prior=two, given={"u": np.array([0, 1])})
    stage = Stage(steps=300, batch=64, warmup=10, learning_rate=0.01, validate_every=300, beta=1.0, train=("encoder",))
    fitted, _ = fit(program, dataset(x, u), stage, key=KEY, progress=False)
    values = fitted.latents.from_code(fitted.encode(x)[0])["z"]
    assert values[u == 1, 0].mean() > 1.5
    assert values[u == 0, 0].mean() < -1.5
    backwards, _ = fit(program, dataset(x, 1 - u), stage, key=KEY, progress=False)
    values = backwards.latents.from_code(backwards.encode(x)[0])["z"]
    assert values[u == 1, 0].mean() < -1.5, "control: classes exchanged"


BAD = {
    "an array": (lambda p: evidence_bound(p, X, key=KEY, levels=2), "give an xarray Dataset with x and u on obs"),
    "no u": (lambda p: p.posterior(dataset().drop_vars("u"), key=KEY), "no variable 'u' on obs, which the prior takes"),
    "not given": (lambda p: p.model(X), r"takes 'u': pass given={'u': array of shape \(6, ...\)}.* got none"),
    "words": (
        lambda p: p.observations(dataset(u=np.array(list("abcabc")))),
        "'u' as numbers, got <U1: write np.unique",
    ),
    "not finite": (lambda p: p.observations(dataset(u=np.full(N, np.nan))), "'u', which the prior takes, is NaN"),
    "wrong length": (lambda p: p.model(X, given={"u": U[:2]}), r"of shape \(6, ...\).*got an array of shape \(2,\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_missing_is_said(tiny_program, name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        handlers.seed(call, KEY)(conditional(tiny_program))


def test_variables_are_checked_when_a_prior_is_read():
    with pytest.raises(TypeError, match=r"takes the argument 'u', which is not given: pass .*given=\{'u'"):
        read_prior(by_class)
    with pytest.raises(TypeError, match="given holds v, but the prior takes u"):
        read_prior(by_class, {"u": U, "v": U})
    with pytest.raises(ValueError, match=r"for the same observations, got u \(6,\), v \(2,\)"):
        read_prior(lambda u, v: None, {"u": U, "v": U[:2]})
