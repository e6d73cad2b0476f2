"""What every data set must fulfil, checked once before anything is compiled.

A data set is an xarray Dataset with a variable `x` whose first dim is `obs` and whose other dims are those of one
observation (channels first for images), known factors as further variables on `obs`, and, once split, a coordinate
`split` on `obs` with the values "train" and "test".

Whatever users hand over passes here, by `Program.observations` or `check_data`: `as_array`, `as_floats` and
`as_numbers` convert what can be converted without a guess, and refuse the rest with the call to write.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal
import warnings

from jax.dtypes import canonicalize_dtype
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped
import numpy as np
import xarray as xr

from sami_ppl.data.layout import check_name, default_event_dims
from sami_ppl.data.pixels import scale_bytes
from sami_ppl.data.stream import LOOKED_AT, Stream

LARGEST = 20.0
"""Of observations: noise levels are set for about unit scale."""
Missing = Literal["nothing", "frames", "entries"]
LEAST_RESOLUTION = 1e-3
"""Rounding to 32 bits that is borne, as a share of the range of a variable that the prior takes."""


def check_data[T: (xr.Dataset, Stream)](
    data: T, *, event_shape: tuple[int, ...] | None = None, batch: int | None = None
) -> T:
    """Check a data set; returns it with x in float32. Of a stream, some rows are checked, and it is returned as it is.

    `event_shape`: shape of one observation that a program expects. `batch`: observations per step of a fit.
    Raises TypeError for another type than a Dataset and for an x that is not real floating point; ValueError for all
    else: no x, dims, empty, other shape than `event_shape`, channels last, fewer observations than a batch, pixels
    that are infinite or out of range, observations all equal, variables not on `obs`. Values may be missing, NaN, but
    not all of an observation; of sequences, x on obs and time, only whole frames.
    """
    if isinstance(data, Stream):
        some = data.some(LOOKED_AT)
        if isinstance(some, np.ndarray):
            some = xr.Dataset({"x": (("obs", *default_event_dims(some.shape[1:])), some)})
        check_data(some, batch=None if batch is None or batch <= len(data) else batch)
        return data
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
    kind = "frames" if data.x.dims[1:2] == ("time",) else "entries"
    x = as_floats(data.x.values, missing=kind, fill=fill_value(data.x))
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
    x: Any, *, missing: Missing = "nothing", first: int = 0, fill: float | None = None
) -> Float[np.ndarray, "obs *event"]:
    """Observations as finite floating point, 8-bit pixels scaled from 0 … 255 to [−1, 1].

    `missing`: what may be missing, NaN: "nothing", "frames" (obs, time, ...) as a whole, or any "entries". `first`:
    number of the first observation, for messages about a part of the data. `fill`: the value by which their file marks
    what is missing. Raises ValueError for 8-bit values that may be a mask, for other integers than 0 and 1, for values
    that are infinite, or NaN where they may not be, for frames missing in part, for observations of which nothing is
    seen; and what `as_array` raises.
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
    wrong = ~np.isfinite(x)
    if not wrong.any():
        return x
    if missing == "entries":
        # A file may say by a value like any other what is missing; then it is not.
        if fill is None or not np.nanmin(x) <= fill <= np.nanmax(x):
            wrong = np.isinf(x)
    elif missing == "frames":
        frames = np.isnan(x).reshape(*x.shape[:2], -1)
        whole = frames.all(2)
        if len(partly := np.argwhere(frames.any(2) & ~whole)):
            raise ValueError(
                f"frame {partly[0, 1]} of observation {first + partly[0, 0]} is NaN in part, but frames are missing as "
                "a whole: fill it, or set all of it to NaN"
            )
        wrong &= ~whole.reshape(*whole.shape, *(1,) * (x.ndim - 2))
    if wrong.any():
        at = tuple(map(int, np.argwhere(wrong)[0]))
        kind = "NaN" if np.isnan(x[at]) else "infinite"
        raise ValueError(
            f"x is {kind} at observation {first + at[0]}, index {at[1:]} in it, the first of {int(wrong.sum())} values "
            "that are NaN or infinite: fill them, or leave these observations out, data.isel(obs=keep)"
            + (
                "; only frames of sequences (over_time), or values of a program that was built of data that miss some, "
                "may be missing"
                if missing == "nothing" and kind == "NaN"
                else ""
            )
            + (
                f". The file's fill value is {fill:g}: where that is a value like any other, open it by "
                "xr.open_dataset(path, mask_and_scale=False)"
                if fill is not None
                else ""
            )
        )
    if len(empty := np.flatnonzero(np.isnan(x).reshape(len(x), -1).all(1))):
        every = "all frames" if missing == "frames" else "all values"
        raise ValueError(
            f"x has nothing to say: {every} of observation {first + empty[0]} are missing (NaN); leave it out, and "
            "write a store again that has lost a part"
        )
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
