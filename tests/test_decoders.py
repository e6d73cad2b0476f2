"""Decoders that take the code: against closed forms, beside the guided decoder, and all that programs of them do."""

from dataclasses import replace
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
import pytest
from scipy import stats

import sami_ppl as sp
from sami_ppl._util.history import History
from sami_ppl.analyses import axis_geometry, posterior_by_noise
from sami_ppl.decoders.bound import bound, noise_error
from sami_ppl.decoders.conditional import ConditionedDenoiser, IsotropicDenoiser, NormalDenoiser
from sami_ppl.decoders.exact import LinearGaussian
from sami_ppl.decoders.training import Objective
from sami_ppl.diagnostics import information_spectrum, noise_end_kl, noise_errors
from sami_ppl.diffusion.schedule import VarianceExploding, VariancePreserving
from sami_ppl.evidence import evidence_bound, importance_weighted_bound
from sami_ppl.fitting.sizes import Extent, joint_stage
from sami_ppl.nn import AscendingDiT, AscendingUNet, DiT, ResidualMLP, UNet
from sami_ppl.program.program import Program
from sami_ppl.refinement.target import log_joint, targets

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


@pytest.mark.slow
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


@pytest.mark.slow
def test_both_decoders_have_one_bound(x64):
    """The same noise, so the same numbers; a network that is not told z has another."""
    law = oracle()
    x, _ = law.sample(KEY, 16)
    found = [evidence_bound(p, x, key=KEY, levels=8)["bound"].values
             for p in (conditioned(law), Program(prior, law.denoiser, law.encoder))]  # fmt: skip
    np.testing.assert_allclose(*found, rtol=1e-9)
    deaf = eqx.tree_at(lambda p: p.denoiser.network.law.weights, conditioned(law), jnp.zeros((5, 2)))
    assert np.abs(evidence_bound(deaf, x, key=KEY, levels=8)["bound"] - found[1]).mean() > 0.1


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_refinement_has_one_target(x64):
    """log p(x, z) on one noise set: the same for exact guided and conditioned decoders, exact for a Gaussian one."""
    law, z = oracle(), jnp.asarray([0.7, -1.2])
    x = law.sample(KEY, 1)[0]
    made = (Program(prior, law.denoiser, law.encoder), conditioned(law), gaussian(law))
    guided, ours, exact = (log_joint(program, targets(program, x, KEY, 4)[0], z) for program in made)
    # The densities of noise levels that pilots have found are alike, not equal: float32 of different orders.
    np.testing.assert_allclose(ours, guided, rtol=1e-6)
    expected = stats.norm.logpdf(x[0], law.mean + law.weights @ z, 0.6).sum() + stats.norm.logpdf(z).sum()
    np.testing.assert_allclose(exact, expected, rtol=1e-9)


# --- networks ---------------------------------------------------------------------------------------------------------

NETWORKS = {
    "mlp": lambda condition: ResidualMLP((6,), (6,), width=8, depth=2, condition=condition, key=KEY),
    "unet": lambda condition: UNet((1, 8, 8), widths=(4, 8), condition=condition, key=KEY),
    "dit": lambda condition: DiT((1, 8, 8), width=8, depth=1, condition=condition, key=KEY),
}


def awake(network):
    """No layer at zero, as after some training."""
    rng = np.random.default_rng(1)
    moved = lambda a: jnp.asarray(a + 0.1 * rng.normal(size=a.shape), a.dtype) if eqx.is_array(a) else a  # noqa: E731
    return jax.tree.map(moved, network)


@pytest.mark.slow
@pytest.mark.parametrize("kind", NETWORKS)
def test_the_code_reaches_every_block(kind):
    """A network with codes has the parameters of one without, and more; NaN is no code, and has a finite gradient."""
    plain, coded = NETWORKS[kind](0), NETWORKS[kind](3)
    shared = jax.tree_util.tree_leaves_with_path(eqx.filter(plain, eqx.is_array))
    more = dict(jax.tree_util.tree_leaves_with_path(eqx.filter(coded, eqx.is_array)))
    assert all(np.array_equal(leaf, more[path]) for path, leaf in shared)
    assert len(more) == len(shared) + 7
    coded = awake(coded)
    x, level = jax.random.normal(KEY, (6,) if kind == "mlp" else (1, 8, 8)), jnp.zeros(())
    z, none = jnp.ones(3), jnp.full(3, jnp.nan)

    @jax.jit
    def computed(codes):
        slopes = jax.vmap(jax.grad(lambda z: coded(x, level, z).sum()))(codes)
        return jax.vmap(lambda z: coded(x, level, z))(codes), coded(x, level), slopes

    (told, other, untold), alone, slopes = computed(jnp.stack([z, -z, none]))
    assert np.abs(told - other).max() > 1e-3
    assert np.abs(told - untold).max() > 1e-3
    np.testing.assert_allclose(untold, alone, rtol=1e-4, atol=1e-5)
    assert np.array_equal(slopes[2], np.zeros(3))
    assert np.abs(slopes[0]).min() > 0
    with pytest.raises(ValueError, match="takes no code"):
        plain(x, level, z)


