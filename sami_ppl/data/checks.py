"""What every data set must fulfil, checked once before anything is compiled, and its split in train and test.

A data set is an xarray Dataset with a variable `x` whose first dim is `obs` and whose other dims are those of one
observation (channels first for images), known factors as further variables on `obs`, and, once split, a coordinate
`split` on `obs` with the values "train" and "test".
"""

from collections.abc import Hashable
from typing import Any
import warnings

import jax
from jaxtyping import Array, Bool, Key
import numpy as np
import xarray as xr

LARGEST = 20.0  # noise levels are set for observations of about unit scale


def check_data(data: xr.Dataset, *, event_shape: tuple[int, ...] | None = None, batch: int | None = None) -> xr.Dataset:
    """Check a data set; returns it with x in float32.

    `event_shape`: shape of one observation that a program expects. `batch`: observations per step of a fit.
    Raises TypeError for another type than a Dataset and for an x that is not real floating point; ValueError for all
    else: no x, dims, empty, other shape than `event_shape`, channels last, fewer observations than a batch, pixels
    that are not finite or out of range, observations all equal, variables not on `obs`. Of sequences, x on obs and
    time, whole frames may be missing: NaN.
    """
    if not isinstance(data, xr.Dataset):
        raise TypeError(
            f"data must be an xarray.Dataset with a variable x, got {type(data).__name__}: write "
            'xr.Dataset({"x": (("obs", "channel", "row", "column"), array)})'
        )
    check_shape(data, event_shape=event_shape, batch=batch)
    if not np.issubdtype(data.x.dtype, np.floating):
        raise TypeError(
            f"x must be floating point of about unit scale, got {data.x.dtype}: for 8-bit images write "
            'data.assign(x=data.x.astype("float32") / 127.5 - 1)'
        )
    data = data.assign(x=data.x.astype(np.float32))
    _check_values(data.x.values, data.x.dims)
    return data


def _names(data: xr.Dataset) -> str:
    return ", ".join(map(repr, data.data_vars)) or "none"


def check_shape(data: xr.Dataset, *, event_shape: tuple[int, ...] | None = None, batch: int | None = None) -> None:
    """The part of `check_data` that reads no values; raises the same ValueErrors, of names, dims and shapes."""
    if "x" not in data.data_vars:
        raise ValueError(
            f"data has no variable 'x', the observations; its variables are {_names(data)}: "
            'write data.rename({"<name>": "x"})'
        )
    dims, shape = data.x.dims, data.x.shape
    if not dims or dims[0] != "obs":
        write = 'transpose("obs", ...)' if "obs" in dims else f'rename({{"{dims[0] if dims else "?"}": "obs"}})'
        raise ValueError(f"the first dim of x must be 'obs', got dims {dims}: write data.{write}")
    if len(dims) == 1:
        raise ValueError(
            "x has the dim 'obs' only, an observation needs at least one: "
            'write data.assign(x=data.x.expand_dims("feature", 1))'
        )
    if 0 in shape:
        raise ValueError(f"x is empty: its shape is {dict(zip(dims, shape, strict=True))}")
    if event_shape is not None and shape[1:] != tuple(event_shape):
        raise ValueError(
            f"one observation of x has shape {shape[1:]}, expected event_shape {tuple(event_shape)}: "
            f"build the program for {shape[1:]}, or resize the data"
        )
    if event_shape is None and len(shape) == 4 and shape[3] in (1, 3, 4) and shape[1] > shape[3]:
        raise ValueError(
            f"x looks channels-last (n, h, w, c), got shape {shape}: "
            "write array.transpose(0, 3, 1, 2) where the array is made, "
            f'or data.transpose("obs", "{dims[3]}", "{dims[1]}", "{dims[2]}")'
        )
    if batch is not None and shape[0] < batch:
        raise ValueError(f"x has {shape[0]} observations, fewer than a batch of {batch}: lower batch")
    for name, variable in data.data_vars.items():
        if variable.dims[:1] != ("obs",):
            raise ValueError(
                f"variable {name!r} must have 'obs' as its first dim, as every factor has, got dims {variable.dims}: "
                f'write data.drop_vars("{name}"), or keep it in data.attrs'
            )


