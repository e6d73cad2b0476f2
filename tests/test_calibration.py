"""Calibration of the exact posterior of a linear-Gaussian program, and of posteriors broken on purpose.

Images are by SDE-DPM-Solver++(2M) with 60 evaluations over λ from −10 to 9, whose error is below what
`test_sampler_law.py` resolves with 4,000 draws: that is no reason to reject 400.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
import pytest
from scipy.stats import binomtest, kstest, norm
import xarray as xr

from sami_ppl.calibration import (
    calibration_table,
    describe,
    factor_recovery,
    pictures,
    quick_calibration,
    simulation_based_calibration,
    typicality,
)
from sami_ppl.decoders.exact import ExactEncoder, LinearGaussian
from sami_ppl.diffusion.sampler import StochasticDPMSolver
from sami_ppl.diffusion.schedule import VariancePreserving
from sami_ppl.encoders.encoder import encoder_for
from sami_ppl.encoders.families import Full, Mixture
from sami_ppl.program.program import Program

SIMULATIONS, FALSE_ALARM = 400, 1e-3
WEIGHTS = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 2)))[0] @ np.array([[1.5, 0.5], [0.0, 0.8]])


class Changed(ExactEncoder):
    """The exact posterior as guidance; as a guide, scaled by `factor` and moved by `shift` of its own deviations."""

    factor: float
    shift: float

    def __init__(self, model, factor=1.0, shift=0.0):
        super().__init__(model)
        self.factor, self.shift = factor, shift

    def parameters(self, x_noisy, log_snr):
        mean, cov = self.model.posterior(x_noisy, log_snr)
        return mean + self.shift * self.factor * jnp.sqrt(jnp.diagonal(cov)), self.factor**2 * cov


class Deaf(ExactEncoder):
    """The exact posterior as a guide; guidance says the same of every image, so that no sample hears its code."""

    def log_prob(self, z, x_noisy, log_snr):
        return -0.5 * jnp.sum(z**2)


@pytest.fixture(scope="module")
def model():
    return LinearGaussian(jnp.asarray(WEIGHTS, jnp.float32), 0.5, VariancePreserving(-10.0, 9.0))


def prior():
    numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))


@pytest.fixture(scope="module")
def build(model):
    return lambda encoder: Program(prior, model.denoiser, encoder, sampler=StochasticDPMSolver(60))


def calibrated(program, **arguments):
    return simulation_based_calibration(
        program, key=jax.random.key(3), **{"simulations": SIMULATIONS, "draws": 100, "chunk": 200} | arguments
    )


@pytest.fixture(scope="module")
def exact(build, model):
    return calibrated(build(model.encoder))


@pytest.mark.slow
def test_a_short_calibration_tells_right_from_wrong(build, model):
    """Exact networks pass; a guide of .8 of the width, and one that lies off, are told by what they are."""

    encoders = {"exact": model.encoder, "narrow": Changed(model, 0.8), "off": Changed(model, 1.0, 0.3)}
    found = {
        name: quick_calibration(build(encoder), key=jax.random.key(1), simulations=400)[0]
        for name, encoder in encoders.items()
    }
    assert {name: one["calibrated"] for name, one in found.items()} == {"exact": True, "narrow": False, "off": False}
    assert any("too narrow by a factor" in said for said in found["narrow"]["verdict"].values())
    assert any("shifted by +0." in said for said in found["off"]["verdict"].values())
    np.testing.assert_allclose(list(found["narrow"]["factor"].values()), 1.25, atol=0.15)
    few, x = quick_calibration(build(model.encoder), key=jax.random.key(1), simulations=400, seconds=0.0)
    assert (few["simulations"], few["calibrated"], len(x)) == (64, True, 64) or few["calibrated"] is None
    none, _ = quick_calibration(build(model.encoder), key=jax.random.key(1), simulations=20)
    assert none["calibrated"] is None
    assert "verdict" not in none


@pytest.mark.slow
def test_exact_posterior_is_calibrated(exact):
    """Uniform ranks by another test than the table's, nominal coverage within binomial error, moments of N(0, 1)."""
    table = calibration_table(exact, false_alarm=FALSE_ALARM)
    assert list(table["verdict"].values) == ["calibrated"] * 3
    ranks = exact["prior_sbc"]
    pit = np.concatenate([ranks["code"].values[0], ranks["joint"].values[0][:, None]], 1)
    assert pit.shape == (SIMULATIONS, 3)
    assert min(kstest(column, "uniform").pvalue for column in pit.T) > FALSE_ALARM / 3
    for level in table["level"].values:
        for covered in table["coverage"].sel(level=level).values:
            assert binomtest(round(covered * SIMULATIONS), SIMULATIONS, level).pvalue > FALSE_ALARM / 9
    assert np.all(np.abs(table["factor"] - 1)[:-1] < 4 * table["factor_se"][:-1])
    assert np.all(np.abs(table["shift"])[:-1] < 4 * table["shift_se"][:-1])
    assert table["z_score"].values[:-1] == pytest.approx(np.ones(2), abs=4 / np.sqrt(2 * SIMULATIONS) + 0.02)
    assert "calibrated" in describe(table)


