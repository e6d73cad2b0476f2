"""What every data set must fulfil, checked once before anything is compiled, and its split in train and test.

A data set is an xarray Dataset with a variable `x` whose first dim is `obs` and whose other dims are those of one
observation (channels first for images), known factors as further variables on `obs`, and, once split, a coordinate
`split` on `obs` with the values "train" and "test".

Whatever users hand over passes here, by `Program.observations` or `check_data`: `as_array`, `as_floats` and
`as_numbers` convert what can be converted without a guess, and refuse the rest with the call to write.
"""

from collections.abc import Mapping, Sequence
from typing import Any
import warnings

import jax
from jax.dtypes import canonicalize_dtype
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, Shaped
import numpy as np
import xarray as xr

from sami_ppl._util.keys import check_key
from sami_ppl.data.layout import check_name
from sami_ppl.data.local import scale_bytes

LARGEST = 20.0
"""Of observations: noise levels are set for about unit scale."""
UNLIKELY = 10.0
"""Root mean square of observations, in units of the program's own statistics, from which another scale is likely."""
SCALED = 1024
"""Observations whose scale is looked at, at most."""
LEAST_RESOLUTION = 1e-3
"""Rounding to 32 bits that is borne, as a share of the range of a variable that the prior takes."""


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
    x = as_floats(data.x.values, gaps=data.x.dims[1:2] == ("time",), fill=fill_value(data.x))
    x = x.astype(np.float32, copy=False)
    check_spread(x)
    return data.assign(x=(data.x.dims, x, data.x.attrs))


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
    if len(set(dims)) < len(dims):
        raise ValueError(f"the dims of x must have different names, got {dims}")
    if taken := [name for name in data.data_vars if name in data.dims]:
        raise ValueError(f"a dim and a variable are both called {taken[0]!r}: give one of them another name")
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
        check_name(name, "a variable")
        for dim in variable.dims:
            check_name(dim, f"a dim of variable {name!r}")
        if variable.dims[:1] != ("obs",):
            raise ValueError(
                f"variable {name!r} must have 'obs' as its first dim, as every factor has, got dims {variable.dims}: "
                f'write data.drop_vars("{name}"), or keep it in data.attrs'
            )
        period = variable.attrs.get("period", 1)
        if not (isinstance(period, int | float | np.integer | np.floating) and 0 < period < np.inf):
            raise ValueError(
                f"variable {name!r} has attrs['period'] = {period!r}, expected a positive number, in the unit of its "
                f"values: write data[{name!r}].attrs['period'] = 2 * np.pi, or take it away"
            )
        if variable.dtype.kind == "V":
            raise ValueError(
                f"variable {name!r} holds records, {variable.dtype}, which no file of results can: write a variable "
                f'for each field, or data.drop_vars("{name}")'
            )


def check_variable(data: xr.Dataset, name: str) -> None:
    """Raise ValueError unless the data have a variable with leading dim obs: x, or one that the prior takes."""
    if name in data.data_vars and data[name].dims[:1] == ("obs",):
        return
    taken, write = (
        ("the observations", 'rename({"<name>": "x"}) or data.transpose("obs", ...)')
        if name == "x"
        else ("which the prior takes", f'assign({name}=("obs", values))')
    )
    raise ValueError(
        f"data has no variable {name!r} on obs, {taken}; its variables are {', '.join(map(str, data.data_vars))}: "
        f"write data.{write}"
    )


def as_array(values: Any, name: str = "x") -> Shaped[np.ndarray, "..."]:
    """A user's array as a plain one of numbers, in the machine's byte order; floats of less than 32 bits get 32.

    Raises TypeError for an x that is no numbers, or complex ones; ValueError for arrays of unequal shapes, for masked
    arrays that hide something, and for variables that the prior takes and are no numbers.
    """
    if isinstance(values, np.ma.MaskedArray):
        if values.dtype.names:  # the mask has fields too
            _refuse_kind(values, name, type(values).__name__)
        if hidden := int(np.ma.count_masked(values)):
            raise ValueError(
                f"{name} is a masked array that hides {hidden} of {values.size} values: fill them, "
                f"{name}.filled(value), or leave these observations out, "
                f"{name}[~np.ma.getmaskarray({name}).reshape(len({name}), -1).any(1)].data"
            )
        values = values.data
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(
            f"{name} cannot be made one array (obs, *event) ({error}): observations must have one shape; crop or "
            "resize them, then np.stack"
        ) from error
    # Of the kinds that NumPy does not know, such as bfloat16, JAX does.
    if array.dtype.kind not in "biuf" and not jnp.issubdtype(array.dtype, jnp.floating):
        _refuse_kind(array, name, type(values).__name__)
    if jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.itemsize not in (4, 8):
        return array.astype(np.float32 if array.dtype.itemsize < 4 else np.float64)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _refuse_kind(array: np.ndarray, name: str, given_as: str) -> None:
    kind = array.dtype.kind
    if name == "x":
        write = {"c": "x.real, or np.stack([x.real, x.imag], 1)", "O": "np.asarray(x.tolist(), 'float32')"}.get(
            kind, "for files sami_ppl.data.load_data(path)"
        )
        raise TypeError(
            "data must be an array of numbers (obs, *event) or a Dataset with the variable x, got "
            f"{given_as} of {array.dtype}: write {write}"
        )
    write = {"M": f"({name} - {name}.min()) / np.timedelta64(1, 'D')", "m": f"{name} / np.timedelta64(1, 'D')"}.get(
        kind, f"np.unique({name}, return_inverse=True)[1]"
    )
    raise ValueError(f"the prior takes {name!r} as numbers, got {array.dtype}: write {write}")


