"""dSprites, 3D Shapes, MPI3D and Cars3D, in small, as they are handed out; the images tell the factors."""

import itertools
import math

import h5py
import numpy as np
import pytest
from scipy.io import savemat

from sami_ppl.data import check_data, factor_names, load_data, open_data
from sami_ppl.data.readers import grids


def told(data, channel=0):
    """The number that was written into each image."""
    return np.rint((data.x.values[:, channel, 0, 0] + 1) * 127.5).astype(int)


class Unpickled:
    """What runs when it is unpickled."""

    def __reduce__(self):
        return print, ("unpickled",)


SPRITES = list(itertools.product([0], range(3), range(2), range(4), range(2), range(2)))
"""Of dSprites, fewer scales, orientations and places."""


@pytest.fixture
def sprites():
    """The arrays of dSprites: masks with two pixels that tell shape and posY, and metadata that must not be read."""
    classes = np.array(SPRITES)
    values = classes * [1, 1, 0.5, math.pi / 2, 1, 1] + [1, 1, 0.5, 0, 0, 0]
    images = np.zeros((len(SPRITES), 4, 4), np.uint8)
    images[:, 0, 0], images[:, 1, 1], images[:, 3, 3] = classes[:, 1] == 1, classes[:, 1] == 2, classes[:, 5]
    metadata = np.array({"latents_names": Unpickled()}, dtype=object)
    return {"imgs": images, "latents_classes": classes, "latents_values": values, "metadata": metadata}


def test_dsprites(tmp_path, sprites, capsys):
    """Masks in the whole range; factors in their own units, the shape by its names, the constant colour left out."""
    path = tmp_path / "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"
    np.savez_compressed(path, **sprites)
    data = check_data(load_data(path))
    assert "unpickled" not in capsys.readouterr().out
    assert (data.x.shape, {*np.unique(data.x)}) == ((96, 1, 4, 4), {-1.0, 1.0})
    assert [*data.data_vars] == ["x", "shape", "scale", "orientation", "posX", "posY"]
    assert data["shape"].attrs["names"] == ["square", "ellipse", "heart"]
    assert factor_names(data, "class") == ["shape"]
    assert factor_names(data, "real") == ["scale", "orientation", "posX", "posY"]
    assert data["orientation"].attrs["period"] == 2 * math.pi
    light = data.x.values[:, 0] > 0
    np.testing.assert_array_equal(data["shape"].values, light[:, 0, 0] + 2 * light[:, 1, 1])
    np.testing.assert_array_equal(data["posY"].values, light[:, 3, 3])
    assert [*np.unique(data["scale"])] == [0.5, 1.0]
    np.testing.assert_allclose(np.unique(data["orientation"]), np.arange(4) * np.pi / 2, rtol=1e-6)
    assert len({*data["shape"].values[:8]}) > 1, "mixed"


def test_arrays_of_dsprites_that_do_not_fit_are_refused(tmp_path, sprites):
    path, pickled = tmp_path / "sprites.npz", np.array([Unpickled()], object)
    for name, array, message in (
        ("latents_values", sprites["latents_values"][1:], r"latents_values has shape \(95, 6\), expected \(96, 6\)"),
        ("latents_classes", sprites["latents_classes"][:, 1:], r"latents_classes has shape \(96, 5\).* color, shape"),
        (
            "imgs",
            sprites["imgs"].reshape(96, 16),
            r"imgs is uint8 of shape \(96, 16\), expected uint8 \(n, row, column\)",
        ),
        ("imgs", pickled, "its array 'imgs' cannot be read"),
    ):
        np.savez(path, **{**sprites, name: array})
        with pytest.raises(ValueError, match=rf"sprites.npz: .*{message}"):
            load_data(path)


LARGE, SMALL = grids.MPI3D


@pytest.mark.parametrize("sizes", [pytest.param(LARGE, marks=pytest.mark.slow), SMALL], ids=["large", "small"])
def test_mpi3d(tmp_path, sizes):
    """Images of one pixel, as many as there are: each factor is that of the image's place in the file."""
    count = math.prod(sizes)
    places = np.indices(sizes).reshape(7, -1)
    image = np.stack([places[0] * 10 + places[1], places[5], places[6]], -1).astype(np.uint8)
    np.savez(tmp_path / "mpi3d_toy.npz", images=image.reshape(count, 1, 1, 3))
    data = load_data(tmp_path / "mpi3d_toy.npz")
    assert data.x.shape == (count, 3, 1, 1)
    assert len(data.data_vars) == 8
    assert factor_names(data, "real") == ["horizontal_axis", "vertical_axis"]
    assert data["camera_height"].attrs["names"] == ["top", "center", "bottom"]
    assert ("names" in data["object_shape"].attrs) == (sizes[0] == 6), "of the smaller there are two"
    np.testing.assert_array_equal(data["object_color"] * 10 + data["object_shape"], told(data))
    np.testing.assert_array_equal(data["horizontal_axis"], told(data, 1))
    np.testing.assert_array_equal(data["vertical_axis"], told(data, 2))
    np.testing.assert_array_equal(data["background_color"], places[4][data.obs])


