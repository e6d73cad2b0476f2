"""Data parallelism: batches split over devices, of one process or of several.

    with sp.data_parallel(8):
        program, history = sp.fit(program, x, stage, key=key)

Networks and data are on every device, each computes its share of a batch, and XLA adds up the gradients. The loss is
the same on any number of devices, up to the order of summation.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
import os
from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

_MESH: ContextVar[Mesh | None] = ContextVar("mesh", default=None)


@contextmanager
def data_parallel(devices: int | None = None) -> Iterator[Mesh]:
    """Within this context `fit` splits every batch over the first `devices` devices; None, over all.

    After `jax.distributed.initialize()` the devices of all processes count, and every process makes the same calls.
    Raises ValueError where there are fewer devices, or where a process would have none of them.
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
    mesh = Mesh(np.array(found[:count]), ("obs",))
    token = _MESH.set(mesh)
    try:
        yield mesh
    finally:
        _MESH.reset(token)


def current_mesh() -> Mesh | None:
    """The mesh of the `data_parallel` context that we are in."""
    return _MESH.get()


def is_first_process() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def devices_in_words() -> str:
    """What is computed on: `CPU (2 cores)`, `GPU (NVIDIA H200)`, `4 of 8 GPU (NVIDIA H200)`."""
    found, mesh = jax.devices(), current_mesh()
    used, kind = 1 if mesh is None else mesh.size, found[0].platform.upper()
    share = "" if len(found) == 1 else f"{used} of {len(found)} "
    return f"{share}{kind} ({f'{os.cpu_count()} cores' if kind == 'CPU' else found[0].device_kind})"


def replicate[T](tree: T, mesh: Mesh | None) -> T:
    """The arrays of a tree on every device of the mesh. Every process must hold the same, which JAX checks."""
    if mesh is None:
        return tree
    sharding = NamedSharding(mesh, PartitionSpec())
    # From the host: arrays that are on a device cannot be sent to those of another process.
    return _on_arrays(lambda leaf: jax.device_put(np.asarray(leaf), sharding), tree)


def split_rows(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Inside a compiled function: the leading dim split over the devices."""
    return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec("obs")))


def keep_whole(tree: Any, mesh: Mesh | None) -> Any:
    """Inside a compiled function: results whole on every device, where the host and the next step look for them."""
    if mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec()))


def gather[T](tree: T, mesh: Mesh | None) -> T:
    """The replicated arrays of a tree as arrays of this process's first device alone."""
    return tree if mesh is None else _on_arrays(lambda leaf: leaf.addressable_data(0), tree)


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
