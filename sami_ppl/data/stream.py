"""Observations that are read when they are needed: streams, for data larger than memory.

A source is anything with `len(source)` and `source.rows(i)`. A `Stream` is some of the rows of one, as an array or a
Dataset is some that are in memory: `autoencoder`, `fit`, `warm_start`, `split`, `train_test` and `check_data` take it
in their place. A fit reads every batch from it; where whole data are looked at otherwise, a stated number of rows is
read instead, taken from all over it (`at_hand`).

Rows that are stored together are read together. An epoch then goes through these parts in random order, and rows are
drawn from a window that slides along them, `WINDOW` bytes wide; rows stored by themselves come in any order.
"""

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
import hashlib
import math
from threading import Lock
from typing import Any, Protocol, cast, runtime_checkable

from jaxtyping import Bool, Int
import numpy as np
import xarray as xr

from sami_ppl.data.layout import default_event_dims
from sami_ppl.data.pixels import largest_byte, scale_bytes

WINDOW = 2**27
"""Bytes of the window from which rows are drawn, of sources that store several together."""
LARGEST_PART = 2**30
"""Bytes that are stored together, at most."""
LOOKED_AT, LOOKED_AT_BYTES = 10_000, 2**28
"""Observations that stand for all of a stream, at most, and their bytes in 32 bits."""
TOUCHED = 64
"""Parts that such a choice of rows is read from, at most."""
DIGESTED = 64
"""Rows by which a stream is known again."""


class StreamError(RuntimeError):
    """Rows of a stream cannot be read, or are not what they were; the message names them."""


@runtime_checkable
class Source(Protocol):
    """Observations that can be read in any order.

    `rows` may be called by several threads at once. It is asked for whole numbers in rising order, and gives the
    observations there: an array (rows, *event), or a Dataset with x and further variables on obs, all of one type and
    shape whatever the rows are. What it raises is told with the rows that were asked for.
    """

    def __len__(self) -> int:
        """How many observations there are."""
        ...

    def rows(self, i: Int[np.ndarray, " rows"], /) -> "xr.Dataset | np.ndarray":
        """The observations at these places."""
        ...


class _Reader:
    """A source, its parts, and those of them that are held; shared by all streams of the source."""

    def __init__(self, source: Source, chunks: int | Sequence[int], name: str):
        self.source, self.name, count = source, name, len(source)
        if count < 1:
            raise ValueError(f"{name} holds no observations: give a source with at least two")
        sizes = np.full(-(-count // chunks), chunks) if isinstance(chunks, int | np.integer) else np.asarray(chunks)
        if isinstance(chunks, int | np.integer):
            sizes[-1] = count - chunks * (len(sizes) - 1)
        if sizes.sum() != count or (sizes < 1).any():
            raise ValueError(f"chunks must be positive and add up to the {count} rows of {name}, got {chunks!r}")
        self.starts = np.concatenate([[0], np.cumsum(sizes)])
        self.together = int(sizes.max()) > 1
        self.held: OrderedDict[int, Future] = OrderedDict()
        self.lock, self.capacity = Lock(), 4
        self.template: Any = None
        found = self.ask(np.arange(1))
        self.template = found if isinstance(found, xr.Dataset) else found[:1]
        self.row_bytes = max(1, sum(values.nbytes for values in self.values(found, None).values()))
        if self.together and (size := self.row_bytes * int(sizes.max())) > LARGEST_PART:
            raise ValueError(
                f"{name} stores {int(sizes.max()):,} rows together, {size / 2**30:.1f} GiB, which would have to be "
                "read at once: write it again in smaller parts, "
                'data.to_zarr(path, encoding={"x": {"chunks": (256, ...)}}) or row_group_size=1000'
            )
        self.top = None
        if self.dtype == np.uint8:
            self.top = largest_byte(self.read(spread(np.arange(count), self.starts, 200, 16), ("x",))["x"])

    @property
    def dtype(self) -> np.dtype:
        """Of x, as it is stored."""
        return (self.template["x"] if isinstance(self.template, xr.Dataset) else self.template).dtype

    def ask(self, i: np.ndarray) -> Any:
        """What the source gives for rows in rising order, checked against the first row. Raises StreamError."""
        rows = f"row {i[0]:,}" if len(i) == 1 else f"rows {i[0]:,} to {i[-1]:,}"
        try:
            found = self.source.rows(i)
        except Exception as error:  # of damaged files, readers raise nearly anything
            raise StreamError(f"{rows} of {self.name} cannot be read: {error or type(error).__name__}") from error
        if not isinstance(found, xr.Dataset | np.ndarray) or (isinstance(found, xr.Dataset) and "x" not in found):
            raise StreamError(
                f"{self.name} gave {type(found).__name__} for {rows}, expected an array (rows, *event) or a Dataset "
                "with the variable x"
            )
        if self.template is not None:
            here, there = _kinds(found), _kinds(self.template)
            if wrong := [name for name in there if here.get(name) != there[name]]:
                name = wrong[0]
                raise StreamError(
                    f"{rows} of {self.name} have {name} of {here.get(name, 'no kind')}, row 0 has it of {there[name]}: "
                    "it was written again, or holds data of several sets"
                )
        if len(found["x"] if isinstance(found, xr.Dataset) else found) != len(i):
            raise StreamError(f"{self.name} gave another number of observations than the {len(i)} of {rows}")
        return found

    def values(self, found: Any, names: Sequence[str] | None) -> dict[str, np.ndarray]:
        """Arrays by name."""
        if not isinstance(found, xr.Dataset):
            return {"x": found}
        return {str(name): found[name].values for name in (found.data_vars if names is None else names)}

    def read(self, i: np.ndarray, names: Sequence[str] | None) -> dict[str, np.ndarray]:
        """The variables at rows in any order."""
        wanted, place = np.unique(i, return_inverse=True)
        if not self.together:
            return {name: values[place] for name, values in self.values(self.ask(wanted), names).items()}
        part = np.searchsorted(self.starts, wanted, "right") - 1
        pieces = [
            {name: values[wanted[part == p] - self.starts[p]] for name, values in self.part(int(p), names).items()}
            for p in np.unique(part)
        ]
        return {name: np.concatenate([piece[name] for piece in pieces])[place] for name in pieces[0]}

    def part(self, p: int, names: Sequence[str] | None) -> dict[str, np.ndarray]:
        """All rows of a part; read once by one of several threads, as long as it is held."""
        with self.lock:
            future = self.held.get(p)
            mine = future is None
            if mine:
                future = self.held[p] = Future()
                while len(self.held) > self.capacity:
                    self.held.popitem(last=False)
            else:
                self.held.move_to_end(p)
        if mine:
            try:
                future.set_result(self.ask(np.arange(self.starts[p], self.starts[p + 1])))
            except BaseException as error:
                with self.lock:
                    self.held.pop(p, None)
                future.set_exception(error)
        return self.values(future.result(), names)


def spread(rows: np.ndarray, starts: np.ndarray, most: int, parts: int) -> np.ndarray:
    """At most so many of these rising rows, evenly from all over them, of no more than so many parts."""
    part = np.searchsorted(starts, rows, "right") - 1
    there = np.unique(part)
    if starts[-1] > len(starts) - 1 and len(there) > parts:  # where rows lie together
        there = there[np.linspace(0, len(there) - 1, parts).round().astype(int)]
        rows = rows[np.isin(part, there)]
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(int))]


