"""Stages whose sizes suit program and data, where nothing else is said.

A batch of no more than there are observations, steps for so many epochs, the learning rate of the kind of network.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import jax

from sami_ppl.data.augment import Augmentation
from sami_ppl.decoders.training import DenoiserLoss, Weighting
from sami_ppl.diffusion.schedule import NoiseProposal
from sami_ppl.fitting.penalties import Penalty
from sami_ppl.fitting.stage import Stage, Target
from sami_ppl.nn import AscendingUNet, HalfUNet, UNet
from sami_ppl.program.program import Program

EPOCHS = 150
"""Passes through the data that a stage takes, within its least and most steps."""


@dataclass(frozen=True)
class Sized:
    """A stage of a plan of which some settings are given; those left at None suit program and data.

        sp.TwoStage(encoder=sp.Sized(steps=5000))

    The settings are those of `Stage`. Raises ValueError as it does.
    """

    steps: int | None = None
    epochs: int | None = None
    batch: int | None = None
    learning_rate: float | None = None
    warmup: int | None = None
    clip: float | None = None
    weight_decay: float | None = None
    ema: float | None = None
    target: Target | None = None
    train: tuple[str, ...] | None = None
    denoiser_loss: DenoiserLoss | None = None
    discount: float | None = None
    weighting: Weighting | None = None
    proposal: NoiseProposal | tuple[float, ...] | None = None
    dropped: float | None = None
    penalties: dict[str, Penalty] | None = None
    beta: float | None = None
    beta_start: float | None = None
    beta_steps: int | None = None
    free_bits: float | dict[str, float] | None = None
    site_beta: dict[str, float] | None = None
    capacity: dict[str, float] | None = None
    capacity_steps: int | None = None
    label_weight: float | None = None
    augment: Augmentation | None = None
    validate_every: int | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        Stage(**self.given)

    def __hash__(self) -> int:
        return hash(Stage(**self.given))

    @property
    def given(self) -> dict[str, Any]:
        """The settings that are not None, by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if value is not None}

    def settled(self, default: Callable[[Program, int], Stage], program: Program, count: int) -> Stage:
        """The stage, its other settings those of `default` for a program and so many observations."""
        stage = replace(default(program, count), **self.given)
        if "validate_every" not in self.given:
            stage = replace(stage, validate_every=_every(stage.count(count)))
        if "warmup" not in self.given:
            stage = replace(stage, warmup=min(stage.warmup, max(1, stage.count(count) // 5)))
        return stage


def taken(
    plan: object, stage: Stage | Sized, default: Callable, program: Program, count: int, **settings: Any
) -> Stage:
    """The stage as a plan trains it. Raises ValueError where the stage itself says otherwise."""
    if isinstance(stage, Sized):
        stage = stage.settled(default, program, count)
    own = {field.name: field.default for field in fields(Stage)}
    for name, value in settings.items():
        if (found := getattr(stage, name)) not in (own[name], value):
            kind = type(plan).__name__
            raise ValueError(
                f"{kind} sets {name}={value!r}, its stage has {name}={found!r}: leave it out, or fit this stage by "
                "itself, sp.fit(program, data, stage, key=key)"
            )
    return replace(stage, **settings)


def denoiser_stage(program: Program, count: int) -> Stage:
    """The stage of a denoiser, for `count` observations."""
    batch, most, rate = (64, 4000, 1e-3) if _is_convolutional(program.denoiser) else (256, 3000, 3e-3)
    return _stage(count, batch, most, learning_rate=rate)


def encoder_stage(program: Program, count: int) -> Stage:
    """The stage of an encoder against a fitted denoiser, for `count` observations.

    Beside a U-Net, so on images with more to tell than a code can, what lies at low noise is discounted: at c = 0 such
    a code spends itself on texture (docs/panel.md).
    """
    weights: dict[str, float] = {"beta": 0.2}
    if _is_convolutional(program.denoiser):
        batch, most = (64 if _is_convolutional(program.encoder) else 128), 1500
        weights = {"beta": 0.1, "discount": 1.0}
    else:
        batch, most = 128, 3000
    warmup = min(300, _steps(count, batch, 500, most) // 5)
    return _stage(count, batch, most, learning_rate=8e-4, warmup=warmup, clip=150.0, **weights)


def gaussian_stage(program: Program, count: int) -> Stage:
    """The stage of an encoder beside a Gaussian decoder, from where it starts, for `count` observations."""
    batch = 64 if _is_convolutional(program.denoiser) else 128
    return _stage(count, batch, 1500, learning_rate=1e-3, clip=150.0, beta=1.0)


def joint_stage(program: Program, count: int) -> Stage:
    """The stage of both networks at once, for `count` observations."""
    batch, most = (64, 3000) if _is_convolutional(program.denoiser) else (128, 5000)
    beta = 0.1 if program.denoiser.marginal else 1.0
    return _stage(count, batch, most, learning_rate=1e-3, clip=150.0, beta=beta)


def _stage(count: int, batch: int, most: int, **settings: Any) -> Stage:
    steps = _steps(count, batch, 500, most)
    return Stage(steps=steps, batch=min(batch, count), validate_every=_every(steps), **settings)


def prior_stage(program: Program, count: int) -> Stage:
    """The stage of a prior's parameters, for `count` observations."""
    steps, batch = _steps(count, 512, 200, 1500), min(512, count)
    return Stage(steps=steps, batch=batch, learning_rate=3e-3, beta=1.0, validate_every=_every(steps))


def _every(steps: int) -> int:
    return max(min(100, steps), steps // 6)


def _steps(count: int, batch: int, least: int, most: int) -> int:
    return min(most, max(least, EPOCHS * count // min(batch, count)))


def _is_convolutional(part: Any) -> bool:
    kinds = UNet | HalfUNet | AscendingUNet
    return any(isinstance(node, kinds) for node in jax.tree.leaves(part, is_leaf=lambda node: isinstance(node, kinds)))
