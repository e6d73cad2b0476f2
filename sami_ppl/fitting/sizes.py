"""Stages whose sizes suit program and data, where a plan is given none.

A batch of no more than there are observations, steps for so many epochs, the learning rate of the kind of network.
"""

from typing import Any

import jax

from sami_ppl.fitting.stage import Stage
from sami_ppl.nn import AscendingUNet, UNet
from sami_ppl.program.program import Program

EPOCHS = 150
"""Passes through the data that a stage takes, within its least and most steps."""


def denoiser_stage(program: Program, count: int) -> Stage:
    """The stage of a denoiser, for `count` observations."""
    batch, most, rate = (64, 2500, 1e-3) if _is_convolutional(program) else (256, 3000, 3e-3)
    return _stage(count, batch, most, learning_rate=rate)


def encoder_stage(program: Program, count: int) -> Stage:
    """The stage of an encoder against a fitted denoiser, for `count` observations."""
    batch, most = (64, 1500) if _is_convolutional(program) else (128, 3000)
    warmup = min(300, _steps(count, batch, 500, most) // 5)
    return _stage(count, batch, most, learning_rate=8e-4, warmup=warmup, beta=0.2, clip=150.0)


def joint_stage(program: Program, count: int) -> Stage:
    """The stage of both networks at once, for `count` observations."""
    batch, most = (64, 3000) if _is_convolutional(program) else (128, 5000)
    beta = 0.1 if program.denoiser.marginal else 1.0
    return _stage(count, batch, most, learning_rate=1e-3, clip=150.0, beta=beta)


def _stage(count: int, batch: int, most: int, **settings: Any) -> Stage:
    steps = _steps(count, batch, 500, most)
    return Stage(steps=steps, batch=min(batch, count), validate_every=max(100, steps // 6), **settings)


def prior_stage(count: int) -> Stage:
    """The stage of a prior's parameters, for `count` observations."""
    steps, batch = _steps(count, 512, 200, 1500), min(512, count)
    return Stage(steps=steps, batch=batch, learning_rate=3e-3, beta=1.0, validate_every=max(100, steps // 3))


def _steps(count: int, batch: int, least: int, most: int) -> int:
    return min(most, max(least, EPOCHS * count // min(batch, count)))


def _is_convolutional(program: Program) -> bool:
    nodes = jax.tree.leaves(program.denoiser, is_leaf=lambda node: isinstance(node, UNet | AscendingUNet))
    return any(isinstance(node, UNet | AscendingUNet) for node in nodes)
