"""Fits a small program on so many devices, alone or as one of several processes; run by `test_parallel.py`.

python parallel_fit.py OUT.npz DEVICES STEPS [FOLDER]
"""

from contextlib import nullcontext
from pathlib import Path
import sys

from conftest import MLP, normal_prior
import jax
import numpy as np

import sami_ppl as sp
from sami_ppl._util.parallel import is_first_process, join_processes

if __name__ == "__main__":
    target, devices, steps, *folder = sys.argv[1:]
    if devices == "processes":
        join_processes()
    schedule, keys = sp.VariancePreserving(-4.0, 4.0), jax.random.split(jax.random.key(7), 3)
    program = sp.Program(
        normal_prior,
        sp.PreconditionedDenoiser(MLP(4, 4, key=keys[0]), schedule, (4,)),
        sp.DiagonalEncoder(MLP(4, 6, key=keys[1]), schedule, (4,), 2, key=keys[2]),
    )
    x = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)
    stage = sp.Stage(steps=int(steps), batch=16, learning_rate=3e-3, validate_every=10)
    context = {"0": nullcontext()}.get(devices)
    if context is None:
        context = sp.data_parallel(None if devices == "processes" else int(devices))
    out = Path(folder[0]) if folder else None
    with context:
        fitted, history = sp.fit(
            program, x, stage, key=jax.random.key(1), progress=False, out=out, resume=out is not None
        )
    leaves = jax.tree.leaves(fitted.params())
    assert all(leaf.sharding.is_fully_addressable and len(leaf.devices()) == 1 for leaf in leaves)
    records = history.stage_records()
    np.savez(
        target, *map(np.asarray, leaves), train_loss=[r["train_loss"] for r in records],
        bound=[r["bound"] for r in records], first=is_first_process(), processes=jax.process_count(),
    )  # fmt: skip
