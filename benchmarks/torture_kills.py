"""`kill -9` at any moment of a run, then `--resume`: the results must be bit for bit those of a run left alone.

A run is killed several times before it may end. Half of the moments are random times; the others follow something
that the run writes: a stage's first checkpoint, a file that is being written, the program, the posterior, figures.
"""

from collections import Counter
import json
from pathlib import Path
import time
from typing import Any

import numpy as np

from benchmarks.torture_trials import Sandbox, Tally
from sami_ppl._util.history import read_history

SETTINGS = {
    "features": 4, "width": 8, "depth": 1, "warm_steps": 10, "posterior_obs": 4, "draws": 10,
    **{f"denoiser.{k}": v for k, v in (("steps", 40), ("batch", 16), ("validate_every", 5))},
    **{f"encoder.{k}": v for k, v in (("steps", 40), ("batch", 16), ("validate_every", 5), ("warmup", 5))},
}  # fmt: skip
"""A run whose time goes into its beginning and its end, with a checkpoint every fifth step."""
STAGES = {
    "nothing": "config.json", "start": "checkpoints", "denoiser": "checkpoints/denoiser",
    "encoder": "checkpoints/encoder", "posterior": "model", "metrics": "posterior.nc", "report": "metrics.json",
    "end": "report.html",
}  # fmt: skip
"""What a run is doing until a path appears."""
MOMENTS = (
    *("any time", "being written") * 2, *("a checkpoint",) * 4, "model", "posterior.nc", "figures", "metrics.json",
    "report.html",
)  # fmt: skip
MOST_KILLS = 6
"""Of one run."""
LONGEST = 40
"""A run that takes so many times as long as the first one hangs."""


def make_data(file: Path) -> Path:
    """Sixty vectors of four numbers that depend on two."""
    draws = np.random.default_rng(0)
    x = draws.normal(size=(60, 2)) @ draws.normal(size=(2, 4)) / 2 + draws.normal(size=(60, 4)) / 10
    np.savez(file, x=x.astype(np.float32))
    return file


def command(data: Path, out: Path, **settings: Any) -> list[str]:
    """The words of a small run."""
    chosen = [word for name, value in {**SETTINGS, **settings}.items() for word in ("--set", f"{name}={value}")]
    return ["run", "linear_gaussian", "--data", str(data), *chosen, "--quiet", "--out", str(out)]


def kills(count: int, seed: int, folder: Path) -> Tally:
    """So many kills of runs that are resumed and compared with one that was never killed."""
    tally, rng, box = Tally("kill -9, then --resume"), np.random.default_rng(seed), Sandbox.make(folder)
    data, seconds = make_data(folder / "data.npz"), 0.0
    for name in ("compiled", "whole"):
        began = time.monotonic()
        process = box.start(*command(data, folder / name))
        printed = "".join(process.communicate(timeout=1200))
        seconds = time.monotonic() - began
        if process.returncode:
            tally.fail("a run left alone", printed[-500:])
            return tally
    expected, killed, number = results(folder / "whole"), 0, 0
    while killed < count:
        number += 1
        out, planned = folder / f"run{number}", min(int(rng.integers(1, MOST_KILLS + 1)), count - killed)
        words, at = [*command(data, out), "--resume"], []
        for _ in range(planned):
            moment, wait = str(rng.choice(MOMENTS)), float(rng.uniform(0, 1))
            process = box.start(*words)
            wait_for(process, out, moment, wait, seconds)
            process.kill()
            process.communicate()
            if process.returncode != -9:
                break
            at.append(f"{moment}, in {stage(out)}")
        killed += len(at)
        process = box.start(*words)
        try:
            printed = "".join(process.communicate(timeout=LONGEST * seconds))
            why = None if process.returncode == 0 else f"exit code {process.returncode}: {printed[-800:]}"
            why = why or difference(expected, results(out)) or left_over(out) or box.untouched()
        except Exception as error:
            process.kill()
            why = f"{type(error).__name__}: {error}"
        tally.seen.update(Counter(at))
        if why is None:
            tally.right += len(at)
        else:
            tally.fail({"run": number, "seed": seed, "kills": at}, why)
        print(f"kill: {killed} of {count}, {at}: {why or 'the same'}", flush=True)
    return tally


def wait_for(process: Any, out: Path, moment: str, wait: float, seconds: float) -> None:
    """Until the moment of a kill, or the end of the process; `wait` in [0, 1) is how long after what it follows."""
    began, started, seen = time.monotonic(), time.time(), set()
    while process.poll() is None:
        gone = time.monotonic() - began
        if moment == "any time":
            if gone >= wait * seconds:
                return
        elif moment == "being written":
            # What is written aside has a name of its own until it is complete.
            if gone >= wait * seconds and any("tmp" in p.name or p.name[0] == "." for p in _recent(out, started)):
                return
        elif moment == "a checkpoint":
            # One of sixteen, while it is written: each has a name of its own until it is complete.
            seen |= {path.name for path in out.glob("checkpoints/*/*tmp*")}
            if len(seen) > wait * 12:
                return
        elif (path := out / moment).exists() and path.stat().st_mtime > started:
            time.sleep(wait * seconds / 20)
            return
        time.sleep(0.002)


def _recent(out: Path, started: float) -> list[Path]:
    found = []
    for path in [*out.glob("*"), *out.glob("checkpoints/*/*")]:
        try:
            if path.name != ".lock" and path.stat().st_mtime > started:
                found.append(path)
        except FileNotFoundError:
            pass
    return found


def stage(out: Path) -> str:
    """How far a run has come."""
    return next((name for name, path in STAGES.items() if not (out / path).exists()), "the end")


def results(out: Path) -> dict[str, Any]:
    """What a run leaves, without what is measured in seconds."""
    metrics = json.loads((out / "metrics.json").read_text())
    metrics.pop("seconds")
    with np.load(out / "model" / "arrays.npz") as arrays:
        program = {name: (array.shape, str(array.dtype), array.tobytes()) for name, array in arrays.items()}
    log = [{k: v for k, v in record.items() if k != "seconds"} for record in read_history(out / "log.jsonl")]
    return {
        "program": program, "metrics": metrics, "posterior": (out / "posterior.nc").read_bytes(), "log": log,
        "config": json.loads((out / "config.json").read_text()),
        "figures": sorted(path.name for path in (out / "figures").iterdir()),
        "report": (out / "report.html").read_text().rstrip().endswith("</html>"),
    }  # fmt: skip


def difference(expected: dict[str, Any], found: dict[str, Any]) -> str | None:
    """Which results are not the same, bit for bit, or None."""
    other = [name for name in expected if expected[name] != found[name]]
    return f"other results: {', '.join(other)}" if other else None


def left_over(out: Path) -> str | None:
    """What killed processes have left and nobody has taken away, or None."""
    hidden = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.name[0] == "." or "tmp" in path.name)
    return f"left over: {hidden}" if hidden else None
