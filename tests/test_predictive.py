"""Predictive checks: of an exact program nothing is flagged and ranks are uniform; each mistake is told by its name."""

import arviz as az
import jax
import jax.numpy as jnp
from missing_oracle import MODEL, ExactDenoiser
from missing_oracle import ExactEncoder as SeenEncoder
import numpy as np
import numpyro
from numpyro import distributions as dist
import pytest
from scipy import stats
import xarray as xr

import sami_ppl as sp
from sami_ppl.calibration import describe_checks, flagged
from sami_ppl.calibration.checks import checks_table
from sami_ppl.calibration.predictive import _inside, _pit, default_statistics
from sami_ppl.decoders.exact import ExactEncoder

KEY, OBS, FALSE_ALARM = jax.random.key(2), 128, 1e-3
WEIGHTS = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 2)))[0] @ np.array([[1.5, 0.5], [0.0, 0.8]])


def linear(noise):
    return sp.LinearGaussian(jnp.asarray(WEIGHTS, jnp.float32), noise, sp.VariancePreserving(-10.0, 9.0))


TRUTH = linear(0.5)
X = np.asarray(TRUTH.sample(jax.random.key(1), OBS)[0])


class Deaf(ExactEncoder):
    """The exact posterior as a guide; as guidance one that says the same of every image: no sample hears its code."""

    def log_prob(self, z, x_noisy, log_snr):
        return -0.5 * jnp.sum(z**2)


def prior():
    numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))


def checked(x, encoder=TRUTH.encoder, **settings):
    program = sp.Program(prior, TRUTH.denoiser, encoder, sampler=sp.StochasticDPMSolver(40))
    return sp.predictive_checks(program, x, key=KEY, **settings)


@pytest.fixture(scope="module")
def exact():
    return checked(X, false_alarm=FALSE_ALARM)


@pytest.mark.slow
def test_of_an_exact_program_p_values_are_uniform(exact):
    """By another test than the table's; coverage within 4 standard errors; nothing flagged. False alarms: .001 each."""
    assert flagged(exact) == {}
    pits = exact["pit"].to_dataset()
    assert set(pits.data_vars) == {"mean", "std", "smallest", "largest", "distance", "log_q"}
    for name, pit in pits.data_vars.items():
        assert stats.kstest(pit.values[0], "uniform").pvalue > FALSE_ALARM / len(pits.data_vars), name
    for name in ("mean", "std", "smallest", "largest"):
        own, drawn = (exact[group][name].values.ravel() for group in ("observed_data", "prior_predictive"))
        assert stats.ks_2samp(own, drawn).pvalue > FALSE_ALARM / 4
    inside = exact["coverage"]["entries"]
    error = inside.std("obs", ddof=1) / OBS**0.5
    assert np.all(np.abs(inside.mean("obs") - inside["level"]) < 4 * error)
    assert error.max() < 0.03, "what could be told apart"


@pytest.mark.slow
def test_programs_that_are_wrong_about_the_data_are_flagged_by_name():
    """Each passes simulation-based calibration but the last: it is of its own images that they are right."""
    loud = flagged(checked(np.asarray(linear(0.8).sample(jax.random.key(1), OBS)[0])))
    assert loud["samples: distance"] == "samples of a code vary too little, or lie elsewhere"
    assert {loud[f"entries: {level}%"] for level in (50, 80, 95)} == {"intervals too narrow"}
    assert loud["draws: std"].startswith("higher than of draws of the program")
    quiet = flagged(checked(np.asarray(linear(0.3).sample(jax.random.key(1), OBS)[0])))
    assert quiet["samples: distance"] == "samples of a code vary too much"
    assert quiet["entries: 80%"] == "intervals too wide"
    moved = flagged(checked(X + 0.4))
    for others in ("draws", "samples"):
        assert moved[f"{others}: mean"].startswith("higher than of ")
    assert "samples: log_q" not in moved
    narrow = TRUTH.sample_given(jax.random.key(6), 0.1 * jax.random.normal(jax.random.key(5), (OBS, 2)))
    assert flagged(checked(np.asarray(narrow)))["codes"] == "codes of observations are not spread as the prior"
    deaf = flagged(checked(X, Deaf(TRUTH)))
    assert deaf == {"samples: log_q": "samples do not follow their code as observations do"}


