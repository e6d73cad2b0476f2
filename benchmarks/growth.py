"""How time and memory grow: `python -m benchmarks.growth`, with fitted exponents and a picture.

One quantity is varied at a time: batch, pixels (of an image), latent axes D, observations. Time is the median step;
memory what the compiled step holds at its peak, or for observations the arrays of a run: the data themselves lie on
the device. Exponents are slopes of log against log over the upper sizes, where fixed costs matter least.
"""

import argparse
from dataclasses import replace
import json
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np

from benchmarks.cases import Case, program_of, steps_of
from benchmarks.steps import compile_step, memory
from benchmarks.timing import interleaved, machine, spread
from sami_ppl import Stage
from sami_ppl.fitting.loop import BLOCK
from sami_ppl.fitting.stage import batches
from sami_ppl.fitting.step import Batch, Fit, compiled_step

BASE = Case("unet", 32, 64, 6, (16, 32))
GROWTH = {
    "batch": (16, 32, 64, 128, 256),
    "pixels": (8, 16, 32, 64),
    "latents": (4, 16, 64, 256),
}
OBSERVATIONS = (2_000, 8_000, 32_000, 128_000)
STEPS = ("plain", "encoder", "guided sampling", "encoding")


def along(name: str, values: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """Seconds and MiB of every step over the values of one quantity."""
    cases = [replace(BASE, **{name: value}) for value in values]
    compiled = {
        (step, value): compile_step(steps_of(case)[step]) for case, value in zip(cases, values, strict=True)
        for step in STEPS
    }  # fmt: skip
    seconds = interleaved({f"{step} {value}": call for (step, value), (call, _) in compiled.items()}, rounds)
    sizes = [value**2 if name == "pixels" else value for value in values]
    rows = {}
    for step in STEPS:
        taken = [spread(seconds[f"{step} {value}"]) for value in values]
        held = [memory(compiled[step, value][1]) for value in values]
        rows[step] = {"seconds": taken, "memory_mib": held,
                      "time_exponent": exponent(sizes, [t["median"] for t in taken]),
                      "memory_exponent": exponent(sizes, held)}  # fmt: skip
    return {"sizes": sizes, "steps": rows}


def along_observations(values: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """Seconds of a block of steps, and MiB of its arrays, with more and more observations on the device."""
    case = replace(BASE, pixels=8, batch=32)
    program = program_of(case)
    calls, held = {}, []
    for value in values:
        x = Batch(jax.random.normal(jax.random.key(0), (value, *program.event_shape)), {})
        fit = Fit(program, Stage(train=("encoder",)), steps=1000)
        state = fit.init(jax.random.key(1), x)
        rows = batches(0, value, case.batch, 0, BLOCK)
        calls[str(value)] = lambda fit=fit, state=state, x=x, rows=rows: fit.run_block(state, x.steps(rows))
        step: Any = compiled_step.lower(fit.recipe, fit.rest, state, x, rows[0])
        found = step.compile().memory_analysis()
        held.append((found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes) / 2**20)
    taken = [spread(found / BLOCK) for found in interleaved(calls, rounds, warm=1).values()]
    row = {"seconds": taken, "memory_mib": held,
           "time_exponent": exponent(values, [t["median"] for t in taken]),
           "memory_exponent": exponent(values, held)}  # fmt: skip
    return {"sizes": list(values), "steps": {"encoder, by Fit": row}}


def exponent(sizes: Any, values: Any) -> float:
    """Slope of log value against log size, without the smaller ones of more than three sizes."""
    half = len(sizes) // 2 - 1 if len(sizes) > 3 else 0
    return float(np.polyfit(np.log(sizes[half:]), np.log(values[half:]), 1)[0])


LABELS = {"batch": "batch", "pixels": "pixels of an image", "latents": "latent axes D", "observations": "observations"}


def picture(report: dict[str, Any], file: Path) -> None:
    """Time above, memory below, one column for each quantity."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(LABELS), figsize=(11, 5), sharex="col", sharey="row", layout="constrained")
    for column, (name, label) in enumerate(LABELS.items()):
        found = report["growth"][name]
        for step, row in found["steps"].items():
            colour = "tab:purple" if step not in STEPS else None
            style = {"marker": "o", "markersize": 4, "label": step, "color": colour}
            median = [1e3 * t["median"] for t in row["seconds"]]
            axes[0, column].plot(found["sizes"], median, **style)
            axes[1, column].plot(found["sizes"], row["memory_mib"], **style)
        for panel in axes[:, column]:
            panel.set(xscale="log", yscale="log")
            panel.spines[["top", "right"]].set_visible(False)
        axes[1, column].set(xlabel=label)
        axes[1, column].set_xticks(found["sizes"], [f"{size:,}" for size in found["sizes"]], minor=False)
        axes[1, column].minorticks_off()
    for panel in axes[:, 0]:
        panel.yaxis.set_major_formatter("{x:g}")
    known = dict(zip(*reversed(axes[0, 0].get_legend_handles_labels()), strict=True))
    known |= dict(zip(*reversed(axes[0, 3].get_legend_handles_labels()), strict=True))
    figure.legend(known.values(), known.keys(), loc="outside upper center", ncols=5, frameon=False)
    axes[0, 0].set_ylabel("ms a step")
    axes[1, 0].set_ylabel("MiB at the peak")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


def table(report: dict[str, Any]) -> str:
    """The exponents as a Markdown table."""
    lines = ["| grows with | step | time ∝ size^ | memory ∝ size^ |", "|---|---|---|---|"]
    for name, label in LABELS.items():
        for step, row in report["growth"][name]["steps"].items():
            lines.append(f"| {label} | {step} | {row['time_exponent']:.2f} | {row['memory_exponent']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tiny", action="store_true", help="two small values of each, to see that all of it runs")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/growth.json"))
    parser.add_argument("--picture", type=Path, default=Path("runs/bench/growth.png"))
    arguments = parser.parse_args()
    growth = {"batch": (2, 4), "pixels": (8, 16), "latents": (2, 4)} if arguments.tiny else GROWTH
    observations = (100, 200) if arguments.tiny else OBSERVATIONS
    report: dict[str, Any] = {"machine": machine(), "jax": jax.__version__, "base": BASE.name, "growth": {}}
    for name, values in growth.items():
        report["growth"][name] = along(name, values, arguments.rounds)
        jax.clear_caches()
    report["growth"]["observations"] = along_observations(observations, max(2, arguments.rounds // 4))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1))
    picture(report, arguments.picture)
    print(f"{report['base']}; {report['machine']['processor']}\n\n{table(report)}\n\nwritten: {arguments.out}")


if __name__ == "__main__":
    main()
