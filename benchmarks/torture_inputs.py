"""Arrays and Datasets of every kind, made at random.

Each is drawn by a generator of its own from its number, so that any one can be made again. What is accepted is held
against what it must be, computed here from the plain numbers.
"""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any
import warnings

import jax
import numpy as np
from numpyro import distributions as dist
import xarray as xr

from benchmarks.torture_trials import Tally, Wrong
import sami_ppl as sp
from sami_ppl.data import check_data, split, train_test
from sami_ppl.data.factors import factor_names, read_factors
from sami_ppl.posteriors.tree import check_labels

ODD = (
    "x",
    "obs",
    "z",
    "",
    " ",
    "a b",
    "z[0]",
    "größe",
    "<b>",
    "<script>alert(1)</script>",
    "../up",
    "a/b",
    "a.b",
    "%s",
    "{x}",
    "'",
    '"',
    "\n",
    "\0",
    "__class__",
    "0",
    "time",
    "channel",
    "split",
    "lambda",
    "None",
    "🦆",
    "n" * 300,
)
"""Names that a user may give, some of them on purpose."""
DTYPES = (
    "float32",
    "float64",
    "float16",
    "longdouble",
    "uint8",
    "int8",
    "int64",
    "uint16",
    "bool",
    "complex64",
    ">f4",
    ">i8",
    "<U3",
    "S3",
    "O",
    "datetime64[s]",
    "timedelta64[ns]",
    "f4,i4",
    "V3",
)
SHAPES = (
    (),
    (0,),
    (5,),
    (5, 4),
    (0, 4),
    (5, 0),
    (5, 3),
    (1, 4),
    (5, 6, 6),
    (5, 1, 6, 6),
    (5, 6, 6, 1),
    (5, 6, 6, 3),
    (2, 2, 2, 2, 2),
    (4,),
    (300, 4),
    (5, 4, 1),
)
VALUES: dict[str, Callable[[np.ndarray], Any]] = {
    "as they are": lambda a: a,
    "negative": lambda a: -a,
    "one value": lambda a: np.zeros_like(a),
    "NaN": lambda a: _with(a, np.nan),
    "infinite": lambda a: _with(a, np.inf),
    "large": lambda a: a * 1e30,
    "pixels": lambda a: np.abs(a) * 255,
    "two values": lambda a: a > 0,
}
FORMS: dict[str, Callable[[np.ndarray], Any]] = {
    "array": lambda a: a,
    "Fortran": np.asfortranarray,
    "backwards": lambda a: a[::-1],
    "read-only": lambda a: _locked(a),
    "every second": lambda a: np.repeat(a, 2, 0)[::2] if a.ndim else a,
    "list": lambda a: a.tolist(),
    "ragged": lambda a: [*a.tolist(), [1, 2, 3]] if a.ndim else a.tolist(),
    "masked": lambda a: np.ma.masked_array(a, False),
    "masked in part": lambda a: np.ma.masked_array(a, np.arange(a.size).reshape(a.shape) % 3 == 1),
    "memory map": lambda a: a.view(np.memmap) if a.ndim else a,
    "broadcast": lambda a: np.broadcast_to(a[:1], a.shape) if a.ndim else a,
    "matrix": lambda a: np.matrix(a) if a.ndim == 2 else a,
    "jax": lambda a: jax.numpy.asarray(a),
    "DataArray": xr.DataArray,
    "None": lambda a: None,
    "text": lambda a: "x",
    "function": lambda a: lambda: a,
    "dict": lambda a: {"x": a},
}


def _with(a: np.ndarray, value: float) -> np.ndarray:
    a = a.copy()
    a.reshape(-1)[:1] = value
    return a


def _locked(a: np.ndarray) -> np.ndarray:
    a = a.copy()
    a.flags.writeable = False
    return a


def pick(rng: np.random.Generator, options: Iterable[Any]) -> Any:
    """One of the options, whatever they are."""
    options = list(options)
    return options[int(rng.integers(len(options)))]


