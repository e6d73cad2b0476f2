"""Data parallelism: batches split over devices, of one process or of several.

    with sp.data_parallel(8):
        program, history = sp.fit(program, x, stage, key=key)

Networks and data are on every device, each computes its share of a batch, and XLA adds up the gradients. The loss is
the same on any number of devices, up to the order of summation.

    with sp.data_parallel(8, split_above=1_000_000):

Of what a fit goes on from, parameters, moments of the optimiser, running average, arrays of more numbers than that lie
on the devices in parts, along their longest axis that the number of devices divides. XLA brings them together where a
step needs them (Rajbhandari et al. 2020, *ZeRO*, stage 3).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
import os
from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np


@dataclass(frozen=True)
class Devices:
    """Devices in a row, over which batches are split, and arrays of the state of more than `split_above` numbers."""

    mesh: Mesh
    split_above: int | None = None

    @property
    def size(self) -> int:
        """How many they are."""
        return self.mesh.size

    def sharding(self, *axes: str | None) -> NamedSharding:
        """An array split along the axes that are named "obs"; none are, where it is whole on every device."""
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    def by_size(self, leaf: Any) -> NamedSharding:
        """How an array of the state lies on them."""
        axes = [axis for axis, side in enumerate(leaf.shape) if side % self.size == 0]
        if self.split_above is None or leaf.size <= self.split_above or not axes:
            return self.sharding()
        longest = max(axes, key=leaf.shape.__getitem__)
        return self.sharding(*(None,) * longest, "obs")


_DEVICES: ContextVar[Devices | None] = ContextVar("devices", default=None)


@contextmanager
def data_parallel(devices: int | None = None, *, split_above: int | None = None) -> Iterator[Devices]:
    """Within this context `fit` splits every batch over the first `devices` devices; None, over all.

    `split_above`: arrays of parameters, optimiser and average of more numbers than that are split over them too; None,
    none. After `jax.distributed.initialize()` the devices of all processes count, and every process makes the same
    calls. Raises ValueError where there are fewer devices, or where a process would have none of them, for a
    `split_above` below 0, and for one with several processes.
    """
    found = jax.devices()
    count = len(found) if devices is None else devices
    if not 1 <= count <= len(found):
        raise ValueError(
            f"devices must lie between 1 and {len(found)}, the {found[0].platform} devices that JAX sees, got {count}; "
            "for virtual CPU devices set XLA_FLAGS=--xla_force_host_platform_device_count=8 before Python starts"
        )
    if {device.process_index for device in found[:count]} != set(range(jax.process_count())):
        raise ValueError(
            f"the first {count} of {len(found)} devices leave some of the {jax.process_count()} processes without "
            "one: leave devices out, so that all are used"
        )
    if split_above is not None and not split_above >= 0:
        raise ValueError(f"split_above={split_above}: must be at least 0 numbers, or be left out")
    if split_above is not None and jax.process_count() > 1:
        raise ValueError("split_above= takes the devices of one process: checkpoints are written by one. Leave it out")
    chosen = Devices(Mesh(np.array(found[:count]), ("obs",)), split_above)
    token = _DEVICES.set(chosen)
    try:
        yield chosen
    finally:
        _DEVICES.reset(token)


def current_devices() -> Devices | None:
    """The devices of the `data_parallel` context that we are in."""
    return _DEVICES.get()


def is_first_process() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def devices_in_words() -> str:
    """What is computed on: `CPU (2 cores)`, `GPU (NVIDIA H200)`, `4 of 8 GPU (NVIDIA H200)`."""
    found, devices = jax.devices(), current_devices()
    used, kind = 1 if devices is None else devices.size, found[0].platform.upper()
    share = "" if len(found) == 1 else f"{used} of {len(found)} "
    return f"{share}{kind} ({f'{os.cpu_count()} cores' if kind == 'CPU' else found[0].device_kind})"


def replicate[T](tree: T, devices: Devices | None) -> T:
    """The arrays of a tree on every device. Every process must hold the same, which JAX checks."""
    return tree if devices is None else _put(tree, lambda leaf: devices.sharding())


def place[T](state: T, devices: Devices | None) -> T:
    """The arrays of a state on every device, or in parts on all (`Devices.by_size`)."""
    return state if devices is None else _put(state, devices.by_size)


def _put[T](tree: T, sharding: Callable[[Any], NamedSharding]) -> T:
    # From the host: arrays that are on a device cannot be sent to those of another process.
    return _on_arrays(lambda leaf: jax.device_put(np.asarray(leaf), sharding(leaf)), tree)


def split_rows(x: jax.Array, devices: Devices | None) -> jax.Array:
    """Inside a compiled function: the leading dim split over the devices."""
    return x if devices is None else jax.lax.with_sharding_constraint(x, devices.sharding("obs"))


def split_parts(x: jax.Array, parts: int, devices: Devices | None) -> jax.Array:
    """Inside a compiled function: (rows, …) as (parts, rows / parts, …), every part split over the devices."""
    x = x.reshape(parts, -1, *x.shape[1:])
    return x if devices is None else jax.lax.with_sharding_constraint(x, devices.sharding(None, "obs"))


def keep_whole(tree: Any, devices: Devices | None) -> Any:
    """Inside a compiled function: results whole on every device, where the host looks for them."""
    return tree if devices is None else jax.lax.with_sharding_constraint(tree, devices.sharding())


def keep_placed(state: Any, devices: Devices | None) -> Any:
    """Inside a compiled function: a state where `place` puts it, and the next step looks for it."""
    if devices is None:
        return state
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, devices.by_size(leaf)), state)


def gather[T](tree: T, devices: Devices | None) -> T:
    """The arrays of a placed tree as arrays of this process's first device alone."""

    def whole(leaf: jax.Array) -> jax.Array:
        return leaf.addressable_data(0) if leaf.is_fully_replicated else jnp.asarray(np.asarray(leaf))

    return tree if devices is None else _on_arrays(whole, tree)


def from_first_process[T](tree: T) -> T:
    """The arrays that the first process holds, in every process; all must call it with trees of one structure."""
    if jax.process_count() == 1:
        return tree
    return _on_arrays(lambda leaf: jnp.asarray(multihost_utils.broadcast_one_to_all(np.asarray(leaf))), tree)


def _on_arrays[T](function: Callable[[Any], jax.Array], tree: T) -> T:
    """The function of every array, of random keys their plain numbers."""

    def apply(leaf: jax.Array) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(function(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        return function(leaf)

    return jax.tree.map(apply, tree)


def join_processes() -> None:
    """Join the other processes of the same command, `jax.distributed.initialize()`; the first thing a process does.

    Where no cluster says who takes part, the environment does. Raises ValueError for an incomplete one.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = [os.environ.get(name) for name in names]
    if not any(given):
        jax.distributed.initialize()
        return
    if not all(given):
        missing = [name for name, value in zip(names, given, strict=True) if not value]
        raise ValueError(f"the environment lacks {', '.join(missing)}: give all of {', '.join(names)}, or none of them")
    address, count, index = given
    jax.distributed.initialize(address, int(count or 1), int(index or 0))
