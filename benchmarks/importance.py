"""How much less noisy the bound is under fitted noise levels: `python benchmarks/importance.py RUN/model DATA.npz`.

Prints the variance of one observation's bound, in nats², from the same number of noise levels: drawn independently or
in strata, from the uniform or from the fitted density. For independent levels it is the variance over levels divided by
their number; for strata, half the mean squared difference of two estimates. DATA holds x; the first quarter fits the
density, the rest is measured.
"""

import sys

import jax
import numpy as np

import sami_ppl as sp
from sami_ppl.data import load_data
from sami_ppl.evidence import evidence_bound, importance_proposal

LEVELS = 24


def main(folder: str, file: str) -> None:
    program = sp.load(folder)
    x = np.asarray(load_data(file)["x"].values, np.float32)
    pilot, x = x[: len(x) // 4], x[len(x) // 4 :]
    proposal = importance_proposal(program, pilot, key=jax.random.key(0), pilot=len(pilot))

    def pair(proposal):
        return [evidence_bound(program, x, key=jax.random.key(k), levels=LEVELS, proposal=proposal) for k in (1, 2)]

    uniform, fitted = pair(None), pair(proposal)
    rows = {}
    for name, found in (("uniform", uniform), ("fitted", fitted)):
        rows[f"independent, {name}"] = float(np.mean([estimate["monte_carlo_se"].values ** 2 for estimate in found]))
        rows[f"stratified, {name}"] = float(np.mean((found[0]["bound"].values - found[1]["bound"].values) ** 2) / 2)
    independent = rows["independent, uniform"]
    print(f"{len(x)} observations, {LEVELS} noise levels each")
    for name, variance in rows.items():
        print(f"{name:<22}{variance:10.3f} nats²  {independent / variance:6.2f} times less")
    means = [np.mean([found["bound"].values.mean() for found in runs]) for runs in (uniform, fitted)]
    print(f"mean bound: uniform {means[0]:.2f}, fitted {means[1]:.2f} nats")


if __name__ == "__main__":
    main(*sys.argv[1:])
