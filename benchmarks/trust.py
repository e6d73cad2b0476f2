"""What particles and a guide of its own do to the posteriors of finished runs: one table.

    python -m benchmarks.trust runs/disks runs/digits --simulations 1000

For every run, samples by guidance alone and with particles, the guide as fitted and one fitted to such samples; for
every combination, on held-out observations and simulations:

- the bound, in nats; the squared error of a sample to the observation that gave its code, and the share of such errors
  that are larger than a quarter of the mean observation's: samples that went elsewhere;
- the factors by which posteriors are too narrow, how many lines of the calibration are called calibrated, the coverage
  of regions of 50, 80 and 95 %, and the share of simulations with an axis beyond five standard deviations;
- what the codes tell: accuracies of neighbours and of a linear probe, or DCI.

The guide that a run has of its own is given up first.
"""

import argparse
import json
from pathlib import Path
import time
from typing import Any
import warnings

import jax
import numpy as np

from benchmarks.panel import scores
import sami_ppl as sp
from sami_ppl.data import train_test
from sami_ppl.runs.run import open_run

HEAD = ("run", "sampler", "guide", "s", "bound", "error", "elsewhere", "factors", "calibrated", "coverage", "> 5 sd",
        "codes")  # fmt: skip


def measured(program: sp.Program, data: tuple, simulations: int, key: jax.Array) -> dict[str, Any]:
    """The figures of one program."""
    train, test = data
    keys = jax.random.split(key, 3)
    x = program.observed(test)[:1000]
    bound = sp.evidence_bound(program, test.isel(obs=slice(len(x))), key=keys[0])
    error = ((sp.generate(program, x=x, key=keys[1]) - x) ** 2).reshape(len(x), -1).mean(1)
    mean = float(((program.observed(train).mean(0) - x) ** 2).mean())
    tree = sp.simulation_based_calibration(program, key=keys[2], simulations=simulations)
    table, codes = sp.calibration_table(tree), tree["simulations"]
    beyond = np.abs((codes["mean"] - codes["z"]) / codes["sd"]).max("axis") > 5
    return {
        "bound": float(bound["bound"].mean()),
        "error": float(error.mean()),
        "elsewhere": float(np.mean(error > mean / 4)),
        "factors": table["factor"].values[:-1].tolist(),
        "calibrated": int((table["verdict"] == "calibrated").sum()),
        "lines": table.sizes["axis"],
        "coverage": table["coverage"].values[-1].tolist(),
        "beyond 5 sd": float(beyond.mean()),
        "codes": scores((program.encode(train)[0], program.encode(test)[0]), data),
    }


def line(run: str, sampler: str, guide: str, figures: dict[str, Any]) -> str:
    """A row of the table."""
    told = {name: np.round(value, 3).tolist() for name, value in figures["codes"].items()}
    cells = (
        run, sampler, guide, f"{figures['seconds']:.0f}", f"{figures['bound']:.2f}", f"{figures['error']:.4f}",
        f"{figures['elsewhere']:.1%}", " ".join(f"{factor:.2f}" for factor in figures["factors"]),
        f"{figures['calibrated']} of {figures['lines']}", " ".join(f"{c:.0%}" for c in figures["coverage"]),
        f"{figures['beyond 5 sd']:.1%}", ", ".join(f"{name} {value}" for name, value in told.items()),
    )  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def main(arguments: list[str] | None = None) -> None:
    """Print a row as soon as it is there; keep all of them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    parser.add_argument("--simulations", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=3000, help="to which a guide is fitted")
    parser.add_argument("--particles", type=int, nargs="+", default=[4])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file of the figures, as JSON")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    print("| " + " | ".join(HEAD) + " |\n" + "|---" * len(HEAD) + "|", flush=True)
    for folder in options.runs:
        run = open_run(folder)
        program, data = run.program, train_test(run.data)
        if isinstance(program.encoder, sp.OwnGuideEncoder):
            program = program.replace(encoder=program.encoder.base)
        steps = program.sampler.evaluations
        samplers = {"guidance": sp.StochasticDPMSolver(steps)}
        samplers |= {f"{count} particles": sp.TwistedSampler(steps, count) for count in options.particles}
        for name, sampler in samplers.items():
            fit_key, key = jax.random.split(jax.random.key(options.seed))
            drawn = program.replace(sampler=sampler)
            for guide in ("as fitted", "its own"):
                began = time.perf_counter()
                if guide == "its own":
                    drawn = sp.recalibrate(drawn, key=fit_key, simulations=options.samples, progress=False).program
                figures = {"seconds": time.perf_counter() - began} | measured(drawn, data, options.simulations, key)
                found[f"{folder.name}/{name}/{guide}"] = figures
                print(line(folder.name, name, guide, figures), flush=True)
                if options.out is not None:
                    options.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