def faulty(x: np.ndarray, dims: tuple[Hashable, ...]) -> np.ndarray:
    """Which values are NaN or infinite, but for frames of sequences, on obs and time, that are missing: NaN."""
    wrong = ~np.isfinite(x)
    if dims[1:2] == ("time",) and wrong.any():
        missing = np.isnan(x.reshape(*x.shape[:2], -1)).all(2)
        wrong &= ~missing.reshape(*missing.shape, *(1,) * (x.ndim - 2))
    return wrong


def _check_values(x: np.ndarray, dims: tuple[Hashable, ...]) -> None:
    if (wrong := faulty(x, dims)).any():
        first = tuple(map(int, np.argwhere(wrong)[0]))
        raise ValueError(
            f"x has {int(wrong.sum())} values that are NaN or infinite, the first at index {first}: "
            "drop these observations, data.isel(obs=keep), or fill them"
        )
    if len(empty := np.flatnonzero(np.isnan(x).reshape(len(x), -1).all(1))):
        raise ValueError(f"all frames of observation {empty[0]} are missing (NaN): leave it out")
    low, high = float(np.nanmin(x)), float(np.nanmax(x))
    if max(-low, high) > LARGEST:
        raise ValueError(
            f"x has values from {low:g} to {high:g}, expected about unit scale, [-1, 1] for images "
            f"(at most {LARGEST:g}): write data.assign(x=(data.x - data.x.mean()) / data.x.std())"
        )
    if low == high or (len(x) > 1 and (x == x[:1]).all()):
        raise ValueError(f"x has no spread: all observations are equal (values from {low:g} to {high:g})")


def split(data: xr.Dataset, *, test: float = 0.2, key: Key[Array, ""]) -> xr.Dataset:
    """The data with a coordinate `split` on obs: "train" or "test". A split that the data already have is kept.

    `test` is the share of observations drawn at random for testing, at least one. Raises ValueError where one of the
    two parts would be empty or a given split has other values.
    """
    if "split" in data.variables:
        data = data.set_coords("split")
        _check_split(data)
        return data
    n = data.sizes["obs"]
    n_test = max(1, round(test * n))
    if not 0 < test < 1 or n_test >= n:
        raise ValueError(f"test must be a share in (0, 1) that fills both parts of {n} observations, got {test}")
    labels = np.full(n, "train")
    labels[np.asarray(jax.random.permutation(key, n))[:n_test]] = "test"
    return data.assign_coords(split=("obs", labels))


def train_test(data: xr.Dataset) -> tuple[xr.Dataset, xr.Dataset]:
    """The two parts of split data. Raises ValueError where they are not split."""
    if "split" not in data.coords:
        raise ValueError("data have no coordinate 'split': write data = split(data, key=jax.random.key(0))")
    labels = _check_split(data)
    return data.isel(obs=labels == "train"), data.isel(obs=labels == "test")


def real_factors(*parts: xr.Dataset) -> list[str]:
    """Names of the true factors: real-valued variables on obs, finite and not constant in every one of the `parts`.

    A warning names those that are left out, and why.
    """
    names = [str(n) for n, v in parts[0].data_vars.items() if n != "x" and v.dims == ("obs",) and v.dtype.kind == "f"]
    kept = []
    for name in names:
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


def labelled(data: xr.Dataset, share: float, *, key: Key[Array, ""]) -> Bool[np.ndarray, " obs"]:
    """Whose labels a semi-supervised prior is told: each training observation with probability `share`, no test one.

    Raises ValueError where data are not split or `share` is no share.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"the share of labelled observations must lie in [0, 1], got {share}")
    train_test(data)
    chosen = np.asarray(jax.random.uniform(key, (data.sizes["obs"],))) < share
    return chosen & (data["split"].values == "train")


def _check_split(data: xr.Dataset) -> np.ndarray:
    variable = data["split"]
    labels = variable.values.astype(str)
    if variable.dims != ("obs",) or set(labels.tolist()) != {"train", "test"}:
        raise ValueError(
            'split must label each obs "train" or "test", both of them present, got dims '
            f"{variable.dims} and values {sorted(set(labels.reshape(-1).tolist()))[:5]}"
        )
    return labels


def training_part(data: Any) -> Any:
    """Of a Dataset whose `split` has both parts, the training part; other data as they are."""
    if not isinstance(data, xr.Dataset) or "split" not in data.variables:
        return data
    both = {"train", "test"} <= set(data["split"].values.astype(str).flat)
    return train_test(data.set_coords("split"))[0] if both else data
