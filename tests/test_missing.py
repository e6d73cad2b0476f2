"""Observations in which something is missing: bound, posterior, samples, statistics, and the way through a run."""

import equinox as eqx
import jax
import jax.numpy as jnp
from missing_oracle import MODEL, SEEN, ExactDenoiser, ExactEncoder
import numpy as np
from numpyro import distributions as dist
import pytest

import sami_ppl as sp
from sami_ppl.decoders.bound import bound
from sami_ppl.decoders.exact import LinearGaussian
from sami_ppl.decoders.twisted import TwistedSampler
from sami_ppl.diffusion.sampler import DPMSolver, FromPureNoise
from sami_ppl.fitting.components import filled, low_pass_codes
from sami_ppl.nn import Masked
from sami_ppl.program.tabulated import Table, ends, noise_terms, tabulated_log_likelihood
from sami_ppl.saving.save import LoadError

KEY, RNG = jax.random.key(0), np.random.default_rng(0)
PRIOR = sp.factors(z=dist.Normal(0, 1).expand([2]))
ROWS, COLUMNS = np.mgrid[0:6, 0:9]


def fields(obs=96, land=True, clouds=True, seed=0):
    """Smooth fields of two factors, 6×9; a corner of land that no observation has, and clouds in most."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, obs, 1, 1, 1))
    x = (a * np.sin(ROWS / 3) + b * np.cos(COLUMNS / 4) + 0.1 * rng.normal(size=(obs, 1, 6, 9))).astype(np.float32)
    if land:
        x[:, :, :2, :3] = np.nan
    if clouds:
        x[np.arange(obs), 0, rng.integers(6, size=obs), rng.integers(3, 9, size=obs)] = np.nan
    return x


@pytest.mark.slow
def test_bound_is_the_marginal_evidence_of_what_is_seen():
    """With exact networks, bound + KL(q(z | x_seen) ‖ p(z)) = −log p(x_seen), to four standard errors of 65,536 draws.

    Controls: the evidence of the whole observation, and that of others, are far off.
    """
    whole = MODEL.sample(KEY, 1)[0][0]
    x = jnp.where(SEEN, whole, jnp.nan)
    denoiser, encoder = ExactDenoiser(seen=jnp.ones(6, bool)), ExactEncoder()
    loc, cov = encoder.parameters(*encoder.clean(x))
    z = loc + jax.random.normal(jax.random.key(1), (65536, 2)) @ jnp.linalg.cholesky(cov).T
    levels = MODEL.schedule.stratified(jax.random.key(2), len(z))
    eps = jax.random.normal(jax.random.key(3), (len(z), 6))
    found = jax.jit(jax.vmap(lambda *a: bound(denoiser, encoder, x, *a).total))(z, *levels, eps)
    kl = 0.5 * (jnp.trace(cov) + loc @ loc - 2 - jnp.linalg.slogdet(cov)[1])
    part = LinearGaussian(MODEL.weights[SEEN], MODEL.noise_std, MODEL.schedule, mean=MODEL.mean[SEEN])
    error = float(found.std() / len(z) ** 0.5)
    estimate = float(found.mean() + kl)
    assert abs(estimate + float(part.log_prob(x[SEEN]))) < 4 * error + 0.02  # and what the ends of the range cost
    for other in (MODEL.log_prob(whole), part.log_prob(whole[~SEEN].repeat(2))):
        assert abs(estimate + float(other)) > 10 * error


def test_missing_entries_move_no_gradient_and_no_noise():
    """Whatever noise they are given, and guidance is 0 there: it is that of the model without them."""
    x = jnp.where(SEEN, MODEL.sample(KEY, 1)[0][0], jnp.nan)
    denoiser, encoder = ExactDenoiser(seen=jnp.ones(6, bool)), ExactEncoder()
    z, level = jnp.asarray([0.3, -0.5]), jnp.asarray(1.0)
    eps = jax.random.normal(KEY, (2, 6)).at[1].set(0)
    eps = eps.at[1].set(jnp.where(SEEN, eps[0], 9.0))
    one, other = (bound(denoiser, encoder, x, z, level, jnp.asarray(2.0), e).total for e in eps)
    assert np.isfinite(one)
    assert one == other
    guide = jax.grad(encoder.log_prob, 1)(z, x, level)
    part = LinearGaussian(MODEL.weights[SEEN], MODEL.noise_std, MODEL.schedule, mean=MODEL.mean[SEEN])
    np.testing.assert_allclose(guide[SEEN], jax.grad(part.encoder.log_prob, 1)(z, x[SEEN], level), rtol=1e-4)
    assert not guide[~SEEN].any()


# --- programs of networks ---------------------------------------------------------------------------------------------

DECODERS = ("guided", "conditioned", "gaussian")


def program_of(x, decoder="guided", network=None):
    size = {"widths": (4, 4), "patch": 1} if network == "unet" else {"width": 8, "depth": 1}
    return sp.autoencoder(PRIOR, x, decoder=decoder, network=network, size=size, progress=False, key=KEY)


@pytest.mark.parametrize("network", ["mlp", "unet"])
def test_networks_are_told_what_is_missing(network, fill):
    """By further channels; the value that stands there counts nothing, and where nothing is missing all is seen."""
    x = fields()
    program = program_of(x, network=network)
    masked = fill(program.denoiser.network)
    assert isinstance(masked, Masked)
    level = jnp.asarray(0.5)
    found = masked(jnp.asarray(x[0]), level)
    assert found.shape == (1, 6, 9)
    seen = ~np.isnan(x[0])
    by_hand = masked.network(jnp.concatenate([np.nan_to_num(x[0]), seen.astype(np.float32)]), level)
    np.testing.assert_array_equal(found, by_hand)
    assert not np.allclose(found, masked(jnp.asarray(np.nan_to_num(x[0])), level))


def test_statistics_are_of_what_is_seen(capsys):
    x = fields()
    program = sp.autoencoder(PRIOR, x, size={"width": 8, "depth": 1}, key=KEY)
    assert program.denoiser.statistics == (
        pytest.approx(np.nanmean(x), abs=1e-6),
        pytest.approx(np.nanstd(x), abs=1e-6),
    )
    assert f"{np.isnan(x).mean():.1%} of the values are missing (NaN)" in capsys.readouterr().out
    np.testing.assert_array_equal(program.denoiser.seen[0, :2, :3], False)
    assert program.denoiser.seen.sum() == 48


def test_components_take_the_mean_of_others_for_what_is_missing():
    """The leading ones are those of the whole fields."""
    codes, whole = (low_pass_codes(x, 2, width=0.0) for x in (fields(400), fields(400, clouds=False)))
    assert np.abs(np.corrcoef(codes.T, whole.T)[:2, 2:]).max(1).min() > 0.95
    x = fields()
    np.testing.assert_array_equal(np.isnan(filled(x)), False)
    np.testing.assert_allclose(filled(x).mean(0)[:, 2:], np.nanmean(x[:, :, 2:], 0), atol=1e-6)
    assert not filled(x)[:, :, :2, :3].any()


def test_a_program_of_whole_observations_refuses_missing_values():
    x = fields(land=False, clouds=False)
    with pytest.raises(ValueError, match="built of data that miss some"):
        program_of(x).observed(fields())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::sami_ppl.diagnostics.CollapseWarning")
@pytest.mark.parametrize("decoder", DECODERS)
def test_a_fit_learns_from_what_is_seen(decoder):
    """Losses are finite and fall; samples have values wherever any observation has, and are NaN where none has."""
    x = fields()
    program, history = sp.fit(
        program_of(x, decoder), x, sp.Stage(steps=60, batch=32, learning_rate=1e-2), key=KEY, progress=False
    )
    losses = [record["train_loss"] for record in history.records]
    assert np.isfinite(losses).all()
    bounds = [
        sp.evidence_bound(p, x[:32], key=KEY, levels=4)["bound"].mean().item()
        for p in (program_of(x, decoder), program)
    ]
    assert bounds[1] < bounds[0]
    samples = sp.generate(program, x=x[:3], key=KEY)
    assert samples.shape == (3, 1, 6, 9)
    np.testing.assert_array_equal(np.isnan(samples), np.broadcast_to(~np.asarray(program.denoiser.seen), samples.shape))
    assert np.isfinite(program.encode(samples)[0]).all()
    # A guide is fitted to such samples too, as fits do at their end.
    found = sp.recalibrate(program, key=KEY, simulations=500, steps=5, progress=False)
    assert np.isfinite([found.before, found.after]).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampler", [TwistedSampler(evaluations=4, particles=2), FromPureNoise(DPMSolver(4))], ids=["twisted", "pure noise"]
)
@pytest.mark.filterwarnings("ignore::sami_ppl.diagnostics.fitted.NotFittedWarning")
def test_samples_are_nan_where_nothing_was_ever_seen(sampler):
    """And nowhere else, whatever the sampler."""
    program = program_of(fields())
    samples = sp.generate(program, x=fields()[:2], key=KEY, sampler=sampler)
    np.testing.assert_array_equal(np.isnan(samples), np.broadcast_to(~np.asarray(program.denoiser.seen), samples.shape))


@pytest.mark.slow
def test_tables_of_the_bound_leave_out_what_is_missing(fill):
    """As the bound does: a table of one row is the bound at its noise."""
    x = jnp.asarray(fields()[0])
    program = fill(program_of(fields()))
    z, level, eps = jnp.asarray([0.3, -0.5]), jnp.asarray(1.0), jax.random.normal(KEY, x.shape)
    terms = noise_terms(program.denoiser, program.encoder, x, level, eps)
    table = Table(jax.tree.map(lambda leaf: leaf[None], terms), jnp.asarray([2.0]), ends(program.encoder, x))
    found = tabulated_log_likelihood(program.encoder, table, z)
    exact = bound(program.denoiser, program.encoder, x, z, level, jnp.asarray(2.0), eps).total
    np.testing.assert_allclose(found, -exact, rtol=1e-4)


@pytest.mark.slow
def test_a_saved_program_knows_what_was_seen(tmp_path):
    x = fields()
    program = program_of(x)
    again = sp.load(sp.save(program, tmp_path / "program"), program_of(fields(seed=1)))
    assert eqx.tree_equal(again.denoiser, program.denoiser)
    np.testing.assert_array_equal(again.encode(x)[0], program.encode(x)[0])
    with pytest.raises(LoadError):
        sp.load(tmp_path / "program", program_of(fields(land=False, clouds=False)))