def test_an_image_from_a_code():
    for widths, blocks, patch in (((4, 8), 1, 2), ((4,), 2, 4), ((4, 4, 8), 1, 1)):
        network = AscendingUNet(3, (2, 8, 8), widths=widths, blocks=blocks, patch=patch, key=KEY)
        assert jax.eval_shape(network, jax.ShapeDtypeStruct((3,), jnp.float32)).shape == (2, 8, 8)
    network = AscendingDiT(3, (2, 9, 6), width=8, depth=1, key=KEY)
    assert jax.eval_shape(network, jax.ShapeDtypeStruct((3,), jnp.float32)).shape == (2, 9, 6)


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


# --- programs ---------------------------------------------------------------------------------------------------------

TAKING_CODES = ("conditioned", "gaussian")
FACTORS = sp.factors(z=dist.Normal(0, 1).expand([2]))
X = np.random.default_rng(0).normal(size=(24, 6)).astype(np.float32)


@functools.cache
def small(decoder):
    """A program of vectors with networks as small as they go, and with no layer at zero."""
    program = sp.autoencoder(
        FACTORS, X, decoder=decoder, size={"width": 8, "depth": 1}, features=4, sampler=sp.DDIM(3), key=KEY,
        progress=False,
    )  # fmt: skip
    return program.replace(denoiser=awake(program.denoiser), encoder=awake(program.encoder))


@pytest.mark.slow
@pytest.mark.parametrize("decoder", TAKING_CODES)
def test_the_decoder_is_one_word(decoder):
    program = small(decoder)
    assert not program.guided
    assert small("guided").guided
    assert type(program.denoiser).__name__ in repr(program)
    assert f"{type(program.denoiser).__name__} of ResidualMLP" in program.describe()
    assert program.denoiser.statistics == small("guided").denoiser.statistics
    unet = eqx.filter_eval_shape(
        lambda key: sp.autoencoder(
            FACTORS, np.resize(X, (4, 1, 32, 32)), decoder=decoder, size={"widths": (4, 8)}, key=key, progress=False
        ),
        KEY,
    )
    assert type(unet.denoiser.network).__name__ == {"conditioned": "UNet", "gaussian": "AscendingUNet"}[decoder]


@pytest.mark.slow
def test_codes_steer_and_none_is_the_marginal():
    """Samples given other codes differ; without a code a conditioned denoiser samples, a Gaussian decoder refuses."""
    keys = jnp.stack([KEY, KEY])
    for decoder in TAKING_CODES:
        first, second = sp.decode(small(decoder), np.eye(2), keys)
        assert np.abs(first - second).max() > 1e-3
    assert np.isfinite(sp.generate(small("conditioned"), key=KEY, size=2, guided=False)).all()
    with pytest.raises(ValueError, match=r"sp\.generate\(program, size="):
        sp.generate(small("gaussian"), key=KEY, size=2, guided=False)


def test_the_gain_is_of_codes():
    """Own against shuffled codes for both; the error without a code where there is such a denoiser."""
    for decoder in TAKING_CODES:
        found = eqx.filter_jit(noise_errors)(small(decoder), jnp.asarray(X), KEY)
        assert np.isfinite(found.gain).all()
        assert (found.unguided is None) == (decoder == "gaussian")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::sami_ppl.diagnostics.CollapseWarning")
