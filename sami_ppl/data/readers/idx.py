"""Data in the IDX format of MNIST, Fashion-MNIST and their kin, as they are handed out: gzipped or not.

A file of images has a name such as `train-images-idx3-ubyte.gz`, that of its labels `train-labels-idx1-ubyte.gz`. The
format: two zero bytes, one for the type of numbers, one for how many dims there are; their lengths, in 32 bits each;
then the numbers, all with the most significant byte first (LeCun, Cortes & Burges, *The MNIST database*).
"""

import gzip
import math
from pathlib import Path
import re

import numpy as np
import xarray as xr

from sami_ppl._util.errors import attempt

KINDS = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
"""NumPy's names of the types of numbers, by their code in a file."""
NAME = re.compile(r"(?P<part>.+)[-_.]images[-_.]idx\d[-_.]ubyte(\.gz)?", re.IGNORECASE)
"""Names of files of images."""
PARTS = {"train": "train", "t10k": "test", "test": "test"}
"""Parts of a `split`, by how the names of their files begin."""


def idx_images(path: Path) -> list[Path]:
    """The files of images, by their names: `path` itself, or those in the folder; train before test."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    found = [file for file in files if NAME.fullmatch(file.name) and not file.is_dir()]
    return sorted(found, key=lambda file: PARTS.get(_part(file), "") == "test")


def read_idx(path: Path) -> xr.Dataset:
    """Images as they are stored, x (obs, channel, row, column), with the variable `label` where labels are beside them.

    Of a folder that has the files of both, `split` says which images are for training and which are for testing.
    Raises ValueError for files that are damaged or do not fit together, by name.
    """
    files = idx_images(path)
    parts = [_with_labels(file) for file in files]
    if len(parts) == 1:
        return parts[0]
    named = [PARTS.get(_part(file)) for file in files]
    if None in named or len(set(named)) != len(named):
        raise ValueError(
            f"{path.name} has images of several sets, {', '.join(file.name for file in files)}: give the file of one, "
            "or put those of one set, train and t10k, into a folder of their own"
        )
    if len({(part.x.shape[1:], *part.data_vars) for part in parts}) > 1:
        raise ValueError(
            f"the images in {path.name} differ in size, or only some have labels: {[dict(p.sizes) for p in parts]}"
        )
    split = np.repeat(np.array(named, str), [part.sizes["obs"] for part in parts])
    return xr.concat(parts, "obs").assign_coords(split=("obs", split))


def _part(file: Path) -> str:
    match = NAME.fullmatch(file.name)
    return match["part"].lower() if match else ""


def _with_labels(file: Path) -> xr.Dataset:
    images = read_array(file)
    if images.ndim != 3:
        raise ValueError(f"{file.name} has shape {images.shape}, images have (count, rows, columns)")
    x = {"x": (("obs", "channel", "row", "column"), images[:, None])}
    beside = re.sub("images", "labels", re.sub(r"idx\d", "idx1", file.name, flags=re.IGNORECASE), flags=re.IGNORECASE)
    stem = beside.removesuffix(".gz")
    labels = next((p for name in (stem, f"{stem}.gz") if (p := file.with_name(name)).is_file()), None)
    if labels is None:
        return xr.Dataset(x)
    known = read_array(labels)
    if known.shape != images.shape[:1]:
        raise ValueError(
            f"{labels.name} has shape {known.shape} and {file.name} {len(images):,} images: labels are one for each; "
            "take the files of one set"
        )
    return xr.Dataset({**x, "label": ("obs", known.astype(np.int32))})


def read_array(file: Path) -> np.ndarray:
    """The array of one file, gzipped or not. Raises ValueError for what is none, or is cut short."""
    raw, error = attempt(lambda: (gzip.open if file.suffix == ".gz" else open)(file, "rb").read())
    if raw is None:
        raise ValueError(f"{file.name} cannot be read ({error or type(error).__name__}): fetch it again") from error
    kind, dims = (KINDS.get(raw[2]), raw[3]) if len(raw) >= 4 and raw[:2] == b"\0\0" else (None, 0)
    if kind is None or len(raw) < 4 + 4 * dims:
        raise ValueError(f"{file.name} does not begin as an IDX file does: fetch it again, or write a .npz file")
    shape = tuple(np.frombuffer(raw, ">u4", dims, 4).tolist())
    start, wanted = 4 + 4 * dims, math.prod(shape) * np.dtype(kind).itemsize
    if len(raw) != start + wanted:
        raise ValueError(
            f"{file.name} holds {len(raw) - start:,} bytes of numbers, its shape {shape} needs {wanted:,}: "
            "fetch it again"
        )
    return np.frombuffer(raw, kind, offset=start).reshape(shape)
