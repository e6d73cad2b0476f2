"""Two revisions of the library against each other: `python -m benchmarks.revisions BEFORE AFTER [--steps plain ...]`.

Each revision runs in a process of its own and both take their steps in turn, so that the ratio holds on a machine that
does other things too. A revision is anything that git knows; `.` is the working tree.
"""

import argparse
from pathlib import Path
import subprocess
import sys
import tempfile
import time

import numpy as np

from benchmarks.timing import interleaved, ratio, spread

ROOT = Path(__file__).resolve().parents[1]
STEPS = ("plain", "encoder", "decoupled", "guided sampling")
WORKER = """
import sys
from benchmarks.cases import CASES, TINY, steps_of
from benchmarks.steps import compile_step, memory
case, *names = sys.argv[1:]
table = steps_of({c.name: c for c in (*CASES, *TINY)}[case])
calls = {name: compile_step(table[name]) for name in names}
print("ready", *(memory(compiled) for _, compiled in calls.values()), flush=True)
for line in sys.stdin:
    calls[line.strip()][0]()
    print("done", flush=True)
"""


class Worker:
    """A process that imports one revision of the library and takes the steps that it is told to."""

    def __init__(self, revision: str, case: str, steps: list[str], folder: Path):
        library = ROOT
        if revision != ".":
            library = folder / revision.replace("/", "_")
            library.mkdir()
            archive = subprocess.run(
                ["git", "archive", revision, "sami_ppl"], cwd=ROOT, check=True, capture_output=True
            )
            subprocess.run(["tar", "-x", "-C", library], input=archive.stdout, check=True)
        code = f"import sys; sys.path[:0] = [{str(library)!r}, {str(ROOT)!r}]\n{WORKER}"
        began = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, case, *steps],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
        )
        self.memory = dict(zip(steps, map(float, self._answer("ready")), strict=True))
        self.compile_seconds = time.perf_counter() - began

    def _answer(self, expected: str) -> list[str]:
        word, *rest = self.process.stdout.readline().split() or ["nothing"]
        if word != expected:
            raise RuntimeError(f"a worker said {word!r}, expected {expected!r}: its own message stands above")
        return rest

    def __call__(self, step: str) -> None:
        self.process.stdin.write(step + "\n")
        self.process.stdin.flush()
        self._answer("done")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before")
    parser.add_argument("after")
    parser.add_argument("--case", default="unet 32-64, 32 px, batch 64, D 6", help="the name of a configuration")
    parser.add_argument("--steps", nargs="+", default=STEPS, help="names of steps, as `make bench` prints them")
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        revisions = {"before": arguments.before, "after": arguments.after}
        workers = {
            side: Worker(revision, arguments.case, arguments.steps, Path(tempfile.mkdtemp(dir=folder)))
            for side, revision in revisions.items()
        }
        print(
            f"{arguments.case}; {arguments.before} → {arguments.after}; median (quartiles) of {arguments.rounds} rounds"
        )
        for step in arguments.steps:
            seconds = interleaved({s: lambda w=w, step=step: w(step) for s, w in workers.items()}, arguments.rounds)
            report(step, seconds, {side: worker.memory[step] for side, worker in workers.items()})
        print("start and compile: " + " → ".join(f"{worker.compile_seconds:.0f} s" for worker in workers.values()))
        for worker in workers.values():
            worker.process.stdin.close()
            worker.process.wait()


def report(step: str, seconds: dict[str, np.ndarray], memory: dict[str, float]) -> None:
    before, after = (1e3 * spread(seconds[side])["median"] for side in ("before", "after"))
    found = ratio(seconds["after"], seconds["before"])
    quartiles = f"{found['median']:.3f} ({found['low']:.3f}–{found['high']:.3f})"
    held = f"{memory['before']:.1f} → {memory['after']:.1f} MiB"
    print(f"{step:24s} {before:8.1f} → {after:8.1f} ms, ratio {quartiles}; {held}", flush=True)


if __name__ == "__main__":
    main()
