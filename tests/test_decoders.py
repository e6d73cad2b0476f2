"""Decoders that take the code: against closed forms, beside the guided decoder, and all that programs of them do."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
import pytest
from scipy import stats

import sami_ppl as sp
from sami_ppl._util.errors import UserError
from sami_ppl.analyses import axis_geometry, posterior_by_noise
from sami_ppl.decoders.bound import bound, noise_error
from sami_ppl.decoders.conditional import ConditionedDenoiser, IsotropicDenoiser, NormalDenoiser
from sami_ppl.decoders.exact import LinearGaussian
from sami_ppl.decoders.training import Objective
from sami_ppl.diagnostics import information_spectrum, noise_end_kl, noise_errors
from sami_ppl.diffusion.denoiser import PreconditionedDenoiser
from sami_ppl.diffusion.schedule import VarianceExploding, VariancePreserving
from sami_ppl.evidence import evidence_bound, importance_weighted_bound
from sami_ppl.nn import AscendingUNet, ResidualMLP, UNet
from sami_ppl.program.program import Program

KEY = jax.random.key(0)
MEAN, STD = 0.3, 1.7
"""Statistics that the networks are told; any will do."""


def prior():
    numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))


def oracle(schedule=None):
    rng = np.random.default_rng(0)
    schedule = VariancePreserving(-12.0, 10.0) if schedule is None else schedule
    weights, mean = rng.normal(size=(5, 2)), rng.normal(size=5)
    return LinearGaussian(jnp.asarray(weights), 0.6, schedule, mean=jnp.asarray(mean))


class LinearNetwork(eqx.Module):
    """The network by which a conditioned denoiser is exact: E[x | x_λ, z] of the oracle, in the network's units."""

    law: LinearGaussian
    predict: str = "data"

    def __call__(self, u, log_snr, z=None):
        law, schedule = self.law, self.law.schedule
        alpha, sigma = schedule.alpha(log_snr), schedule.sigma(log_snr)
        variance = (alpha * STD) ** 2 + sigma**2
        x_noisy = jnp.sqrt(variance) * u + alpha * MEAN
        if z is None:
            eps_hat = law.denoiser(x_noisy, log_snr)
        else:
            centre = law.mean + law.weights @ z
            eps_hat = sigma * (x_noisy - alpha * centre) / (alpha**2 * law.noise_std**2 + sigma**2)
        if self.predict == "data":
            return ((x_noisy - sigma * eps_hat) / alpha - MEAN) / STD
        return (sigma / variance * (x_noisy - alpha * MEAN) - eps_hat) * jnp.sqrt(variance) / (alpha * STD)


class LinearMean(eqx.Module):
    """The mean network of factor analysis, μ + Wz, in the network's units."""

    law: LinearGaussian

    def __call__(self, z, log_snr):
        return (self.law.mean + self.law.weights @ z - MEAN) / STD


def conditioned(law, predict="data"):
    denoiser = ConditionedDenoiser(LinearNetwork(law, predict), law.schedule, (5,), 2, MEAN, STD, predict)
    return Program(prior, denoiser, law.encoder)


def gaussian(law, noise_std=0.6):
    denoiser = IsotropicDenoiser(LinearMean(law), law.schedule, (5,), 2, MEAN, STD, noise_std)
    return Program(prior, denoiser, law.encoder)


# --- closed forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("predict", ["data", "noise"])
@pytest.mark.parametrize("schedule", [VariancePreserving(-12.0, 10.0), VarianceExploding(-8.0, 10.0)], ids=["vp", "ve"])
def test_an_exact_conditioned_denoiser_is_the_guided_one(predict, schedule, x64):
    """At every noise level and code; without a code both are the marginal's."""
    law = oracle(schedule)
    ours, guided = conditioned(law, predict), Program(prior, law.denoiser, law.encoder)
    x, z = jax.random.normal(KEY, (4, 5)), jnp.asarray([0.7, -1.2])
    for level in jnp.asarray([-6.0, 0.0, 6.0]):
        for mine, theirs in ((ours.decoder(z), guided.decoder(z)), (ours.denoiser, guided.denoiser)):
            np.testing.assert_allclose(mine(x[0], level), theirs(x[0], level), rtol=1e-9)


def test_both_decoders_have_one_bound(x64):
    """The same noise, so the same numbers; a network that is not told z has another."""
    law = oracle()
    x, _ = law.sample(KEY, 16)
    found = [evidence_bound(p, x, key=KEY, levels=8)["bound"].values
             for p in (conditioned(law), Program(prior, law.denoiser, law.encoder))]  # fmt: skip
    np.testing.assert_allclose(*found, rtol=1e-9)
    deaf = eqx.tree_at(lambda p: p.denoiser.network.law.weights, conditioned(law), jnp.zeros((5, 2)))
    assert np.abs(evidence_bound(deaf, x, key=KEY, levels=8)["bound"] - found[1]).mean() > 0.1


def test_a_linear_gaussian_decoder_is_factor_analysis(x64):
    """With the exact posterior every weight is p(x): log p(x) = log N(x; μ, WWᵀ + s²I), whatever the draw of z."""
    law = oracle()
    x = np.asarray(law.sample(KEY, 8)[0])
    exact = stats.multivariate_normal(law.mean, law.weights @ law.weights.T + 0.36 * np.eye(5)).logpdf(x)
    weights = importance_weighted_bound(gaussian(law), x, key=KEY, draws=32, levels=2)["log_weight"]
    # The guide is the posterior at the clean end, of x with a variance e^{−λmax} more.
    np.testing.assert_allclose(weights.mean("draw"), exact, atol=2e-3)
    assert weights.std("draw").max() < 2e-3
    wrong = importance_weighted_bound(gaussian(law, 0.7), x, key=KEY, draws=32, levels=2)["bound"].isel(particles=-1)
    assert np.abs(wrong - exact).mean() > 0.02


