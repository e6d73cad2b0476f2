"""Densities and weights of a posterior's draws against closed forms; programs with global sites and with data."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
import pytest
from scipy import stats
import xarray as xr

from sami_ppl._util import chunks
from sami_ppl.diagnostics import CollapseWarning
from sami_ppl.diffusion.sampler import DDIM
from sami_ppl.diffusion.schedule import VariancePreserving
from sami_ppl.posteriors import posterior
from sami_ppl.posteriors.draws import Sampler
from sami_ppl.program.program import Program

N, DRAWS = 5, 64
X = np.random.default_rng(0).normal(size=(N, 4)).astype(np.float32)
KEY = jax.random.key(0)


def mixed():
    """A Normal that is not standard, and a bounded site."""
    numpyro.sample("place", dist.Uniform(-1.0, 2.0).expand([2]).to_event(1))
    numpyro.sample("z", dist.Normal(jnp.array([0.5, -1.0]), 2.0).to_event(1))


@pytest.fixture(scope="module")
def cache():
    return {}


@pytest.fixture
def found(cache, tiny_program):
    if "found" not in cache:
        program = tiny_program(mixed)
        cache["found"] = program, posterior(program, X, key=KEY, draws=DRAWS, predictive=0, levels=2, chunk=3)
    return cache["found"]


@pytest.mark.slow
def test_codes_are_those_of_the_draws(found):
    program, tree = found
    values = {name: jnp.asarray(v.values[0]) for name, v in tree["posterior"].data_vars.items()}
    code = program.latents.to_code(values)
    np.testing.assert_allclose(tree["unconstrained_posterior"]["code"][0], code, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_log_prior_is_that_of_the_sites(found):
    _, tree = found
    z = tree["posterior"]["z"].values
    want = stats.norm.logpdf(z, [0.5, -1.0], 2.0).sum(-1)
    np.testing.assert_allclose(tree["log_prior"]["z"], want, rtol=1e-5)
    np.testing.assert_allclose(tree["log_prior"]["place"], -2 * np.log(3.0), rtol=1e-5)


@pytest.mark.slow
def test_weights_are_the_joint_density_over_the_guide(found):
    """Of the guide: a Gaussian of the code, and the Jacobian from it to the factors, 3 s (1 − s) for U(−1, 2)."""
    program, tree = found
    loc, scale = program.encode(X)
    code = tree["unconstrained_posterior"]["code"].values.astype(float)
    log_q = stats.norm.logpdf(code, loc, scale).sum(-1) - np.log(2.0) * 2  # z is twice its code, and shifted
    share = (tree["posterior"]["place"].values.astype(float) + 1) / 3
    spread = program.latents.sites[0].scale
    log_q -= (np.log(3 * share * (1 - share)) + np.log(spread)).sum(-1)
    lp = tree["log_likelihood"]["x"] + tree["log_prior"]["z"] + tree["log_prior"]["place"]
    stat = tree["sample_stats"]
    np.testing.assert_allclose(stat["lp"], lp, rtol=1e-5)
    np.testing.assert_allclose(stat["log_weight"], lp - log_q, rtol=2e-4, atol=2e-3)
    assert np.abs(stat["log_weight"] - lp).max() > 0.1, "log q is of no account here"


def test_kl_per_axis_and_site(found):
    """Closed form for Normals; by draws for others, five standard errors."""
    program, tree = found
    loc, scale = program.encode(X)
    kl = 0.5 * (loc**2 + scale**2 - 1) - np.log(scale)
    axes = tree["sample_stats"]["kl_axis"]
    np.testing.assert_allclose(axes.sel(axis=["z[0]", "z[1]"])[0], kl[:, 2:], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(tree["sample_stats"]["kl"].sel(site="z")[0], kl[:, 2:].sum(1), rtol=1e-4, atol=1e-5)
    u = loc[:, :2, None] + scale[:, :2, None] * np.random.default_rng(1).normal(size=(N, 2, 100_000))
    site = program.latents.sites[0]
    share = 1 / (1 + np.exp(-(site.shift[:, None] + site.scale[:, None] * u)))
    log_q = stats.norm.logpdf(u, loc[:, :2, None], scale[:, :2, None]) - np.log(site.scale[:, None])
    ratio = log_q - np.log(share * (1 - share))  # over the density 1 of the share
    allowed = 5 * ratio.std(-1) / DRAWS**0.5
    assert (np.abs(axes[0, :, :2] - ratio.mean(-1)) < allowed).all()


def weights(oracle, exact_encoder, scale):
    """Stats of the oracle's posterior, of its standard deviation `scale` at the clean end."""

    class Spoiled(exact_encoder):
        def parameters(self, x_noisy, log_snr):
            loc, sd = super().parameters(x_noisy, log_snr)
            return loc, sd * jnp.where(log_snr >= self.schedule.log_snr_max, scale, 1.0)

    def prior():
        numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))

    exact = oracle(VariancePreserving(-6.0, 9.0))
    encoder = Spoiled(exact.encoder.weights, exact.noise_variance, exact.schedule)
    program = Program(prior, exact.denoiser, encoder, sampler=DDIM(4))
    x = np.random.default_rng(0).multivariate_normal(np.zeros(6), exact.cov, size=4).astype(np.float32)
    return posterior(program, x, key=KEY, draws=256, predictive=0, levels=96)["sample_stats"]


