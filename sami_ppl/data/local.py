"""Data by their path, a user's own or those of the field: which format a path is of, and the reader of each.

Files are read as they are, with one exception: 8-bit images, stored as uint8 or as image files, are scaled from
[0, 255] to [−1, 1]. uint8 arrays with no value but 0 and 1 are masks and are scaled from [0, 1]; 16-bit image files
are scaled from [0, 65535].
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xarray as xr

from sami_ppl._util.progress import say
from sami_ppl.data.pixels import check_side, largest_byte, resized_array, scale_bytes
from sami_ppl.data.readers import arrays, folders, grids, idx, tables, video
from sami_ppl.data.readers.images import Decoding
from sami_ppl.data.readers.opened import Opened
from sami_ppl.data.stream import Stream


class Format(NamedTuple):
    """A format: its name, whether a path is of it, its reader, and what opens it as a source; None, it is read whole.

    `ordered`: whether observations may be in the order of their factors.
    """

    name: str
    is_of: Callable[[Path], bool]
    read: Callable[[Path, Decoding], xr.Dataset]
    open: Callable[[Path, Decoding], Opened] | None = None
    ordered: bool = False


def _suffix(*suffixes: str) -> Callable[[Path], bool]:
    return lambda path: path.suffix in suffixes


def _of_arrays(read: Callable[[Path], xr.Dataset]) -> Callable[[Path, Decoding], xr.Dataset]:
    """A reader of arrays, whose images are resized once they are read."""

    def resized(path: Path, how: Decoding) -> xr.Dataset:
        data = read(path)
        if how.resize is None or data.x.shape[-2:] == (how.resize, how.resize):
            return data
        x = resized_array(data.x.values, how.resize)
        say(f"{len(x):,} images: the shorter side is resized to {how.resize}, the centre cropped")
        return data.assign(x=(("obs", "channel", "row", "column"), x))

    return resized


def _store(open_it: Callable[[Path], Opened]) -> Callable[[Path, Decoding], Opened]:
    """What opens arrays, whose images must have their size."""

    def opened(path: Path, how: Decoding) -> Opened:
        found = open_it(path)
        if how.resize is not None:
            raise ValueError(
                f"resize={how.resize}: a stream of arrays is read as it is stored; leave it out, or write the arrays "
                "in the size that is wanted"
            )
        return found

    return opened


FORMATS = (
    Format("dSprites", grids.is_dsprites, _of_arrays(grids.read_dsprites), ordered=True),
    Format("MPI3D", grids.is_mpi3d, _of_arrays(grids.read_mpi3d), ordered=True),
    Format(".npz", _suffix(".npz"), _of_arrays(arrays.read_npz)),
    Format(".npy", _suffix(".npy"), _of_arrays(arrays.read_npy), _store(arrays.open_npy)),
    Format(
        "3D Shapes", grids.is_shapes3d, _of_arrays(grids.read_shapes3d), _store(grids.stream_shapes3d), ordered=True,
    ),
    Format(
        ".nc, .zarr, .h5", _suffix(".nc", ".zarr", *arrays.HDF5), _of_arrays(arrays.read_xarray),
        _store(arrays.open_store),
    ),
    Format("MNIST", lambda path: bool(idx.idx_images(path)), _of_arrays(idx.read_idx)),
    Format("Cars3D", grids.is_cars3d, _of_arrays(grids.read_cars3d), ordered=True),
    Format("a table of images", tables.is_table, tables.read_table, tables.open_table, ordered=True),
    Format("a video", video.is_video, video.read_video),
    Format("CelebA", folders.is_celeba, folders.read_celeba, folders.open_celeba),
    Format("images in sub-folders", folders.has_sub_folders, folders.read_images, folders.open_images, ordered=True),
    Format("images", Path.is_dir, folders.read_images, folders.open_images),
)  # fmt: skip
"""Formats in the order in which a path is tried for them."""


def load_data(path: str | Path, *, resize: int | None = None, skip_unreadable: bool = False) -> xr.Dataset:
    """Read a data set: x (obs, *event), of images (obs, channel, row, column), and what is known of each observation.

    - `.npz`: the array x, with observations on its first axis; further arrays of the same length become factors.
    - `.nc`, `.zarr`, `.h5`: a dataset with the variable x. `.npy`: one array, which is x.
    - a folder of images, in order of file name, with the names in the variable `file`: one channel if all are
      grayscale, else three. Of images in sub-folders, the first of these is the class, `label`, after those of training
      and testing, `split`. Images are turned as their EXIF says; what is transparent is shown on white.
    - MNIST and its kin, dSprites, 3D Shapes, MPI3D, Cars3D, CelebA, as they are handed out, with their factors.
    - `.parquet` files and folders of the library `datasets`, with a column of images.
    - a video, `.mp4` and others: its frames in order of time, the last fifth of them for testing.

    Classes are whole numbers, with their names in `attrs["names"]`; factors that go round have `attrs["period"]`. Where
    a data set goes through its factors in order its observations are mixed, always in the same way, since the first of
    them are taken for many figures; `obs` then is the place of each among those read.

    Args:
        path: a file or a folder.
        resize: the side of the images wanted: the shorter side is resized to it, the centre is cropped. Without it
            images must be of one size.
        skip_unreadable: whether images that cannot be read are left out, with a warning that names them.

    Raises:
        FileNotFoundError: nothing is at `path`.
        ImportError: a table without pyarrow, a video without PyAV.
        ValueError: what cannot be read as described; every image that is none, has several pages, or has another size
            is named.
    """
    path = Path(path)
    found = _format_of(path, resize)
    data = found.read(path, Decoding(resize, skip_unreadable))
    if found.ordered:
        data = _mixed(data)
        say(f"{found.name}: {data.sizes['obs']:,} observations, mixed, as they may be in the order of their factors")
    if data.x.dtype != np.uint8:
        return data
    x = data.x.values
    return data.assign(x=(data.x.dims, scale_bytes(x, largest_byte(x))))


def open_stream(path: str | Path, *, resize: int | None = None, skip_unreadable: bool = False) -> Stream:
    """Open a data set of any size: its observations are read when they are needed, in the order of the files.

    Of zarr, netCDF and HDF5 with the variable x and of `.npy`, of 3D Shapes, of folders of images and CelebA, and of
    `.parquet` files and folders of the library `datasets`, with factors and `split` as `load_data` has them. Memory
    holds what is in use and, for each row, some tens of bytes, of image files their names too.

    Args:
        path: a file or a folder.
        resize: the side of images wanted, as for `load_data`; not of arrays.
        skip_unreadable: whether images that cannot be read are left out, for which all are decoded once, now.

    Raises FileNotFoundError where nothing is at `path`, ImportError as `load_data` does, ValueError for formats that
    are read whole, and for what `load_data` would refuse that can be seen without reading all of it.
    """
    path = Path(path)
    found = _format_of(path, resize)
    if found.open is None:
        raise ValueError(
            f"{path.name} ({found.name}) can be read only as a whole: leave stream= out, or write "
            f'load_data("{path}").to_zarr("{path.stem}.zarr"), which can be streamed'
        )
    opened = found.open(path, Decoding(resize, skip_unreadable))
    stream = Stream(opened.source, chunks=opened.chunks, test=opened.test, name=path.name)
    return stream if opened.kept is None else stream.take(opened.kept)


def _format_of(path: Path, resize: int | None) -> Format:
    """The format of a path. Raises FileNotFoundError, and ValueError where it is of none."""
    check_side(resize)
    if not path.exists():
        raise FileNotFoundError(f"no data at {path}: expected a .npz, .nc or .zarr file, or a folder of images")
    found = next((one for one in FORMATS if one.is_of(path)), None)
    if found is None:
        raise ValueError(
            f"{path.name} has the suffix {path.suffix!r}, expected .npz, .nc, .zarr, a folder of images, .parquet, "
            ".mp4, .npy, .h5, or a file of MNIST's format with its name, as train-images-idx3-ubyte.gz: "
            'write for instance np.savez("data.npz", x=array)'
        )
    return found


def open_data(path: str | Path) -> xr.Dataset:
    """Open a `.zarr`, `.nc` or `.h5` dataset with the variable x, or 3D Shapes, without reading it; uint8 stays uint8.

    Raises FileNotFoundError where nothing is at `path`, ValueError for what is no such dataset.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no data at {path}: expected a .zarr or .nc file")
    if grids.is_shapes3d(path):
        return grids.open_shapes3d(path)
    if path.suffix not in (".zarr", ".nc", *arrays.HDF5):
        raise ValueError(
            f"{path.name} has the suffix {path.suffix!r}, expected .zarr, .nc or .h5, which can be read in parts: "
            f'write load_data("{path}").to_zarr("{path.stem}.zarr")'
        )
    return arrays.open_xarray(path)


def _mixed(data: xr.Dataset) -> xr.Dataset:
    order = np.random.default_rng(0).permutation(data.sizes["obs"])
    return data.isel(obs=order).assign_coords(obs=order)
