"""Seconds from a cold start to a fitted program that knows the factors: `python -m benchmarks.time_to_result`.

Every seed is a `sami run` of the disks in a process and a compilation cache of its own. Three times from its start are
taken: until the bar shows its first steps, which it does after fifty and at most once a second; until the fitted
program has been saved, which knows the factors of any image; and until its posterior has been saved too. Figures and
report, which follow, are cut off. Whether the result was reached is measured afterwards on new images, 5,000 to fit and
2,500 to score: forest R² of each factor against .97. Before each seed the rate of matrix products is measured, which on
a shared machine changes from hour to hour.
"""

import argparse
from contextlib import suppress
import json
import os
from pathlib import Path
import pty
import re
import subprocess
import sys
from tempfile import TemporaryDirectory
import termios
import time
from typing import Any

import jax
import numpy as np

from benchmarks.ceilings import calls
from benchmarks.timing import interleaved
import sami_ppl as sp
from sami_ppl.data import disks
from sami_ppl.metrics import forest_r2, mean_correlation

SETTINGS = ("denoiser.steps=800", "encoder.steps=500", "warm_steps=200")
FACTORS = ("centre_x", "centre_y", "background")
BAR = 0.97
FIRST_STEPS = re.compile(rb"\b[1-9]\d*/\d+ ")


def timed(seed: int, settings: list[str], out: Path, *, cold: bool) -> dict[str, Any]:
    """Times of one run into the new folder `out`; with `cold` it ends at its first steps."""
    command = [sys.executable, "-m", "sami_ppl", "run", "disks", "--seed", str(seed), "--out", str(out)]
    command += [part for setting in settings for part in ("--set", setting)]
    first = fitted = saved = None
    shown = b""
    terminal, child = pty.openpty()  # at a terminal the bar is drawn every second, else every twenty
    os.set_blocking(terminal, False)
    termios.tcsetwinsize(child, (24, 100))  # in a terminal of no width nothing is drawn
    with TemporaryDirectory() as cache:
        environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
        began = time.perf_counter()
        process = subprocess.Popen(command, env=environment | {"XDG_CACHE_HOME": cache}, stdout=child, stderr=child)
        while process.poll() is None and saved is None and not (cold and first is not None):
            with suppress(BlockingIOError):
                shown += os.read(terminal, 65536)
            now = time.perf_counter() - began
            if first is None and FIRST_STEPS.search(shown):
                first = now
            if fitted is None and (out / "model").exists():  # appears whole
                fitted = now
            if (out / "posterior.nc").exists():
                saved = now
            time.sleep(0.1)
        process.terminate()
        process.wait()
        with suppress(BlockingIOError):
            shown += os.read(terminal, 65536)  # of a run that failed, why
    os.close(terminal)
    os.close(child)
    if first is None or (saved is None and not cold):
        raise RuntimeError(f"seed {seed} failed: {shown.decode(errors='replace')[-2000:]}")
    return {"seed": seed, "first_steps": first, "fitted": fitted, "saved": saved}


def scores(program: sp.Program) -> dict[str, Any]:
    """How well the code knows the factors of new images, and samples follow it."""
    data = disks(jax.random.fold_in(jax.random.key(0), 2**31 - 1), 7500)
    factors = np.stack([data[name].values for name in FACTORS], 1)
    codes, x = program.encode(data["x"].values)[0], data["x"].values[-256:]
    keys = jax.random.split(jax.random.key(1), len(x))
    samples = sp.decode(program, codes[-256:], keys)
    return {
        "forest_r2": forest_r2(codes[:5000], factors[:5000], codes[5000:], factors[5000:], seed=0).tolist(),
        "mean_correlation": float(mean_correlation(codes[5000:], factors[5000:])),
        "mse_own": float(np.mean((samples - x) ** 2)),
    }


def matrix_rate() -> float:
    """GFLOP/s of a large float32 matrix product, median of ten."""
    call, operations = calls()["matrix product"]
    return operations / float(np.median(interleaved({"product": call}, 10)["product"])) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--set", action="append", dest="settings", help=f"instead of {' '.join(SETTINGS)}")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/time_to_result"))
    parser.add_argument("--cold", action="store_true", help="the first steps only")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    found = []
    columns = ["seed", "GFLOP/s", "first steps, s"]
    scored = ["program, s", "posterior, s", "smallest forest R²", "mean correlation", "squared error of samples"]
    columns += [] if asked.cold else scored
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    for seed in asked.seeds:
        rate, out = matrix_rate(), asked.out / f"seed_{seed}"
        run = {"gflops": rate} | timed(seed, asked.settings or list(SETTINGS), out, cold=asked.cold)
        cells = [f"{seed}", f"{rate:.0f}", f"{run['first_steps']:.1f}"]
        if not asked.cold:
            run |= scores(sp.load(out / "model"))
            cells += [f"{run['fitted']:.1f}", f"{run['saved']:.1f}", f"{min(run['forest_r2']):.4f}"]
            cells += [f"{run['mean_correlation']:.3f}", f"{run['mse_own']:.4f}"]
        found.append(run)
        print(f"| {' | '.join(cells)} |", flush=True)
    (asked.out / "found.json").write_text(json.dumps(found, indent=1))
    if not asked.cold:
        reached = sum(min(run["forest_r2"]) >= BAR for run in found)
        fitted, saved = (np.median([run[name] for run in found]) for name in ("fitted", "saved"))
        print(f"\nforest R² of every factor at least {BAR}: {reached} of {len(found)}; "
              f"median {fitted:.0f} s to the program, {saved:.0f} s to its posterior")  # fmt: skip


if __name__ == "__main__":
    main()
