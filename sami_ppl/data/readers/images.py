"""Images one by one, from files or from bytes: decoded, turned upright, brought to one size, and stacked."""

import abc
from collections import Counter
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import NamedTuple
import warnings

import numpy as np
from PIL import Image
import xarray as xr

from sami_ppl._util.progress import advance, phase, say
from sami_ppl.data.pixels import DEEPEST, resized, scale_bytes

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
GRAY_MODES = ("1", "L", "LA")
DEEP_MODES = ("I;16", "I;16B", "I;16L", "I;16N")
"""16-bit grays."""
COLOUR_MODES = ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
ONE_PHOTOGRAPH = ("MPO",)
"""Formats whose further pages are previews and depths of the first."""
GLANCES = 200
"""Images of a stream that tell what the others are like, at most."""
ORIENTATION = 0x0112
"""The EXIF tag, and how an image is turned by its values."""
TURNS = dict(
    zip(range(2, 9), (getattr(Image.Transpose, turn) for turn in (
        "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"
    )), strict=True)
)  # fmt: skip


class Decoding(NamedTuple):
    """How images are read: the side that they are resized to, if any, and whether what cannot be read is left out."""

    resize: int | None = None
    skip_unreadable: bool = False


class Stack(NamedTuple):
    """Images x (n, channel, row, column), in uint8, or of 16 bits in float32 and [−1, 1]; which of those given."""

    x: np.ndarray
    kept: np.ndarray


def stack_images(images: Iterable[tuple[str, Path | bytes | str]], how: Decoding) -> Stack:
    """Images of one size, of one channel if all are gray, else of three.

    `images`: of each its name, for messages, and its file or its bytes, or, as text, why it has none. A line says what
    was resized. Raises ValueError with the name of every image that cannot be read, unless they are to be left out,
    which a warning says, and for images of other sizes where they are not resized.
    """
    found, names, sizes, faults, kept = [], [], [], [], []
    for name, source in images:
        try:
            image = _opened(name, source)
        except ValueError as error:
            faults.append(str(error))
            kept.append(False)
            continue
        kept.append(True)
        names.append(name)
        sizes.append(image.size)
        found.append(_pixels(image, how))
    if not kept:
        raise ValueError("there are no images in it: give a data set that has some")
    if faults and not (how.skip_unreadable and found):
        leave = "" if how.skip_unreadable else "\nor leave them out: skip_unreadable=True"
        raise ValueError(_listed(faults, "\n") + leave)
    if faults:
        warnings.warn(f"{len(faults)} of {len(kept)} images left out:\n" + _listed(faults, "\n"), stacklevel=4)
    if how.resize is None:
        _check_sizes(names, sizes)
    elif set(sizes) != {(how.resize, how.resize)}:
        say(_told(sizes, how.resize))
    return Stack(_stacked(found), np.array(kept))


def _stacked(found: list[np.ndarray], *, deep: bool = False, colour: bool = False) -> np.ndarray:
    """Of different depths and channels the most, or what is asked for where that is more."""
    deep, colour = deep or any(a.dtype == np.uint16 for a in found), colour or any(a.ndim == 3 for a in found)
    shape = (len(found), 3 if colour else 1, *found[0].shape[:2])
    x = np.empty(shape, np.float32 if deep else np.uint8)
    for place, image in zip(x, found, strict=True):
        values = scale_bytes(image, DEEPEST if image.dtype == np.uint16 else 255) if deep else image
        place[:] = values.transpose(2, 0, 1) if values.ndim == 3 else values
    return x


class ImageSource(abc.ABC):
    """Images that are decoded when they are needed: a source for `data.stream.Stream`.

    What they are like is told by up to 200 of them, from the first to the last: of one size, of three channels where
    one of these has colour, of 16 bits where one has. Others are brought to that where nothing is lost, and refused by
    name where something would be. Raises ValueError as `stack_images` does, of those 200.
    """

    def __init__(self, how: Decoding):
        self.how = how
        self.left_out = np.empty(0, int)
        if how.skip_unreadable:
            self._leave_out()
        kept = np.setdiff1d(np.arange(len(self)), self.left_out)
        if not len(kept):
            raise ValueError("there are no images in it: give a data set that has some")
        some = kept[np.unique(np.linspace(0, len(kept) - 1, min(GLANCES, len(kept))).round().astype(int))]
        x = stack_images(self.images(some), how._replace(skip_unreadable=False)).x
        self.shape, self.deep = x.shape[1:], x.dtype == np.float32

    def _leave_out(self) -> None:
        """Decode all once, with a warning that names those that cannot be."""
        faults = []
        with phase("reading every image once, to leave out what cannot be read"):
            for row in range(len(self)):
                ((name, source),) = self.images(np.array([row]))
                try:
                    _opened(name, source)
                except ValueError as error:
                    self.left_out = np.append(self.left_out, row)
                    faults.append(str(error))
                advance(row + 1, len(self))
        if faults:
            warnings.warn(f"{len(faults)} of {len(self)} images left out:\n" + _listed(faults, "\n"), stacklevel=5)

    @property
    def kept(self) -> np.ndarray | None:
        """Which are not left out; None for all."""
        return np.setdiff1d(np.arange(len(self)), self.left_out) if len(self.left_out) else None

    @abc.abstractmethod
    def __len__(self) -> int:
        """How many images there are."""

    @abc.abstractmethod
    def images(self, i: np.ndarray) -> Iterable[tuple[str, Path | bytes | str]]:
        """The images at these places, as `stack_images` takes them."""

    @abc.abstractmethod
    def variables(self, i: np.ndarray) -> dict[str, xr.Variable]:
        """What is known of them."""

    def rows(self, i: np.ndarray, /) -> xr.Dataset:
        """The images at these places, x (obs, channel, row, column), and what is known of them."""
        found = []
        for row, (name, source) in zip(i, self.images(i), strict=True):
            if row in self.left_out:  # never asked for but with its neighbours
                found.append(np.zeros(self.shape[1:], np.uint8))
                continue
            try:
                pixels = _pixels(_opened(name, source), self.how)
            except ValueError as error:
                raise ValueError(f"row {row:,}, {error}") from error
            colour, deep, size = pixels.ndim == 3, pixels.dtype == np.uint16, pixels.shape[:2]
            if size != self.shape[1:] or (colour and self.shape[0] == 1) or (deep and not self.deep):
                kind = f"{size[1]}×{size[0]}, {'colour' if colour else 'gray'}, {16 if deep else 8} bits"
                raise ValueError(
                    f"row {row:,}, {name} is {kind}, those looked at first are {self.shape[2]}×{self.shape[1]}, "
                    f"{'colour' if self.shape[0] == 3 else 'gray'}, {16 if self.deep else 8} bits: convert it, or "
                    "resize all by resize="
                )
            found.append(pixels)
        x = _stacked(found, deep=self.deep, colour=self.shape[0] == 3)
        return xr.Dataset({"x": (("obs", "channel", "row", "column"), x), **self.variables(i)})


