"""`sami evidence`: figures of the evidence beside the truth, and messages for what does not fit."""

import json
import shutil
import warnings

import numpy as np
import pytest
import xarray as xr

from sami_ppl.diagnostics import CollapseWarning
from sami_ppl.runs import run as running
from sami_ppl.runs.evidence import evidence_run, table
from sami_ppl.saving.files import UserError

SETTINGS = {
    "observations": "200", "width": "8", "depth": "1", "posterior_obs": "3", "draws": "4", "warm_steps": "0",
    "denoiser.steps": "4", "denoiser.batch": "16", "encoder.steps": "4", "encoder.batch": "16",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "linear"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CollapseWarning)  # four steps are no fit
        running.run("linear_gaussian", settings=SETTINGS, out=out, progress=False)
    return out


@pytest.mark.slow
def test_figures_add_up_and_stand_beside_the_truth(folder):
    """Parts sum to the bound; the exact evidence is that of the program file's law; the table tells both."""
    text = evidence_run(folder, limit=24, levels=8, draws=32, weighted=4, flow=2)
    figures = json.loads((folder / "evidence.json").read_text())
    parts = sum(figures[name]["mean"] for name in ("prior", "diffusion", "reconstruction", "kl[z]"))
    assert parts == pytest.approx(figures["bound"]["mean"], rel=1e-5)
    assert figures["observations"] == 24
    with xr.open_datatree(folder / "evidence.nc", engine="h5netcdf") as tree:
        assert set(tree.children) == {"bound", "importance_weighted", "flow", "information", "exact"}
        excess = tree["bound"]["bound"].values - tree["exact"]["negative_log_evidence"].values
        assert tree["importance_weighted"]["bound"].sizes == {"obs": 4, "particles": 6}
    assert figures["exact"]["excess"]["mean"] == pytest.approx(excess.mean(), rel=1e-5)
    # The law of the data is N(0, WWᵀ + noise): its evidence is near its entropy.
    variances = np.concatenate([np.array([4.0, 1.0]) + 0.25, np.full(6, 0.25)])
    entropy = 0.5 * np.sum(np.log(2 * np.pi * np.e * variances))
    assert figures["exact"]["negative_log_evidence"]["mean"] == pytest.approx(entropy, abs=4 * np.sqrt(4.0 / 24))
    for words in ("24 observations", "exact −log p(x)", "another model", "Pareto", "information in z"):
        assert words in text
    assert text == table(figures)


@pytest.mark.slow
def test_own_data_and_mistakes(folder, tmp_path):
    """Other observations are taken whole; unfinished folders, wrong shapes and counts are refused by name."""
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "mine.npz", x=rng.normal(size=(5, 8)).astype(np.float32))
    np.savez(tmp_path / "wrong.npz", x=rng.normal(size=(5, 7)).astype(np.float32))
    own = lambda: [path.read_bytes() for path in sorted(folder.glob("evidence.*"))]  # noqa: E731
    before = own()
    text = evidence_run(folder, data=tmp_path / "mine.npz", levels=4, weighted=0)
    assert "5 observations" in text
    assert json.loads((folder / "evidence_mine.json").read_text())["observations"] == 5
    assert own() == before, "the report shows what the run's own observations gave"
    assert "exact" in text
    fitted_to_mine = tmp_path / "mine"
    shutil.copytree(folder, fitted_to_mine)
    description = json.loads((folder / "config.json").read_text())
    (fitted_to_mine / "config.json").write_text(json.dumps(description | {"data": str(tmp_path / "mine.npz")}))
    assert "exact" not in evidence_run(fitted_to_mine, levels=4, weighted=0), "the program file's law is not that of x"
    assert "importance-weighted" not in text
    with pytest.raises(UserError, match="8"):
        evidence_run(folder, data=tmp_path / "wrong.npz")
    with pytest.raises(UserError, match=r"is no finished run .*give the folder"):
        evidence_run(tmp_path)
    with pytest.raises(UserError, match="limit=1: must be at least 2"):
        evidence_run(folder, limit=1)