def test_the_closed_form_is_what_diffusion_bounds(x64):
    """log N(x; m, s²I) against prior loss, quadrature of the errors and reconstruction loss, up to the range's ends."""
    schedule = VariancePreserving(-14.0, 16.0)
    x, mean, std = jax.random.normal(KEY, (5,)), jnp.linspace(-1, 1, 5), jnp.asarray(0.4)
    exact = stats.norm.logpdf(x, mean, std).sum()
    nodes, width = np.polynomial.legendre.leggauss(64)
    levels, weights = jnp.asarray(schedule.log_snr_min + 15 * (nodes + 1)), jnp.asarray(15 * width)
    eps = jax.random.normal(jax.random.key(1), (500, 5))
    eps = jnp.concatenate([eps, -eps]) / jnp.sqrt(jnp.mean(eps**2, 0))  # of mean 0 and variance 1 to the letter

    def diffusion(std):
        denoiser = NormalDenoiser(mean, std, schedule)
        error = lambda level: jax.vmap(lambda e: noise_error(denoiser, None, x, None, level, e))(eps).mean()  # noqa: E731
        parts = bound(denoiser, None, x, None, levels[0], jnp.ones(()), eps[0])
        np.testing.assert_allclose(-parts.total, denoiser.log_prob(x), rtol=1e-12)
        return parts.prior + parts.reconstruction + 0.5 * weights @ jax.lax.map(error, levels)

    assert abs(diffusion(std) + exact) < 1e-4
    assert abs(diffusion(2 * std) + exact) > 0.1


def test_the_decoder_gives_the_exact_log_prob(x64):
    """Whatever the noise set."""
    law = oracle()
    program, z = gaussian(law), jnp.asarray([[0.7, -1.2]])
    x = law.sample(KEY, 1)[0]
    for seed in range(2):
        decoder = sp.ScoreDecoder(
            program.denoiser, program.encoder, z, sampler=program.sampler, key=jax.random.key(seed)
        )
        expected = stats.norm.logpdf(x, law.mean + z @ law.weights.T, 0.6).sum()
        np.testing.assert_allclose(decoder.log_prob(x), expected, rtol=1e-9)


# --- networks ---------------------------------------------------------------------------------------------------------

NETWORKS = {
    "mlp": lambda condition: ResidualMLP((6,), (6,), width=8, depth=2, condition=condition, key=KEY),
    "unet": lambda condition: UNet((1, 8, 8), widths=(4, 8), condition=condition, key=KEY),
}


def awake(network):
    """No layer at zero, as after some training."""
    keys = iter(jax.random.split(jax.random.key(1), 200))
    return jax.tree.map(lambda a: a + 0.1 * jax.random.normal(next(keys), a.shape) if eqx.is_array(a) else a, network)


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_code_reaches_every_block(kind):
    """A network with codes has the parameters of one without, and more; NaN is no code, and has a finite gradient."""
    plain, coded = NETWORKS[kind](0), NETWORKS[kind](3)
    shared = jax.tree_util.tree_leaves_with_path(eqx.filter(plain, eqx.is_array))
    more = dict(jax.tree_util.tree_leaves_with_path(eqx.filter(coded, eqx.is_array)))
    assert all(np.array_equal(leaf, more[path]) for path, leaf in shared)
    assert len(more) == len(shared) + 5
    coded = awake(coded)
    x, level = jax.random.normal(KEY, (6,) if kind == "mlp" else (1, 8, 8)), jnp.zeros(())
    call = jax.jit(lambda z: coded(x, level, z))
    z, none = jnp.ones(3), jnp.full(3, jnp.nan)
    assert np.abs(call(z) - call(-z)).max() > 1e-3
    np.testing.assert_allclose(call(none), coded(x, level), rtol=1e-5, atol=1e-6)
    assert np.abs(call(z) - call(none)).max() > 1e-3
    slope = jax.jit(jax.grad(lambda z: call(z).sum()))
    assert np.array_equal(slope(none), np.zeros(3))
    assert np.abs(slope(z)).min() > 0
    with pytest.raises(ValueError, match="takes no code"):
        plain(x, level, z)


def test_an_image_from_a_code():
    for widths, blocks, patch in (((4, 8), 1, 2), ((4,), 2, 4), ((4, 4, 8), 1, 1)):
        network = AscendingUNet(3, (2, 8, 8), widths=widths, blocks=blocks, patch=patch, key=KEY)
        assert jax.eval_shape(network, jax.ShapeDtypeStruct((3,), jnp.float32)).shape == (2, 8, 8)


def test_codes_are_dropped_in_training_only():
    """About the share asked for, of conditioned denoisers; the bound drops none."""
    law, z = oracle(), jnp.ones((4000, 2))
    told = Objective(dropped=0.1).told(conditioned(law).denoiser, z, KEY)
    gone = np.isnan(told)
    assert np.array_equal(gone[:, 0], gone[:, 1])
    assert stats.binomtest(int(gone[:, 0].sum()), 4000, 0.1).pvalue > 1e-4
    for objective, denoiser in (
        (Objective(), conditioned(law).denoiser),
        (Objective(dropped=0.1), gaussian(law).denoiser),
        (Objective(dropped=0.1), law.denoiser),
    ):
        assert objective.told(denoiser, z, KEY) is z
