"""A user's own data: a `.npz`, `.nc` or `.zarr` file, a folder of images, or files like MNIST's, as a data set.

Files are read as they are, with one exception: 8-bit images, stored as uint8 or as image files, are scaled from
[0, 255] to [−1, 1]. uint8 arrays with no value but 0 and 1 are masks and are scaled from [0, 1].
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
import warnings

import numpy as np
from PIL import Image
import xarray as xr

from sami_ppl._util.errors import attempt
from sami_ppl.data.idx import idx_images, read_idx
from sami_ppl.data.layout import default_event_dims

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
GRAY_MODES = ("1", "L", "LA")
COLOUR_MODES = ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")


ONE_PHOTOGRAPH = ("MPO",)
"""Formats whose further pages are previews and depths of the first."""
ORIENTATION = 0x0112
"""The EXIF tag, and how an image is turned by its values."""
TURNS = dict(
    zip(range(2, 9), (getattr(Image.Transpose, turn) for turn in (
        "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"
    )), strict=True)
)  # fmt: skip


def load_data(path: str | Path) -> xr.Dataset:
    """Read a data set.

    - `.npz`: the array x, with observations on its first axis; further arrays of the same length become factors.
    - `.nc`, `.zarr`: a dataset with the variable x.
    - a folder of images of one square size, in order of file name: x (obs, channel, row, column) with one channel
      if all are grayscale, else three (transparency is dropped), and the names in the variable `file`.
    - IDX files as MNIST and its kin have them (`idx`): one of images, with the variable `label` where its labels are
      beside it, or a folder of those for training and for testing, with their `split`.

    Raises FileNotFoundError where nothing is at `path`, ValueError for what cannot be read as described; of a folder it
    names every file that is no image, has several pages, or has another size. Warns of EXIF that cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no data at {path}: expected a .npz, .nc or .zarr file, or a folder of images")
    if path.suffix in READERS:
        data = READERS[path.suffix](path)
    elif idx_images(path):
        data = read_idx(path)
    elif path.is_dir():
        data = _read_images(path)
    else:
        raise ValueError(
            f"{path.name} has the suffix {path.suffix!r}, expected {', '.join(READERS)}, a folder of images, or a file "
            "of MNIST's format with its name, as train-images-idx3-ubyte.gz: "
            'write for instance np.savez("data.npz", x=array)'
        )
    if data.x.dtype != np.uint8:
        return data
    x = data.x.values
    return data.assign(x=(data.x.dims, scale_bytes(x, 1 if x.size and x.max() <= 1 else 255)))


