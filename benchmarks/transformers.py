"""Steps of training of transformers and U-Nets, ours and PyTorch's: `python -m benchmarks.transformers`.

All steps are timed in turn, a round after the other, with a large matrix product among them: ratios and shares are
medians of ratios within a round, so that they hold on a machine that does other things too. PyTorch's steps are taken
by a process of its own, `--pytorch PYTHON` (an environment with PyTorch and NumPy), which waits while others run.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
import json
from pathlib import Path
import subprocess
from tempfile import TemporaryDirectory
from typing import Any

import equinox as eqx
import jax
import numpy as np

from benchmarks import ceilings
from benchmarks.cases import Case, program_of, steps_of
from benchmarks.counts import step_products
from benchmarks.export_weights import export_case
from benchmarks.steps import compile_step
from benchmarks.timing import interleaved, machine, ratio, spread

STEPS = ("plain", "encoder")
CASES = (
    Case("unet", 28, 64, 8),
    Case("dit", 28, 64, 8, (64, 4, 4)),  # about as many parameters
    Case("dit", 28, 64, 8, (64, 6, 4)),  # the front door's
    Case("unet", 32, 64, 8, channels=3),
    Case("dit", 32, 64, 8, (64, 4, 4), channels=3),
    Case("dit", 32, 64, 8, (64, 6, 4), channels=3),
)
TINY = (Case("unet", 8, 4, 2, (8, 8)), Case("dit", 8, 4, 2, (8, 2, 4)))
Calls = dict[str, Callable[[], Any]]


@contextmanager
def theirs(python: str | None, cases: tuple[Case, ...]) -> Iterator[Calls]:
    """PyTorch's steps by name, float32, of U-Nets in both memory layouts; none where there is no PyTorch."""
    if python is None:
        yield {}
        return
    with TemporaryDirectory() as folder:
        for index, case in enumerate(cases):
            export_case(case, Path(folder) / f"{index}.npz")
        command = [python, "-m", "benchmarks.pytorch_reference", folder, "--serve"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            stdin, stdout = process.stdin, process.stdout
            assert stdin is not None
            assert stdout is not None

            def told(name: str) -> None:
                print(name, file=stdin, flush=True)
                if stdout.readline() != "done\n":
                    raise RuntimeError(f"the PyTorch process failed at {name}: what it said is above")

            if stdout.readline() != "ready\n":
                raise RuntimeError("the PyTorch process did not start: what it said is above")
            found = {}
            for index, case in enumerate(cases):
                layouts = ("float32", "float32, channels last") if case.network == "unet" else ("float32",)
                for step in STEPS:
                    for layout in layouts:
                        line = f"{index}: {step}, {layout}"
                        found[f"{case.name}: {step}, PyTorch {layout}"] = lambda line=line: told(line)
            yield found
            stdin.close()


def parameters(network: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(network, eqx.is_inexact_array)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pytorch", help="Python of an environment with PyTorch and NumPy; default: ours alone")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tiny", action="store_true", help="networks of no interest, to see that all of it runs")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/transformers.json"))
    arguments = parser.parse_args()
    cases = TINY if arguments.tiny else CASES
    product, operations = ceilings.calls()["matrix product"]
    calls: Calls = {"matrix product": product}
    for case in cases:
        calls |= {f"{case.name}: {step}": compile_step(steps_of(case)[step])[0] for step in STEPS}
    with theirs(arguments.pytorch, cases) as others:
        seconds = interleaved(calls | others, arguments.rounds)
    rows: list[dict[str, Any]] = []
    print("| network | step | parameters trained | ms | share of matrix rate | over U-Net | over PyTorch |")
    print("|---|---|---|---|---|---|---|")
    for case in cases:
        program = program_of(case)
        unet = next(other for other in cases if other.network == "unet" and other.pixels == case.pixels)
        for step in STEPS:
            name = f"{case.name}: {step}"
            taken, products = seconds[name], step_products(program, step, case.batch)
            peers = [peer for peer in others if peer.startswith(f"{name}, ")]
            best = min(peers, key=lambda peer: float(np.median(seconds[peer])), default=None)
            row = {
                "name": name,
                "parameters": parameters(program.denoiser if step == "plain" else program.encoder),
                "gflop": products / 1e9,
                "seconds": spread(taken),
                "share": ratio(products / taken, operations / seconds["matrix product"]),
                "over_unet": ratio(taken, seconds[f"{unet.name}: {step}"]),
                "pytorch": {peer: spread(seconds[peer]) for peer in peers},
                "over_pytorch": ratio(taken, seconds[best]) if best else None,
            }
            rows.append(row)
            milliseconds = {key: 1e3 * value for key, value in row["seconds"].items()}
            cells = (case.name, step, f"{row['parameters']:,}", _quartiles(milliseconds, 0), _quartiles(row["share"]),
                     _quartiles(row["over_unet"]), _quartiles(row["over_pytorch"]) if best else "")  # fmt: skip
            print(f"| {' | '.join(cells)} |", flush=True)
    report = {"machine": machine(), "jax": jax.__version__, "rounds": arguments.rounds, "rows": rows,
              "gflops": spread(operations / seconds["matrix product"] / 1e9)}  # fmt: skip
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1))
    print(f"\nmatrix products at {_quartiles(report['gflops'], 0)} GFLOP/s; written: {arguments.out}")


def _quartiles(found: dict[str, float], digits: int = 2) -> str:
    low, median, high = (f"{found[key]:.{digits}f}" for key in ("low", "median", "high"))
    return f"{median} ({low}–{high})"


if __name__ == "__main__":
    main()
