"""Parquet files and saved data sets with a column of images, written here as the library `datasets` writes them."""

import builtins
from io import BytesIO
import json

import numpy as np
from PIL import Image
import pytest

from sami_ppl.data import check_data, factor_names, load_data

RNG = np.random.default_rng(0)
CLASSES = ["cat", "dog", "big horse"]
WITHOUT = "needs pyarrow: pip install 'sami_ppl[datasets]'"


def png(level, side=4):
    """An image whose pixels tell its row."""
    Image.fromarray(np.full((side, side), level, np.uint8)).save(file := BytesIO(), "png")
    return file.getvalue()


@pytest.fixture
def pyarrow():
    pytest.importorskip("pyarrow.parquet", reason=WITHOUT)
    import pyarrow

    return pyarrow


@pytest.fixture
def rows(pyarrow):
    """`rows(first, count)`: a table of images with a class, a number, text, a truth and boxes."""

    def table(first, count):
        places = range(first, first + count)
        content = [{"bytes": png(i), "path": f"{i}.png"} for i in places]
        features = {"image": {"_type": "Image"}, "label": {"names": CLASSES, "_type": "ClassLabel"}}
        return pyarrow.table(
            {
                "image": content,
                "label": pyarrow.array([i % 3 for i in places]),
                "size": pyarrow.array([i / 2 for i in places], pyarrow.float32()),
                "name": [f"n{i}" for i in places],
                "ok": [i > 2 for i in places],
                "box": [[1, 2]] * count,
            }
        ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})

    return table


@pytest.fixture
def saved(pyarrow, rows):
    """`saved(folder, first, count)`: what `save_to_disk` makes of it, in two files."""

    def save(folder, first, count):
        folder.mkdir(parents=True)
        names = [f"data-{i:05d}-of-00002.arrow" for i in range(2)]
        for name, start, end in zip(names, (0, 2), (2, count), strict=True):
            table = rows(first + start, end - start)
            with pyarrow.ipc.new_stream(str(folder / name), table.schema) as writer:
                writer.write_table(table)
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
        (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))
        return folder

    return save


@pytest.fixture
def parquet(pyarrow, rows):
    """`parquet(file, first, count)`: the same in a parquet file."""
    from pyarrow.parquet import write_table

    def save(file, first, count):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_table(rows(first, count), file, row_group_size=2)
        return file

    return save


def check_rows(data, count):
    """Every factor is that of the row which the image tells, and `obs` too."""
    assert data.x.shape == (count, 1, 4, 4)
    row = np.rint((data.x.values[:, 0, 0, 0] + 1) * 127.5).astype(int)
    assert sorted(row) == [*range(count)]
    assert data.obs.values.tolist() == data["label"].obs.values.tolist() == row.tolist()
    np.testing.assert_array_equal(data["label"], row % 3)
    np.testing.assert_array_equal(data["size"], row / 2)
    np.testing.assert_array_equal(data["ok"], row > 2)
    assert data["name"].values.tolist() == [f"n{i}" for i in row]
    assert data["label"].attrs["names"] == CLASSES
    assert factor_names(data, "class") == ["label", "ok"]
    assert factor_names(data, "real") == ["size"]
    assert "box" not in data


LEFT_OUT = pytest.mark.filterwarnings("ignore:.*left out, as neither numbers nor text")


@LEFT_OUT
def test_a_saved_data_set(saved, tmp_path):
    check_rows(check_data(load_data(saved(tmp_path / "set", 0, 5))), 5)


@LEFT_OUT
def test_a_saved_data_set_of_two_parts(saved, tmp_path):
    saved(tmp_path / "set" / "train", 0, 5)
    saved(tmp_path / "set" / "test", 5, 3)
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    data = load_data(tmp_path / "set")
    check_rows(data, 8)
    assert data.sortby("obs")["split"].values.tolist() == ["train"] * 5 + ["test"] * 3
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train", "extra"]}')
    with pytest.raises(ValueError, match=r"set has the parts train, extra, .* give the folder of one, .*set/train"):
        load_data(tmp_path / "set")


@LEFT_OUT
def test_parquet(parquet, tmp_path):
    """One file, more rows than are held at a time, and a folder of shards whose names say the parts."""
    check_rows(load_data(parquet(tmp_path / "some.parquet", 0, 5)), 5)
    for name, first, count in (("train-00000-of-00002", 0, 3), ("train-00001-of-00002", 3, 2), ("test-0", 5, 2)):
        parquet(tmp_path / "hub" / "data" / f"{name}.parquet", first, count)
    data = load_data(tmp_path / "hub")
    assert sorted(data["split"].values) == ["test"] * 2 + ["train"] * 5
    assert {*data["name"].values[data["split"] == "test"]} == {"n5", "n6"}
    first = parquet(tmp_path / "plain" / "a.parquet", 0, 3)
    parquet(first.with_name("b.parquet"), 3, 3)
    data = load_data(first.parent)
    check_rows(data, 6)
    assert "split" not in data.coords


