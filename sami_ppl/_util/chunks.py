"""Long arrays in chunks of one size, so that a compiled function is compiled once and memory stays bounded."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def padded_chunks(count: int, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Rows of one chunk after another, and how many of them count: the last chunk repeats its last row to full size."""
    size = min(size, count)
    for start in range(0, count, size):
        yield np.minimum(np.arange(start, start + size), count - 1), min(size, count - start)


def by_chunks(function: Callable[..., Any], size: int, *arrays: Any) -> Any:
    """What a compiled function of arrays gives, chunk by chunk of their rows, joined on the host.

    `arrays`: trees of arrays with as many rows each; the result has them too, in every leaf.
    """
    count, parts = len(jax.tree.leaves(arrays)[0]), []
    for rows, kept in padded_chunks(count, size):
        part = function(*jax.tree.map(lambda array: jnp.asarray(np.asarray(array)[rows]), arrays))  # noqa: B023
        parts.append(jax.tree.map(lambda leaf: np.asarray(leaf)[:kept], jax.device_get(part)))  # noqa: B023
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
