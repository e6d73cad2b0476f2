"""Files and folders of images as data sets, and what is said of those that are none."""

import pickle
import struct
from unittest.mock import Mock
import zipfile

import numpy as np
from PIL import Image, ImageOps
import pytest
import xarray as xr

from sami_ppl.data import check_data, load_data

RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, (5, 1, 4, 4), dtype=np.uint8)
FLOATS = RNG.uniform(-1, 1, (5, 1, 4, 4)).astype(np.float32)


def scaled(x):
    return x / 127.5 - 1


def save_images(folder, arrays, suffix=".png"):
    folder.mkdir()
    for i, array in enumerate(arrays):
        Image.fromarray(array).save(folder / f"{i:02d}{suffix}")
    return folder


def test_npz(tmp_path):
    path = tmp_path / "data.npz"
    names = np.array(list("abcde"))
    np.savez(path, x=BYTES, size=np.arange(5), name=names, position=np.zeros((5, 2)))
    data = check_data(load_data(path))
    np.testing.assert_allclose(data.x, scaled(BYTES), atol=1e-6)
    assert data.x.dims == ("obs", "channel", "row", "column")
    assert data["size"].dims == ("obs",)
    assert data.position.dims == ("obs", "position_axis0")
    np.testing.assert_array_equal(data.name, names)
    assert load_data(str(path)).identical(load_data(path))


@pytest.mark.parametrize(
    ("shape", "dims"),
    [((5, 3), ("feature",)), ((5, 4, 4), ("x_axis0", "x_axis1")), ((5, 1, 4, 4), ("channel", "row", "column"))],
)
def test_npz_floats_stay_as_they_are(tmp_path, shape, dims):
    x = RNG.normal(size=shape)
    np.savez(tmp_path / "data.npz", x=x)
    data = load_data(tmp_path / "data.npz")
    np.testing.assert_array_equal(data.x, x)
    assert data.x.dims == ("obs", *dims)


def test_masks_use_the_whole_range(tmp_path):
    np.savez(tmp_path / "data.npz", x=(BYTES > 127).astype(np.uint8))
    assert set(np.unique(load_data(tmp_path / "data.npz").x)) == {-1.0, 1.0}


def test_npz_arrays_of_another_length_are_reported(tmp_path):
    np.savez(tmp_path / "data.npz", x=FLOATS, mean=np.zeros(3), version=np.array(1))
    with pytest.warns(UserWarning, match=r"data.npz: \['mean', 'version'\] left out.*5 observations"):
        data = load_data(tmp_path / "data.npz")
    assert list(data.data_vars) == ["x"]


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
@pytest.mark.parametrize("x", [BYTES, FLOATS], ids=["bytes", "floats"])
def test_xarray_files(tmp_path, suffix, x):
    path = tmp_path / f"data{suffix}"
    saved = xr.Dataset({"x": (("obs", "channel", "row", "column"), x), "size": ("obs", np.arange(5.0))})
    saved.to_netcdf(path) if suffix == ".nc" else saved.to_zarr(path, consolidated=False)
    data = check_data(load_data(path))
    np.testing.assert_allclose(data.x, scaled(x) if x.dtype == np.uint8 else x, atol=1e-6)
    xr.testing.assert_equal(data["size"], saved["size"])


@pytest.mark.parametrize("suffix", [".png", ".BMP", ".gif", ".tif"])
def test_folder_of_grayscale_images(tmp_path, suffix):
    folder = save_images(tmp_path / "images", BYTES[:, 0], suffix)
    (folder / "notes.txt").write_text("not an image")
    data = check_data(load_data(folder))
    np.testing.assert_allclose(data.x, scaled(BYTES), atol=1e-6)
    assert data.file.values.tolist() == [f"{i:02d}{suffix}" for i in range(5)]


def test_folder_of_colour_images_with_a_gray_one(tmp_path):
    colour = RNG.integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    data = check_data(load_data(save_images(tmp_path / "images", [colour[0], BYTES[0, 0], colour[1]])))
    assert data.x.shape == (3, 3, 4, 4)
    np.testing.assert_allclose(data.x[0], scaled(colour[0].transpose(2, 0, 1)), atol=1e-6)
    np.testing.assert_allclose(data.x[1], scaled(np.repeat(BYTES[0], 3, 0)), atol=1e-6)


