"""Every plot function of ArviZ takes our trees, or stands in a table with the reason why not; so do its tables."""

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
import pytest
import xarray as xr

import sami_ppl as sp
from sami_ppl.encoders.affine import AffineEncoder

pytestmark = pytest.mark.slow  # all stand on a fitted program


N, DRAWS = 6, 100


def prior():
    numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1), infer={"event_dims": ["factor"]})
    numpyro.sample("tone", dist.Normal(0.0, 1.0))


@pytest.fixture(scope="module")
def trees():
    """`tree` of an exact program; `both`, with the same one whose axes are planted elsewhere; `scalar`, one number of
    each observation and of its draws; `single`, of one observation; `ranks`, of simulations; `elpd`, of two programs.
    """
    columns = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 3)))[0] * [2.0, 1.5, 1.0]
    truth = sp.LinearGaussian(jnp.asarray(columns, jnp.float32), 0.5, sp.VariancePreserving(-8.0, 8.0))
    program = sp.Program(prior, truth.denoiser, truth.encoder, sampler=sp.DPMSolver(6))
    turn = jnp.asarray([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    other = program.replace(encoder=AffineEncoder(program.encoder, turn))
    x = np.asarray(truth.sample(jax.random.key(0), N)[0])
    data = xr.Dataset({"x": (("obs", "feature"), x), "height": ("obs", x[:, 0])})
    options = {"draws": DRAWS, "predictive": DRAWS, "levels": 8}
    tree, again = (p.posterior(data, key=jax.random.key(i), **options) for i, p in enumerate((program, other)))
    return {
        "tree": tree.isel(obs=slice(2)),
        "all": tree,
        "single": tree.isel(obs=[0]),
        "both": sp.combine([tree, again]).isel(obs=slice(2)),
        "scalar": scalar(tree),
        "ranks": sp.simulation_based_calibration(program, key=jax.random.key(2), simulations=32, draws=31),
        "elpd": sp.compare({"one": program, "other": other}, data, key=jax.random.key(3), levels=16),
    }


def scalar(tree):
    """The mean over the dims of an observation, as docs/posterior.md makes it."""
    groups = {name: node.to_dataset() for name, node in tree.children.items()}
    for name in ("posterior_predictive", "prior_predictive", "observed_data"):
        groups[name] = groups[name].mean("feature")
    return xr.DataTree.from_dict(groups)


PLOTS = {  # which tree, and what must be said beside it
    "plot_autocorr": ("tree", {}),
    "plot_bf": ("single", {"var_names": "tone", "ref_val": 0.0}),
    "plot_compare": ("elpd", {}),
    "plot_convergence_dist": ("tree", {}),
    "plot_dgof": ("tree", {}),
    "plot_dgof_dist": ("tree", {}),
    "plot_dist": ("tree", {}),
    "plot_ecdf_pit": ("ranks", {}),
    "plot_ess": ("tree", {}),
    "plot_ess_evolution": ("tree", {}),
    "plot_forest": ("all", {}),
    "plot_lm": ("scalar", {"x": "height", "y": "x"}),
    "plot_mcse": ("tree", {}),
    "plot_pair": ("tree", {}),
    "plot_pair_focus": ("single", {"focus_var": "tone", "focus_var_coords": {"obs": 0}}),
    "plot_parallel": ("tree", {}),
    "plot_ppc_dist": ("tree", {"num_samples": 20}),
    "plot_ppc_dist_pit": ("scalar", {"num_samples": 20}),
    "plot_ppc_interval": ("tree", {}),
    "plot_ppc_pit": ("scalar", {}),
    "plot_ppc_tstat": ("tree", {}),
    "plot_prior_posterior": ("tree", {}),
    "plot_psense_dist": ("single", {}),
    "plot_psense_quantities": ("single", {}),
    "plot_rank": ("both", {}),
    "plot_rank_dist": ("both", {}),
    "plot_ridge": ("all", {}),
    "plot_trace": ("tree", {}),
    "plot_trace_dist": ("tree", {}),
}

OWN = "each observation has latents of its own, and without it they have their prior, which no weights can reach: k-hat"
DO_NOT_APPLY = {  # the reason, and what ArviZ raises or warns of; None where it draws something that means nothing
    "plot_energy": ("energy is a quantity of Hamiltonian Monte Carlo; draws here are independent", AttributeError),
    "plot_khat": ("takes what az.loo gives, see plot_loo_pit; k-hat of our weights is in sample_stats", ValueError),
    "plot_loo_interval": (OWN, UserWarning),
    "plot_loo_pit": (OWN, None),
    "plot_loo_pava": ("for binary observations; those of a diffusion decoder are continuous", None),
    "plot_ppc_pava": ("for binary observations", None),
    "plot_ppc_pava_residuals": ("for binary observations", TypeError),
    "plot_ppc_censored": ("for times of events, some censored", None),
    "plot_ppc_rootogram": ("for counts", ValueError),
}
MODULES = {"plot_collection", "plot_matrix"}  # of arviz_plots; `az` shows them as names beside the functions


def test_the_tables_are_complete():
    """A new plot function of ArviZ must be given a place here."""
    there = {name for name in dir(az) if name.startswith("plot_")} - MODULES
    assert all(callable(getattr(az, name)) for name in there)
    assert not any(callable(getattr(az, name)) for name in MODULES)
    assert PLOTS.keys() | DO_NOT_APPLY.keys() == there
    assert not PLOTS.keys() & DO_NOT_APPLY.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", PLOTS)
def test_plots(trees, name):
    tree, options = PLOTS[name]
    assert getattr(az, name)(trees[tree], backend="none", **options) is not None


@pytest.mark.parametrize("name", [name for name, (_, error) in DO_NOT_APPLY.items() if error])
def test_plots_that_do_not_apply_say_so(trees, name):
    with pytest.raises(DO_NOT_APPLY[name][1]):
        getattr(az, name)(trees["scalar"], backend="none")


def test_summary(trees):
    """A row for each element; r-hat needs a second fit; the statistics are those of the draws."""
    one, both = (az.summary(trees[name], round_to="none") for name in ("tree", "both"))
    assert len(one) == len(both) == 2 * 3
    assert one["r_hat"].isna().all()
    assert (both["r_hat"] < 1.1).all()
    z = trees["tree"]["posterior"]["z"].values
    assert one.loc["z[0, 1]", "mean"] == pytest.approx(z[0, :, 0, 1].mean(), rel=1e-5)
    assert one.loc["z[0, 1]", "sd"] == pytest.approx(z[0, :, 0, 1].std(ddof=1), rel=1e-5)


def test_compare(trees):
    """Programs whose axes alone differ have one evidence: their difference is within noise of zero."""
    assert list(trees["elpd"]["rank"]) == [0, 1]
    assert abs(trees["elpd"]["elpd_diff"]).max() < 4 * trees["elpd"]["dse"].max()


def test_sensitivity_to_the_prior(trees):
    table = az.psense_summary(trees["single"])
    assert set(table.columns) == {"prior", "likelihood", "diagnosis"}
    assert (table["likelihood"].astype(float) > 0).all()


def test_more_panels_than_arviz_draws(trees, monkeypatch):
    """ArviZ counts the panels and names the limit; fewer observations are below it."""
    monkeypatch.setitem(az.rcParams, "plot.max_subplots", 9)
    with pytest.raises(ValueError, match=r"Requested 18 subplots, which exceeds rcParams\['plot.max_subplots'\]=9"):
        az.plot_dist(trees["all"], backend="none")
    assert az.plot_dist(trees["all"].isel(obs=slice(3)), backend="none") is not None


@pytest.mark.parametrize("call", [az.loo, lambda tree: az.compare({"one": tree, "other": tree})])
def test_leave_one_out_of_a_tree_warns(trees, call):
    """Its weights would have to reach the prior; where they do not the figure is too high, and ArviZ says so."""
    with pytest.warns(UserWarning, match="shape parameter of Pareto distribution is greater than"):
        found = call(trees["all"])
    if call is az.loo:
        assert found.elpd > trees["elpd"]["elpd"].max() + N


def test_one_fit_has_no_ranks_to_compare(trees):
    with pytest.raises(ValueError, match="at least 2 chains"):
        az.plot_rank(trees["tree"], backend="none")
    with pytest.raises(KeyError, match="prior_sbc"):
        az.plot_ecdf_pit(trees["tree"], backend="none")
