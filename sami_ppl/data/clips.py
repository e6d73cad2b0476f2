"""Clips: short stretches of a video, of whole frames or of a patch of them; and stills."""

import jax
from jaxtyping import Array, Key, Shaped
import numpy as np

from sami_ppl._util.keys import check_key

TRIES = 50
"""Patches looked at for each one wanted, where only those are taken in which something moves."""
RED, GREEN, BLUE = 0.299, 0.587, 0.114
"""Shares of luminance (ITU-R BT.601), as Pillow takes them."""


def cut_clips(
    x: Shaped[np.ndarray, "frame *event"], length: int, *, step: int = 1
) -> Shaped[np.ndarray, "clip {length} *event"]:
    """Consecutive stretches of `length` frames, `step` frames apart, that do not overlap; the rest is left out.

    Raises ValueError for fewer frames than one stretch takes, and for a length or step below 1.
    """
    span = _span(len(x), length, step)
    starts = np.arange(len(x) // span) * span
    return np.asarray(x)[starts[:, None] + step * np.arange(length)]


def cut_patches(
    x: Shaped[np.ndarray, "frame channel row column"],
    sides: tuple[int, int],
    count: int,
    *,
    length: int = 1,
    step: int = 1,
    change: float = 0.0,
    key: Key[Array, ""],
) -> Shaped[np.ndarray, "clip {length} channel rows columns"]:
    """Patches of a video at random places and times, each `length` frames long: stills of one frame by default.

        stills = cut_patches(load_data("clip.mp4").x.values, (16, 16), 2000, key=key)[:, 0]

    Args:
        x: frames of a video in order of time.
        sides: rows and columns of a patch.
        count: how many patches.
        length: frames of each.
        step: every so many-th frame is taken.
        change: least root mean square change of a pixel from one frame taken to the next, averaged over the patch, in
            the unit of x. Where nothing moves, what changes is the noise of camera and compression.
        key: random key.

    Returns:
        The patches, fewer than `count` where `change` leaves fewer of 50 times as many.

    Raises:
        ValueError: frames smaller than a patch, or fewer than one takes; nothing that changes as much.
    """
    check_key(key)
    x = np.asarray(x)
    if x.ndim != 4 or x.shape[2] < sides[0] or x.shape[3] < sides[1]:
        raise ValueError(
            f"patches of {sides[0]}×{sides[1]} are cut out of frames (frame, channel, row, column) no smaller, but "
            f"x has shape {x.shape}"
        )
    span = _span(len(x), length, step)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    found = []
    for _ in range(count * (TRIES if change > 0 and length > 1 else 1)):
        if len(found) == count:
            break
        start, row, column = (
            rng.integers(most + 1) for most in (len(x) - span, x.shape[2] - sides[0], x.shape[3] - sides[1])
        )
        patch = x[start : start + span : step, :, row : row + sides[0], column : column + sides[1]]
        if length == 1 or np.sqrt(np.mean(np.diff(patch.astype(np.float32), axis=0) ** 2)) >= change:
            found.append(patch)
    if not found:
        raise ValueError(f"change={change:g}: none of {count * TRIES:,} patches changes as much, give less")
    return np.stack(found)


def luminance(
    x: Shaped[np.ndarray, "*obs channel row column"],
) -> Shaped[np.ndarray, "*obs 1 row column"]:
    """Grays of colour images in floating point; those of one channel as they are.

    Raises ValueError for images of neither one nor three channels.
    """
    channels = x.shape[-3]
    if channels not in (1, 3):
        raise ValueError(f"colours have 3 channels, grays 1, got {channels}, of shape {x.shape}")
    if channels == 1:
        return x
    return np.tensordot(x, np.array([RED, GREEN, BLUE], np.float32), axes=((-3,), (0,)))[..., None, :, :]


def _span(count: int, length: int, step: int) -> int:
    """Frames from the first to the last of a stretch, both counted. Raises ValueError where there are fewer."""
    if length < 1 or step < 1:
        raise ValueError(f"length={length}, step={step}: both must be at least 1")
    span = (length - 1) * step + 1
    if count < span:
        raise ValueError(
            f"there are {count} frames, but a clip of {length} frames, {step} apart, takes {span}: give a longer "
            "video, or shorter clips"
        )
    return span
