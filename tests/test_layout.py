"""Arrays as users have them, in the layout of a program: by the names of their dims, or by their shape."""

import numpy as np
import pytest
import xarray as xr

from sami_ppl.data.layout import arranged, layout_of

IMAGES = np.arange(2 * 3 * 8 * 10, dtype=np.float32).reshape(2, 3, 8, 10)
DIMS = ("channel", "row", "column")
LAST = np.moveaxis(IMAGES, 1, -1)


@pytest.mark.parametrize(
    ("x", "shape", "change"),
    [
        (np.zeros((5, 7)), (7,), ""),
        (IMAGES, (3, 8, 10), ""),
        (LAST, (3, 8, 10), "channels moved to the front"),
        (IMAGES[:, 0], (1, 8, 10), "a channel added"),
        (np.zeros((5, 2, 30)), (2, 30), ""),
    ],
)
def test_layout_of_arrays(x, shape, change):
    """By shape alone."""
    found = layout_of(x)
    assert (found.event_shape, found.change) == (shape, change)
    assert found.is_image == (len(shape) == 3)


@pytest.mark.parametrize(
    ("dims", "sizes", "expected"),
    [
        (("lat", "lon"), (8, 9), ("channel", "lat", "lon")),
        (("lat", "lon", "band"), (8, 9, 5), ("band", "lat", "lon")),
        (("row", "channel", "column"), (8, 5, 9), ("channel", "row", "column")),
        (("channel", "row", "column"), (4, 8, 3), ("channel", "row", "column")),
        (("time", "feature"), (8, 9), ("time", "feature")),
        (("wavelength",), (50,), ("wavelength",)),
    ],
)
def test_layout_of_named_dims(dims, sizes, expected):
    """Names say what shapes cannot."""
    assert layout_of(xr.Dataset({"x": (("obs", *dims), np.zeros((4, *sizes)))})).event_dims == expected


def test_dims_are_matched_by_name():
    """Of a square image the shape would not tell."""
    square = np.arange(2 * 25.0).reshape(2, 1, 5, 5)
    np.testing.assert_array_equal(arranged(square, DIMS, (1, 5, 5), DIMS), square)
    turned = arranged(square.swapaxes(2, 3), ("channel", "column", "row"), (1, 5, 5), DIMS)
    np.testing.assert_array_equal(turned, square)
    assert not np.array_equal(arranged(square.swapaxes(2, 3), DIMS, (1, 5, 5), DIMS), square)


def test_arrays_are_matched_by_shape():
    """Channels that are last, and grey images without a channel; what fits no way is left to the check of shapes."""
    np.testing.assert_array_equal(arranged(LAST, None, (3, 8, 10), DIMS), IMAGES)
    np.testing.assert_array_equal(arranged(IMAGES[:, 0], None, (1, 8, 10), DIMS), IMAGES[:, :1])
    assert arranged(IMAGES, None, (3, 10, 8), DIMS) is IMAGES
