"""The lines with which a fit begins: what is fitted to what, on which device, and what is written."""

from pathlib import Path

import jax

from sami_ppl._util.parallel import devices_in_words
from sami_ppl.fitting.stage import Stage
from sami_ppl.program.program import Program


def header(program: Program, steps: dict[str, int], *, observations: int, held_out: int, out: str | Path | None) -> str:
    """The lines for who begins to wait; `steps`: of every stage by its name, in the order in which they are taken."""
    parts = {name.removesuffix("$params"): jax.tree.leaves(part) for name, part in program.params().items()}
    dims = " × ".join(f"{dim} {n}" for dim, n in zip(program.event_dims, program.event_shape, strict=True))
    written = "nothing is written: give out= to go on after an interruption"
    if out is not None:
        written = f"checkpoints and log: {Path(out) / 'checkpoints'}, {Path(out) / 'log.jsonl'}"
    return "\n".join([
        f"device: {devices_in_words()}",
        f"data: {observations:,} observations to fit, {held_out:,} held out, of {dims}",
        f"parameters: {', '.join(f'{name} {sum(leaf.size for leaf in leaves):,}' for name, leaves in parts.items())}",
        f"stages: {', '.join(f'{name} ({count:,} steps)' for name, count in steps.items())}",
        written,
    ])  # fmt: skip


def stage_line(name: str, stage: Stage, steps: int) -> str:
    """What one stage does, in words."""
    codes = f", beta (weight of the KL) {stage.beta:g}" if stage.has_codes else ""
    low = f", low noise discounted by c = {stage.discount:g}" if stage.discount else ""
    return f"{name}: {steps:,} steps of {stage.batch} observations, learning rate {stage.learning_rate:g}{codes}{low}"
