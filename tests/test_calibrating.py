"""`sami calibrate`: the folder it leaves, the table it prints, and messages for what does not fit."""

import json
import sys

import arviz as az
import numpy as np
import pytest
import xarray as xr

from sami_ppl.runs import cli
from sami_ppl.runs.calibrate import calibrate_run
from sami_ppl.saving.files import UserError

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Cyclopts application invoked without tokens")]


def test_everything_is_written_and_said(exact_run, monkeypatch, capsys):
    arguments = ["--simulations", "60", "--draws", "20", "--limit", "30", "--weighted", "4", "--quiet"]
    monkeypatch.setattr(sys, "argv", ["sami", "calibrate", str(exact_run), *arguments])
    cli.main()
    text = capsys.readouterr().out
    for words in (
        "60 simulations",
        "z[1]",
        "joint",
        "factor_0",
        "30 observations beside 320 training ones",
        "Pareto",
        "disagree at 0 of 16 noise levels",
        "30 held-out observations",
        "samples: log_q",
    ):
        assert words in text
    where = exact_run / "calibration"
    names = {"calibration.json", "calibration.nc", "coverage.png", "ecdf_pit.png", "factors.png", "recovery.png",
             "predictive.nc", "predictive_pit.png"}  # fmt: skip
    assert {file.name for file in where.iterdir()} == names
    figures = json.loads((where / "calibration.json").read_text())
    assert figures["calibration"]["axis"] == ["z[0]", "z[1]", "joint"]
    assert figures["calibration"]["factor"][2] is None
    assert figures["observations"]["weighted"] == 4
    assert figures["predictive"]["check"][-1] == "codes"
    assert set(figures["predictive"]["verdict"]) == {"as it should be"}
    assert figures["consistency"]["flagged"] == [False] * 16
    metrics = json.loads((exact_run / "metrics.json").read_text())
    assert metrics["calibration"]["simulations"] == 60, "the verdict is of the longer calibration"
    report = (exact_run / "report.html").read_text()
    for words in ("60 simulations", "samples: distance", "Noisy posteriors beside the guide"):
        assert words in report
    with xr.open_datatree(where / "calibration.nc", engine="h5netcdf") as tree:
        assert tree["prior_sbc"]["code"].sizes == {"chain": 1, "draw": 60, "axis": 2}
        assert tree["observations"]["pareto_k"].notnull().sum() == 4
        az.plot_ecdf_pit(tree, backend="none")


def test_own_data_and_mistakes(exact_run, tmp_path):
    """Observations of another kind are odd beside the run's own; what does not fit is refused by name."""
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "mine.npz", x=(5 + rng.normal(size=(12, 8))).astype(np.float32))
    np.savez(tmp_path / "wrong.npz", x=rng.normal(size=(12, 7)).astype(np.float32))
    few = {"simulations": 20, "draws": 4, "weighted": 0}
    text = calibrate_run(exact_run, data=tmp_path / "mine.npz", **few)
    # Beside 80 observations no p-value is below 2/81: the level is that, not 1 %.
    assert "12 observations beside 80 held-out ones: the bounds of 12 are among the 2.5% most unusual; 0 would" in text
    assert "Pareto" not in text
    assert "no predictive checks: checks need at least 20 observations and 4 samples of each, got 12" in text
    with pytest.raises(UserError, match="8"):
        calibrate_run(exact_run, data=tmp_path / "wrong.npz", **few)
    with pytest.raises(UserError, match=r"is no finished run .*give the folder"):
        calibrate_run(tmp_path)
    for name, value in (("simulations", 0), ("draws", 1), ("limit", 1), ("weighted", -1)):
        with pytest.raises(UserError, match=f"{name}={value}: must be at least "):
            calibrate_run(exact_run, **{name: value})