def test_rows_are_read_some_at_a_time(pyarrow, tmp_path, monkeypatch):
    """Plain bytes for images; integers with gaps are numbers with NaN, text with gaps has empty ones."""
    monkeypatch.setattr("sami_ppl.data.readers.tables.ROWS", 2)
    table = pyarrow.table({"img": [png(i) for i in range(5)], "n": [1, None, 3, 4, 5], "t": ["a", None, "b", "c", "d"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    data = load_data(tmp_path / "a.parquet", resize=2).sortby("obs")
    assert data.x.shape == (5, 1, 2, 2)
    np.testing.assert_array_equal(data["n"], [1, np.nan, 3, 4, 5])
    assert data["t"].values.tolist() == ["a", "", "b", "c", "d"]


def test_rows_without_a_class_are_of_none(pyarrow, rows, tmp_path):
    table = rows(0, 3).select(["image", "label"])
    gaps = table.set_column(1, "label", pyarrow.array([2, None, 1])).replace_schema_metadata(table.schema.metadata)
    pyarrow.parquet.write_table(gaps, tmp_path / "a.parquet")
    assert load_data(tmp_path / "a.parquet").sortby("obs")["label"].values.tolist() == [2, -1, 1]


def test_columns_of_other_things_are_left_out_with_a_warning(parquet, tmp_path):
    with pytest.warns(UserWarning, match=r"a.parquet: box \(list<.*\) left out, as neither numbers nor text"):
        load_data(parquet(tmp_path / "a.parquet", 0, 3))


def test_rows_without_an_image_are_named(pyarrow, tmp_path):
    table = {"image": [png(0), b"no image", None, png(3)], "label": [0, 1, 2, 3]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"(?s)row 1 of a.parquet cannot be read.*row 2 of a.parquet: there are no"):
        load_data(tmp_path / "a.parquet")
    with pytest.warns(UserWarning, match="2 of 4 images left out"):
        data = load_data(tmp_path / "a.parquet", skip_unreadable=True)
    assert sorted(data["label"].values) == [0, 3]
    named = {"image": [{"bytes": None, "path": "/elsewhere/1.png"}]}
    pyarrow.parquet.write_table(pyarrow.table(named), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"row 0 of b.parquet: there are no bytes, only the path /elsewhere/1.png"):
        load_data(tmp_path / "b.parquet")


@LEFT_OUT
def test_tables_that_are_none_are_named(pyarrow, parquet, saved, tmp_path):
    write = pyarrow.parquet.write_table
    for table, message in (
        ({"label": [1]}, r"has no column of images, .* its columns are label \(int64\): rename"),
        ({"a": [png(0)], "b": [png(0)]}, "has several columns of bytes"),
        ({"image": [png(0)], "row": [1]}, "has the column 'row', which is the name of a dim here"),
    ):
        write(pyarrow.table(table), tmp_path / "a.parquet")
        with pytest.raises(ValueError, match=f"a.parquet {message}"):
            load_data(tmp_path / "a.parquet")
    empty = pyarrow.schema({"image": pyarrow.binary()}).empty_table()
    write(empty, tmp_path / "empty.parquet")
    with pytest.raises(ValueError, match="there are no images in it"):
        load_data(tmp_path / "empty.parquet")
    (tmp_path / "a.parquet").write_bytes(b"no table")
    with pytest.raises(ValueError, match=r"a.parquet cannot be read \("):
        load_data(tmp_path / "a.parquet")
    folder = saved(tmp_path / "set", 0, 5)
    last = folder / "data-00001-of-00002.arrow"
    whole = last.read_bytes()
    for found in (whole[: len(whole) // 2], b"no table", b""):
        last.write_bytes(found)
        with pytest.raises(ValueError, match=r"data-00001-of-00002.arrow cannot be read \("):
            load_data(folder)
    last.unlink()
    with pytest.raises(ValueError, match=r"data-00001-of-00002.arrow cannot be read \("):
        load_data(folder)
    (folder / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"set/state.json cannot be read .*save_to_disk"):
        load_data(folder)
    parquet(tmp_path / "two" / "a.parquet", 0, 2)
    write(pyarrow.table({"image": [png(0)]}), tmp_path / "two" / "b.parquet")
    with pytest.raises(ValueError, match=r"b.parquet has the columns image, the files before it image, label"):
        load_data(tmp_path / "two")


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").touch()
    real = builtins.__import__

    def without(name, *rest):
        if name.split(".")[0] == "pyarrow":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"a.parquet is read by pyarrow: pip install 'sami_ppl\[datasets\]'"):
        load_data(tmp_path / "a.parquet")
