"""Videos, frame by frame in order of time."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
import xarray as xr

from sami_ppl._util.errors import attempt
from sami_ppl._util.progress import say
from sami_ppl.data.pixels import resized
from sami_ppl.data.readers.images import Decoding

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg")
HELD_OUT = 5
"""One frame in so many is for testing."""


def is_video(path: Path) -> bool:
    """Whether a path has the suffix of a video."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def read_video(path: Path, how: Decoding) -> xr.Dataset:
    """Frames x (obs, channel, row, column) of a video in order of time, in uint8, of one channel if all are gray.

    The last fifth is the `split` "test": frames that follow each other are nearly the same, so that frames held out at
    random would have been seen. `attrs["frames_per_second"]` is as the file says. Raises ImportError without
    PyAV, ValueError for a file that cannot be decoded.
    """
    frames, rate = _decoded(path, how.resize)
    count = len(frames)
    split = np.where(np.arange(count) < count - count // HELD_OUT, "train", "test")
    x = frames.transpose(0, 3, 1, 2)
    return xr.Dataset(
        {"x": (("obs", "channel", "row", "column"), x[:, :1] if _is_gray(frames) else x)},
        coords={"split": ("obs", split)}, attrs={"frames_per_second": rate},
    )  # fmt: skip


def _decoded(path: Path, side: int | None) -> tuple[np.ndarray, float]:
    """Frames (frame, row, column, 3) and how many there are in a second."""
    try:
        import av
    except ImportError as error:
        raise ImportError(f"{path.name} is read by PyAV: pip install 'sami_ppl[video]'") from error

    def decode() -> tuple[list[np.ndarray], float]:
        with av.open(str(path.resolve())) as container:
            stream = container.streams.video[0]
            frames = [_upright(frame, side) for frame in container.decode(stream)]
            return frames, float(stream.average_rate or 0)

    found, error = attempt(decode)
    if found is None or not found[0]:
        raise ValueError(
            f"{path.name} cannot be decoded as a video ({error or 'it has no frames'}): write it anew, for instance by "
            f"ffmpeg -i {path.name} new.mp4, or save its frames as images in a folder"
        ) from error
    frames, rate = found
    if side is not None:
        say(f"{len(frames):,} frames: the shorter side is resized to {side}, the centre cropped")
    return np.stack(frames), rate


def _upright(frame: Any, side: int | None) -> np.ndarray:
    """One frame (row, column, 3), turned as telephones say."""
    pixels = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
    return pixels if side is None else np.asarray(resized(Image.fromarray(pixels), side))


def _is_gray(frames: np.ndarray) -> bool:
    return all((frame == frame[..., :1]).all() for frame in frames)