def open_data(path: str | Path) -> xr.Dataset:
    """Open a `.zarr` or `.nc` dataset with the variable x without reading it; uint8 stays uint8.

    Raises FileNotFoundError where nothing is at `path`, ValueError for what is no such dataset.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no data at {path}: expected a .zarr or .nc file")
    if path.suffix not in (".zarr", ".nc"):
        raise ValueError(
            f"{path.name} has the suffix {path.suffix!r}, expected .zarr or .nc, which can be read in parts: "
            f'write load_data("{path}").to_zarr("{path.stem}.zarr")'
        )
    return _open_xarray(path)


def scale_bytes(x: np.ndarray, top: int) -> np.ndarray:
    """[0, top] to [−1, 1] in float32; `top` is 255, or 1 for masks."""
    scaled = x.astype(np.float32)
    scaled *= np.float32(2 / top)
    scaled -= np.float32(1)  # in place: images may fill the memory
    return scaled


def _read_npz(path: Path) -> xr.Dataset:

    def read() -> dict[str, np.ndarray]:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
        if others := [name for name, array in found.items() if not isinstance(array, np.ndarray)]:
            raise ValueError(f"{', '.join(others)} in it is no array")
        return found

    arrays, error = attempt(read)
    if arrays is None:
        raise ValueError(
            f"{path.name} cannot be read as a .npz file of plain arrays ({_reason(error)}): "
            "write it by np.savez(path, x=array), with no object arrays in it"
        ) from error
    if "x" not in arrays:
        raise ValueError(f"{path.name} has no array 'x', it has {sorted(arrays)}: write np.savez(path, x=array)")
    x = arrays.pop("x")
    if x.ndim < 2:
        raise ValueError(
            f"array 'x' in {path.name} has shape {x.shape}, expected observations on the first axis and at least one "
            "axis more: write np.savez(path, x=array[:, None])"
        )
    if taken := sorted({"obs", *default_event_dims(x.shape[1:])} & set(arrays)):
        raise ValueError(
            f"{path.name} has arrays named as dims of x are, {', '.join(taken)}, which would not be kept as factors: "
            f"write another name, np.savez(path, x=x, centre_{taken[0]}=array)"
        )
    factors = {name: a for name, a in arrays.items() if a.ndim and len(a) == len(x)}
    if others := sorted(set(arrays) - set(factors)):
        warnings.warn(
            f"{path.name}: {others} left out, a factor has one entry for each of the {len(x)} observations of x",
            stacklevel=4,
        )
    return xr.Dataset(
        {
            "x": (("obs", *default_event_dims(x.shape[1:])), x),
            **{name: (("obs", *(f"{name}_axis{i}" for i in range(a.ndim - 1))), a) for name, a in factors.items()},
        }
    )


def _read_xarray(path: Path) -> xr.Dataset:
    with _open_xarray(path) as data:
        return _opened(path, data.load)


def _opened(path: Path, read: Callable[[], xr.Dataset]) -> xr.Dataset:
    data, error = attempt(read)
    if data is None:
        raise ValueError(
            f"{path.name} cannot be read as a dataset ({_reason(error)}): write it by xarray, "
            f"dataset.to_{'zarr' if path.suffix == '.zarr' else 'netcdf'}(path), with no dim called 'x' beside the "
            "variable x"
        ) from error
    return data


def _reason(error: Exception | None) -> str:
    return str(error) or type(error).__name__


def _open_xarray(path: Path) -> xr.Dataset:
    # Without consolidated=False, a zarr store that has no consolidated metadata is read with a warning.
    options = {"engine": "zarr", "consolidated": False} if path.suffix == ".zarr" else {}
    data = _opened(path, lambda: xr.open_dataset(path, **options))
    if "x" not in data.data_vars:
        raise ValueError(
            f"{path.name} has no variable 'x', it has {sorted(map(str, data.data_vars))}: "
            'write dataset.rename({"<name>": "x"}) before saving'
        )
    return data


READERS: dict[str, Callable[[Path], xr.Dataset]] = {".npz": _read_npz, ".nc": _read_xarray, ".zarr": _read_xarray}


def _read_images(folder: Path) -> xr.Dataset:
    entries = [p for p in folder.iterdir() if not p.name.startswith(".")]
    # A link whose target is not there is no file, and an image that would be missed.
    files = sorted(p for p in entries if not p.is_dir() and p.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        inside = ", ".join(sorted(p.name + "/" * p.is_dir() for p in entries)[:5]) or "nothing"
        raise ValueError(
            f"folder {folder} has no image files ({', '.join(IMAGE_SUFFIXES)}), it has {inside}: "
            "put the images directly into one folder (sub-folders are not searched)"
        )
    images, faults = [], []
    for file in files:
        try:
            images.append(_open_image(file))
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise ValueError(_listed(faults, "\n"))
    _check_sizes([file.name for file in files], [image.size for image in images])
    mode = "L" if all(image.mode == "L" for image in images) else "RGB"
    x = np.stack([np.asarray(image.convert(mode)) for image in images])
    x = x[:, None] if mode == "L" else x.transpose(0, 3, 1, 2)
    return xr.Dataset(
        {"x": (("obs", "channel", "row", "column"), x), "file": ("obs", np.array([file.name for file in files]))}
    )


def _open_image(file: Path) -> Image.Image:
    """One image in mode L or RGB, upright. Raises ValueError, with the file's name, where it is none, or several."""
    try:
        with Image.open(file) as image:
            mode, pages = image.mode, 1 if image.format in ONE_PHOTOGRAPH else getattr(image, "n_frames", 1)
            if pages == 1 and mode in GRAY_MODES + COLOUR_MODES:
                image.load()
                return _converted(_upright(image, file.name))
    except Exception as error:  # of a damaged file Pillow raises nearly anything: SyntaxError, TypeError, struct.error
        raise ValueError(f"{file.name} cannot be read as an image ({error}): repair it or take it away") from error
    if pages > 1:
        raise ValueError(
            f"{file.name} has {pages} pages, and an observation is one: save every page as a file of its own, or stack "
            'them yourself and write np.savez("data.npz", x=array)'
        )
    raise ValueError(
        f"{file.name} has pixels of mode {mode!r}, expected 8-bit grayscale or colour: "
        'convert it, or scale the images yourself and write np.savez("data.npz", x=array)'
    )


def _upright(image: Image.Image, name: str) -> Image.Image:
    """The image turned as its EXIF says; where that cannot be read, as it is, with a warning."""
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception as error:
        warnings.warn(f"{name}: its EXIF cannot be read ({error}), it is not turned by it", stacklevel=6)
        turn = None
    return image if turn is None else image.transpose(turn)


def _converted(image: Image.Image) -> Image.Image:
    if image.mode in GRAY_MODES:
        return image.convert("L")
    colour = image.convert("RGB")
    # Formats like gif store grays as a palette.
    gray = image.mode == "P" and np.ptp(np.asarray(colour), axis=-1).max() == 0
    return colour.convert("L") if gray else colour


def _listed(items: list[str], between: str, most: int = 10) -> str:
    more = [f"and {len(items) - most} more"] if len(items) > most else []
    return between.join([*items[:most], *more])


def _check_sizes(names: list[str], sizes: list[tuple[int, int]]) -> None:
    counts = Counter(sizes)
    expected = next((size for size, _ in counts.most_common() if size[0] == size[1]), None)
    odd = [i for i, size in enumerate(sizes) if size != expected]
    if not odd:
        return
    seen = ", ".join(f"{w}×{h} ({count} file{'s' * (count > 1)})" for (w, h), count in counts.most_common(5))
    more = f" and {len(counts) - 5} sizes more" if len(counts) > 5 else ""
    named = _listed([f"{names[i]} ({sizes[i][0]}×{sizes[i][1]})" for i in odd], ", ")
    are = "the odd ones are" if len(odd) > 1 else "the odd one is"
    raise ValueError(
        f"all images must have one square size, got {seen}{more}; {are} {named}: "
        "crop or resize them, for instance by PIL.ImageOps.fit(image, (64, 64))"
    )
