"""Data sets in two parts: a coordinate `split` on obs that says "train" or "test"; of a stream, which is which."""

from typing import Any

import jax
from jaxtyping import Array, Bool, Key
import numpy as np
import xarray as xr

from sami_ppl._util.keys import check_key
from sami_ppl.data.stream import Stream


def split[T: (xr.Dataset, Stream)](data: T, *, test: float = 0.2, key: Key[Array, ""]) -> T:
    """The data with a coordinate `split` on obs: "train" or "test". A split that the data already have is kept.

    Of a stream, which of its observations are for testing; as many and the same as of those data in memory.

    `test` is the share of observations drawn at random for testing, at least one. Raises ValueError where one of the
    two parts would be empty or a given split has other values.
    """
    check_key(key)
    if isinstance(data, Stream) and data.test is not None:
        data.train_test()
        return data
    if not isinstance(data, Stream) and "split" in data.variables:
        data = data.set_coords("split")
        _check_split(data)
        return data
    n = len(data) if isinstance(data, Stream) else data.sizes["obs"]
    n_test = max(1, round(test * n))
    if not 0 < test < 1 or n_test >= n:
        raise ValueError(f"test must be a share in (0, 1) that fills both parts of {n} observations, got {test}")
    labels = np.full(n, "train")
    labels[np.asarray(jax.random.permutation(key, n))[:n_test]] = "test"
    if isinstance(data, Stream):
        return data.with_test(labels == "test")
    return data.assign_coords(split=("obs", labels))


def train_test[T: (xr.Dataset, Stream)](data: T) -> tuple[T, T]:
    """The two parts of split data. Raises ValueError where they are not split."""
    if isinstance(data, Stream):
        return data.train_test()
    if "split" not in data.coords:
        raise ValueError("data have no coordinate 'split': write data = split(data, key=jax.random.key(0))")
    labels = _check_split(data)
    return data.isel(obs=labels == "train"), data.isel(obs=labels == "test")


def labelled(data: xr.Dataset, share: float, *, key: Key[Array, ""]) -> Bool[np.ndarray, " obs"]:
    """Whose labels a semi-supervised prior is told: each training observation with probability `share`, no test one.

    Raises ValueError where data are not split or `share` is no share.
    """
    check_key(key)
    if not 0 <= share <= 1:
        raise ValueError(f"the share of labelled observations must lie in [0, 1], got {share}")
    train_test(data)
    chosen = np.asarray(jax.random.uniform(key, (data.sizes["obs"],))) < share
    return chosen & (data["split"].values == "train")


def _check_split(data: xr.Dataset) -> np.ndarray:
    variable = data["split"]
    labels = _words(variable)
    if variable.dims != ("obs",) or set(labels.tolist()) != {"train", "test"}:
        raise ValueError(
            'split must label each obs "train" or "test", both of them present, got dims '
            f"{variable.dims} and values {sorted(set(labels.reshape(-1).tolist()))[:5]}"
        )
    return labels


def _words(variable: xr.DataArray) -> np.ndarray:
    """Values of whatever type as text: NumPy refuses bytes that are none, and records."""
    values = [v.decode(errors="replace") if isinstance(v, bytes) else str(v) for v in variable.values.flat]
    return np.array(values, dtype=str).reshape(variable.shape)


def training_part(data: Any) -> Any:
    """Of a Dataset or a stream whose `split` has both parts, the training part; other data as they are."""
    if isinstance(data, Stream):
        return data.train_test()[0] if data.is_split else data
    if not isinstance(data, xr.Dataset) or "split" not in data.variables:
        return data
    both = {"train", "test"} <= set(_words(data["split"]).flat)
    return train_test(data.set_coords("split"))[0] if both else data