@pytest.mark.parametrize("decoder", TAKING_CODES)
def test_a_fit_moves_both_networks_and_is_saved(decoder, tmp_path):
    """Joint by default, at the β of the decoder; the program comes back from disk; its posterior is a tree."""
    program = small(decoder)
    fitted, _ = sp.fit(program, X, sp.Joint(sp.Stage(steps=2, batch=8)), key=KEY, progress=False)
    for part in ("denoiser", "encoder"):
        assert not eqx.tree_equal(getattr(fitted, part), getattr(program, part))
    if decoder == "conditioned":
        before, after = (p.denoiser.network.code.absent for p in (program, fitted))
        assert np.abs(after - before).max() > 0
    again = sp.load(sp.save(fitted, tmp_path / "model"), program)
    np.testing.assert_array_equal(again.encode(X)[0], fitted.encode(X)[0])
    assert eqx.tree_equal(again.denoiser, fitted.denoiser)
    tree = again.posterior(X[:3], key=KEY, draws=4, predictive=2)
    assert np.isfinite(tree["log_likelihood"]["x"].values).all()
    assert tree["posterior_predictive"]["x"].shape == (1, 2, 3, 6)
    assert joint_stage(program, Extent(24, 1.0)).beta == (0.1 if decoder == "conditioned" else 1.0)


def test_the_default_plan_follows_the_decoder(monkeypatch):
    """Two stages for guided decoders, both networks at once for others."""
    taken = []
    for plan in (sp.TwoStage, sp.Joint):
        monkeypatch.setattr(plan, "run", lambda self, program, run, *, key: taken.append(type(self)) or (program, []))
    monkeypatch.setattr(History, "joined", lambda histories: None)
    for decoder in ("guided", *TAKING_CODES):
        sp.fit(small(decoder), X, key=KEY, progress=False)
    assert taken == [sp.TwoStage, sp.Joint, sp.Joint]


def over_time():
    numpyro.sample("z", sp.Matern(jnp.arange(3.0), 1.0, size=2))


STAGE = sp.Stage(steps=1, batch=8)
REFUSED = {
    "two stages": (lambda p: sp.fit(p, X, sp.TwoStage(), key=KEY), r"sp\.Joint\(\)"),
    "encoder only": (lambda p: sp.fit(p, X, sp.EncoderOnly(), key=KEY), r"sp\.Joint\(\)"),
    "decoupled": (lambda p: sp.fit(p, X, sp.Decoupled(), key=KEY), r"sp\.Joint\(\)"),
    "marginal stage": (lambda p: sp.fit(p, X, replace(STAGE, target="marginal"), key=KEY), "target='marginal'"),
    "own loss": (lambda p: sp.fit(p, X, replace(STAGE, denoiser_loss="own"), key=KEY), "denoiser_loss='own'"),
    "another prior": (lambda p: sp.with_prior(p, FACTORS, key=KEY), "with_prior"),
    "sequences": (lambda p: sp.over_time(p, over_time), "sequences"),
    "gauge": (lambda p: sp.align(p, X), "align"),
    "noisy posteriors": (lambda p: posterior_by_noise(p, X, key=KEY), "posterior_by_noise"),
    "geometry": (lambda p: axis_geometry(p, X, key=KEY), "axis_geometry"),
    "information": (lambda p: information_spectrum(p, X, key=KEY), "information_spectrum"),
    "noisy end": (lambda p: noise_end_kl(p, X, key=KEY), "noise_end_kl"),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("decoder", TAKING_CODES)
def test_what_needs_guidance_is_refused_by_name(what, decoder):
    call, words = REFUSED[what]
    with pytest.raises(ValueError, match=words) as caught:
        call(small(decoder))
    assert "guided decoder" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"decoder": "vae"}, "must be one of"),
        ({"decoder": "conditioned", "noise": "blind"}, "noise='blind'"),
        ({"decoder": "gaussian", "predict": "noise"}, "predict='noise'"),
        ({"decoder": "conditioned", "network": (lambda x, log_snr: x, ResidualMLP((6,), (4,), width=8, key=KEY))},
         r"\(x, log_snr, z\)"),
        ({"decoder": "gaussian", "network": (lambda z, log_snr: z, ResidualMLP((6,), (4,), width=8, key=KEY))},
         r"network\(z, None\) must be one observation of shape \(6,\), got shape \(2,\)"),
    ],
)  # fmt: skip
def test_what_a_decoder_cannot_take_is_refused_at_once(settings, words):
    with pytest.raises(ValueError, match=words):
        sp.autoencoder(FACTORS, X, **settings, key=KEY, progress=False)


def test_codes_of_another_length_are_refused():
    wide = sp.factors(z=dist.Normal(0, 1).expand([3]))
    other = sp.autoencoder(wide, X, size={"width": 8, "depth": 1}, key=KEY, progress=False)
    with pytest.raises(ValueError, match="takes codes of 2 numbers and the encoder gives 3"):
        Program(wide, small("gaussian").denoiser, other.encoder)
