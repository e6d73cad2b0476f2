"""Data sets whose images go through all combinations of known factors: dSprites, 3D Shapes, MPI3D, Cars3D.

None of them is handed out with the names of its factors in a form that can be read without running code: they are
written here. Sources: Matthey, Higgins, Hassabis & Lerchner 2017, *dSprites*; Burgess & Kim 2018, *3D Shapes*; Gondal
et al. 2019, arXiv 1906.03292 (MPI3D); Reed, Zhang, Zhang & Lee 2015, *Deep Visual Analogy-Making* (Cars3D).
"""

import math
from pathlib import Path
import zipfile

import numpy as np
import xarray as xr

from sami_ppl._util.errors import attempt
from sami_ppl.data.readers.arrays import HDF5, opened_store
from sami_ppl.data.readers.images import IMAGE_SUFFIXES
from sami_ppl.data.readers.known import Factor, variables
from sami_ppl.data.readers.opened import Opened

DSPRITES = (
    Factor("color", ()), Factor("shape", ("square", "ellipse", "heart")), Factor("scale"),
    Factor("orientation", period=2 * math.pi), Factor("posX"), Factor("posY"),
)  # fmt: skip
SHAPES_3D = (
    Factor("floor_hue", period=1.0), Factor("wall_hue", period=1.0), Factor("object_hue", period=1.0), Factor("scale"),
    Factor("shape", ("cube", "cylinder", "sphere", "capsule")), Factor("orientation"),
)  # fmt: skip
_PLACED = (
    Factor("object_size", ("small", "large")), Factor("camera_height", ("top", "center", "bottom")),
    Factor("background_color", ("purple", "sea green", "salmon")), Factor("horizontal_axis"), Factor("vertical_axis"),
)  # fmt: skip
_COLOURS, _SHAPES = (
    ("white", "green", "red", "blue", "brown", "olive"),
    ("cone", "cube", "cylinder", "hexagonal", "pyramid", "sphere"),
)
MPI3D = {
    (6, 6, 2, 3, 3, 40, 40): (Factor("object_color", _COLOURS), Factor("object_shape", _SHAPES), *_PLACED),
    # Two sets of this size have been handed out, with other colours and shapes: these have no names.
    (4, 4, 2, 3, 3, 40, 40): (Factor("object_color", ()), Factor("object_shape", ()), *_PLACED),
}
"""Factors by how many values each has; the last changes from image to image."""


