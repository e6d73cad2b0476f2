"""Memory of a training step against its time, by the settings of a stage: `python -m benchmarks.memory`.

Memory is what the compiled step needs beside its arguments and results (`temp_size_in_bytes`): activations, gradients,
and random numbers. All steps are timed in turn, in one process. The default is the encoder's step of the U-Net of
`make bench`, against a frozen denoiser.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.cases import Case, program_of
from benchmarks.timing import interleaved, machine, ratio, spread
from sami_ppl import Stage
from sami_ppl.fitting.step import Batch, Fit, compiled_step

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "accumulate=4": {"accumulate": 4},
    "remat": {"remat": True},
    "accumulate=4, remat": {"accumulate": 4, "remat": True},
    "bfloat16": {"compute": "bfloat16"},
}
STAGES: dict[str, dict[str, Any]] = {
    "encoder": {"train": ("encoder",)},
    "denoiser": {"target": "marginal"},
    "decoupled": {"denoiser_loss": "own"},
    "joint": {},
}


def step_of(case: Case, stage: Stage) -> tuple[Callable[[], Any], int]:
    """A blocking call that takes one step after the other, and the bytes that it needs."""
    program = program_of(case)
    fit = Fit(program, stage, steps=stage.steps)
    data = Batch(jax.random.normal(jax.random.key(1), (case.batch, *case.shape)), {})
    state = fit.init(jax.random.key(0), data)
    compiled = compiled_step.lower(fit.recipe, fit.rest, state, data, None).compile()
    held = [jax.tree.map(jnp.copy, state)]

    def call() -> None:
        held[0], _ = jax.block_until_ready(compiled(fit.rest, held[0], data, None))

    return call, compiled.memory_analysis().temp_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=["unet", "mlp", "dit"], default="unet")
    parser.add_argument("--pixels", type=int, default=32, help="side of an image")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--latents", type=int, default=6)
    parser.add_argument("--widths", type=int, nargs="+", default=(32, 64), help="channels by level")
    parser.add_argument("--stage", choices=STAGES, default="encoder")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=tuple(SETTINGS), metavar="SETTING")
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    case = Case(arguments.network, arguments.pixels, arguments.batch, arguments.latents, tuple(arguments.widths))
    stage = Stage(steps=1000, batch=case.batch, **STAGES[arguments.stage])
    names = list(dict.fromkeys(["default", *arguments.only]))
    steps = {name: step_of(case, replace(stage, **SETTINGS[name])) for name in names}
    seconds = interleaved({name: call for name, (call, _) in steps.items()}, arguments.rounds, warm=1)
    found = machine()
    print(f"{found['processor']}, {found['cores']} cores, load {found['load']:.1f}; {jax.devices()[0].device_kind}; "
          f"jax {jax.__version__}\n\n**{case.name}, stage: {arguments.stage}**\n\n"
          "| settings | MiB | over default | ms | over default (quartiles) |\n|---|---|---|---|---|")  # fmt: skip
    for name, (_, size) in steps.items():
        over = ratio(seconds[name], seconds["default"])
        print(f"| {name} | {size / 2**20:.1f} | {size / steps['default'][1]:.2f} | "
              f"{1e3 * spread(seconds[name])['median']:.0f} | "
              f"{over['median']:.2f} ({over['low']:.2f}–{over['high']:.2f}) |")  # fmt: skip


if __name__ == "__main__":
    main()
