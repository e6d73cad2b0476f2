"""How one observation lies in the arrays that users have: channels first or last, grey images without a channel.

A program takes images as (channel, row, column), whatever the user's arrays are, volumes as (channel, depth, row,
column), and signals as (channel, length): what is told from a matrix or a vector by the name of its first dim, or by
the wish for a U-Net. Dims that have names are matched by name, those that have none by shape.
"""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

CHANNELS = ("channel", "channels", "band", "bands", "colour", "color", "rgb")
"""Names by which a dim is one of channels."""
LEAST_SIDE = 6
"""Of arrays without names of dims: a matrix with shorter sides is no image."""


class Layout(NamedTuple):
    """Shape and names of the dims of one observation, and what was done to get there, for the user; "" for nothing."""

    event_shape: tuple[int, ...]
    event_dims: tuple[str, ...]
    change: str

    @property
    def is_image(self) -> bool:
        """Whether it has channels, rows and columns."""
        return len(self.event_shape) == 3

    @property
    def has_sides(self) -> bool:
        """Whether it is (channel, *sides) with neighbours along the sides: an image, a volume, or a named signal."""
        named = str(self.event_dims[0]).lower() in CHANNELS
        return {2: named, 3: True, 4: named}.get(len(self.event_shape), False)

    @property
    def with_channel(self) -> "Layout":
        """Of a vector, the signal of one channel; else itself."""
        if len(self.event_shape) != 1:
            return self
        side = "place" if self.event_dims == ("feature",) else self.event_dims[0]
        return Layout((1, *self.event_shape), ("channel", side), "a channel added")


def layout_of(data: xr.Dataset | np.ndarray) -> Layout:
    """The layout that a program should have for these observations: (channel, row, column) for images.

    `data`: x as an array (obs, *event), or a Dataset with the variable x on obs.
    """
    named = isinstance(data, xr.Dataset)
    shape = tuple((data["x"] if named else data).shape[1:])
    dims: tuple[Any, ...] = tuple(data["x"].dims[1:]) if named else default_event_dims(shape)
    last = _channel_axis(shape, dims if named else None)
    if last is not None:
        order = (last, *(i for i in range(3) if i != last))
        names = tuple(dims[i] for i in order) if named else ("channel", "row", "column")
        return Layout(tuple(shape[i] for i in order), names, "channels moved to the front")
    if len(shape) == 2 and min(shape) >= LEAST_SIDE and not (named and {*dims} & {"time", "feature", *CHANNELS}):
        names = dims if named else ("row", "column")
        return Layout((1, *shape), ("channel", *names), "a channel added")
    return Layout(shape, dims, "")


def check_name(name: Hashable, of: str) -> None:
    """Raise ValueError for the name of a variable or a dim that no file of results can hold; `of` says what has it."""
    if not isinstance(name, str) or not name or "/" in name or "\0" in name:
        raise ValueError(
            f"{of} is called {name!r}, but results are files of named variables: give it a name of text, not empty and "
            "without '/'"
        )


def default_event_dims(event_shape: tuple[int, ...]) -> tuple[str, ...]:
    """Names of the dims of one observation: ("feature",) for vectors, ("channel", "row", "column") for images, with
    "depth" between for volumes.
    """
    # A dim must not be called x: that is the name of the variable.
    if len(event_shape) == 1:
        return ("feature",)
    if len(event_shape) in (3, 4):
        return ("channel", "depth", "row", "column")[:1] + ("depth", "row", "column")[4 - len(event_shape) :]
    return tuple(f"x_axis{i}" for i in range(len(event_shape)))


def arranged(x: Any, dims: Sequence[Hashable] | None, event_shape: tuple[int, ...], event_dims: tuple[str, ...]) -> Any:
    """Observations (obs, *event) in the layout of a program, where that is another order of theirs or lacks a channel.

    `dims`: names of the dims of one observation, where they have names. What fits neither way is returned as it is.
    """
    shape = tuple(np.shape(x)[1:])
    if dims is not None and tuple(dims) != event_dims and len(dims) == len(event_dims) and {*dims} == {*event_dims}:
        return np.transpose(np.asarray(x), (0, *(1 + list(dims).index(dim) for dim in event_dims)))
    if shape == event_shape or not 2 <= len(event_shape) <= 4:
        return x
    channels, *sides = event_shape
    if len(event_shape) == 3 and shape == (*sides, channels):
        return np.moveaxis(np.asarray(x), -1, 1)
    if channels == 1 and shape == tuple(sides):
        return np.asarray(x)[:, None]
    return x


def _channel_axis(shape: tuple[int, ...], dims: tuple[Any, ...] | None) -> int | None:
    """Which dim of an image that has its channels elsewhere than in front is that of channels."""
    if len(shape) != 3:
        return None
    found = [i for i, dim in enumerate(dims or ()) if str(dim).lower() in CHANNELS]
    if found:
        return found[0] or None
    return 2 if shape[2] in (1, 3, 4) and min(shape[:2]) > shape[2] else None