@pytest.mark.slow
def test_contraction_is_one_minus_the_posterior_variance(exact, model):
    """The prior's variance is 1 and the posterior's the same for every x."""
    cov = model.posterior(jnp.zeros(6), jnp.asarray(9.0))[1]
    found = calibration_table(exact)["contraction"].values[:-1]
    assert found == pytest.approx(1 - np.diagonal(cov), abs=0.05)


def ranked(factor, shift, draws=100):
    """Mean and deviation of Φ⁻¹(PIT) for a posterior of that width and place: finite draws blunt what lies beyond."""
    rng = np.random.default_rng(0)
    truth = rng.normal(size=400_000) / factor - shift
    probit = norm.ppf((rng.binomial(draws, norm.cdf(truth)) + rng.uniform(size=truth.size)) / (draws + 1))
    return probit.mean(), probit.std()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("factor", "shift", "words", "joint"),
    [
        (0.7, 0.0, "too narrow by a factor of about 1.", "too small"),
        (1.4, 0.0, "too wide by a factor of about 1.", "too large"),
        (1.0, 0.5, "shifted by +0.", ""),
        (1.0, -0.5, "shifted by −0.", ""),
    ],
)
def test_broken_guides_are_flagged_in_words(build, model, factor, shift, words, joint):
    """Negative controls: the size of the mistake is told within four of its standard errors, on every axis.

    Held against what 100 draws can tell: a factor of 1.43 looks like 1.35.
    """
    table = calibration_table(calibrated(build(Changed(model, factor, shift))), false_alarm=FALSE_ALARM)
    mean, width = ranked(factor, shift)
    assert all(str(verdict).startswith(words) for verdict in table["verdict"].values[:-1])
    assert np.all(np.abs(table["factor"] - width)[:-1] < 4 * table["factor_se"][:-1])
    assert np.all(np.abs(table["shift"] + mean)[:-1] < 4 * table["shift_se"][:-1])
    assert joint in str(table["verdict"].values[-1])
    # Unlike ranks it sees how far the truth is from the draws; .02 for means and deviations of 100 draws.
    expected = np.sqrt(1 / factor**2 + shift**2)
    assert table["z_score"].values[:-1] == pytest.approx(expected, rel=4 / np.sqrt(2 * SIMULATIONS) + 0.02)


@pytest.mark.slow
def test_every_mistake_is_flagged_by_name(build, model, exact):
    """Negative controls: what is wrong with the guide, with the sampler, with the decoder. The exact program passes."""
    tables = {
        "guide too narrow": calibrated(build(Changed(model, 0.8))),
        "guide off": calibrated(build(Changed(model, 1.0, 0.3))),
        "few evaluations": calibrated(build(model.encoder), sampler=StochasticDPMSolver(5)),
        "deaf decoder": calibrated(build(Deaf(model))),
    }
    found = {name: calibration_table(tree, false_alarm=FALSE_ALARM) for name, tree in tables.items()}
    said = {name: [str(verdict) for verdict in table["verdict"].values] for name, table in found.items()}
    assert said["guide too narrow"][2] == "regions too small", "the code as a whole tells more than an axis alone"
    narrow = found["guide too narrow"].isel(axis=slice(2))
    assert (narrow["factor"] > 1 + 2 * narrow["factor_se"]).all()
    assert all("shifted by +0." in one for one in said["guide off"][:2])
    assert any(one != "calibrated" for one in said["few evaluations"])
    assert "(StochasticDPMSolver, 5 evaluations)" in describe(found["few evaluations"])
    assert all(one.startswith("too narrow by a factor of about ") for one in said["deaf decoder"][:2])
    assert said["deaf decoder"][2] == "regions too small"
    assert found["deaf decoder"]["z_score"].values[:2].min() > 2, "posterior and code have nothing in common"
    assert set(calibration_table(exact, false_alarm=FALSE_ALARM)["verdict"].values) == {"calibrated"}