def shuffled(rng, obs=60, members=8, entries=12):
    """What `checks_table` takes, of sets whose members are alike."""
    sets = rng.normal(size=(obs, members, entries)) + rng.normal(size=(obs, 1, 1))
    values = {"mean": sets.mean(2), "largest": sets.max(2)}
    observed = {name: value[:, 0] for name, value in values.items()}
    drawn = {name: (rng.normal(size=(obs, entries)) + rng.normal(size=(obs, 1))).mean(1) for name in ("mean",)}
    inside = np.stack([_inside(one, rng) for one in sets])
    codes = (rng.normal(size=(obs, 3)), rng.normal(size=(obs, 3)))
    pit = {name: _pit(value, rng) for name, value in values.items()}
    return ({"mean": observed["mean"]}, drawn, values, pit, inside, None, codes)


@pytest.mark.slow
def test_rate_of_false_alarms():
    """Of 200 tables of 7 checks, at most 10 in the mean speak at a rate of 5 %; 23 is four deviations above."""
    rng = np.random.default_rng(0)

    def speaks():
        table = checks_table(*shuffled(rng), units="of x", rng=rng, false_alarm=0.05)
        return np.any(table["verdict"] != "as it should be")

    assert 1 <= sum(speaks() for _ in range(200)) <= 23


def test_shares_inside_intervals_are_counted():
    """Of equal values every order is as likely; of others the middle ones are inside. All members: the content."""
    rng = np.random.default_rng(0)
    values = np.tile(np.arange(20.0)[:, None], (1, 4000))
    inside = _inside(values, rng)
    assert np.all(inside[5:15, 0] == 1)
    assert np.all(inside[[0, 19], 1] == 0)
    alike = _inside(np.zeros((20, 4000)), rng)
    np.testing.assert_allclose(alike, np.broadcast_to([0.5, 0.8, 0.95], alike.shape), atol=0.04)
    for shares in (inside, alike):
        np.testing.assert_allclose(shares.mean(0), [0.5, 0.8, 0.95], atol=0.01)
    pit = _pit(np.array([[3.0, 1, 2, 9]] * 5000), rng)
    assert pit.min() >= 0.5
    assert pit.max() < 0.75


@pytest.mark.slow
def test_hidden_entries_are_predicted():
    """With exact networks intervals hold as many as they say, of what was hidden too, on land there is nothing.

    Control: in data of three times the noise they do not.
    """
    program = sp.Program(
        prior, ExactDenoiser(seen=jnp.asarray(np.arange(6) < 5)), SeenEncoder(), sampler=sp.StochasticDPMSolver(40)
    )
    x = np.array(MODEL.sample(jax.random.key(1), OBS)[0])
    x[:, 5] = np.nan
    x[:40, 0] = np.nan
    found = sp.predictive_checks(program, x, key=KEY, hidden=0.4, false_alarm=FALSE_ALARM)
    assert flagged(found) == {}
    assert "hidden entries: 80%" in found["checks"]["check"]
    shares = found["coverage"]["hidden"]
    error = shares.std("obs", ddof=1) / OBS**0.5
    assert np.all(np.abs(shares.mean("obs") - shares["level"]) < 4 * error)
    noisy = x + np.random.default_rng(0).normal(size=x.shape).astype(np.float32) * 1.5
    wrong = flagged(sp.predictive_checks(program, noisy, key=KEY, hidden=0.4))
    assert wrong["hidden entries: 80%"] == "intervals too narrow"


