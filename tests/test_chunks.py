"""Chunks of long arrays: of a size that memory bears, for no longer than there is time."""

import jax
import numpy as np

from sami_ppl._util import budget, chunks
from sami_ppl._util.budget import Budget
from sami_ppl._util.chunks import NUMBERS, by_chunks, chunk_of, padded_chunks


def clock(monkeypatch, module):
    """A list whose first number is the time in seconds."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_large_observations_come_in_smaller_chunks():
    """As many as keep within the bound, a power of two; at least one, however large."""
    assert chunk_of(256, (5,)) == chunk_of(256, (1, 28, 28)) == 256
    for shape, passes in (((3, 64, 64), 1), ((3, 64, 64), 8), ((3, 256, 256), 1)):
        found = chunk_of(256, shape, passes=passes)
        assert found * np.prod(shape) * passes <= NUMBERS < 2 * found * np.prod(shape) * passes
    assert chunk_of(256, (3, 1024, 1024)) == 1


def test_no_chunk_is_begun_after_the_time(monkeypatch):
    """The first always is, and what has been done is what comes back."""
    now = clock(monkeypatch, chunks)
    done = []
    for rows, count in padded_chunks(10, 4, seconds=2.5):
        done.append((rows.tolist(), count))
        now[0] += 2
    assert done == [([0, 1, 2, 3], 4), ([4, 5, 6, 7], 4)]
    assert [count for _, count in padded_chunks(10, 4)] == [4, 4, 2]

    def slow(x):
        now[0] += 2
        return 2 * x

    x = np.arange(10.0, dtype=np.float32)
    assert np.array_equal(by_chunks(slow, 4, x, seconds=2.5), 2 * x[:8])
    assert np.array_equal(by_chunks(slow, 4, x, seconds=0.0), 2 * x[:4])
    assert np.array_equal(by_chunks(slow, 4, x), 2 * x)


def test_chunks_of_random_keys():
    keys = jax.random.split(jax.random.key(0), 5)
    found = by_chunks(jax.vmap(jax.random.uniform), 2, keys)
    assert np.array_equal(found, jax.vmap(jax.random.uniform)(keys))


def test_parts_share_the_time_that_is_left(monkeypatch):
    now = clock(monkeypatch, budget)
    time = Budget(90.0, 3)
    assert time.share() == 30
    now[0] += 10
    assert time.share() == 40, "what the first has not used"
    now[0] += 100
    assert time.share() == 0
    assert time.spent
    forever = Budget(None, 3)
    assert forever.share() is None
    assert not forever.spent
