"""What the steps of a stage are taken on: observations in memory, or batches read from a stream ahead of their step.

Both are functions of the step's number alone, so that a run goes on from a checkpoint, which holds that number, bit for
bit, with any number of threads that read.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from threading import Lock
from typing import Any, cast

import jax
import numpy as np
import xarray as xr

from sami_ppl._util import parallel
from sami_ppl._util.parallel import Devices
from sami_ppl.data.stream import Stream, StreamError
from sami_ppl.fitting.signature import digests
from sami_ppl.fitting.stage import batches
from sami_ppl.fitting.step import Batch, Step
from sami_ppl.program.program import Program

THREADS, AHEAD = 4, 8
"""Threads that read batches of a stream, and batches that are read ahead."""


class InMemory:
    """Observations on the device, of which each step takes some rows."""

    def __init__(self, observed: Batch, *, seed: int, batch: int):
        self.observed, self.seed, self.batch, self.count = observed, seed, batch, len(observed.x)
        self.first = observed.take(slice(1))

    def digest(self) -> dict[str, str]:
        """By what they are known again."""
        return digests(*self.observed)

    def place(self, devices: Devices | None) -> None:
        """Put them on every device."""
        self.observed = parallel.replicate(jax.tree.map(jax.numpy.asarray, self.observed), devices)

    def steps(self, first: int, count: int) -> Iterator[Step]:
        """What so many steps are taken on."""
        yield from self.observed.steps(batches(self.seed, self.count, self.batch, first, count))

    def close(self) -> None:
        """Nothing is to be ended."""


class Streamed:
    """Batches of a stream, read by threads of grain while earlier steps are computed.

    Of several processes that fit, each reads its own rows of every batch: those of its own parts where rows are stored
    together, else those of its own devices in the order of a single process.
    """

    def __init__(self, program: Program, stream: Stream, *, seed: int, batch: int, total: int):
        _grain()
        self.program, self.stream, self.total = program, stream, total
        self.seed, self.batch, self.count = seed, batch, len(stream)
        self.names = program.latents.arguments
        self.first = self._observed(np.arange(1), stream.rows(np.arange(1), self.names))
        self.devices: Devices | None = None
        self.iterator: Any = None
        self.next = -1

    def digest(self) -> dict[str, Any]:
        """By what the stream is known again; its values are not all read."""
        return self.stream.digest()

    def place(self, devices: Devices | None) -> None:
        """Say on which devices batches are to be."""
        self.devices = devices

    def steps(self, first: int, count: int) -> Iterator[Step]:
        """What so many steps are taken on. Raises StreamError, with the row, for what cannot be used."""
        if self.iterator is None or self.next != first:
            self._begin(first)
        for _ in range(count):
            read = next(cast(Any, self.iterator))
            if isinstance(read, StreamError):
                self.close()
                raise read
            self.next += 1
            yield self._placed(read), None

    def close(self) -> None:
        """End the threads that read."""
        if self.iterator is not None:
            self.iterator.close()
        self.iterator, self.next = None, -1

    def _begin(self, first: int) -> None:
        self.close()
        grain = _grain()
        own = local_rows(self.batch, self.devices)
        share = self.stream.share(jax.process_index(), jax.process_count())
        if share is not self.stream:
            own = np.arange(len(own))
        batch = self.batch if share is self.stream else len(own)
        reads = Reads(share, own, seed=self.seed, batch=batch, names=self.names, total=self.total)
        options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=AHEAD)
        found = grain.MapDataset.source(reads)[first:].to_iter_dataset(options)
        found = grain.experimental.ThreadPrefetchIterDataset(found.map(self._checked), prefetch_buffer_size=2)
        self.iterator, self.next = iter(found), first

    def _checked(self, read: Any) -> Batch | StreamError:
        """A batch as the program takes it; what goes wrong is handed on, and raised where the step would be taken."""
        if isinstance(read, StreamError):
            return read
        try:
            return self._observed(*read)
        except StreamError as error:
            return error

    def _observed(self, rows: np.ndarray, read: Any) -> Batch:
        """Observations as the program takes them. Raises StreamError with the first row that is not as it must be."""
        try:
            return Batch(*self.program.observations(read))
        except (ValueError, TypeError) as error:
            for i, row in enumerate(rows):
                one = slice(i, i + 1)
                try:
                    self.program.observations(read.isel(obs=one) if isinstance(read, xr.Dataset) else read[one])
                except (ValueError, TypeError) as found:
                    message = str(found).replace(" at observation 0,", " in it,").replace("observation 0", "it")
                    raise StreamError(f"row {row:,} of {self.stream.name} cannot be used: {message}") from error
            raise StreamError(f"rows of {self.stream.name} cannot be used: {error}") from error

    def _placed(self, read: Batch) -> Batch:
        """The batch on the devices, of several processes each one's own rows of it."""
        if self.devices is None:
            return jax.device_put(read)
        sharding = self.devices.sharding("obs")
        return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), read)


class Reads:
    """The batches of a fit as grain asks for them: number i is read for step i."""

    def __init__(self, stream: Stream, own: np.ndarray, *, seed: int, batch: int, names: Sequence[str], total: int):
        """`own`: which rows of a batch are read here."""
        self.stream, self.own, self.seed, self.batch, self.names, self.total = stream, own, seed, batch, names, total
        stream.hold_window(ahead=batch * (AHEAD + THREADS))
        self.lock, self.known = Lock(), lru_cache(maxsize=2)(stream.order)

    def _order(self, seed: int, epoch: int) -> np.ndarray:
        with self.lock:  # of several threads that begin an epoch one finds its order
            return self.known(seed, epoch)

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, step: Any) -> Any:
        try:
            places = batches(self.seed, len(self.stream), self.batch, int(step), 1, self._order)[0][self.own]
            return self.stream.index[places], self.stream.rows(places, self.names)
        except StreamError as error:  # raised where the step would be taken
            return error


def local_rows(batch: int, devices: Devices | None) -> np.ndarray:
    """The rows of a batch that devices of this process compute."""
    if devices is None:
        return np.arange(batch)
    sharding = devices.sharding("obs")
    indices: Iterable[Any] = sharding.addressable_devices_indices_map((batch,)).values()
    return np.unique(np.concatenate([np.arange(batch)[index] for index in indices]))


def _grain() -> Any:
    try:
        import grain
    except ImportError as error:
        raise ImportError("streams are read by grain: pip install 'sami_ppl[streams]'") from error
    return grain