def as_floats(
    x: Any, *, gaps: bool = False, first: int = 0, fill: float | None = None
) -> Float[np.ndarray, "obs *event"]:
    """Observations as finite floating point, 8-bit pixels scaled from 0 … 255 to [−1, 1].

    `gaps`: whether frames (obs, time, ...) may be missing, NaN as a whole. `first`: number of the first observation,
    for messages about a part of the data. `fill`: the value by which their file marks what is missing. Raises
    ValueError for 8-bit values that may be a mask, for other integers than 0 and 1, for values that are NaN or
    infinite, for frames missing in part and sequences of which nothing is seen; and what `as_array` raises.
    """
    x = as_array(x)
    if x.dtype == np.uint8 and x.size:
        if x.max() <= 1:
            raise ValueError(
                "x holds 8-bit values of which none is above 1, a mask or very dark images: write x * 2.0 - 1 for a "
                "mask, x / 127.5 - 1 for images"
            )
        return scale_bytes(x, 255)
    if x.dtype.kind in "iu" and x.size and (x.min() < 0 or x.max() > 1):
        raise ValueError(
            f"x holds integers from {x.min()} to {x.max()}, observations are of about unit scale: for pixels "
            "write x.astype('uint8'), or x / 127.5 - 1; for other numbers (x - x.mean()) / x.std()"
        )
    with np.errstate(over="ignore"):  # what 32 bits do not hold is refused as infinite
        x = x.astype(canonicalize_dtype(x.dtype) if x.dtype.kind == "f" else np.float32, copy=False)
    wrong, missing = ~np.isfinite(x), np.zeros(x.shape[:2], bool)
    if not wrong.any():
        return x
    if gaps:
        frames = np.isnan(x).reshape(*x.shape[:2], -1)
        missing = frames.all(2)
        if len(partly := np.argwhere(frames.any(2) & ~missing)):
            raise ValueError(
                f"frame {partly[0, 1]} of observation {first + partly[0, 0]} is NaN in part, but frames are missing as "
                "a whole: fill it, or set all of it to NaN"
            )
        wrong &= ~missing.reshape(*missing.shape, *(1,) * (x.ndim - 2))
    if wrong.any():
        at = tuple(map(int, np.argwhere(wrong)[0]))
        kind = "NaN" if np.isnan(x[at]) else "infinite"
        raise ValueError(
            f"x is {kind} at observation {first + at[0]}, index {at[1:]} in it, the first of {int(wrong.sum())} values "
            "that are NaN or infinite: fill them, or leave these observations out, data.isel(obs=keep)"
            + ("; only frames of sequences may be missing (over_time)" if kind == "NaN" and not gaps else "")
            + (
                f". The file's fill value is {fill:g}: where that is a value like any other, open it by "
                "xr.open_dataset(path, mask_and_scale=False)"
                if fill is not None
                else ""
            )
        )
    if len(empty := np.flatnonzero(missing.all(1))):
        raise ValueError(f"all frames of observation {first + empty[0]} are missing (NaN): leave it out")
    return x


def fill_value(x: xr.DataArray) -> float | None:
    """The number by which the file of a variable marks what is missing, if any."""
    value = x.encoding.get("_FillValue", x.encoding.get("missing_value"))
    return None if value is None or np.isnan(value) else float(value)


