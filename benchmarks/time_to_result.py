"""Seconds from a cold start to a fitted program that knows the factors: `python -m benchmarks.time_to_result`.

Every seed is a `sami run` of the disks in a process and a compilation cache of its own. Two times from its start are
taken, to .1 s: until the first block of steps is done (no later than that for the first step), and until the program
has been saved. Whether the result was reached is read from the run's figures: forest R² of each factor against .97.
Before each seed the rate of matrix products is measured, which on a shared machine changes from hour to hour.
"""

import argparse
import json
import os
from pathlib import Path
import re
import subprocess
import sys
from tempfile import TemporaryDirectory
import time
from typing import Any

import numpy as np

from benchmarks.ceilings import calls
from benchmarks.timing import interleaved

SETTINGS = ("denoiser.steps=800", "encoder.steps=500", "warm_steps=200")
BAR = 0.97
FIRST_BLOCK = re.compile(r"\b[1-9]\d*/\d+ ")


def timed(seed: int, settings: list[str], out: Path) -> dict[str, Any]:
    """Times and figures of one run into the new folder `out`."""
    command = [sys.executable, "-m", "sami_ppl", "run", "disks", "--seed", str(seed), "--out", str(out)]
    command += [part for setting in settings for part in ("--set", setting)]
    errors = out.with_suffix(".log")
    with TemporaryDirectory() as cache, errors.open("w") as sink:
        unset = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
        began = time.perf_counter()
        process = subprocess.Popen(command, env=unset | {"XDG_CACHE_HOME": cache}, stdout=sink, stderr=sink)
        first = saved = None
        while process.poll() is None:
            now = time.perf_counter() - began
            if first is None and FIRST_BLOCK.search(errors.read_text()):
                first = now
            if saved is None and (out / "posterior.nc").exists():
                saved = now
            time.sleep(0.1)
    if process.returncode:
        raise RuntimeError(f"seed {seed} failed: {errors.read_text()[-2000:]}")
    metrics = json.loads((out / "metrics.json").read_text())
    return {"seed": seed, "first_block": first, "saved": saved, "whole_run": metrics["seconds"]["total"],
            "forest_r2": metrics["forest_r2"], "dci": metrics["dci_disentanglement"],
            "mse_own": metrics["samples"]["mse_own"], "mean_correlation": metrics["mean_correlation"]}  # fmt: skip


def matrix_rate() -> float:
    """GFLOP/s of a large float32 matrix product, median of ten."""
    call, operations = calls()["matrix product"]
    return operations / float(np.median(interleaved({"product": call}, 10)["product"])) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--set", action="append", dest="settings", help=f"instead of {' '.join(SETTINGS)}")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/time_to_result"))
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    found = []
    columns = ["seed", "GFLOP/s", "first 50 steps done, s", "program saved, s", "smallest forest R²",
               "mean correlation", "DCI", "squared error of samples"]  # fmt: skip
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for seed in asked.seeds:
        rate = matrix_rate()
        run = timed(seed, asked.settings or list(SETTINGS), asked.out / f"seed_{seed}")
        found.append(run)
        worst = min(run["forest_r2"].values())
        print(f"| {seed} | {rate:.0f} | {run['first_block']:.1f} | {run['saved']:.1f} | {worst:.4f} | "
              f"{run['mean_correlation']:.3f} | {run['dci']:.3f} | {run['mse_own']:.4f} |", flush=True)  # fmt: skip
    reached = sum(min(run["forest_r2"].values()) >= BAR for run in found)
    median = np.median([run["saved"] for run in found])
    print(f"\nforest R² of every factor at least {BAR}: {reached} of {len(found)}; median {median:.0f} s")
    (asked.out / "found.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
