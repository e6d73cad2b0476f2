"""Observations for training and those held out, of arrays, Datasets and streams alike."""

from typing import Any

import numpy as np
import xarray as xr

from sami_ppl.data.stream import Stream


def count_of(data: Any) -> int:
    """How many observations there are."""
    return data.sizes["obs"] if isinstance(data, xr.Dataset) else len(data)


def rows_of(data: Any, rows: slice | np.ndarray) -> Any:
    """Some of them."""
    return data.isel(obs=rows) if isinstance(data, xr.Dataset) else data[rows]


def parted(data: Any) -> tuple[Any, Any]:
    """Observations to train on, and the last tenth, for validation; of a stream, every tenth: it may be in an order."""
    count = count_of(data)
    if count < 2:
        raise ValueError(
            f"data hold {count} observation{'s' * (count != 1)} for training, and one of them is held out: give more"
        )
    if isinstance(data, Stream):
        held = np.arange(count) % min(10, count) == min(10, count) - 1
        return data.take(~held), data.take(held)
    cut = count - max(1, count // 10)
    return rows_of(data, slice(cut)), rows_of(data, slice(cut, None))
