"""Comparing fits: differences and their paired errors, and messages for what cannot be compared."""

import json
import shutil

import jax
import numpy as np
import numpyro
import pytest
import xarray as xr

from sami_ppl import Matern, over_time
from sami_ppl.evidence import evidence_bound
from sami_ppl.evidence.compare import compare, held_out_evidence
from sami_ppl.runs import run as running
from sami_ppl.runs.compare import compare_runs
from sami_ppl.saving.files import UserError


@pytest.mark.slow
def test_difference_is_that_of_the_bounds_and_its_error_is_paired(tiny_program, fill):
    """Two programs, the same noise: `elpd_diff` is the summed difference, `dse` its paired standard error."""
    good = tiny_program()
    bad = good.replace(denoiser=fill(good.denoiser, 0.05))
    x = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    key = jax.random.key(3)
    table = compare({"good": good, "bad": bad}, x, key=key, levels=4)
    each = {name: held_out_evidence(p, x, key=key, levels=4).elpd_i.values for name, p in (("g", good), ("b", bad))}
    difference = each["g"] - each["b"]
    best, worst = table.index
    assert best == ("good" if difference.sum() > 0 else "bad")
    assert abs(table.loc[worst, "elpd_diff"]) == pytest.approx(abs(difference.sum()), rel=1e-5)
    assert table.loc[worst, "dse"] == pytest.approx(difference.std() * 64**0.5, rel=0.02)
    assert table.loc[worst, "dse"] < 0.8 * np.hypot(*(e.std() * 64**0.5 for e in each.values())), "paired"


@pytest.mark.slow
def test_evidence_is_minus_the_bound(tiny_program):
    program, x = tiny_program(), np.zeros((8, 4), np.float32)
    found = held_out_evidence(program, x, key=jax.random.key(0), levels=4)
    assert found.n_data_points == 8
    assert found.elpd == pytest.approx(float(found.elpd_i.sum()))
    bound = evidence_bound(program, x, key=jax.random.key(7), levels=64)["bound"]
    assert found.elpd / 8 == pytest.approx(-float(bound.mean()), abs=6 * float(bound.std()) / 8**0.5 + 3)


def smooth():
    numpyro.sample("z", Matern(np.arange(4.0), np.full(2, 3.0)))


@pytest.mark.slow
def test_programs_may_have_data_sets_of_the_same_observations(tiny_program, fill):
    """Each is scored on its own variables; frames that are missing in both are no difference."""
    program, key = tiny_program(), jax.random.key(0)
    other = program.replace(encoder=fill(program.encoder))
    x = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    own = {"a": xr.Dataset({"x": (("obs", "feature"), x)}), "b": xr.Dataset({"x": (("obs", "feature"), x)})}
    own["b"]["label"] = ("obs", np.zeros(8))
    both = {"a": program, "b": other}
    assert compare(both, own, key=key, levels=4).equals(compare(both, x, key=key, levels=4))
    with pytest.raises(ValueError, match="a, b are compared on one set of observations"):
        compare(both, own | {"b": own["b"] + 1}, key=key, levels=4)
    clips, frames = over_time(program, smooth), x.reshape(2, 4, 4).copy()
    frames[1, 2] = np.nan
    clip = xr.Dataset({"x": (("obs", "time", "feature"), frames)})
    table = compare({"a": clips, "b": clips}, {"a": clip, "b": clip.copy(deep=True)}, key=key, levels=4)
    assert np.allclose(table["elpd_diff"], 0)


@pytest.mark.slow
def test_what_cannot_be_compared(tiny_program):
    program = tiny_program()
    with pytest.raises(ValueError, match="at least two programs, got 1"):
        compare({"a": program}, np.zeros((8, 4), np.float32), key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"x must have shape \(obs, 4\)"):
        compare({"a": program, "b": program}, np.zeros((8, 3), np.float32), key=jax.random.key(0))
    with pytest.raises(UserError, match="at least two folders"):
        compare_runs(["runs/a"])
    with pytest.raises(UserError, match="named twice"):
        compare_runs(["runs/a", "runs/a/"])


@pytest.mark.slow
@pytest.mark.release
@pytest.mark.filterwarnings("ignore::sami_ppl.diagnostics.CollapseWarning")
def test_runs_under_two_priors(tmp_path, monkeypatch):
    """Two priors of the disks, one denoiser: a table, a picture and figures; other data are refused."""
    small = {"observations": "100", "resolution": "8", "width": "8", "depth": "1", "posterior_obs": "3", "draws": "4",
             "warm_steps": "2", "encoder.steps": "2", "encoder.batch": "16"}  # fmt: skip
    first = small | {"denoiser.steps": "2", "denoiser.batch": "16"}
    running.run("disks", settings=first, out=tmp_path / "normal", progress=False)
    reuse = small | {"denoiser": str(tmp_path / "normal" / "model"), "prior": "uniform_box"}
    running.run("disks", "pretrained", settings=reuse, out=tmp_path / "box", progress=False)
    shutil.copytree(tmp_path / "normal", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"seed": 1}))

    folders = [tmp_path / "normal", tmp_path / "box"]
    text = compare_runs(folders, limit=12, levels=4, out=tmp_path / "comparison")
    assert "12 held-out observations" in text
    assert text.count("below the best") == 1
    rows = json.loads((tmp_path / "comparison" / "comparison.json").read_text())
    assert set(rows) == {str(folder) for folder in folders}
    assert (tmp_path / "comparison" / "comparison.png").stat().st_size > 5000
    with pytest.raises(UserError, match=r"fitted to other data than .*data=FILE"):
        compare_runs([tmp_path / "normal", tmp_path / "other"], limit=12, levels=4)
