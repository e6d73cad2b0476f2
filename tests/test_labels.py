"""Labels that a prior gives to its factors come back, in its own order, wherever axes are shown."""

from types import SimpleNamespace

import jax
from matplotlib.text import Text
import numpy as np
import numpyro
from numpyro import distributions as dist
import pytest
import xarray as xr

import sami_ppl as sp
from sami_ppl import plots
from sami_ppl._util.history import History, summary_line
from sami_ppl.refinement.result import result
from sami_ppl.runs.report.tables import _global_values

LABELS = ["weight", "angle"]
RECORD = {"step": 1, "loss": 1.0, "bound": 2.0, "kl": {"style": [0.5, 0.25], "size": [1.0]}, "unguided": [3.0]}


@pytest.fixture(scope="module")
def prior():
    return sp.factors(style=dist.Normal(0, 1).expand([2]), coords={"style_axis": LABELS})


def test_bars_and_curves_have_labels(tmp_path):
    """From the log's file too; a site of many axes has numbers alone on the bar, for want of room."""
    history = History(tmp_path / "log.jsonl", axes={"style": ("style[weight]", "style[angle]")})
    for step in (1, 2):
        history.add(RECORD | {"step": step})
    record = History(tmp_path / "log.jsonl", keep=2).records[-1]
    assert "kl style weight 0.50 angle 0.25, size 1.00" in summary_line(record)
    written = {text.get_text() for panel in history.plot().axes for text in panel.texts}
    assert {"style[weight]", "style[angle]"} <= written
    assert "kl style 0.50 0.25, size 1.00" in summary_line(RECORD)
    many = {"kl": {"z": np.ones(8)}, "axes": {"z": [f"z[{name}]" for name in "abcdefgh"]}}
    assert "kl z 1.00 1.00" in summary_line(RECORD | many)


def test_a_dollar_in_a_name_is_a_dollar():
    """Such a name was no formula, and no picture of a fit that had taken hours; powers on axes still are formulas."""
    figure = plots.kl_bars({"$x_{$": 1.0, "cost $5 or $6": 0.2})
    figure.axes[0].set_xscale("log")
    figure.draw_without_rendering()
    told = {text.get_text(): text.get_parse_math() for text in figure.findobj(Text) if "$" in text.get_text()}
    assert told.pop("$x_{$") is told.pop("cost $5 or $6") is False
    assert told
    assert all(told.values())


@pytest.mark.slow
def test_trees_of_interventions_have_labels(tiny_program, prior):
    found = sp.intervene(tiny_program(prior), {}, key=jax.random.key(0), size=2)
    assert found["style_axis"].values.tolist() == LABELS


@pytest.mark.slow
def test_trees_of_refinements_have_labels(tiny_program, prior):
    rng = np.random.default_rng(0)
    x, codes = rng.standard_normal((1, 4)).astype(np.float32), rng.standard_normal((1, 6, 1, 2))
    tree = result(tiny_program(prior), x, codes, codes, key=jax.random.key(0), levels=2)
    for group in ("posterior", "amortised"):
        assert tree[group]["style_axis"].values.tolist() == LABELS
    assert tree["agreement"]["axis"].values.tolist() == ["style[weight]", "style[angle]"]


@pytest.mark.slow
def test_global_sites_of_a_report_have_labels():
    def prior(obs):
        infer = {"event_dims": ["factor"], "coords": {"factor": LABELS}}
        scale = numpyro.sample("scale", dist.HalfNormal(1).expand([2]).to_event(1), infer=infer)
        with obs:
            numpyro.sample("z", dist.Normal(0, scale).to_event(1), infer=infer)

    draws = xr.Dataset({"scale": (("chain", "draw", "factor"), np.ones((1, 3, 2)))})
    shown = _global_values(SimpleNamespace(latents=sp.read_prior(prior)), {"posterior": draws})
    assert shown.index("scale[weight]") < shown.index("scale[angle]")