def any_array(rng: np.random.Generator, most: int = 0) -> tuple[str, Any, np.ndarray | None]:
    """What it is, the input, and its numbers, None where there are none that could be right."""
    shape, dtype = pick(rng, SHAPES), pick(rng, ("float32", "float64") if rng.random() < 0.3 else DTYPES)
    values, form = pick(rng, VALUES), pick(rng, FORMS)
    what = f"{dtype}{list(shape)}, {values}, {form}"
    with np.errstate(all="ignore"):
        try:
            plain = np.asarray(VALUES[values](np.tanh(rng.normal(size=shape))))
            numbers = plain.astype(dtype)
            return what, FORMS[form](numbers), numbers
        except Exception:  # there is no such array
            return what, FORMS["array"](np.zeros(shape)), np.zeros(shape)


def check_numbers(found: Any, numbers: np.ndarray) -> None:
    """Raise Wrong unless observations are finite floats with the values of the input, in some order of dims."""
    if found.dtype != np.float32 or not np.isfinite(found).all():
        raise Wrong(f"{found.dtype}, finite: {np.isfinite(found).all()}")
    expected = np.asarray(numbers, dtype=float)
    expected = expected / 127.5 - 1 if numbers.dtype == np.uint8 else expected
    if found.size != expected.size or not np.allclose(np.sort(found, None), np.sort(expected, None), 1e-3, 1e-3):
        raise Wrong("other numbers than those given")


def arrays(count: int, seed: int, folder: Path) -> Tally:
    """Arrays to programs of vectors and of images."""
    tally = Tally("arrays")
    draws = np.random.default_rng(0)
    prior = sp.factors(z=dist.Normal(0, 1).expand([2]))
    programs = [
        sp.autoencoder(
            prior,
            draws.normal(size=(8, *shape)),
            size={"width": 4, "depth": 1},
            network="mlp",
            key=jax.random.key(0),
            progress=False,
        )
        for shape in ((4,), (1, 6, 6))
    ]

    def trial(rng: np.random.Generator, given: Any, numbers: np.ndarray) -> None:
        found = pick(rng, programs).observations(given)[0]
        check_numbers(found, np.asarray(given) if np.shape(given) == numbers.shape else numbers)

    def build(given: Any) -> None:
        program = sp.autoencoder(
            prior, given, size={"width": 4, "depth": 1}, network="mlp", key=jax.random.key(0), progress=False
        )
        if program.observations(given)[0].shape[1:] != program.event_shape:
            raise Wrong("a program of another shape than its data")

    for i in range(count):
        rng = np.random.default_rng([seed, i])
        what, given, numbers = any_array(rng)
        call = partial(build, given) if i % 50 == 0 else partial(trial, rng, given, numbers)
        tally.take({"seed": [seed, i], "what": what}, call, ("x ", "data", "observation", "'x'"))
    return tally


def any_dataset(rng: np.random.Generator) -> tuple[str, Any]:
    """A Dataset with one to three things that are odd."""
    count, shape = int(pick(rng, (1, 2, 6, 6, 6))), pick(rng, ((4,), (1, 6, 6), (3, 4)))
    dims = {1: ["feature"], 2: ["time", "feature"], 3: ["channel", "row", "column"]}[len(shape)]
    x = np.tanh(rng.normal(size=(count, *shape))).astype(np.float32)
    data = xr.Dataset({"x": (("obs", *dims), x), "size": ("obs", np.arange(count) / 7)})
    done = []
    for _ in range(int(rng.integers(1, 4))):
        name = pick(rng, ODDITIES)
        done.append(name)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                data = ODDITIES[name](rng, data)
        except Exception:  # xarray has no such Dataset
            done.append("(not possible)")
            break
    return f"{count} of {shape}: {', '.join(done)}", data


def _labels(rng: np.random.Generator, count: int) -> Any:
    made = {
        "words": lambda: np.array([str(pick(rng, ODD)) for _ in range(count)]),
        "objects": lambda: np.array(
            [pick(rng, (1, "a", None, 2.5, (1, 2), b"b")) for _ in range(count)] + [None], object
        )[:-1],
        "dates": lambda: np.datetime64("2020-01-01") + np.arange(count),
        "twice": lambda: np.zeros(count, int),
        "NaN": lambda: np.full(count, np.nan),
        "bytes": lambda: np.array([b"\xff\x00"] * count),
        "records": lambda: np.zeros(count, "f4,i4"),
        "complex": lambda: np.ones(count) * 1j,
        "years": lambda: np.datetime64("2020") + np.arange(count),
        "long": lambda: np.arange(count) + 2**62,
    }
    return made[pick(rng, made)]()


