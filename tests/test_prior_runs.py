"""Whole runs of programs whose priors take variables of the data or have global sites; digits with some labels."""

import json
import warnings

import jax
import numpy as np
import pytest
import xarray as xr

from sami_ppl.data import train_test
from sami_ppl.diagnostics import CollapseWarning, clusters
from sami_ppl.encoders.rotation import TurningEncoder
from sami_ppl.runs import run as running
from sami_ppl.runs.evidence import evidence_run
from sami_ppl.saving.files import find, load_file

pytestmark = [pytest.mark.slow, pytest.mark.release]

SMALL = {"width": "16", "depth": "1", "denoiser.steps": "6", "encoder.steps": "6", "denoiser.batch": "32",
         "encoder.batch": "32", "posterior_obs": "4", "draws": "8"}  # fmt: skip
RUNS = {
    "mixing": ("mixing", {"observations": "400"}),
    "hierarchy": ("disks", {"prior": "hierarchical", "observations": "400", "warm_steps": "2", "latents": "4"}),
    "supports": ("supports", {"observations": "400"}),
    "shapes": ("shapes", {"observations": "400", "labelled": "0.2"}),
    "relaxed": ("shapes", {"observations": "400", "kind": "relaxed"}),
    "cause": ("causal_disks", {"observations": "400"}),
    "torus": ("ramps", {"observations": "400", "warm_steps": "2"}),
    "sphere": ("lit_ball", {"observations": "400", "warm_steps": "2"}),
    "turned": ("disks", {"observations": "400", "prior": "soft_uniform", "turn": "true"}),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folders = {}
    for name, (model, settings) in RUNS.items():
        folders[name] = tmp_path_factory.mktemp("priors") / name
        run(model, settings, folders[name], report=name == "hierarchy")
    return folders


def run(model, settings, out, *, report=False):
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        if not report:
            patch.setattr(running, "write_report", lambda out, *arguments, **named: out / "report.html")
        warnings.simplefilter("ignore", CollapseWarning)  # six steps are no fit
        running.run(model, settings={**SMALL, **settings}, out=out, progress=False)
    jax.clear_caches()  # each program is another, and a process may hold so many compiled functions only


def test_runs_are_read_back_whole(runs):
    """Learned parameters and global sites come back; the posterior holds what the prior says."""
    mixing, hierarchy = (running.open_run(runs[name]).program for name in ("mixing", "hierarchy"))
    assert set(mixing.prior_params) == {"loc", "log_scale"}
    assert set(hierarchy.prior_params) == {"scale$loc", "scale$log_scale"}
    for program, start in ((mixing, 0.0), (hierarchy, 0.0)):
        assert any(not np.allclose(value, start) for value in program.prior_params.values())
    tree = xr.open_datatree(runs["hierarchy"] / "posterior.nc", engine="h5netcdf")
    assert tree["posterior"]["scale"].dims == ("chain", "draw", "factor")
    assert "Shared by all observations" in (runs["hierarchy"] / "report.html").read_text()


def test_every_factor_stays_on_its_support(runs):
    """Draws of posterior and prior of a program with a site of every kind, after whatever fit."""
    laws = load_file(find("supports", "models")).prior.laws
    tree = xr.open_datatree(runs["supports"] / "posterior.nc", engine="h5netcdf").load()
    for group in ("posterior", "prior"):
        for name, law in laws.items():
            value = tree[group][name].values
            assert value.shape == (1, 8, 4, *law.event_shape), name
            assert np.all(law.support(value)), name
            assert value.std() > 0.01, name
    assert not np.all(laws["share"].support(tree["posterior"]["rate"].values)), "or all would pass"


def test_discrete_sites_come_back(runs):
    """A kind summed over is an integer in the posterior; a relaxed one a point of the simplex."""
    tree = xr.open_datatree(runs["shapes"] / "posterior.nc", engine="h5netcdf")
    assert set(np.unique(tree["posterior"]["kind"])) <= {0, 1, 2}
    relaxed = xr.open_datatree(runs["relaxed"] / "posterior.nc", engine="h5netcdf")["posterior"]["kind"]
    assert relaxed.dims == ("chain", "draw", "obs", "shape")
    np.testing.assert_allclose(relaxed.sum("shape"), 1, atol=1e-5)
    metrics = json.loads((runs["shapes"] / "metrics.json").read_text())
    assert -1 <= metrics["clusters"]["shape"]["sami[kind]"] <= 1
    relaxed_metrics = json.loads((runs["relaxed"] / "metrics.json").read_text())
    assert list(relaxed_metrics["probes"]) == ["shape"], "no labels, which it would not take"


def test_causal_program_comes_back(runs):
    """Its sites, and the coefficients that it learns, which have moved."""
    program = running.open_run(runs["cause"]).program
    assert len(program.latents.sites) == 3
    assert any(np.abs(np.asarray(value)).max() > 0 for value in program.prior_params.values())


def test_rotation_comes_back(runs):
    """R has moved, and is saved with the program."""
    encoder = running.open_run(runs["turned"]).program.encoder
    assert isinstance(encoder, TurningEncoder)
    assert 1e-5 < np.abs(np.asarray(encoder.linear()) - np.eye(3)).max() < 0.1


def test_directions_come_back(runs):
    """Angles in [−π, π), each scored against its own factor; unit vectors in space."""
    torus, sphere = (
        xr.open_datatree(runs[name] / "posterior.nc", engine="h5netcdf")["posterior"] for name in ("torus", "sphere")
    )
    assert np.abs(torus["bar"]).max() <= np.pi
    assert torus["ramp"].std() > 0.1
    assert sphere["light"].dims == ("chain", "draw", "obs", "component")
    np.testing.assert_allclose(np.linalg.norm(sphere["light"], axis=-1), 1, atol=1e-5)
    metrics = json.loads((runs["torus"] / "metrics.json").read_text())
    assert set(metrics["circular_corr"]) == set(metrics["circular_corr"]["bar"]) == {"bar", "ramp"}
    metrics = json.loads((runs["sphere"] / "metrics.json").read_text())
    assert set(metrics["linear_r2"]) == {"light_x", "light_y", "light_z"}


def test_evidence_of_a_conditional_prior(runs):
    """`sami evidence` takes u from the run's data, and the factors are scored one axis each."""
    assert "bound" in evidence_run(runs["mixing"], limit=20, levels=4, weighted=2, draws=32)
    metrics = json.loads((runs["mixing"] / "metrics.json").read_text())
    assert 0 <= metrics["mean_correlation"] <= 1
    assert "u" not in metrics.get("probes", {}), "what the prior is told is no class to be found"


def test_clips_with_missing_frames(tmp_path):
    """A run of a program of sequences: fitted, saved, read back; its frames are scored and drawn by themselves."""
    out = tmp_path / "moving"
    clips = {"observations": "60", "frames": "4", "missing": "0.2", "resolution": "8", "warm_steps": "2"}
    run("moving_disks", clips | {"denoiser.batch": "8", "encoder.batch": "8"}, out, report=True)
    found = running.open_run(out)
    assert found.program.event_shape == (4, 1, 8, 8)
    assert np.isnan(found.data["x"]).any()
    assert not np.allclose(found.program.prior_params["log_lengthscale"], np.log(10.0))
    tree = xr.open_datatree(out / "posterior.nc", engine="h5netcdf")
    assert tree["posterior"]["z"].dims == ("chain", "draw", "obs", "time", "factor")
    assert np.isfinite(tree["posterior"]["z"]).all()
    metrics = json.loads((out / "metrics.json").read_text())
    assert set(metrics["forest_r2"]) == {"centre_x", "centre_y", "background"}
    assert np.isfinite(metrics["sequences"]["bound_nats"]["mean"])
    assert (out / "figures" / "reconstructions.png").exists()


def test_digits_with_some_labels():
    """Labels of training images only, of about the share asked for; the prior is a mixture that takes them."""
    module = load_file(find("digits", "models"))
    config = module.Config(prior="mixture", labelled=0.1, width=8, depth=1, clusters=3)
    data = module.load(config, key=jax.random.key(0))
    train, test = train_test(data)
    assert (test["label"] == -1).all()
    told = train["label"].values >= 0
    able = told[train["digit"].values < 3]
    assert abs(able.mean() - 0.1) < 4 * np.sqrt(0.09 / len(able)), "false alarm 6e-5"
    assert not told[train["digit"].values >= 3].any(), "there is no cluster for these classes"
    np.testing.assert_array_equal(train["label"].values[told], train["digit"].values[told])
    program = module.build(config, data, key=jax.random.key(1))
    assert program.latents.arguments == ("label",)
    assert program.latents.sites[0].components == 3
    assert set(np.unique(clusters(program, test.isel(obs=slice(64)))["z"])) <= {0, 1, 2}
