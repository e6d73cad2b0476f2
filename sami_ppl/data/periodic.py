"""Factors that go round, such as angles: variables with their period in `attrs["period"]`."""

import numpy as np
import xarray as xr


def unrolled(data: xr.Dataset, names: list[str]) -> xr.Dataset:
    """With cosine and sine of every factor that goes round (`attrs["period"]`): no regression finds a jump of 2π."""
    parts = {}
    for name in names:
        if "period" in data[name].attrs:
            turn = 2 * np.pi * data[name].values / data[name].attrs["period"]
            parts |= {n: ("obs", f(turn)) for n, f in zip(unrolled_names(data[name]), (np.cos, np.sin), strict=True)}
    return data.assign(parts)


def unrolled_names(factor: xr.DataArray) -> list[str]:
    """Names of the variables that stand for a factor: its own, or those of its cosine and sine."""
    return [f"cos_{factor.name}", f"sin_{factor.name}"] if "period" in factor.attrs else [str(factor.name)]
