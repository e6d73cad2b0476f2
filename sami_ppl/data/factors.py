"""Which variables of a Dataset are known factors of its observations: one rule for evaluation, reports and analyses.

A factor is a variable with the dim `obs` alone, other than x. By its values it is *real* (floating point) or a *class*
(integers); what has exactly two values, of whatever type, is *binary* too. Words and dates are none of them, and names
that are asked for are taken whatever their type. A factor that goes round, with a period in its `attrs`, counts as two,
its cosine and sine, wherever numbers are fitted to it.
"""

from collections.abc import Sequence
from typing import Literal
import warnings

from jaxtyping import Float
import numpy as np
import xarray as xr

from sami_ppl.data.periodic import unrolled, unrolled_names

Kind = Literal["real", "class", "binary"]


def factor_names(data: xr.Dataset, kind: Kind, names: Sequence[str] | None = None) -> list[str]:
    """Names of the factors of a kind, in the order of the data; of those in `names` only, where they are given.

    Raises ValueError for data without x, and for names that are no variables on obs.
    """
    there = _on_obs(data, names)
    tests = {
        "real": lambda v: np.issubdtype(v.dtype, np.floating),
        "class": lambda v: np.issubdtype(v.dtype, np.integer),
        "binary": lambda v: len(np.unique(v.values)) == 2,
    }
    return [name for name in there if (names is None or name in names) and tests[kind](data[name])]


def read_factors(data: xr.Dataset, names: Sequence[str] | None = None) -> tuple[Float[np.ndarray, "obs F"], list[str]]:
    """Values of known factors and the names of their columns: those named, else all real ones.

    Raises ValueError where there is none, for values that are not finite, and what `factor_names` raises.
    """
    there = _on_obs(data, names)
    names = factor_names(data, "real") if names is None else list(names)
    if not names:
        raise ValueError(
            'data holds no known factors: give real-valued variables on obs, data.assign(size=("obs", sizes)); its '
            f"variables on obs are {there}"
        )
    columns = [column for name in names for column in unrolled_names(data[name])]
    table = unrolled(data, names)
    values = np.stack([np.asarray(table[name].values, float) for name in columns], axis=1)
    if bad := [name for name, column in zip(columns, values.T, strict=True) if not np.isfinite(column).all()]:
        raise ValueError(f"factors {', '.join(bad)} are NaN or infinite somewhere: drop these, data.isel(obs=keep)")
    return values, columns


def real_factors(*parts: xr.Dataset) -> list[str]:
    """Names of the real factors that are finite and not constant in every one of the `parts`.

    A warning names those that are left out, and why.
    """
    kept = []
    for name in factor_names(parts[0], "real"):
        values = [part[name].values for part in parts]
        if missing := sum(int((~np.isfinite(v)).sum()) for v in values):
            reason = f"{missing} values are not finite"
        elif any(np.ptp(v) == 0 for v in values):
            reason = "it is constant in one part of the data"
        else:
            kept.append(name)
            continue
        warnings.warn(f"{name} is left out of the true factors: {reason}", stacklevel=3)
    return kept


def _on_obs(data: xr.Dataset, names: Sequence[str] | None) -> list[str]:
    if not isinstance(data, xr.Dataset) or "x" not in data.data_vars:
        raise ValueError(
            "data must be an xarray.Dataset with the observations x and their factors, such as data.disks(key, 1000)"
        )
    there = [str(n) for n, v in data.data_vars.items() if n != "x" and v.dims == ("obs",)]
    if unknown := [name for name in names or () if name not in there]:
        raise ValueError(f"data has no factor {', '.join(map(repr, unknown))}; its variables on obs are {there}")
    return there
