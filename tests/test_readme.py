"""The README's code runs as it stands, with fewer steps and observations."""

import os
from pathlib import Path
import re

import arviz as az
import pytest

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.slow
def test_python_example_runs(tmp_path, monkeypatch):
    """25 lines compose a prior, fit, and plot: what a newcomer copies first."""
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 30
    small = re.sub(r"steps=\d+", "steps=4", code)
    small = small.replace("20_000", "700").replace("batch=256", "batch=64")
    assert small.count("steps=4") == 3
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(az.rcParams, "plot.backend", "none")
    names: dict = {}
    exec(compile(small, str(README), "exec"), names)
    assert set(names["tree"]["posterior"].data_vars) == {"place", "light"}
    assert (tmp_path / "disks_with_a_box" / "program.json").exists()
    assert os.listdir(tmp_path) == ["disks_with_a_box"]
