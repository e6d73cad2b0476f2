"""Pixels: their scale, and images brought to one size."""

import warnings

from jaxtyping import Float
import numpy as np
from PIL import Image, ImageOps

from sami_ppl.data.layout import arranged, layout_of

DEEPEST = 65535
"""White of 16 bits."""
UNLIKELY = 10.0
"""Root mean square of observations, in units of the program's own statistics, from which another scale is likely."""
SCALED = 1024
"""Observations whose scale is looked at, at most."""


def scale_bytes(x: np.ndarray, top: int) -> np.ndarray:
    """[0, top] to [−1, 1] in float32; `top` is 255, 1 for masks, or `DEEPEST`."""
    scaled = x.astype(np.float32)
    scaled *= np.float32(2 / top)
    scaled -= np.float32(1)  # in place: images may fill the memory
    return scaled


def largest_byte(x: np.ndarray) -> int:
    """The `top` of `scale_bytes` for 8-bit values: 1 where none is above 1, a mask, else 255."""
    return 1 if x.size and x.max() <= 1 else 255


def warn_of_scale(x: Float[np.ndarray, "obs *event"], statistics: tuple[float, float] | None) -> None:
    """Warn of observations on another scale than those that a program was built for, such as pixels from 0 to 255.

    `statistics`: mean and standard deviation of these, where they are known.
    """
    if statistics is None or not x.size:
        return
    (mean, std), x = statistics, x[:SCALED]
    size = float(np.sqrt(np.nanmean(np.square((x - mean) / std, dtype=np.float64))))
    if size > UNLIKELY:
        warnings.warn(
            f"x ranges from {np.nanmin(x):g} to {np.nanmax(x):g}, but the program was built for values of mean "
            f"{mean:.3g} and standard deviation {std:.3g}: is it on another scale? Pixels from 0 to 255 are scaled by "
            "x / 127.5 - 1, others as the data of the fit were",
            stacklevel=3,
        )


def check_side(side: int | None) -> None:
    """Raise ValueError for a side of images that is none."""
    if side is not None and side < 1:
        raise ValueError(f"resize={side}: must be at least 1, the side of the images in pixels")


def resized(image: Image.Image, side: int) -> Image.Image:
    """The shorter side resized to `side`, bicubic and without aliasing, the centre of the longer one cut out."""
    return image if image.size == (side, side) else ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)


def resized_array(x: np.ndarray, side: int) -> Float[np.ndarray, "obs channel {side} {side}"]:
    """Images (obs, *event) as `resized` makes them, channels first, 8-bit ones scaled to [−1, 1].

    Raises ValueError for what are no images of 8 bits or floating point.
    """
    layout = layout_of(x)
    if not layout.is_image or not (x.dtype == np.uint8 or x.dtype.kind == "f"):
        raise ValueError(
            f"resize={side} is for images of 8 bits or floating point, (obs, channel, row, column), but x is "
            f"{x.dtype} of shape {x.shape}: leave it out, and resize before you write the file"
        )
    x = arranged(x, None, layout.event_shape, layout.event_dims)
    top = largest_byte(x) if x.dtype == np.uint8 else None
    found = np.empty((*x.shape[:2], side, side), np.float32)
    for image, place in zip(x, found, strict=True):
        values = image.astype(np.float32) if top is None else scale_bytes(image, top)
        for channel, out in zip(values, place, strict=True):
            # Bicubic weights are negative in part: what they overshoot is cut off.
            out[:] = np.clip(np.asarray(resized(Image.fromarray(channel), side)), channel.min(), channel.max())
    return found
