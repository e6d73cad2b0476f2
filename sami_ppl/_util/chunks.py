"""Long arrays in chunks of one size, so that a compiled function is compiled once and memory stays bounded."""

from collections.abc import Callable, Iterator
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sami_ppl._util.progress import advance

NUMBERS = 2**20
"""Values of observations in a chunk, at most: networks and their gradients hold some hundreds of numbers for each."""


def chunk_of(most: int, event_shape: tuple[int, ...], *, passes: int = 1) -> int:
    """Observations of a chunk: `most`, or, of large ones, as many as memory bears, a power of two.

    `passes`: how often each is taken at once, for instance with several draws.
    """
    borne = NUMBERS // (math.prod(event_shape) * passes)
    return most if borne >= most else 2 ** (max(1, borne).bit_length() - 1)


def padded_chunks(count: int, size: int, *, seconds: float | None = None) -> Iterator[tuple[np.ndarray, int]]:
    """Rows of one chunk after another, and how many of them count: the last chunk repeats its last row to full size.

    `seconds`: after so many no further chunk is begun; there is always a first. The phase under way says how far it is.
    """
    size, began = min(size, count), time.monotonic()
    for start in range(0, count, size):
        if start and seconds is not None and time.monotonic() - began > seconds:
            return
        yield np.minimum(np.arange(start, start + size), count - 1), min(size, count - start)
        advance(min(start + size, count), count)


def by_chunks(function: Callable[..., Any], size: int, *arrays: Any, seconds: float | None = None) -> Any:
    """What a compiled function of arrays gives, chunk by chunk of their rows, joined on the host.

    `arrays`: trees of arrays with as many rows each; the result has them too, in every leaf, or, where `seconds` were
    over before, the first of them.
    """
    count, parts = len(jax.tree.leaves(arrays)[0]), []
    for rows, kept in padded_chunks(count, size, seconds=seconds):
        part = function(*jax.tree.map(lambda array: _taken(array, rows), arrays))  # noqa: B023
        parts.append(jax.tree.map(lambda leaf: np.asarray(leaf)[:kept], jax.device_get(part)))  # noqa: B023
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def _taken(array: Any, rows: np.ndarray) -> jax.Array:
    if isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return array[rows]  # NumPy has no arrays of keys
    return jnp.asarray(np.asarray(array)[rows])