@pytest.mark.slow
def test_weights_tell_a_right_guide_from_a_narrow_one(oracle, exact_encoder):
    """Weights of the exact posterior are equal but for the noise set. Those of one with half its width are
    exp(½ (1 − .5²) n²) of a standard normal n on each axis, of which the tail has k = 1 − .5² = .75.
    """
    right, narrow = (weights(oracle, exact_encoder, scale) for scale in (1.0, 0.5))
    assert (right["importance_ess"] > 200).all()
    assert (right["pareto_k"] < 0.5).all()
    assert (narrow["importance_ess"] < 0.6 * right["importance_ess"]).all()
    assert (narrow["pareto_k"] > right["pareto_k"]).all()
    assert float(narrow["pareto_k"].mean()) > 0.4


# --- other programs ---------------------------------------------------------------------------------------------------


def hierarchical(obs):
    centre = numpyro.sample("centre", dist.Normal(0.0, 1.0).expand([2]).to_event(1), infer={"event_dims": ["factor"]})
    with obs:
        numpyro.sample("z", dist.Normal(centre, 1.0).to_event(1), infer={"event_dims": ["factor"]})


def conditional(u):
    numpyro.sample("z", dist.Normal(jnp.array([[-1.0, 0.0], [1.0, 0.0]])[u], 1.0).to_event(1))


@pytest.mark.slow
def test_global_sites(tiny_program):
    program = tiny_program(hierarchical)
    tree = posterior(program, X, key=KEY, draws=40, predictive=1, levels=1, chunk=3)
    for group in ("posterior", "prior"):
        assert tree[group]["centre"].dims == ("chain", "draw", "factor")
        assert tree[group]["z"].dims == ("chain", "draw", "obs", "factor")
    assert tree["unconstrained_posterior"]["global_code"].dims == ("chain", "draw", "global_axis")
    centre, z = tree["posterior"]["centre"], tree["posterior"]["z"]
    np.testing.assert_allclose(tree["log_prior"]["centre"], stats.norm.logpdf(centre).sum(-1), rtol=1e-4)
    np.testing.assert_allclose(
        tree["log_prior"]["z"], stats.norm.logpdf(z - centre).sum(-1), rtol=1e-4, atol=1e-5,
        err_msg="own sites are scored at the global ones of the same draw",
    )  # fmt: skip
    loc, scale = (np.asarray(program.prior_params[f"centre${n}"], float) for n in ("loc", "log_scale"))
    site = program.latents.global_sites[0]
    mean, sd = site.shift + site.scale * loc, site.scale * np.exp(scale)
    kl = (0.5 * (mean**2 + sd**2 - 1) - np.log(sd)).sum()
    np.testing.assert_allclose(tree["sample_stats"]["kl_global"], [[kl]], rtol=1e-4)
    assert tree["sample_stats"]["global_site"].values.tolist() == ["centre"]
    spread = tree["prior"]["z"] - tree["prior"]["centre"]
    assert float(spread.std()) < 1.25 < float(tree["prior"]["z"].std()), "prior draws belong together"


@pytest.mark.slow
def test_variables_that_the_prior_takes(tiny_program):
    data = xr.Dataset({"x": (("obs", "feature"), X), "u": ("obs", np.arange(N) % 2)})
    program = tiny_program().replace(prior=conditional, given={"u": np.arange(2)})
    tree = posterior(program, data, key=KEY, draws=200, predictive=1, levels=1, chunk=3)
    means = np.array([[-1.0, 0.0], [1.0, 0.0]])[data["u"].values]
    want = stats.norm.logpdf(tree["posterior"]["z"], means).sum(-1)
    np.testing.assert_allclose(tree["log_prior"]["z"], want, rtol=1e-4)
    np.testing.assert_array_equal(tree["constant_data"]["u"], data["u"])
    # Means of 200 draws: five standard errors; those of the other class lie 28 away.
    np.testing.assert_allclose(tree["prior"]["z"].mean(["chain", "draw"]), means, atol=5 / 200**0.5)


@pytest.mark.slow
def test_collapsed_axes_and_a_single_draw_and_observation(tiny_program):
    """One observation with one draw is a tree like any other; a program that says nothing is told of."""

    def prior():
        numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))

    program = tiny_program(prior)
    heads = lambda encoder: (encoder.loc, encoder.log_scale)  # noqa: E731
    encoder = eqx.tree_at(heads, program.encoder, jax.tree.map(jnp.zeros_like, heads(program.encoder)))
    with pytest.warns(CollapseWarning, match="KL is below .05 nats on every axis"):
        tree = posterior(program.replace(encoder=encoder), X[:1], key=KEY, draws=1, predictive=1, levels=1)
    assert tree["posterior"]["z"].shape == (1, 1, 1, 2)
    assert tree["sample_stats"]["pareto_k"].isnull().all()


def test_large_observations_take_fewer_noise_levels(tiny_program, monkeypatch):
    """64 of small ones, as many as memory bears of large ones, never fewer than where every draw calls the encoder."""
    program = tiny_program()  # of 4 numbers

    def levels(numbers, asked=None):
        monkeypatch.setattr(chunks, "NUMBERS", numbers)
        return Sampler(program, 2, key=jax.random.key(0), draws=100, predictive=0, levels=asked).levels

    assert [levels(2**20), levels(512), levels(16)] == [64, 32, 8]
    assert levels(16, asked=3) == 3
