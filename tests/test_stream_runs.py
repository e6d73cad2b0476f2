"""`sami run --stream`: what an inference is given, and what figures are of."""

import numpy as np
import pytest
import xarray as xr

from sami_ppl._util.errors import UserError
from sami_ppl.data import Stream
from sami_ppl.runs import reading
from sami_ppl.runs import run as running

INFERENCE = '''
"""Says what it was given."""
from dataclasses import dataclass

from sami_ppl.data import check_data, train_test


@dataclass(frozen=True)
class Config:
    posterior_obs: int = 3
    draws: int = 2


def run(program, data, config, *, key, out, resume=False, progress=True):
    parts = train_test(check_data(data))
    (out / "seen.txt").write_text(f"{type(data).__name__} {len(parts[0])} {len(parts[1])}")
    return program
'''


@pytest.fixture
def store(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (50, 1, 6, 6), dtype=np.uint8)
    data = xr.Dataset({"x": (("obs", "channel", "row", "column"), x), "size": ("obs", np.arange(50.0))})
    data.to_zarr(tmp_path / "images.zarr", encoding={"x": {"chunks": (8, 1, 6, 6)}}, consolidated=False)
    return tmp_path / "images.zarr"


@pytest.mark.slow
def test_the_fit_is_given_the_stream_and_figures_some_of_it(store, tmp_path, monkeypatch):
    """Everything after the fit sees a Dataset of both parts; the finished run is opened in the same way."""
    file, figures = tmp_path / "tells.py", []
    file.write_text(INFERENCE)
    monkeypatch.setattr(running, "_saved_posterior", lambda program, out, *, data, draws, key: (program, data))
    monkeypatch.setattr(running, "save_tree", lambda tree, path: None)
    monkeypatch.setattr(running, "load", lambda path: None)
    monkeypatch.setattr(running, "evaluate", lambda program, data, **more: figures.append(data) or {"seconds": {}})
    monkeypatch.setattr(running, "report", lambda out, *, data, progress: figures.append(data))
    _, shown = running.run(
        "images", str(file), data=store, stream=True, settings={"network": "mlp"}, out=tmp_path / "run", progress=False
    )
    assert (tmp_path / "run" / "seen.txt").read_text() == "Stream 40 10"
    given = figures[0]
    assert isinstance(given, xr.Dataset)
    assert {*given["split"].values} == {"train", "test"}
    assert given.sizes["obs"] == 50
    assert sorted(given["obs"].values) == list(range(50))
    assert figures[1] is given
    assert shown.sizes["obs"] == 3
    assert {*shown["split"].values} == {"test"}


def test_what_is_loaded_is_a_stream_in_two_parts(store):
    key = running.jax.random.key(0)
    found = reading.run_data(None, None, store, {"stream": True}, key=key)
    assert isinstance(found, Stream)
    whole = reading.run_data(None, None, store, {}, key=key)
    np.testing.assert_array_equal(found.test, whole["split"].values == "test")


def test_options_of_a_stream_are_checked(store, tmp_path):
    with pytest.raises(UserError, match="and stream= say how data= is read: give data= too"):
        running.run("images", stream=True, out=tmp_path / "run")
    np.savez(tmp_path / "a.npz", x=np.zeros((4, 3)))
    with pytest.raises(UserError, match=r"a.npz \(.npz\) can be read only as a whole"):
        reading.run_data(None, None, tmp_path / "a.npz", {"stream": True}, key=running.jax.random.key(0))