@pytest.mark.slow
def test_statistics_of_your_own_and_what_arviz_makes_of_them(exact):
    data = xr.Dataset({"x": (("obs", "feature"), X, {"units": "K"})}, coords={"obs": np.arange(OBS) + 7})
    found = checked(data, statistics={"range": lambda x: np.ptp(x, axis=1)}, samples=9)
    assert found["observed_data"]["range"].values == pytest.approx(np.ptp(X, axis=1), abs=0.05)
    assert found["posterior_predictive"]["range"].sizes == {"chain": 1, "draw": 9, "obs": OBS}
    assert found["coverage"]["obs"].values.tolist() == list(range(7, OBS + 7))
    table = found["checks"].to_dataset().set_index(check="check")
    assert str(table["units"].sel(check="draws: range").item()) == "K"
    assert str(table["units"].sel(check="samples: log_q").item()) == "nats"
    text = describe_checks(found)
    assert "128 held-out observations, 9 samples" in text
    assert all(str(name) in text for name in found["checks"]["check"].values)
    az.plot_ecdf_pit(found, group="pit", backend="none")
    az.plot_ppc_pit(found, var_names=["range"], backend="none")
    az.plot_ppc_dist(found, group="prior_predictive", num_samples=1, backend="none")


def test_default_statistics_of_images():
    """Roughness by loops, around what is missing."""

    class Shape:
        event_dims, event_shape = ("channel", "row", "column"), (2, 3, 4)

    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 2, 3, 4))
    x[1, 0, 1, 1] = np.nan
    found = {name: statistic(x) for name, statistic in default_statistics(Shape).items()}
    steps = [
        [
            (x[i, c, r + dr, k + dk] - x[i, c, r, k]) ** 2
            for c in range(2) for r in range(3) for k in range(4) for dr, dk in ((0, 1), (1, 0))
            if r + dr < 3 and k + dk < 4
        ]
        for i in range(5)
    ]  # fmt: skip
    np.testing.assert_allclose(found["roughness"], np.sqrt(np.nanmean(steps, axis=1)))
    np.testing.assert_allclose(found["largest"], np.nanmax(x.reshape(5, -1), 1))
    Shape.event_dims, Shape.event_shape = ("feature",), (6,)
    assert "roughness" not in default_statistics(Shape)


def test_bad_input():
    for settings, message in (
        ({"samples": 3}, "at least 20 observations and 4 samples"),
        ({"hidden": 0.0}, "hidden and false_alarm must lie between 0 and 1"),
        ({"false_alarm": 1.0}, "hidden and false_alarm must lie between 0 and 1"),
        ({"statistics": {"log_q": np.mean}}, "log_q, which every program has"),
        ({"resolution": -1.0}, "resolution must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            checked(X[:30], **settings)
    with pytest.raises(ValueError, match="at least 20 observations"):
        checked(X[:5])


def test_statistics_that_are_none_are_refused():
    for statistic, message in (
        (lambda x: x, r"'mine' must give one number of each observation, shape \(30,\), got \(30, 6\)"),
        (lambda x: np.where(x[:, 0] > 0, 1.0, np.nan), "'mine' is not finite for"),
    ):
        with pytest.raises(ValueError, match=message):
            checked(X[:30], statistics={"mine": statistic}, samples=4)


@pytest.mark.slow
def test_draws_of_the_program_are_at_the_variables_of_the_observations():
    """Codes of p(z | u), a row of u each: means of both classes within 4 standard errors, and not the other's."""
    means = np.array([[1.0, -0.5], [-2.0, 1.0]])

    def by_class(kind):
        numpyro.sample("z", dist.Normal(jnp.asarray(means)[kind], 0.6).to_event(1))

    program = sp.Program(by_class, TRUTH.denoiser, TRUTH.encoder, given={"kind": np.arange(2)})
    kinds = np.arange(400) % 2
    z = program.latents.from_code(program.prior_codes(KEY, 400, given={"kind": kinds}))["z"]
    for kind in range(2):
        np.testing.assert_allclose(np.asarray(z)[kinds == kind].mean(0), means[kind], atol=4 * 0.6 / 200**0.5)
