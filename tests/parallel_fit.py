"""Fits a small program on so many devices, alone or as one of several processes; run by `test_parallel.py`.

python parallel_fit.py OUT.npz DEVICES STEPS [FOLDER]

With STREAMED=chunk in the environment the data are a stream, of rows that are stored so many together; with SPLIT=n
arrays of the state of more than n numbers are split over devices; with ACCUMULATE=k the batch is taken in k parts; with
STOP=1 the fit is interrupted after its first validation.
"""

from contextlib import nullcontext, suppress
import os
from pathlib import Path
import sys

from conftest import MLP, normal_prior
import jax
import numpy as np

import sami_ppl as sp
from sami_ppl._util.parallel import is_first_process, join_processes
from sami_ppl.fitting.loop import Loop
from sami_ppl.fitting.stopping import Interrupted


class Rows:
    """A source that remembers what it was asked for."""

    def __init__(self, x):
        self.x, self.asked = x, []

    def __len__(self):
        return len(self.x)

    def rows(self, i):
        self.asked.append(i)
        return self.x[i]


class Wide(MLP):
    """The network of the other tests, of a width that two and eight devices divide."""

    def __init__(self, size, out, *, key):
        super().__init__(size, out, key=key)
        inner_key, outer_key = jax.random.split(key)
        self.inner = jax.random.normal(inner_key, (size + 1, 16)) * size**-0.5
        self.outer = jax.random.normal(outer_key, (16, out)) * 0.25


def share(state):
    """What the first device holds of a state, over all of it."""
    leaves = [leaf for leaf in jax.tree.leaves(state) if not jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    return sum(leaf.addressable_shards[0].data.size for leaf in leaves) / sum(leaf.size for leaf in leaves)


def stop(record):
    if os.environ.get("STOP"):
        raise KeyboardInterrupt


if __name__ == "__main__":
    target, devices, steps, *folder = sys.argv[1:]
    if devices == "processes":
        join_processes()
    schedule, keys = sp.VariancePreserving(-4.0, 4.0), jax.random.split(jax.random.key(7), 3)
    program = sp.Program(
        normal_prior,
        sp.PreconditionedDenoiser(Wide(4, 4, key=keys[0]), schedule, (4,)),
        sp.DiagonalEncoder(Wide(4, 6, key=keys[1]), schedule, (4,), 2, key=keys[2]),
    )
    x = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)
    source, data = Rows(x), x[:-20]
    if chunk := int(os.environ.get("STREAMED", 0)):
        data = sp.data.Stream(source, chunks=chunk).take(slice(-20))
    parts = int(os.environ.get("ACCUMULATE", 1))
    stage = sp.Stage(steps=int(steps), batch=16, learning_rate=3e-3, validate_every=10, accumulate=parts)
    shares, validate = [], Loop.validate
    Loop.validate = lambda self, state: (shares.append(share(state)), validate(self, state))[1]
    context = {"0": nullcontext()}.get(devices)
    if context is None:
        split = {"split_above": int(os.environ["SPLIT"])} if "SPLIT" in os.environ else {}
        context = sp.data_parallel(None if devices == "processes" else int(devices), **split)
    out = Path(folder[0]) if folder else None
    with context, suppress(Interrupted if os.environ.get("STOP") else ()):
        fitted, history = sp.fit(
            program, data, stage, key=jax.random.key(1), held_out=x[-20:], progress=False, out=out,
            resume=out is not None, callback=stop,
        )  # fmt: skip
    if os.environ.get("STOP"):
        sys.exit()
    leaves = jax.tree.leaves(fitted.params())
    assert all(leaf.sharding.is_fully_addressable and len(leaf.devices()) == 1 for leaf in leaves)
    records = history.stage_records()
    np.savez(
        target, *map(np.asarray, leaves), train_loss=[r["train_loss"] for r in records],
        bound=[r["bound"] for r in records], first=is_first_process(), share=shares[-1:], processes=jax.process_count(),
        asked=np.concatenate([i for i in source.asked if len(i) < 17] or [[]]),
    )  # fmt: skip
