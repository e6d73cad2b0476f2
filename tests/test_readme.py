"""The README's code runs as it stands, with fewer steps and observations."""

import os
from pathlib import Path
import re

import arviz as az
import pytest

from sami_ppl.fitting import sizes as fit_sizes

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.slow
@pytest.mark.release
def test_python_example_runs(tmp_path, monkeypatch):
    """At most eight lines from the first import to the forest plot: what a newcomer copies first."""
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 8
    assert lines[0].startswith("import")
    assert lines[-1].startswith("az.plot_forest")
    small = code.replace("20_000", "300")
    assert small != code
    counted = []
    monkeypatch.setattr(fit_sizes, "_steps", lambda *sizes: counted.append(sizes) or 4)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(az.rcParams, "plot.backend", "none")
    names: dict = {}
    exec(compile(small, str(README), "exec"), names)
    assert counted, "the steps were not made fewer: this would take minutes"
    assert set(names["tree"]["posterior"].data_vars) == {"place", "light"}
    assert names["tree"]["posterior"]["place"].dims == ("chain", "draw", "obs", "place_axis")
    assert [record["stage"] for record in names["history"].records] == ["denoiser", "encoder"]
    assert not os.listdir(tmp_path)
