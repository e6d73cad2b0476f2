"""Long arrays in chunks of one size, so that a compiled function is compiled once and memory stays bounded."""

from collections.abc import Iterator

import numpy as np


def padded_chunks(count: int, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Rows of one chunk after another, and how many of them count: the last chunk repeats its last row to full size."""
    size = min(size, count)
    for start in range(0, count, size):
        yield np.minimum(np.arange(start, start + size), count - 1), min(size, count - start)