class Stream:
    """Some of the rows of a source, in rising order, to be read when they are needed.

        stream = sp.data.open_stream("images.zarr")     # or Stream(source)
        program = sp.autoencoder(prior, stream, key=a)
        program, history = sp.fit(program, stream, key=b)

    Args:
        source: observations that can be read in any order.
        chunks: how many rows of it are stored together, one number or that of each part; 1, each by itself.
        test: of each row, whether it is for testing; None, the rows are not split.
        name: of the source, in messages.

    Memory holds the window, its parts, and some tens of bytes for each row, which say in what order rows are read.
    `index` holds the rows of the source that the stream is of, in rising order; `test`, which of them are for testing.

    Raises ValueError for no rows, chunks that do not add up to them, or that are too large to be read at once;
    StreamError for a source whose first row cannot be read.
    """

    def __init__(
        self,
        source: Source,
        *,
        chunks: int | Sequence[int] = 1,
        test: Bool[np.ndarray, " rows"] | None = None,
        name: str | None = None,
    ):
        if test is not None and len(test) != len(source):
            raise ValueError(f"test must say of each of the {len(source)} rows whether it is for testing")
        self._reader = _Reader(source, chunks, name or type(source).__name__)
        self.index, self.test = np.arange(len(source)), test

    def _some(self, index: np.ndarray, test: np.ndarray | None) -> "Stream":
        other = object.__new__(Stream)
        other._reader, other.index, other.test = self._reader, index, test
        return other

    def __len__(self) -> int:
        return len(self.index)

    def __repr__(self) -> str:
        return f"Stream({self.name}, {len(self):,} observations)"

    @property
    def name(self) -> str:
        """Of the source."""
        return self._reader.name

    @property
    def is_split(self) -> bool:
        """Whether there are observations for training and for testing."""
        return self.test is not None and 0 < int(self.test.sum()) < len(self)

    def train_test(self) -> "tuple[Stream, Stream]":
        """The observations for training, and those for testing. Raises ValueError where one of the parts is empty."""
        if self.test is None or not self.is_split:
            raise ValueError("the stream has no two parts: write stream = split(stream, key=jax.random.key(0))")
        return self.take(~self.test), self.take(self.test)

    def with_test(self, test: Bool[np.ndarray, " obs"]) -> "Stream":
        """The same observations, split."""
        return self._some(self.index, np.asarray(test))

    def take(self, places: Any) -> "Stream":
        """The observations at these places, as a stream."""
        return self._some(self.index[places], None if self.test is None else self.test[places])

    def share(self, one: int, of: int) -> "Stream":
        """One of several shares of the observations, which no part is in two of; all, where rows are stored singly."""
        part = np.searchsorted(self._reader.starts, self.index, "right") - 1
        if of == 1 or not self._reader.together or len(np.unique(part)) < of:
            return self
        return self.take(np.unique(part, return_inverse=True)[1] % of == one)

    def rows(self, i: Any, /, names: Sequence[str] | None = None) -> xr.Dataset | np.ndarray:
        """The observations at these places, in any order; of a Dataset, x and the variables `names`, or all.

        8-bit values are scaled as `load_data` scales them. Raises StreamError for rows that cannot be read.
        """
        rows = self.index[i]
        found = self._reader.read(rows, None if names is None else ("x", *names))
        if (top := self._reader.top) is not None:
            if top == 1 and found["x"].max() > 1:
                at = rows[np.argmax(found["x"].reshape(len(rows), -1).max(1) > 1)]
                raise StreamError(f"row {at:,} of {self.name} has values above 1, those looked at first are 0 and 1")
            found["x"] = scale_bytes(found["x"], top)
        template = self._reader.template
        if not isinstance(template, xr.Dataset):
            return found["x"]
        return xr.Dataset({name: (template[name].dims, v, template[name].attrs) for name, v in found.items()})

    def some(self, most: int) -> xr.Dataset | np.ndarray:
        """At most so many observations in memory, from all over the stream, with their `split`; obs, their rows.

        Raises StreamError for rows that cannot be read.
        """
        bytes_each = 4 * math.prod(self.event_shape)
        most = max(1, min(most, LOOKED_AT_BYTES // bytes_each))
        places = [np.arange(len(self))]
        if self.test is not None and self.is_split:
            places = [np.flatnonzero(part) for part in (~self.test, self.test)]
        chosen = []
        for these in places:
            rows = spread(self.index[these], self._reader.starts, -(-most // len(places)), TOUCHED)
            chosen.append(these[np.searchsorted(self.index[these], rows)])
        found = self.rows(np.concatenate(chosen))
        if not isinstance(found, xr.Dataset):
            if len(places) == 1:
                return found
            found = xr.Dataset({"x": (("obs", *default_event_dims(found.shape[1:])), found)})
        found = found.assign_coords(obs=self.index[np.concatenate(chosen)])
        if len(places) == 1:
            return found
        return found.assign_coords(split=("obs", np.repeat(("train", "test"), list(map(len, chosen)))))

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one observation, as it is stored."""
        template = self._reader.template
        return tuple((template["x"] if isinstance(template, xr.Dataset) else template).shape[1:])

    def order(self, seed: int, epoch: int) -> Int[np.ndarray, " obs"]:
        """Places in the order in which an epoch takes them, a function of these two numbers alone."""
        rng, count = np.random.default_rng((seed, epoch)), len(self)
        begins = self._begins
        if not self._reader.together:
            return rng.permutation(count)
        chosen = rng.permutation(len(begins))
        lengths = np.diff(np.append(begins, count))[chosen]
        along = np.repeat(begins[chosen] - (np.cumsum(lengths) - lengths), lengths) + np.arange(count)
        # Each row is put off by less than the window: a part enters it row by row, and is held as long.
        return along[np.argsort(np.arange(count) + rng.uniform(0, self.window, count))]

    @property
    def window(self) -> int:
        """Rows of the window that slides along an epoch."""
        return max(WINDOW // self._reader.row_bytes, 1)

    @property
    def _begins(self) -> np.ndarray:
        """Places of the first observation of each part."""
        part = np.searchsorted(self._reader.starts, self.index, "right") - 1
        return np.flatnonzero(np.diff(part, prepend=-1))

    def hold_window(self, ahead: int) -> None:
        """Keep as many parts as a window takes, and `ahead` observations that are read before they are needed."""
        each = len(self) / len(self._begins)
        self._reader.capacity = math.ceil((min(self.window, len(self)) + ahead) / each) + 4

    def digest(self) -> dict[str, Any]:
        """By what a stream is known again: how many rows, which and how stored, and the values of a few of them."""
        sha = lambda *arrays: hashlib.sha256(b"".join(map(np.ascontiguousarray, arrays))).hexdigest()[:16]  # noqa: E731
        places = np.unique(np.linspace(0, len(self) - 1, min(DIGESTED, len(self))).round().astype(int))
        values = self._reader.read(self.index[places], ("x",))["x"]
        return {
            "rows": len(self), "index": sha(self.index), "parts": sha(self._reader.starts),
            "kind": str(self._reader.dtype), "some": sha(values),
        }  # fmt: skip


def _kinds(found: Any) -> dict[str, str]:
    """Type and shape of one observation's variables, in words; text may be of any length."""
    arrays = cast(dict, found.data_vars) if isinstance(found, xr.Dataset) else {"x": found}
    return {
        name: f"{'text' if a.dtype.kind in 'UOT' else a.dtype} and shape {a.shape[1:]}" for name, a in arrays.items()
    }


def at_hand(data: Any, most: int = LOOKED_AT) -> Any:
    """Data in memory: of a stream, at most so many observations from all over it; other data as they are.

    Raises StreamError for rows that cannot be read.
    """
    return data.some(most) if isinstance(data, Stream) else data
