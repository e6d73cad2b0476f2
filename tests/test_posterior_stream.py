"""Posteriors streamed to a zarr store: the tree that is held in memory, in memory that does not grow."""

import tracemalloc

import jax
import numpy as np
import pandas as pd
import pytest
import xarray as xr
import zarr

from sami_ppl.posteriors import amortised, posterior
from sami_ppl.posteriors.tree import check_labels

RNG = np.random.default_rng(0)
OPTIONS = {"key": jax.random.key(0), "draws": 4, "predictive": 1, "levels": 1, "chunk": 4}


def dataset(count):
    x = RNG.normal(size=(count, 4)).astype(np.float32)
    variables = {"x": (("obs", "feature"), x), "height": ("obs", np.arange(count) / 2)}
    return xr.Dataset(variables, coords={"obs": [f"image {i}" for i in range(count)]})


@pytest.fixture(scope="module")
def cache():
    return {}


@pytest.fixture
def program(cache, tiny_program):
    return cache.setdefault("program", tiny_program())


@pytest.mark.slow
def test_the_store_is_the_tree_in_memory(program, tmp_path):
    """Three chunks, the last one short; values, names and attributes; the data from a store with chunks of its own."""
    data = dataset(10)
    data.to_zarr(tmp_path / "x.zarr", consolidated=False, encoding={"x": {"chunks": (7, 4)}})
    settings = {**OPTIONS, "attrs": {"steps": [1, 2], "early": None}}
    streamed = posterior(program, tmp_path / "x.zarr", out=tmp_path / "tree.zarr", **settings)
    assert type(streamed["posterior"]["z"].variable._data).__name__ != "ndarray", "it is not read"
    assert zarr.open_group(tmp_path / "tree.zarr")["posterior/z"].chunks == (1, 4, 4, 2)
    xr.testing.assert_identical(streamed.load(), posterior(program, data, **settings))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["tree.zarr", "x.zarr"]


@pytest.mark.slow
def test_an_interruption_leaves_no_store_and_does_no_harm(program, tmp_path):
    data = dataset(10)
    data["x"][6, 0] = np.nan
    with pytest.raises(ValueError, match="NaN at observation 6"):
        posterior(program, data, out=tmp_path / "tree.zarr", **OPTIONS)
    assert not list(tmp_path.iterdir())
    tree = posterior(program, data.isel(obs=slice(5)), out=tmp_path / "tree.zarr", **OPTIONS)
    assert tree["posterior"].sizes["obs"] == 5
    assert [file.name for file in tmp_path.iterdir()] == ["tree.zarr"]


def test_mistakes(program, tmp_path):
    out = tmp_path / "tree.zarr"
    narrow = dataset(3).isel(feature=slice(3))
    cases = {
        "no out": ({"data": "x.zarr"}, ValueError, r'x.zarr, and out is not given: write .*load_data\("x.zarr"\)'),
        "no data": ({"data": tmp_path / "no.zarr", "out": out}, FileNotFoundError, "no data at .*no.zarr"),
        "suffix": ({"out": tmp_path / "tree.nc"}, ValueError, r'must end in .zarr.*write out="tree.zarr"'),
        "there": ({"out": tmp_path / "there.zarr"}, FileExistsError, "there.zarr exists and is not overwritten"),
        "array": ({"data": np.zeros((3, 4)), "out": out}, TypeError, "a path or an xarray.Dataset .*, got ndarray"),
        "shape": ({"data": narrow, "out": out}, ValueError, r"shape \(3,\), expected event_shape \(4,\)"),
    }
    (tmp_path / "there.zarr").mkdir()
    for arguments, error, message in cases.values():
        with pytest.raises(error, match=message):
            posterior(program, **{**OPTIONS, "data": dataset(3), **arguments})
    assert not out.exists()


def peak(function, *arguments, **options):
    """Bytes that Python and NumPy held at most during a call."""
    tracemalloc.start()
    try:
        function(*arguments, **options)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.slow
@pytest.mark.release
def test_memory_does_not_grow_with_the_observations(program, tmp_path):
    settings = {**OPTIONS, "draws": 50, "predictive": 0, "levels": 0, "chunk": 1000}
    found = []
    for i, count in enumerate((500, 2_000, 20_000)):  # the first call of all pays for imports and compilation
        data = dataset(count).drop_vars("obs")
        data.to_zarr(tmp_path / f"{i}.zarr", consolidated=False, encoding={"x": {"chunks": (1000, 4)}})
        streamed = peak(posterior, program, tmp_path / f"{i}.zarr", out=tmp_path / f"tree{i}.zarr", **settings)
        found.append((streamed, peak(posterior, program, data, **settings)))
    (_, _), (small, small_whole), (large, large_whole) = found
    more = 18_000 * 50 * 6 * 4  # posterior, prior and code alone
    assert large - small < 0.1 * more, f"{small} {large}"
    assert large_whole - small_whole > more, "the control holds everything, and that is seen"


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["h", "m"])
def test_dates_keep_to_the_minute_what_chunk_they_are_in(program, tmp_path, unit):
    """The first chunk is of whole days, by which a store would count; the next ones are not."""
    start, later = np.datetime64("2024-03-01", "ns"), np.timedelta64(95, "m")
    dates = np.concatenate([start + np.arange(4) * np.timedelta64(1, "D"), start + np.arange(1, 9) * later])
    data = dataset(12).assign_coords(obs=dates)
    data = data.assign(taken=("obs", dates), lasted=("obs", dates - start + np.timedelta64(1, unit)))
    options = OPTIONS | {"draws": 1, "predictive": 0, "levels": 0}
    tree = posterior(program, data, out=tmp_path / "tree.zarr", **options)
    assert np.array_equal(tree["posterior"]["obs"], dates)
    assert np.array_equal(tree["constant_data"]["taken"], dates)
    assert np.array_equal(tree["constant_data"]["lasted"].values.astype("m8[ns]"), data["lasted"])


def test_labels_that_no_file_holds_are_refused_before_the_first_draw(program, tmp_path, monkeypatch):
    monkeypatch.setattr(amortised, "Sampler", lambda *a, **k: pytest.fail("must not be reached"))
    data, out = dataset(4), tmp_path / "tree.zarr"
    pairs = [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    several = pd.MultiIndex.from_tuples(pairs, names=("subject", "visit"))
    several = data.drop_vars("obs").assign_coords(xr.Coordinates.from_pandas_multiindex(several, "obs"))
    mixed = data.assign(mixed=("obs", np.array(["a", 1, None, {}], dtype=object)))
    for given, message in (
        (several, r"obs is a MultiIndex.*write data.reset_index\('obs'\).reset_coords\(\)"),
        (mixed, r"'mixed', of type object, cannot be written to zarr .*data.drop_vars\('mixed'\)"),
        (data.assign_coords(obs=mixed["mixed"].values), r"'obs', of type object, cannot be written to zarr"),
    ):
        with pytest.raises(ValueError, match=message):
            posterior(program, given, out=out, **OPTIONS)
    check_labels(several.reset_index("obs").reset_coords())
    with pytest.raises(ValueError, match=r"'mixed', of type object, cannot be written to netCDF"):
        check_labels(mixed)
