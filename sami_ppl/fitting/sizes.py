"""Stages whose sizes suit program and data, where nothing else is said.

A batch of no more than there are observations, steps for so many epochs, the learning rate of the kind of network.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import jax

from sami_ppl.data.augment import Augmentation
from sami_ppl.decoders.training import DenoiserLoss, Weighting
from sami_ppl.diffusion.schedule import NoiseProposal
from sami_ppl.fitting.penalties import Penalty
from sami_ppl.fitting.stage import Stage, Target
from sami_ppl.nn import AscendingDiT, AscendingUNet, DiT, HalfUNet, UNet, ViT
from sami_ppl.nn.evaluate import Compute
from sami_ppl.program.program import Program

EPOCHS = 150
"""Passes through the data that a stage takes, within its least and most steps."""
WHOLE = 0.9
"""Share of what varies from which a code tells all there is. Disks, bars, spectra and features of few factors have .95
to 1, digits, clothes, photographs and faces .61 to .80 (docs/panel.md)."""


class Extent(NamedTuple):
    """What of observations settings depend on: how many there are, and the share of their variance that components, as
    many as the code has axes, tell (`start.told`).
    """

    observations: int
    told: float


@dataclass(frozen=True)
class Sized:
    """A stage of a plan of which some settings are given; those left at None suit program and data.

        sp.TwoStage(encoder=sp.Sized(steps=5000))

    The settings are those of `Stage`. Raises ValueError as it does.
    """

    steps: int | None = None
    epochs: int | None = None
    batch: int | None = None
    accumulate: int | None = None
    remat: bool | None = None
    compute: Compute | None = None
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
    penalties: dict[str, float | Penalty] | None = None
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

    def settled(self, default: Callable[[Program, Extent], Stage], program: Program, extent: Extent) -> Stage:
        """The stage, its other settings those of `default` for a program and such observations."""
        stage = replace(default(program, extent), **self.given)
        if "validate_every" not in self.given:
            stage = replace(stage, validate_every=_every(stage.count(extent.observations)))
        if "warmup" not in self.given:
            stage = replace(stage, warmup=min(stage.warmup, max(1, stage.count(extent.observations) // 5)))
        return stage


def taken(
    plan: object, stage: Stage | Sized, default: Callable, program: Program, extent: Extent, **settings: Any
) -> Stage:
    """The stage as a plan trains it. Raises ValueError where the stage itself says otherwise."""
    if isinstance(stage, Sized):
        stage = stage.settled(default, program, extent)
    own = {field.name: field.default for field in fields(Stage)}
    for name, value in settings.items():
        if (found := getattr(stage, name)) not in (own[name], value):
            kind = type(plan).__name__
            raise ValueError(
                f"{kind} sets {name}={value!r}, its stage has {name}={found!r}: leave it out, or fit this stage by "
                "itself, sp.fit(program, data, stage, key=key)"
            )
    return replace(stage, **settings)


def denoiser_stage(program: Program, extent: Extent) -> Stage:
    """The stage of a denoiser."""
    batch, most, rate = (64, 4000, 1e-3) if _is_large(program.denoiser) else (256, 3000, 3e-3)
    return _stage(extent.observations, batch, most, learning_rate=rate)


def encoder_stage(program: Program, extent: Extent) -> Stage:
    """The stage of an encoder against a fitted denoiser.

    Where observations have more to tell than a code can, what lies at low noise is discounted: at c = 0 such a code
    spends itself on texture, while one that holds all there is is the sharper for it (docs/panel.md).
    """
    large = _is_large(program.denoiser)
    batch, most = (64 if _is_large(program.encoder) else 128), 1500 if large else 3000
    weights: dict[str, float] = {"beta": 0.2}
    if extent.told < WHOLE:  # of β only what was tried on such networks
        weights = {"beta": 0.1 if large else 0.05, "discount": 1.0}
    warmup = min(300, _steps(extent.observations, batch, 500, most) // 5)
    return _stage(extent.observations, batch, most, learning_rate=8e-4, warmup=warmup, clip=150.0, **weights)


def gaussian_stage(program: Program, extent: Extent) -> Stage:
    """The stage of an encoder beside a Gaussian decoder, from where it starts."""
    batch = 64 if _is_large(program.denoiser) else 128
    return _stage(extent.observations, batch, 1500, learning_rate=1e-3, clip=150.0, beta=1.0)


def joint_stage(program: Program, extent: Extent) -> Stage:
    """The stage of both networks at once."""
    batch, most = (64, 3000) if _is_large(program.denoiser) else (128, 5000)
    beta = 0.1 if program.denoiser.marginal else 1.0
    return _stage(extent.observations, batch, most, learning_rate=1e-3, clip=150.0, beta=beta)


def _stage(count: int, batch: int, most: int, **settings: Any) -> Stage:
    steps = _steps(count, batch, 500, most)
    return Stage(steps=steps, batch=min(batch, count), validate_every=_every(steps), **settings)


def prior_stage(program: Program, extent: Extent) -> Stage:
    """The stage of a prior's parameters."""
    steps, batch = _steps(extent.observations, 512, 200, 1500), min(512, extent.observations)
    return Stage(steps=steps, batch=batch, learning_rate=3e-3, beta=1.0, validate_every=_every(steps))


def _every(steps: int) -> int:
    return max(min(100, steps), steps // 6)


def _steps(count: int, batch: int, least: int, most: int) -> int:
    return min(most, max(least, EPOCHS * count // min(batch, count)))


def _is_large(part: Any) -> bool:
    kinds = UNet | HalfUNet | AscendingUNet | DiT | ViT | AscendingDiT
    return any(isinstance(node, kinds) for node in jax.tree.leaves(part, is_leaf=lambda node: isinstance(node, kinds)))
