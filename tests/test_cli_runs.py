"""Whole runs by the command line: what every inference leaves, and decoders in one table."""

import json

from commands import SMALL, refused, sets, stages
import equinox as eqx
import numpy as np
import pytest
import xarray as xr

from sami_ppl.saving import files as programs
from sami_ppl.saving import save as io

pytestmark = pytest.mark.filterwarnings("ignore:Cyclopts application invoked without tokens")


RUNS = {
    "two_stage": [*stages("denoiser", "encoder"), "warm_steps=2", "align=True"],
    "decoupled": stages("both"),
    "joint": stages("both"),
    "vae": [*stages("both"), "decoder=gaussian"],
    "pretrained": [*stages("encoder"), "warm_steps=0"],
    "prior": [*stages("fit"), "prior=flow"],
}
# What they leave as it was fitted.
REUSING = {"pretrained": ("denoiser",), "prior": ("denoiser", "encoder")}
DOCUMENTED = [
    "checkpoints",
    "config.json",
    "figures",
    "log.jsonl",
    "metrics.json",
    "model",
    "posterior.nc",
    "report.html",
]


def small_posterior(tree):
    return tree["posterior"].dataset["z"].values


@pytest.mark.slow
@pytest.mark.release
# Two steps teach nothing, which is said; some measures of constant codes are not defined.
@pytest.mark.filterwarnings("ignore")
def test_every_inference_leaves_what_is_documented(sami, tmp_path):
    assert sorted(RUNS) == sorted(programs.list_files("inference")), "a new inference needs its settings here"
    saved = None
    for name, settings in RUNS.items():
        if name == "pretrained":
            settings = [*settings, f"inference.denoiser={saved}"]
        if name == "prior":
            settings = [*settings, f"inference.program={saved}"]
        seed = "1" if name in REUSING else "0"
        command = ["run", "disks", "--with", name, "--out", name, "--quiet", "--seed", seed, *sets(*SMALL, *settings)]
        code, out, err = sami(*command)
        assert code == 0, err
        folder = tmp_path / name
        assert set(DOCUMENTED) <= {p.name for p in folder.iterdir()}
        assert {p.name for p in folder.iterdir()} <= {*DOCUMENTED, "tensorboard"}
        assert f"report: {name}/report.html" in out
        assert "KL per axis" in out
        metrics = json.loads((folder / "metrics.json").read_text())
        assert np.isfinite(metrics["bound_nats"]["mean"])
        assert metrics["seconds"].keys() >= {"fit", "report", "total"}
        tree = xr.open_datatree(folder / "posterior.nc", engine="h5netcdf").load()
        assert small_posterior(tree).shape == (1, 4, 3, 3)
        program = io.load(folder / "model")
        assert program.event_shape == (1, 8, 8)
        for part in REUSING.get(name, ()):
            # Of other data, whose mean and standard deviation are others.
            assert eqx.tree_equal(getattr(program, part), getattr(io.load(saved), part))
        steps = [(r["stage"], r["step"]) for r in map(json.loads, (folder / "log.jsonl").read_text().splitlines())]
        assert steps == [(stage, 2) for stage in dict.fromkeys(s.split(".")[0] for s in settings if ".steps" in s)]
        if name == "two_stage":
            saved = folder / "model"
            again = sami(*command, "--resume")
            assert again[0] == 0, again[2]
            redrawn = xr.open_datatree(folder / "posterior.nc", engine="h5netcdf").load()
            assert np.array_equal(small_posterior(tree), small_posterior(redrawn))
            assert len((folder / "log.jsonl").read_text().splitlines()) == 2
            (folder / "report.html").unlink()
            code, out, err = sami("report", name)
            assert code == 0, err
            assert (folder / "report.html").exists()


@pytest.mark.slow
@pytest.mark.release
@pytest.mark.filterwarnings("ignore")
def test_three_decoders_make_one_table(sami, tmp_path):
    """One setting swaps the likelihood, and with it the inference; what it does not allow is left out by name."""
    settings = {
        "guided": [*stages("denoiser", "encoder"), "warm_steps=2"],
        "conditioned": [*stages("both")], "gaussian": [*stages("both")],
    }  # fmt: skip
    for name, own in settings.items():
        command = ["run", "disks", "--out", name, "--quiet", *sets(*SMALL, *own, f"decoder={name}")]
        code, _, err = sami(*command)
        assert code == 0, err
        page = (tmp_path / name / "report.html").read_text()
        assert ("need a guided decoder" in page) == (name != "guided")
        assert ("Samples without a code" in page) == (name != "gaussian")
        code, out, err = sami("evidence", name, "--limit", 4, "--levels", 2, "--weighted", 0)
        assert code == 0, err
        assert ("needs a guided decoder" in out) == (name != "guided")
    code, out, err = sami("compare", *settings, "--limit", 4, "--levels", 2)
    assert code == 0, err
    assert all(name in out for name in settings)
    for command in (["run", "disks", "--with", "two_stage"], ["run", "disks", "--with", "decoupled"]):
        said = refused(sami(*command, "--out", "no", "--quiet", *sets(*SMALL, "decoder=gaussian")))
        assert "needs a guided decoder" in said
        assert not (tmp_path / "no").exists()
