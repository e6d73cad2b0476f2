"""Files as MNIST and its kin have them, written here byte by byte."""

import gzip
import struct

import numpy as np
import pytest

from sami_ppl.data import load_data
from sami_ppl.data.readers.idx import read_array, read_idx

CODES = {"u1": 8, "i1": 9, ">i2": 11, ">i4": 12, ">f4": 13, ">f8": 14}
RNG = np.random.default_rng(0)


def written(path, array, kind="u1"):
    """The file of an array, gzipped where its name says so."""
    head = bytes([0, 0, CODES[kind], array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wb") as file:
        file.write(head + array.astype(kind).tobytes())
    return path


def images(count, side=4):
    return RNG.integers(0, 256, (count, side, side))


@pytest.fixture
def folder(tmp_path):
    """A set of 5 images for training, gzipped, and 3 for testing, not."""
    for part, count, end in (("train", 5, ".gz"), ("t10k", 3, "")):
        written(tmp_path / f"{part}-images-idx3-ubyte{end}", images(count))
        written(tmp_path / f"{part}-labels-idx1-ubyte{end}", np.arange(count))
    return tmp_path


def test_a_folder_is_both_parts(folder):
    """In the order train, test, whatever the order of their names, scaled as other 8-bit images are."""
    data, raw = load_data(folder), read_idx(folder)
    assert data.split.values.tolist() == ["train"] * 5 + ["test"] * 3
    assert data.label.values.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert data.x.dims == ("obs", "channel", "row", "column")
    assert (raw.x.dtype, data.x.dtype) == (np.uint8, np.float32)
    np.testing.assert_allclose(data.x.values, raw.x.values / 127.5 - 1, atol=1e-6)
    np.testing.assert_array_equal(raw.x.values[:5, 0], read_array(folder / "train-images-idx3-ubyte.gz"))


def test_one_file_is_its_images(folder):
    """With the labels beside it, gzipped or not; without them where there are none."""
    assert load_data(folder / "t10k-images-idx3-ubyte").label.values.tolist() == [0, 1, 2]
    (folder / "train-labels-idx1-ubyte.gz").rename(folder / "kept")
    alone = load_data(folder / "train-images-idx3-ubyte.gz")
    assert set(alone.variables) == {"x"}
    written(folder / "train-labels-idx1-ubyte", np.arange(5))
    assert load_data(folder / "train-images-idx3-ubyte.gz").label.values.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("kind", CODES)
def test_numbers_of_every_type(tmp_path, kind):
    values = RNG.integers(0, 100, (2, 3, 3)) + (0.5 if "f" in kind else 0)
    np.testing.assert_array_equal(read_array(written(tmp_path / "some-images.idx3-ubyte", values, kind)), values)


def test_damaged_files_are_named(folder):
    """Cut short, with more than there should be, of no such format, or no archive at all."""
    file = folder / "t10k-images-idx3-ubyte"
    whole = file.read_bytes()
    for found, message in (
        (whole[:-1], r"47 bytes of numbers, its shape \(3, 4, 4\) needs 48: fetch it again"),
        (whole + b"0", "holds 49 bytes"),
        (whole[:7], "does not begin as an IDX file does"),
        (b"", "does not begin as an IDX file does"),
        (b"\0\0\x07\x03" + whole[4:], "does not begin as an IDX file does"),
    ):
        file.write_bytes(found)
        with pytest.raises(ValueError, match=f"t10k-images-idx3-ubyte .*{message}"):
            load_data(folder)
    torn = folder / "train-images-idx3-ubyte.gz"
    torn.write_bytes(torn.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte.gz cannot be read"):
        load_data(torn)


def test_files_that_do_not_belong_together_are_refused(folder):
    written(folder / "t10k-labels-idx1-ubyte", np.arange(4))
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte has shape \(4,\) and t10k-images-.* 3 images"):
        load_data(folder)
    written(folder / "t10k-labels-idx1-ubyte", np.arange(3))
    written(folder / "t10k-images-idx3-ubyte", images(3, side=5))
    with pytest.raises(ValueError, match="differ in size"):
        load_data(folder)
    written(folder / "letters-images-idx3-ubyte", images(2))
    with pytest.raises(ValueError, match="has images of several sets"):
        load_data(folder)
    with pytest.raises(ValueError, match="images have"):
        load_data(written(folder / "flat-images-idx1-ubyte", np.arange(3)))
