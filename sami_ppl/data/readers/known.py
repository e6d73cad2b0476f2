"""Known factors as variables on obs: numbers, numbers that go round, and classes with their names."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import xarray as xr


class Factor(NamedTuple):
    """What is known of a factor: `names` of its classes, () where they have none; the `period` of one that goes round.

    A factor without `names` is a number.
    """

    name: str
    names: Sequence[str] | None = None
    period: float | None = None


def variable(factor: Factor, values: np.ndarray) -> xr.Variable:
    """The factor on obs: classes from 0 as int32 with `attrs["names"]`, else float32 with `attrs["period"]`."""
    attrs = {"names": list(factor.names)} if factor.names else {}
    attrs |= {} if factor.period is None else {"period": factor.period}
    return xr.Variable(("obs",), values.astype(np.float32 if factor.names is None else np.int32), attrs)


def classes(names: np.ndarray) -> xr.Variable:
    """Classes by their names, (obs), in alphabetical order."""
    known, values = np.unique(names, return_inverse=True)
    return variable(Factor("label", known.tolist()), values)


def variables(factors: Sequence[Factor], columns: Sequence[np.ndarray]) -> dict[str, xr.Variable]:
    """Factors by their names; those that have one value are left out."""
    pairs = zip(factors, columns, strict=True)
    return {factor.name: variable(factor, values) for factor, values in pairs if np.ptp(values) > 0}