def check_spread(x: Float[np.ndarray, "obs *event"]) -> None:
    """Raise ValueError for observations to train on that hold nothing, are far from unit scale, or all equal."""
    if not x.size:
        raise ValueError(f"x is empty: its shape is {x.shape}")
    low, high = float(np.nanmin(x)), float(np.nanmax(x))
    if max(-low, high) > LARGEST:
        raise ValueError(
            f"x has values from {low:g} to {high:g}, expected about unit scale, [-1, 1] for images "
            f"(at most {LARGEST:g}): write (x - x.mean()) / x.std(), or x / 127.5 - 1 for pixels from 0 to 255"
        )
    if low == high or (len(x) > 1 and (x == x[:1]).all()):
        raise ValueError(f"x has no spread: all observations are equal (values from {low:g} to {high:g})")


def warn_of_scale(x: Float[np.ndarray, "obs *event"], statistics: tuple[float, float] | None) -> None:
    """Warn of observations on another scale than those that a program was built for, such as pixels from 0 to 255.

    `statistics`: mean and standard deviation of these, where they are known.
    """
    if statistics is None or not x.size:
        return
    (mean, std), x = statistics, x[:SCALED]
    size = float(np.sqrt(np.nanmean(np.square((x - mean) / std, dtype=np.float64))))
    if size > UNLIKELY:
        warnings.warn(
            f"x ranges from {np.nanmin(x):g} to {np.nanmax(x):g}, but the program was built for values of mean "
            f"{mean:.3g} and standard deviation {std:.3g}: is it on another scale? Pixels from 0 to 255 are scaled by "
            "x / 127.5 - 1, others as the data of the fit were",
            stacklevel=3,
        )


def prior_variables(
    data: Any, names: Sequence[str], seen: Mapping[str, Array | np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """The variables that a prior takes, of a Dataset, by `as_numbers`; `seen` as there, by name.

    Raises ValueError for data without them, and what `as_numbers` raises.
    """
    if names and not isinstance(data, xr.Dataset):
        raise ValueError(
            f"the prior takes {', '.join(names)}: give an xarray Dataset with x and {', '.join(names)} on obs"
        )
    for name in names:
        check_variable(data, name)
    return {name: as_numbers(name, data[name].values, (seen or {}).get(name)) for name in names}


def as_numbers(name: str, values: Any, seen: Array | np.ndarray | None = None) -> Shaped[np.ndarray, "obs ..."]:
    """A variable that the prior takes, as finite numbers that 32 bits hold.

    `seen`: its values where the program was built. A warning names whole numbers outside their range: where they are
    labels, the prior has no law for them. Raises ValueError for what is no number, NaN
    or infinite, and for numbers whose differences would be lost in 32 bits, such as milliseconds since 1970.
    """
    array = as_array(values, name)
    if not np.isfinite(array).all():
        raise ValueError(f"{name!r}, which the prior takes, is NaN or infinite somewhere: drop these observations")
    if not array.size or array.dtype.kind == "b":
        return array
    known = array if seen is None else np.asarray(seen)
    low, high = array.min(), array.max()
    narrow = canonicalize_dtype(array.dtype)  # 64 bits, where JAX is set to them
    with np.errstate(over="ignore", invalid="ignore"):
        narrowed = array.astype(narrow)
        if array.dtype.kind == "f":
            lost = np.abs(array - narrowed).max() > LEAST_RESOLUTION * np.ptp(known) > 0 or np.isinf(narrowed).any()
        else:
            lost = not np.array_equal(narrowed.astype(array.dtype), array)
    if lost:
        raise ValueError(
            f"{name!r}, which the prior takes, holds {array.dtype} from {low} to {high}, whose differences are lost in "
            f"the 32 bits that are computed with: centre and scale it first, ({name} - {name}.mean()) / {name}.std(), "
            "by the same two numbers for all data"
        )
    spread = seen is not None and known.size and np.ptp(known) > 0  # else they stand for all values
    if spread and array.dtype.kind in "iu" and (low < known.min() or high > known.max()):
        warnings.warn(
            f"{name!r} holds whole numbers from {low} to {high}, but where the program was built they were from "
            f"{known.min()} to {known.max()} (given): if they are labels, the prior has no law for those outside",
            stacklevel=3,
        )
    return array


def split(data: xr.Dataset, *, test: float = 0.2, key: Key[Array, ""]) -> xr.Dataset:
    """The data with a coordinate `split` on obs: "train" or "test". A split that the data already have is kept.

    `test` is the share of observations drawn at random for testing, at least one. Raises ValueError where one of the
    two parts would be empty or a given split has other values.
    """
    check_key(key)
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
    """Of a Dataset whose `split` has both parts, the training part; other data as they are."""
    if not isinstance(data, xr.Dataset) or "split" not in data.variables:
        return data
    both = {"train", "test"} <= set(_words(data["split"]).flat)
    return train_test(data.set_coords("split"))[0] if both else data