def _told(sizes: list[tuple[int, int]], side: int) -> str:
    few = sorted(set(sizes), key=lambda size: size[0] * size[1])
    ends = " to ".join(f"{w}×{h}" for w, h in dict.fromkeys((few[0], few[-1])))
    which = ends if len(few) == 1 else f"{len(few)} sizes, {ends}"
    small = sum(min(size) < side for size in sizes)
    larger = f", {small:,} of them enlarged" if small else ""
    return f"{len(sizes):,} images of {which}{larger}: the shorter side is resized to {side}, the centre cropped"


def _opened(name: str, source: Path | bytes | str) -> Image.Image:
    """One image of mode L, RGB or I;16, upright. Raises ValueError, with its name, where it is none, or several."""
    if isinstance(source, str):
        raise ValueError(f"{name}: {source}")
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
            mode = "I;16" if (image.mode, image.format) == ("I", "PPM") else image.mode
            pages = 1 if image.format in ONE_PHOTOGRAPH else getattr(image, "n_frames", 1)
            if pages == 1 and mode in GRAY_MODES + DEEP_MODES + COLOUR_MODES:
                image.load()
                return _converted(_upright(image, name))
    except Exception as error:  # of a damaged file Pillow raises nearly anything: SyntaxError, TypeError, struct.error
        raise ValueError(f"{name} cannot be read as an image ({error}): repair it or take it away") from error
    if pages > 1:
        raise ValueError(
            f"{name} has {pages} pages, and an observation is one: save every page as a file of its own, or stack "
            'them yourself and write np.savez("data.npz", x=array)'
        )
    raise ValueError(
        f"{name} has pixels of mode {mode!r}, expected grayscale of 8 or 16 bits or colour of 8: "
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
    if image.mode == "I":  # 16 bits, in .pgm
        return Image.fromarray(np.asarray(image).astype(np.uint16))
    if image.mode in DEEP_MODES:
        return image
    gray = image.mode in GRAY_MODES
    if image.has_transparency_data:
        # What lies behind transparent pixels is as a rule noise: they are shown on white, as pages show them.
        shown = image.convert("RGBA")
        colour = Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown).convert("RGB")
    elif gray:
        return image.convert("L")
    else:
        colour = image.convert("RGB")
    # Formats like gif store grays as a palette.
    gray = gray or (image.mode == "P" and np.ptp(np.asarray(colour), axis=-1).max() == 0)
    return colour.convert("L") if gray else colour


def _fitted(image: Image.Image, side: int) -> Image.Image:
    """As `resized`; 16 bits, which Pillow does not resize, by way of floating point."""
    if image.mode not in DEEP_MODES:
        return resized(image, side)
    return resized(Image.fromarray(np.asarray(image).astype(np.float32)), side)


def _pixels(image: Image.Image, how: Decoding) -> np.ndarray:
    """(row, column) or (row, column, 3), uint8 or uint16."""
    image = image if how.resize is None else _fitted(image, how.resize)
    values = np.asarray(image)
    if image.mode == "F":
        return np.clip(np.rint(values), 0, DEEPEST).astype(np.uint16)
    return values.astype(values.dtype.newbyteorder("="))


def _listed(items: list[str], between: str, most: int = 10) -> str:
    more = [f"and {len(items) - most} more"] if len(items) > most else []
    return between.join([*items[:most], *more])


def _check_sizes(names: list[str], sizes: list[tuple[int, int]]) -> None:
    counts = Counter(sizes)
    if len(counts) == 1:
        return
    expected = max(counts, key=lambda size: (counts[size], size[0] == size[1]))
    odd = [i for i, size in enumerate(sizes) if size != expected]
    seen = ", ".join(f"{w}×{h} ({count} file{'s' * (count > 1)})" for (w, h), count in counts.most_common(5))
    more = f" and {len(counts) - 5} sizes more" if len(counts) > 5 else ""
    named = _listed([f"{names[i]} ({sizes[i][0]}×{sizes[i][1]})" for i in odd], ", ")
    are = "the odd ones are" if len(odd) > 1 else "the odd one is"
    raise ValueError(
        f"all images must have one size, got {seen}{more}; {are} {named}: resize the shorter side and crop the "
        f"centre of all by resize={min(expected)}"
    )
