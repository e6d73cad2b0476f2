"""Steps of training, sampling and encoding: time, memory, operations: `make bench`, or `python -m benchmarks.steps`.

All steps of a configuration are timed in turn, in one process, so that their ratios hold on a machine that does
other things too. Memory is what the compiled step holds at its peak: arguments, results and temporaries.
"""

import argparse
from collections.abc import Callable, Collection
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import ceilings
from benchmarks.cases import CASES, QUICK, TINY, Case, Step, program_of, steps_of
from benchmarks.counts import step_products
from benchmarks.timing import interleaved, machine, ratio, spread


def compile_step(step: Step) -> tuple[Callable[[], Any], jax.stages.Compiled]:
    """A blocking call that takes one step after the other, and what was compiled for it."""
    function, arguments, carries = step
    donated = tuple(range(len(arguments))) if carries else ()
    compiled = jax.jit(function, donate_argnums=donated).lower(*arguments).compile()
    state = [jax.tree.map(jnp.copy, arguments)]  # steps share networks; donated arrays are gone after the first call

    def call() -> None:
        result = jax.block_until_ready(compiled(*state[0]))
        if carries:
            state[0] = result[:-1]

    return call, compiled


def memory(compiled: jax.stages.Compiled) -> float:
    """MiB held at the peak of a step; a donated argument and the result in its place count once."""
    found = compiled.memory_analysis()
    total = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    return (total - found.alias_size_in_bytes) / 2**20


def measure(case: Case, rounds: int, ceiling: float, only: Collection[str] = ()) -> dict[str, Any]:
    """Times, ratios, memory and operations of the steps of a configuration, or of some. `ceiling` in GFLOP/s."""
    wanted = {name: step for name, step in steps_of(case).items() if not only or name in {*only, "plain"}}
    steps = {name: compile_step(step) for name, step in wanted.items()}
    seconds = interleaved({name: call for name, (call, _) in steps.items()}, rounds)
    program, rows = program_of(case), {}
    for name, taken in seconds.items():
        products = step_products(program, name, case.batch)
        row = {
            "seconds": spread(taken),
            "memory_mib": memory(steps[name][1]),
            "gflop_compiled": (steps[name][1].cost_analysis() or {}).get("flops", float("nan")) / 1e9,
            "gflop_products": products / 1e9,
            "share_of_ceiling": products / 1e9 / float(np.median(taken)) / ceiling,
        }
        if (base := {"guided sampling": "sampling", "encoder, by Fit": "encoder"}.get(name)) in seconds:
            row[f"over_{base}"] = ratio(taken, seconds[base])
        elif name in ("encoder", "decoupled", "joint"):
            row["over_plain"] = ratio(taken, seconds["plain"])
            row["memory_over_plain"] = row["memory_mib"] / memory(steps["plain"][1])
        rows[name] = row
    return {"case": case.name, "steps": rows}


def table(result: dict[str, Any]) -> str:
    """One configuration as a Markdown table."""
    header = (
        "step",
        "ms (quartiles)",
        "ratio (quartiles)",
        "MiB (ratio)",
        "GFLOP compiled / products",
        "share of ceiling",
    )
    lines = [f"**{result['case']}**", "", f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for name, row in result["steps"].items():
        over = next((key for key in row if key.startswith("over_")), None)
        memory_ratio = f" ({row['memory_over_plain']:.2f})" if "memory_over_plain" in row else ""
        cells = (
            name,
            _quartiles(row["seconds"], 1e3, 1),
            f"{_quartiles(row[over])} × {over.removeprefix('over_')}" if over else "",
            f"{row['memory_mib']:.1f}{memory_ratio}",
            f"{row['gflop_compiled']:.2f} / {row['gflop_products']:.2f}",
            f"{100 * row['share_of_ceiling']:.0f} %",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _quartiles(found: dict[str, float], factor: float = 1.0, digits: int = 2) -> str:
    low, median, high = (f"{factor * found[key]:.{digits}f}" for key in ("low", "median", "high"))
    return f"{median} ({low}–{high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one U-Net and one perceptron only")
    parser.add_argument("--case", choices=[case.name for case in CASES], help="one configuration only")
    parser.add_argument("--only", nargs="+", default=(), metavar="STEP", help="plain denoising and these steps only")
    parser.add_argument("--tiny", action="store_true", help="networks of no interest, to see that all of it runs")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/steps.json"))
    arguments = parser.parse_args()
    found = ceilings.measure(arguments.rounds)
    report = {"machine": machine(), "jax": jax.__version__, "device": jax.devices()[0].device_kind,
              "rounds": arguments.rounds, "ceilings_gflops": found}  # fmt: skip
    device = f"{report['machine']['processor']}, {report['machine']['cores']} cores; {report['device']}"
    print(f"{device}; jax {jax.__version__}; load {report['machine']['load']:.1f}\n\n"
          "| GFLOP/s | median (quartiles) |\n|---|---|")  # fmt: skip
    for name, rate in found.items():
        print(f"| {name} | {_quartiles(rate, digits=0)} |")
    print(flush=True)
    report["cases"] = []
    cases = TINY if arguments.tiny else QUICK if arguments.quick else CASES
    for case in [case for case in cases if arguments.case in (None, case.name)]:
        report["cases"].append(measure(case, arguments.rounds, found["matrix product"]["median"], arguments.only))
        print(table(report["cases"][-1]), flush=True)
        jax.clear_caches()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1))
    print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