def names_in(path: Path) -> set[str]:
    """Names of the arrays in a `.npz` file; none where it is no such file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile):
        return set()


def is_dsprites(path: Path) -> bool:
    """Whether a `.npz` file has the arrays of dSprites."""
    return path.suffix == ".npz" and {"imgs", "latents_values", "latents_classes"} <= names_in(path)


def read_dsprites(path: Path) -> xr.Dataset:
    """dSprites, `.npz`: masks x, `shape`, and `scale`, `orientation`, `posX` and `posY` in their own units.

    The array `metadata` is pickled, and not read. Raises ValueError for arrays that do not fit together.
    """
    images, values, labels = (_array(path, name) for name in ("imgs", "latents_values", "latents_classes"))
    for name, known in (("latents_values", values), ("latents_classes", labels)):
        _check_known(path, name, known.shape, len(images), DSPRITES)
    columns = [labels[:, i] if factor.names is not None else values[:, i] for i, factor in enumerate(DSPRITES)]
    return xr.Dataset({"x": _x(path, "imgs", images, ()), **variables(DSPRITES, columns)})


def is_mpi3d(path: Path) -> bool:
    """Whether a `.npz` file has the one array of MPI3D."""
    return path.suffix == ".npz" and names_in(path) == {"images"}


def read_mpi3d(path: Path) -> xr.Dataset:
    """MPI3D, `.npz`: images x and the seven factors of the order in which they are; places are counted from 0.

    Raises ValueError where the images are not as many as MPI3D has.
    """
    images = _array(path, "images")
    sizes = next((sizes for sizes in MPI3D if images.ndim and math.prod(sizes) == len(images)), None)
    if sizes is None:
        known = " or ".join(f"{math.prod(sizes):,}" for sizes in MPI3D)
        raise ValueError(
            f"{path.name} has no array 'x', it has ['images']: write np.savez(path, x=array). As MPI3D is handed out "
            f"it has {known} images, but here their shape is {images.shape}"
        )
    columns = np.unravel_index(np.arange(len(images)), sizes)
    return xr.Dataset({"x": _x(path, "images", images, (3,)), **variables(MPI3D[sizes], columns)})


def read_shapes3d(path: Path) -> xr.Dataset:
    """3D Shapes, `.h5`: images x and its six factors, hues with period 1, orientation in degrees.

    Raises ValueError for files that are damaged, or hold something else.
    """
    with open_shapes3d(path) as data:
        found, error = attempt(data.load)
    if found is None:
        raise ValueError(f"{path.name} cannot be read ({error or type(error).__name__}): fetch it again") from error
    return found


def open_shapes3d(path: Path) -> xr.Dataset:
    """The same, opened without reading the images.

    Raises ValueError for files that are damaged, or hold something else.
    """
    data = _stored_shapes3d(path)
    return data.assign(x=data["x"].variable.transpose("obs", "channel", "row", "column"))


def stream_shapes3d(path: Path) -> Opened:
    """The same as a source. Raises ValueError as `read_shapes3d` does."""
    return opened_store(path, _stored_shapes3d(path), ("obs", "channel", "row", "column"))


def is_shapes3d(path: Path) -> bool:
    """Whether an HDF5 file has no x: the arrays of 3D Shapes are then expected in it."""
    if path.suffix not in HDF5:
        return False
    data, _ = attempt(lambda: xr.open_dataset(path, engine="h5netcdf", phony_dims="sort"))
    return data is None or "x" not in data.variables


def _stored_shapes3d(path: Path) -> xr.Dataset:
    """x with its dims as they are stored, (obs, row, column, channel), and the factors."""
    data, error = attempt(lambda: xr.open_dataset(path, engine="h5netcdf", phony_dims="sort"))
    if data is None:
        raise ValueError(
            f"{path.name} cannot be read as an HDF5 file ({error or type(error).__name__}): fetch it again, or write "
            "a .npz file"
        ) from error
    if not {"images", "labels"} <= {*data.variables}:
        raise ValueError(
            f"{path.name} has the arrays {sorted(map(str, data.variables))}, expected those of 3D Shapes, images and "
            "labels: of other files write np.savez(path, x=array)"
        )
    images, labels = data["images"].variable, data["labels"].values
    _check_known(path, "labels", labels.shape, len(images), SHAPES_3D)
    if images.ndim != 4 or images.dtype != np.uint8:
        raise ValueError(f"{path.name}: images are {images.dtype} of shape {images.shape}, expected uint8 (n, h, w, 3)")
    x = data[["images"]].rename(dict(zip(images.dims, ("obs", "row", "column", "channel"), strict=True)))["images"]
    found = xr.Dataset({"x": x.variable, **variables(SHAPES_3D, list(labels.T))})
    found.set_close(data.close)
    return found


def is_cars3d(path: Path) -> bool:
    """Whether a folder has MATLAB files, and no images, which they would be about."""
    suffixes = {file.suffix.lower() for file in path.iterdir()} if path.is_dir() else set()
    return ".mat" in suffixes and suffixes.isdisjoint(IMAGE_SUFFIXES)


def read_cars3d(folder: Path) -> xr.Dataset:
    """Cars3D, a folder of `.mat` files, one for each car, in order of their names: images x and three factors.

    `elevation`, counted from 0, `azimuth` in degrees, `object` with the files' names. Raises ValueError for files that
    cannot be read, or hold something else, by name.
    """
    files = sorted(file for file in folder.iterdir() if file.suffix == ".mat")
    cars = [_car(file) for file in files]
    if odd := [file.name for file, car in zip(files, cars, strict=True) if car.shape != cars[0].shape]:
        raise ValueError(
            f"{', '.join(odd[:5])}: images are of another shape than {files[0].name}: take files of one set"
        )
    azimuths, elevations = cars[0].shape[:2]
    sizes = (len(cars), azimuths, elevations)
    car, azimuth, elevation = np.unravel_index(np.arange(math.prod(sizes)), sizes)
    factors = (Factor("object", [file.stem for file in files]), Factor("azimuth", period=360.0), Factor("elevation"))
    x = np.stack(cars).reshape(-1, *cars[0].shape[2:])
    known = variables(factors, (car, azimuth * (360 / azimuths), elevation))
    return xr.Dataset({"x": (("obs", "channel", "row", "column"), x), **known})


def _car(file: Path) -> np.ndarray:
    """The images of one file, (azimuth, elevation, channel, row, column)."""
    from scipy.io import loadmat

    arrays, error = attempt(lambda: loadmat(file, variable_names=["im"]))
    if arrays is None:
        raise ValueError(
            f"{file.name} cannot be read as a MATLAB file ({error or type(error).__name__}): fetch it again, or save "
            "it by save('-v7')"
        ) from error
    image = arrays.get("im")
    if not isinstance(image, np.ndarray) or image.ndim != 5 or image.shape[2] != 3 or image.dtype != np.uint8:
        there = "no array 'im'" if image is None else f"'im' of {image.dtype} and shape {image.shape}"
        raise ValueError(
            f"{file.name} has {there}, expected that of Cars3D, uint8 (row, column, 3, azimuth, elevation): of other "
            "files write np.savez(path, x=array)"
        )
    return image.transpose(3, 4, 2, 0, 1)


def _array(path: Path, name: str) -> np.ndarray:
    def read() -> np.ndarray:
        with np.load(path, allow_pickle=False) as file:
            return file[name]

    array, error = attempt(read)
    if not isinstance(array, np.ndarray):
        raise ValueError(
            f"{path.name}: its array {name!r} cannot be read ({error or 'it is no array'}): fetch it again"
        ) from error
    return array


def _x(path: Path, name: str, images: np.ndarray, last: tuple[int, ...]) -> xr.Variable:
    """Images (obs, row, column, *last) with their channel in front, one where they have none."""
    if images.ndim != 3 + len(last) or images.shape[3:] != last or images.dtype != np.uint8:
        raise ValueError(
            f"{path.name}: {name} is {images.dtype} of shape {images.shape}, expected uint8 "
            f"(n, row, column{''.join(f', {size}' for size in last)}): fetch it again"
        )
    x = images.transpose(0, 3, 1, 2) if last else images[:, None]
    return xr.Variable(("obs", "channel", "row", "column"), x)


def _check_known(path: Path, name: str, shape: tuple[int, ...], count: int, factors: tuple[Factor, ...]) -> None:
    if shape != (count, len(factors)):
        raise ValueError(
            f"{path.name}: {name} has shape {shape}, expected {(count, len(factors))}, one row for each image and one "
            f"column for each of {', '.join(factor.name for factor in factors)}: fetch it again"
        )