ODDITIES: dict[str, Callable[[np.random.Generator, xr.Dataset], Any]] = {
    "dim renamed": lambda r, d: d.rename({pick(r, d.dims): pick(r, ODD)}),
    "dim of another type": lambda r, d: d.rename({pick(r, d.dims): pick(r, (0, None, ("a", 1), 2.5, True))}),
    "dims turned": lambda r, d: d.transpose(*r.permutation(list(d.dims))),
    "no x": lambda r, d: d.drop_vars("x"),
    "x renamed": lambda r, d: d.rename(x=pick(r, ODD)),
    "x a coordinate": lambda r, d: d.set_coords("x"),
    "x of another type": lambda r, d: d.assign(x=d.x.astype(pick(r, DTYPES))),
    "NaN in x": lambda r, d: d.assign(x=d.x.where(r.random(d.x.shape) > 0.2)),
    "pixels": lambda r, d: d.assign(x=d.x * 127 + 128),
    "no observations": lambda r, d: d.isel(obs=slice(0)),
    "empty dim": lambda r, d: d.isel({d.x.dims[-1]: slice(0)}),
    "labels of a dim": lambda r, d: d.assign_coords({(dim := pick(r, d.dims)): _labels(r, d.sizes[dim])}),
    "MultiIndex": lambda r, d: d.assign_coords(
        a=("obs", _labels(r, d.sizes["obs"])), b=("obs", np.arange(d.sizes["obs"]))
    ).set_index(obs=["a", "b"]),
    "variable on obs": lambda r, d: d.assign({pick(r, ODD): ("obs", _labels(r, d.sizes["obs"]))}),
    "variable elsewhere": lambda r, d: d.assign({pick(r, ODD): (("other",), np.arange(3))}),
    "variable of nothing": lambda r, d: d.assign({pick(r, ODD): 3}),
    "split": lambda r, d: d.assign_coords(split=("obs", [pick(r, ("train", "test")) for _ in range(d.sizes["obs"])])),
    "wrong split": lambda r, d: d.assign_coords(split=("obs", _labels(r, d.sizes["obs"]))),
    "attrs": lambda r, d: d.assign_attrs({str(pick(r, ODD)): pick(r, ODD), "o": len, "period": "x"}),
    "attrs of a variable": lambda r, d: d.assign(
        size=d["size"].assign_attrs(period=pick(r, (0, -1, "a", None, np.nan, 6.28)))
    ),
    "fill value": lambda r, d: _filled(d),
    "twice as many": lambda r, d: xr.concat([d, d], "obs"),
    "a DataArray": lambda r, d: d.x,
    "a DataFrame": lambda r, d: d["size"].to_dataframe(),
    "a DataTree": lambda r, d: xr.DataTree(d),
}


def _filled(data: xr.Dataset) -> xr.Dataset:
    data.x.encoding["_FillValue"] = 0.0
    return data


def datasets(count: int, seed: int, folder: Path) -> Tally:
    """Datasets through all checks before a fit; what they let through is split, measured and written to a file."""
    tally, key = Tally("Datasets"), jax.random.key(0)

    def trial(data: Any, number: int) -> None:
        before = data.copy(deep=True)
        checked = check_data(data)
        check_labels(checked)
        check_numbers(checked.x.values[~np.isnan(checked.x.values)], before.x.values[~np.isnan(before.x.values)])
        if not data.identical(before):
            raise Wrong("the user's data were changed")
        parts = train_test(split(checked, key=key))
        if sum(part.sizes["obs"] for part in parts) != data.sizes["obs"]:
            raise Wrong("observations lost in the split")
        for kind in ("real", "class", "binary"):
            factor_names(checked, kind)
        read_factors(checked)

    for i in range(count):
        what, data = any_dataset(np.random.default_rng([seed, i]))
        names = ("x ", "data", "'x'", "obs", "split", "variable", "factor", "labels", "test")
        tally.take({"seed": [seed, i], "what": what}, partial(trial, data, i), names)
    return tally