def test_other_counts_are_no_mpi3d(tmp_path):
    np.savez(tmp_path / "images.npz", images=np.zeros((5, 4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match=r"has no array 'x', it has .* MPI3D .* it has 1,036,800 or 460,800 images"):
        load_data(tmp_path / "images.npz")


HUES = np.arange(10) / 10
SHAPES = np.array([*itertools.product(HUES[::5], HUES[::5], HUES, [0.75, 1.25], range(4), [-30.0, 0.0, 30.0])])


@pytest.fixture
def shapes3d(tmp_path):
    """A file of 3D Shapes whose images tell the hue of the object, the shape and the orientation."""
    images = np.zeros((len(SHAPES), 4, 5, 3), np.uint8)
    images[..., :] = (SHAPES[:, [2, 4, 5]] * [10, 1, 1] + [0, 0, 30]).round()[:, None, None]
    with h5py.File(tmp_path / "3dshapes.h5", "w") as file:
        file["images"], file["labels"] = images, SHAPES
    return tmp_path / "3dshapes.h5"


def test_shapes3d(shapes3d):
    data = check_data(load_data(shapes3d))
    assert data.x.dims == ("obs", "channel", "row", "column")
    assert data.x.shape == (len(SHAPES), 3, 4, 5)
    assert factor_names(data, "class") == ["shape"]
    assert data["shape"].attrs["names"] == ["cube", "cylinder", "sphere", "capsule"]
    assert [name for name in data.data_vars if "period" in data[name].attrs] == ["floor_hue", "wall_hue", "object_hue"]
    np.testing.assert_array_equal((data["object_hue"].values * 10).round(), told(data))
    np.testing.assert_array_equal(data["shape"], told(data, 1))
    np.testing.assert_array_equal(data["orientation"], told(data, 2) - 30)


def test_shapes3d_is_opened_without_being_read(shapes3d):
    """In the order of the file, 8-bit as stored, and rows are read where they are asked for."""
    opened = open_data(shapes3d)
    assert not opened.x.variable._in_memory
    some = opened.isel(obs=[3, 700]).load()
    assert some.x.dtype == np.uint8
    np.testing.assert_allclose(some["floor_hue"], SHAPES[[3, 700], 0], rtol=1e-6)
    whole = load_data(shapes3d).sortby("obs")
    np.testing.assert_allclose(some.x / 127.5 - 1, whole.x[[3, 700]], atol=1e-6)
    opened.close()


def test_damaged_and_other_hdf5_files_are_named(shapes3d, tmp_path):
    whole = shapes3d.read_bytes()
    for found in (b"no HDF5", whole[:200], whole[: len(whole) // 2], b""):
        shapes3d.write_bytes(found)
        with pytest.raises(ValueError, match=r"3dshapes.h5 cannot be read"):
            load_data(shapes3d)
    for arrays, message in (
        ({"frames": SHAPES}, r"has the arrays \['frames'\], expected those of 3D Shapes, images and labels"),
        ({"images": np.zeros((3, 4, 4, 3), np.uint8), "labels": SHAPES[:2]}, r"labels has shape \(2, 6\), expected"),
        ({"images": np.zeros((2, 4, 4, 3)), "labels": SHAPES[:2]}, "images are float64 of shape"),
    ):
        with h5py.File(tmp_path / "other.h5", "w") as file:
            for name, array in arrays.items():
                file[name] = array
        with pytest.raises(ValueError, match=f"other.h5.* {message}"):
            load_data(tmp_path / "other.h5")


@pytest.fixture
def cars(tmp_path):
    """Two cars, as MATLAB writes them: `im` (row, column, channel, azimuth 24, elevation 4)."""
    folder = tmp_path / "cars"
    folder.mkdir()
    for car in range(2):
        image = np.empty((6, 6, 3, 24, 4), np.uint8)
        image[:, :, 0], image[:, :, 1] = car, np.arange(24)[:, None]
        image[:, :, 2] = np.arange(4)
        savemat(folder / f"car_{car:03d}_mesh.mat", {"im": image})
    return folder


def test_cars3d(cars):
    data = check_data(load_data(cars))
    assert data.x.shape == (192, 3, 6, 6)
    assert data["object"].attrs["names"] == ["car_000_mesh", "car_001_mesh"]
    assert data["azimuth"].attrs["period"] == 360
    np.testing.assert_array_equal(data["object"], told(data))
    np.testing.assert_allclose(data["azimuth"], told(data, 1) * 15)
    np.testing.assert_array_equal(data["elevation"], told(data, 2))
    assert load_data(cars, resize=3).x.shape == (192, 3, 3, 3)


def test_other_matlab_files_are_named(cars):
    with h5py.File(cars / "new.mat", "w") as file:  # what MATLAB writes since version 7.3
        file["im"] = np.zeros(3)
    with pytest.raises(ValueError, match=r"new.mat cannot be read as a MATLAB file .*save\('-v7'\)"):
        load_data(cars)
    (cars / "new.mat").unlink()
    for array, message in (
        ({"image": np.zeros(3)}, "z.mat has no array 'im'"),
        ({"im": np.zeros((3, 3))}, r"z.mat has 'im' of float64 and shape \(3, 3\), expected that of Cars3D"),
        ({"im": np.zeros((5, 5, 3, 24, 4), np.uint8)}, "z.mat: images are of another shape than car_000_mesh.mat"),
    ):
        savemat(cars / "z.mat", array)
        with pytest.raises(ValueError, match=message):
            load_data(cars)
