"""What a program file must know of its data to build the same program again, and data that say no more than that."""

from typing import Any

import numpy as np
import xarray as xr

from sami_ppl.program.program import Program


def outline(program: Program, data: xr.Dataset) -> dict[str, Any]:
    """Dims and shape of one observation, and the values that the program has of the variables its prior takes.

    Plain values, as JSON takes them.
    """
    given = zip(program.given.names, map(np.asarray, program.given.arrays), strict=True)
    return {
        "missing": program.denoiser.seen is not None,
        "dims": list(data["x"].dims[1:]),
        "shape": list(data["x"].shape[1:]),
        "given": {name: {"dtype": str(a.dtype), "values": a.tolist()} for name, a in given},
    }


def outlined(found: dict[str, Any]) -> xr.Dataset:
    """Data of which the file builds the same program: one observation is black, the others are white.

    Where something was missing, one value is.
    """
    given = {name: np.asarray(v["values"], v["dtype"]) for name, v in found["given"].items()}
    rows = max([2, *map(len, given.values())])
    x = np.ones((rows, *found["shape"]), np.float32)
    x[0] = 0
    if found.get("missing"):
        x[0].flat[0] = np.nan
    variables: dict[str, Any] = {"x": (("obs", *found["dims"]), x)}
    for name, value in given.items():
        dims = ("obs", *(f"{name}_axis{i}" for i in range(1, value.ndim)))
        variables[name] = (dims, np.resize(value, (rows, *value.shape[1:])))
    return xr.Dataset(variables)