def test_jpeg_is_turned_upright(tmp_path):
    image = np.zeros((16, 16), np.uint8)
    image[:, 8:] = 255
    folder = save_images(tmp_path / "images", [image], ".jpg")
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    Image.fromarray(image).save(folder / "01.jpg", exif=exif)
    x = load_data(folder).x
    np.testing.assert_allclose(x[1], x[0, :, ::-1, ::-1], atol=0.1)


@pytest.mark.parametrize(("turn", "rows", "columns"), [(2, 1, -1), (3, -1, -1), (4, -1, 1)])
def test_images_are_turned_as_they_say(tmp_path, turn, rows, columns):
    exif = Image.Exif()
    exif[0x0112] = turn
    save_images(tmp_path / "images", [])
    Image.fromarray(BYTES[0, 0]).save(tmp_path / "images" / "a.png", exif=exif)
    np.testing.assert_allclose(
        load_data(tmp_path / "images").x[0, 0], scaled(BYTES[0, 0])[::rows, ::columns], atol=1e-6
    )


def test_images_are_turned_by_quarters_as_pillow_turns_them(tmp_path):
    save_images(tmp_path / "images", [])
    wanted = []
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        Image.fromarray(BYTES[0, 0]).save(tmp_path / "images" / f"{turn}.png", exif=exif)
        with Image.open(tmp_path / "images" / f"{turn}.png") as image:
            wanted.append(np.asarray(ImageOps.exif_transpose(image)))
    np.testing.assert_allclose(load_data(tmp_path / "images").x[:, 0], scaled(np.stack(wanted)), atol=1e-6)


def test_exif_that_cannot_be_read_costs_no_image(tmp_path):
    folder = save_images(tmp_path / "images", BYTES[:2, 0])
    Image.fromarray(BYTES[2, 0]).save(folder / "02.png", exif=b"Exif\0\0\x00\x08\x00\x02\x01\x12\x00\x03")
    with pytest.warns(UserWarning, match=r"02.png: its EXIF cannot be read .*it is not turned by it"):
        x = load_data(folder).x
    np.testing.assert_allclose(x, scaled(BYTES[:3]), atol=1e-6)


@pytest.mark.parametrize("suffix", [".tif", ".gif", ".webp", ".png"])
def test_pages_beyond_the_first_are_not_lost_silently(tmp_path, suffix):
    folder = save_images(tmp_path / "images", [BYTES[0, 0]])
    for name in ("a", "b"):
        first, *more = [Image.fromarray(array[0]).convert("RGB") for array in BYTES]
        first.save(folder / f"{name}{suffix}", save_all=True, append_images=more)
    with pytest.raises(ValueError, match=rf"(?s)a\{suffix} has 5 pages, and an observation is one.*b\{suffix} has 5"):
        load_data(folder)


def test_all_files_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    """A link to nothing, half a file, an image too large, and whatever a damaged file makes Pillow raise."""
    folder = save_images(tmp_path / "images", [BYTES[0, 0], np.zeros((20, 20), np.uint8)])
    (folder / "02.png").symlink_to(tmp_path / "not there")
    (folder / "03.png").write_bytes((folder / "00.png").read_bytes()[:60])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="cannot be read as an image") as caught:
        load_data(folder)
    *named, last = str(caught.value).splitlines()
    assert [line.split()[0] for line in named] == ["01.png", "02.png", "03.png"]
    assert last == "or leave them out: skip_unreadable=True"
    assert "decompression bomb" in str(caught.value)
    for error in (SyntaxError, TypeError, struct.error, EOFError, MemoryError):
        with monkeypatch.context() as damaged:
            damaged.setattr(Image.Image, "load", Mock(side_effect=error("within")))
            damaged.setattr("PIL.ImageFile.ImageFile.load", Mock(side_effect=error("within")))
            with pytest.raises(ValueError, match=r"00.png cannot be read as an image \(within\)"):
                load_data(folder)


