"""Observations for training and those held out, of arrays and Datasets alike."""

from typing import Any

import xarray as xr


def count_of(data: Any) -> int:
    """How many observations there are."""
    return data.sizes["obs"] if isinstance(data, xr.Dataset) else len(data)


def rows_of(data: Any, rows: slice) -> Any:
    """Some of them."""
    return data.isel(obs=rows) if isinstance(data, xr.Dataset) else data[rows]


def parted(data: Any) -> tuple[Any, Any]:
    """Observations to train on, and the last tenth, for validation."""
    count = count_of(data)
    if count < 2:
        raise ValueError(
            f"data hold {count} observation{'s' * (count != 1)} for training, and one of them is held out: give more"
        )
    cut = count - max(1, count // 10)
    return rows_of(data, slice(cut)), rows_of(data, slice(cut, None))