def simulated(code, joint=None, draws=100):
    """A tree with given PIT values (n, D) in it."""
    count, size = code.shape
    axes = [f"z[{j}]" for j in range(size)]
    joint = np.random.default_rng(1).uniform(size=count) if joint is None else joint
    each = ("simulation", "axis")
    ranks = {"code": (("chain", "draw", "axis"), code[None]), "joint": (("chain", "draw"), joint[None])}
    moments = {"z": (each, code), "mean": (each, code), "sd": (each, 0.1 * code)}
    tree = xr.DataTree.from_dict(
        {"prior_sbc": xr.Dataset(ranks, coords={"axis": axes}), "simulations": xr.Dataset(moments)}
    )
    tree.attrs = {"draws": draws, "sampler": "DDIM", "evaluations": 20}
    return tree


@pytest.mark.slow
def test_rate_of_false_alarms():
    """Of 300 tables of uniform values, 4 lines each, 15 may speak at a rate of 5 %; 31 is four deviations above."""
    rng = np.random.default_rng(0)

    def speaks():
        tree = simulated(rng.uniform(size=(100, 3)), rng.uniform(size=100))
        return np.any(calibration_table(tree, false_alarm=0.05)["verdict"] != "calibrated")

    alarms = sum(speaks() for _ in range(300))
    assert 2 <= alarms <= 31


def test_ranks_beyond_all_draws_are_said_to_be_more():
    """All truths beyond every draw, half on either side: the factor is a lower end."""
    rng = np.random.default_rng(0)
    ends = rng.choice([0.0, 1.0], size=(400, 1)) * 0.995 + 0.004 * rng.uniform(size=(400, 1))
    assert "or more" in str(calibration_table(simulated(ends))["verdict"].values[0])


@pytest.mark.slow
def test_ranks_count_draws_below(tiny_program):
    """PIT (rank + U) / (S + 1) of a guide that ignores x, against ranks counted in numpy: U is in [0, 1)."""
    tree = simulation_based_calibration(tiny_program(), key=jax.random.key(0), simulations=30, draws=9, chunk=16)
    pit = tree["prior_sbc"]["code"]
    assert pit.dims == ("chain", "draw", "axis")
    assert pit.shape == (1, 30, 2)
    assert list(pit["axis"].values) == ["z[0]", "z[1]"]
    values = pit.values
    assert 0 <= values.min() < values.max() < 1
    again = simulation_based_calibration(tiny_program(), key=jax.random.key(0), simulations=30, draws=9, chunk=16)
    assert np.array_equal(again["prior_sbc"]["code"].values, values)
    # Where a truth lies far below its posterior no draw is below it, and the other way round.
    z_score = ((tree["simulations"]["z"] - tree["simulations"]["mean"]) / tree["simulations"]["sd"]).values
    assert np.all(values[0][z_score < -3] < 1 / 10 + 1e-6)
    assert np.all(values[0][z_score > 3] > 9 / 10 - 1e-6)
    assert np.corrcoef(z_score.ravel(), values.ravel())[0, 1] > 0.7


@pytest.mark.slow
@pytest.mark.parametrize("family", [Full, Mixture], ids=lambda f: f.__name__)
def test_every_family_has_ranks(tiny_program, mlp, family):
    """Families without location and scale: their densities order the draws."""
    program = tiny_program()
    encoder = encoder_for(program.prior, mlp(4, 8, key=jax.random.key(1)), program.denoiser.schedule, (4,),
                          families={"z": family}, key=jax.random.key(2))  # fmt: skip
    tree = simulation_based_calibration(
        program.replace(encoder=encoder), key=jax.random.key(0), simulations=20, draws=8
    )
    assert np.isfinite(tree["prior_sbc"]["joint"].values).all()
    assert set(calibration_table(tree).data_vars) >= {"p_value", "verdict", "coverage"}


