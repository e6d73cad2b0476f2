"""Streams: what they read of every format, in what order, how often, and what they say of data that are damaged."""

import os
import shutil

import h5py
import jax
import numpy as np
from PIL import Image
import pytest
import xarray as xr

from sami_ppl.data import Source, Stream, StreamError, at_hand, check_data, load_data, open_stream, split, train_test
from sami_ppl.data import stream as streams

RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (60, 3, 4, 4), dtype=np.uint8)
KEY = jax.random.key(0)


class Rows:
    """A source that remembers what it was asked for."""

    def __init__(self, x):
        self.x, self.asked = x, []

    def __len__(self):
        return len(self.x)

    def rows(self, i):
        self.asked.append(i)
        return self.x[i]


def written(path, name):
    """The images in a format, with their numbers."""
    data = xr.Dataset({"x": (("obs", "channel", "row", "column"), X), "size": ("obs", np.arange(60.0))})
    file = path / name
    if name.endswith(".zarr"):
        data.to_zarr(file, encoding={"x": {"chunks": (8, 3, 2, 4)}}, consolidated=False)
    elif name.endswith(".nc"):
        data.to_netcdf(file, engine="h5netcdf", encoding={"x": {"chunksizes": (16, 3, 4, 4), "compression": "gzip"}})
    elif name.endswith(".h5"):
        with h5py.File(file, "w") as opened:
            opened.create_dataset("x", data=X, chunks=(7, 3, 4, 4))
            opened["size"] = np.arange(60.0)
    elif name.endswith(".npy"):
        np.save(file, X)
    else:
        for i, image in enumerate(X):
            folder = file / ("train", "test")[i % 5 == 0] / ("cat", "dog")[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{i:02d}.png")
    return file


@pytest.mark.parametrize("name", ["a.zarr", "a.nc", "a.h5", "a.npy", "photographs"])
def test_a_stream_holds_what_load_data_reads(name, tmp_path):
    """Values, factors and split; whole, and in parts that lie across chunks."""
    path = written(tmp_path, name)
    whole, stream = load_data(path), open_stream(path)
    if "obs" in whole.coords:  # mixed
        whole = whole.sortby("obs")
    assert len(stream) == 60
    for places in (np.arange(60), np.array([33, 2, 2, 59])):
        found = stream.rows(places)
        found = {"x": found} if isinstance(found, np.ndarray) else found
        expected = whole.isel(obs=places)
        assert {*found} == {*whole.data_vars}
        for variable in found:
            np.testing.assert_array_equal(found[variable], expected[variable])
    assert stream.is_split == ("split" in whole.coords)
    if stream.is_split:
        np.testing.assert_array_equal(train_test(stream)[1].index, np.flatnonzero(whole["split"].values == "test"))


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_table_is_streamed_too(kind, tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'sami_ppl[datasets]'")
    from io import BytesIO

    from pyarrow import parquet

    content = []
    for image in X:
        Image.fromarray(image.transpose(1, 2, 0)).save(file := BytesIO(), "png")
        content.append({"bytes": file.getvalue(), "path": None})
    names = [f"n{i}" for i in range(60)]
    table = pyarrow.table({"image": content, "size": pyarrow.array(np.arange(60.0)), "name": names})
    for part, rows in (("train", table.slice(0, 45)), ("test", table.slice(45))):
        if kind == "parquet":
            parquet.write_table(rows, tmp_path / f"{part}-00000-of-00001.parquet", row_group_size=8)
        else:
            (tmp_path / part).mkdir()
            (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
            (tmp_path / part / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
            file = str(tmp_path / part / "data.arrow")
            with pyarrow.OSFile(file, "wb") as sink, pyarrow.ipc.new_stream(sink, rows.schema) as writer:
                writer.write_table(rows, max_chunksize=10)
    whole, stream = load_data(tmp_path).sortby("obs"), open_stream(tmp_path)
    for places in (np.arange(60), np.array([50, 2, 2, 44])):
        found = stream.rows(places)
        for variable in ("x", "size", "name"):
            np.testing.assert_array_equal(found[variable], whole[variable].isel(obs=places))
    np.testing.assert_array_equal(stream.test, whole["split"].values == "test")


def test_any_object_with_rows_is_a_source():
    assert isinstance(Rows(X), Source)
    assert not isinstance(X, Source)
    assert not isinstance(xr.Dataset({"x": ("obs", [1.0])}), Source)


def chunked(chunk=10, rows=200, window=40, monkeypatch=None):
    source = Rows(np.arange(rows, dtype=np.float32)[:, None].repeat(2, 1))
    if monkeypatch is not None:
        monkeypatch.setattr(streams, "WINDOW", window * 8)  # bytes of a row
    return source, Stream(source, chunks=chunk)


def test_an_epoch_is_a_permutation_and_a_function_of_its_number(monkeypatch):
    for chunk in (1, 10, 7):
        _, stream = chunked(chunk, monkeypatch=monkeypatch)
        stream = stream.take(np.setdiff1d(np.arange(200), [3, 50, 199]))
        orders = [stream.order(5, epoch) for epoch in (0, 1, 0)]
        assert all(np.array_equal(np.sort(order), np.arange(197)) for order in orders)
        assert np.array_equal(orders[0], orders[2])
        assert not np.array_equal(orders[0], orders[1])


def test_rows_stored_singly_come_in_the_order_of_arrays():
    _, stream = chunked(1)
    np.testing.assert_array_equal(stream.order(3, 2), np.random.default_rng((3, 2)).permutation(200))


def test_parts_are_read_once_an_epoch_and_few_are_held(monkeypatch):
    """Every row comes at most a window after its part; so a window's parts are all that must be held."""
    source, stream = chunked(monkeypatch=monkeypatch)
    stream.hold_window(ahead=0)
    source.asked.clear()
    order = stream.order(0, 0)
    for start in range(0, 200, 4):
        stream.rows(order[start : start + 4])
    assert len(source.asked) == 20
    assert stream._reader.capacity < 10
    stream._reader.capacity = 2  # control
    stream._reader.held.clear()
    for start in range(0, 200, 4):
        stream.rows(order[start : start + 4])
    assert len(source.asked) > 40


def test_windows_mix_parts(monkeypatch):
    """Control of the above: rows of a batch come from several parts, not from one."""
    _, stream = chunked(monkeypatch=monkeypatch)
    order = stream.order(0, 0)
    assert np.mean([len(np.unique(order[i : i + 10] // 10)) for i in range(0, 200, 10)]) > 3


def test_shares_of_several_processes_have_no_part_in_common():
    _, stream = chunked()
    shares = [stream.share(i, 3) for i in range(3)]
    assert sorted(np.concatenate([share.index for share in shares])) == list(range(200))
    parts = [{*(share.index // 10)} for share in shares]
    assert sum(map(len, parts)) == 20
    assert Stream(Rows(X)).share(1, 3).index.tolist() == list(range(60)), "of single rows each reads its own of a batch"


def test_a_few_rows_from_all_over_stand_for_the_whole():
    source, stream = chunked(rows=2000)
    source.asked.clear()
    found = stream.some(100)
    assert found.shape == (100, 2)
    assert found[0, 0] < 20
    assert found[-1, 0] > 1980
    assert len(source.asked) <= streams.TOUCHED
    both = at_hand(split(stream, test=0.25, key=KEY), 100)
    assert sorted({*both["split"].values}) == ["test", "train"]
    assert at_hand(X) is X


def test_a_stream_is_split_as_data_in_memory_are():
    data = xr.Dataset({"x": (("obs", "feature"), np.eye(40, dtype=np.float32))})
    stream = split(Stream(Rows(np.eye(40, dtype=np.float32))), key=KEY)
    expected = train_test(split(data, key=KEY))
    for found, part in zip(train_test(stream), expected, strict=True):
        np.testing.assert_array_equal(found.rows(np.arange(len(found))), part.x)
    assert check_data(stream) is stream
    with pytest.raises(ValueError, match="no two parts: write stream = split"):
        train_test(Stream(Rows(X)))


# Mistakes and damage


def test_a_damaged_chunk_is_named_with_its_rows(tmp_path):
    path = written(tmp_path, "a.zarr")
    stream = open_stream(path)
    (path / "x" / "c" / "3" / "0" / "0" / "0").write_bytes(b"no chunk")
    stream.rows(np.arange(24))
    with pytest.raises(StreamError, match=r"rows 24 to 31 of a.zarr cannot be read: c/3/0/0/0 .* written to"):
        stream.rows(np.array([30]))
    with pytest.raises(StreamError, match=r"rows 24 to 31 of a.zarr cannot be read"):
        open_stream(path).rows(np.array([30]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: written(path.parent, "b.zarr").rename(path), "zarr.json in .* has been written to since"),
        (lambda path: None, "is gone since it was opened"),
    ],
)
def test_a_store_that_changes_is_refused(change, message, tmp_path):
    path = written(tmp_path, "a.zarr")
    stream = open_stream(path)
    stream.rows(np.arange(8))
    shutil.rmtree(path)
    change(path)
    with pytest.raises(StreamError, match=message):
        stream.rows(np.array([10]))


def test_a_file_that_changes_is_refused(tmp_path):
    path = written(tmp_path, "a.npy")
    stream = open_stream(path)
    os.utime(path, ns=(1, 1))
    with pytest.raises(StreamError, match=r"row 4 of a.npy cannot be read: a.npy in .* has been written to since"):
        stream.rows(np.array([4]))


def test_another_dtype_or_shape_in_the_middle_is_refused():
    class Mixed(Rows):
        def rows(self, i):
            found = super().rows(i)
            return found.astype(np.float64) if i[0] > 30 else found

    with pytest.raises(StreamError, match=r"rows 40 to 49 of Mixed have x of float64 .* row 0 has it of uint8"):
        Stream(Mixed(X), chunks=10).rows(np.array([41]))

    class Short(Rows):
        def rows(self, i):
            return super().rows(i)[: 1 if i[0] == 0 else -1]

    with pytest.raises(StreamError, match="another number of observations than the 2 of rows 5 to 6"):
        Stream(Short(X.astype(np.float32))).rows(np.array([5, 6]))


def test_images_that_cannot_be_read_are_named_or_left_out(tmp_path):
    path = written(tmp_path, "photographs")
    stream = open_stream(path)
    names = [str(name) for name in stream.rows(np.arange(60))["file"].values]
    (path / names[7]).write_bytes(b"no image")
    with pytest.raises(StreamError, match=f"row 7, {names[7]}: has been written to since"):
        stream.rows(np.array([6, 7]))
    with pytest.raises(ValueError, match=f"{names[7]} cannot be read as an image"):
        open_stream(path)  # all of a few are looked at
    with pytest.warns(UserWarning, match=f"1 of 60 images left out:\n{names[7]}"):
        kept = open_stream(path, skip_unreadable=True)
    assert len(kept) == 59
    np.testing.assert_array_equal(np.setdiff1d(np.arange(60), kept.index), [7])


def test_an_image_of_another_size_is_named(tmp_path, monkeypatch):
    path = written(tmp_path, "photographs")
    monkeypatch.setattr("sami_ppl.data.readers.images.GLANCES", 2)
    odd = sorted(path.glob("*/*/*.png"))[7]
    Image.fromarray(np.zeros((5, 9), np.uint8)).save(odd)
    with pytest.raises(StreamError, match=rf"row 7, .*{odd.name} is 9×5, gray, 8 bits, those looked at first are 4×4"):
        open_stream(path).rows(np.array([7]))
    assert open_stream(path, resize=4).rows(np.array([7]))["x"].shape == (1, 3, 4, 4)


def test_masks_are_told_by_what_is_looked_at_first():
    x = np.zeros((5000, 2, 2), np.uint8)
    x[::2] = 1
    found = Stream(Rows(x)).rows(np.arange(2))
    assert found.min() == -1
    assert found.max() == 1
    x[4330] = 200
    with pytest.raises(StreamError, match=r"row 4,330 of Rows has values above 1"):
        Stream(Rows(x)).rows(np.array([4329, 4330]))


def test_mistakes(tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", x=X)
    with pytest.raises(ValueError, match=r"a.npz \(.npz\) can be read only as a whole: .*to_zarr"):
        open_stream(tmp_path / "a.npz")
    (tmp_path / "clip.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match=r"clip.mp4 \(a video\) can be read only as a whole: leave stream= out"):
        open_stream(tmp_path / "clip.mp4")
    with pytest.raises(FileNotFoundError, match="no data at"):
        open_stream(tmp_path / "nothing.zarr")
    with pytest.raises(ValueError, match="resize=2: a stream of arrays is read as it is stored"):
        open_stream(written(tmp_path, "a.npy"), resize=2)
    with pytest.raises(ValueError, match="holds no observations"):
        Stream(Rows(X[:0]))
    with pytest.raises(ValueError, match="add up to the 60 rows of Rows"):
        Stream(Rows(X), chunks=[10, 20])
    monkeypatch.setattr(streams, "LARGEST_PART", 100)
    with pytest.raises(ValueError, match=r"stores 60 rows together, .* write it again in smaller parts"):
        Stream(Rows(X), chunks=60)