def broken_files(folder):
    """Faulty data by name, with the message expected."""
    np.savez(folder / "no_x.npz", images=FLOATS)
    np.savez(folder / "flat.npz", x=np.zeros(5))
    np.savez(folder / "objects.npz", x=np.array([1, "a"], object))
    np.savez(folder / "dims.npz", x=np.zeros((5, 1, 4, 4)), row=np.zeros(5), height=np.zeros(5))
    (folder / "text.npz").write_text("no archive")
    (folder / "text.nc").write_text("no dataset")
    (folder / "empty.zarr").mkdir()
    (folder / "data.csv").write_text("1,2")
    xr.Dataset({"images": ("obs", np.zeros(3))}).to_netcdf(folder / "no_x.nc")
    (folder / "empty").mkdir()
    (folder / "nested" / "inner").mkdir(parents=True)
    square, wide = np.zeros((4, 4), np.uint8), np.zeros((4, 6), np.uint8)
    save_images(folder / "odd", [square, square, wide, square])
    save_images(folder / "deep", [square.astype(np.int32)], ".tif")
    save_images(folder / "torn", [square])
    (folder / "torn" / "00.png").write_bytes(b"no image")
    (folder / "nothing.npz").touch()
    with zipfile.ZipFile(folder / "code.npz", "w") as archive:
        archive.writestr("x.npy", pickle.dumps(print))
    xr.Dataset({"x": (("obs", "feature"), np.ones((3, 2)))}).to_zarr(folder / "chunk.zarr", consolidated=False)
    (folder / "chunk.zarr" / "x" / "c" / "0" / "0").write_bytes(b"no chunk")
    return {
        "absent.npz": (FileNotFoundError, r"no data at .*absent.npz: expected a .npz, .nc or .zarr file, or a folder"),
        "data.csv": (ValueError, r"suffix '.csv', expected .npz, .nc, .zarr, a folder of images.*np.savez"),
        "no_x.npz": (ValueError, r"no_x.npz has no array 'x', it has \['images'\]: write np.savez"),
        "flat.npz": (ValueError, r"'x' in flat.npz has shape \(5,\), expected observations on the first axis"),
        "objects.npz": (ValueError, r"objects.npz cannot be read as a .npz file of plain arrays .*no object arrays"),
        "dims.npz": (ValueError, "dims.npz has arrays named as dims of x are, row, which would not be kept as factors"),
        "text.npz": (ValueError, "text.npz cannot be read as a .npz file"),
        "nothing.npz": (ValueError, "nothing.npz cannot be read as a .npz file"),
        "code.npz": (ValueError, r"code.npz cannot be read as a .npz file of plain arrays \(x in it is no array\)"),
        "chunk.zarr": (ValueError, "chunk.zarr cannot be read as a dataset"),
        "text.nc": (ValueError, r"text.nc cannot be read as a dataset (?s:.*)to_netcdf\(path\)"),
        "empty.zarr": (ValueError, r"empty.zarr cannot be read as a dataset (?s:.*)to_zarr\(path\)"),
        "no_x.nc": (ValueError, r"no_x.nc has no variable 'x', it has \['images'\]: write dataset.rename"),
        "empty": (ValueError, "empty has no image files .*, it has nothing"),
        "nested": (ValueError, "nested has no image files .*, it has inner/: put the images into it, directly or"),
        "odd": (
            ValueError,
            r"got 4×4 \(3 files\), 6×4 \(1 file\); the odd one is 02.png \(6×4\)",
        ),
        "deep": (ValueError, "00.tif has pixels of mode 'I', expected grayscale of 8 or 16 bits"),
        "torn": (ValueError, "00.png cannot be read as an image"),
    }


def test_faulty_data(tmp_path, capfd):
    for name, (error, message) in broken_files(tmp_path).items():
        with pytest.raises(error, match=message):
            load_data(tmp_path / name)
    assert not capfd.readouterr().err, "readers' own complaints"