def test_figures_take_ranks():
    rng = np.random.default_rng(0)
    figure = pictures.coverage({"z": rng.uniform(size=200), "joint": rng.uniform(size=200)})
    assert len(figure.axes[0].get_lines()) == 3
    truth = rng.normal(size=(50, 4))
    figure = pictures.recovery(truth, truth + 0.1, np.full((50, 4), 0.1), ["a", "b", "c", "d"])
    assert "contraction 0.98" in figure.axes[0].get_title()
    assert "r 1.000" in figure.axes[3].get_title()


@pytest.mark.slow
def test_true_factors_with_the_exact_posterior(build, model):
    """A factor that is an axis: width is the posterior's, coverage nominal; one that is noise is not recovered."""
    x, z = model.sample(jax.random.key(0), 3000)
    rng = np.random.default_rng(0)
    factors = {"own": ("obs", np.asarray(2 * z[:, 0], float)), "noise": ("obs", rng.normal(size=3000))}
    data = xr.Dataset({"x": (("obs", "feature"), np.asarray(x)), **factors, "label": ("obs", np.arange(3000))})
    train, test = data.isel(obs=slice(2000)), data.isel(obs=slice(2000, None))
    found = factor_recovery(build(model.encoder), train, test, key=jax.random.key(1))
    assert list(found["factor"].values) == ["own", "noise"]
    sd = 2 * np.sqrt(model.posterior(jnp.zeros(6), jnp.asarray(9.0))[1][0, 0])
    own = found.sel(factor="own")
    assert float(own["error"]) == pytest.approx(sd, rel=0.15)
    # The map is E(factor | draw), whose slope is a little below 1.
    assert float(own["width"]) == pytest.approx(sd, rel=0.25)
    assert float(found["r2"].sel(factor="noise")) < 0.02
    assert float(found["coverage"].sel(factor="noise", level=0.95)) < 0.6
    with pytest.raises(ValueError, match="no real-valued variables on obs"):
        factor_recovery(build(model.encoder), train[["x"]], test[["x"]], key=jax.random.key(1))


@pytest.mark.slow
def test_typicality_flags_others_and_not_its_own(build, model):
    """p-values of observations from the law itself are uniform or above; moved ones are found, plain ones lie below."""
    x, _ = model.sample(jax.random.key(0), 600)
    x = np.asarray(x)
    given = np.concatenate([x[:200], x[200:220] + 4.0, 0.0 * x[220:240]])
    found = typicality(build(model.encoder), given, x[300:], key=jax.random.key(1), levels=16)
    p = found["p_value"].values
    # At a rate of 5 %, 26 of 200 or more come by chance in 1 of 100,000 cases.
    assert (p[:200] <= 0.05).sum() < 26
    assert np.all(p[200:220] < 0.02)
    assert np.all(found["z_score"].values[200:220] > 3)
    assert found["z_score"].values[220:].mean() < -0.3
    assert p[200:220].min() == pytest.approx(2 / 301)


def test_bad_arguments_are_named(build, model):
    program = build(model.encoder)
    with pytest.raises(ValueError, match="simulations must be at least 2, got 0"):
        simulation_based_calibration(program, key=jax.random.key(0), simulations=0)
    with pytest.raises(ValueError, match="draws must be at least 2, got 1"):
        simulation_based_calibration(program, key=jax.random.key(0), draws=1)
    with pytest.raises(ValueError, match="false_alarm must lie between 0 and 1, got 1"):
        calibration_table(simulated(np.full((20, 1), 0.5)), false_alarm=1)
    tree = xr.DataTree.from_dict({"posterior": xr.Dataset()})
    with pytest.raises(ValueError, match=r"no group 'prior_sbc', it has posterior: write .*simulation_based"):
        calibration_table(tree)
    x = np.zeros((30, 6), np.float32)
    with pytest.raises(ValueError, match=r"x must have shape \(obs, 6\), got \(30, 5\)"):
        typicality(program, x, x[:, :5], key=jax.random.key(0))
    with pytest.raises(ValueError, match="at least 20 observations, got 5"):
        typicality(program, x, x[:5], key=jax.random.key(0))
