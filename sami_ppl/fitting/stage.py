"""One stage of a fit: what is trained, by which loss, and how: steps, batches, learning rate."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
import math
from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array
import numpy as np

from sami_ppl._util import parallel
from sami_ppl.data.augment import Augmentation
from sami_ppl.decoders.guidance import check_guided
from sami_ppl.decoders.training import DenoiserLoss, Objective, Weighting
from sami_ppl.diffusion.schedule import NoiseProposal
from sami_ppl.fitting.penalties import Penalty, check_penalties
from sami_ppl.nn.evaluate import Compute, has_network
from sami_ppl.priors.latents import Latents
from sami_ppl.program.guide import Beta
from sami_ppl.program.program import NETWORKS, Program

Target = Literal["marginal", "joint"]
PARTS = (*NETWORKS, "prior")
"""What `train` may name. The parameters of the prior are trained with the encoder, or by themselves."""


@dataclass(frozen=True)
class Stage:
    """One stage of a fit: all that shapes the training, none of which is part of the program.

    Args:
        steps: number of steps.
        epochs: where given, passes through the data, which set the number of steps.
        batch: observations in a step.
        accumulate: parts in which the batch is taken, one after another, so that a step holds what one of them needs;
            loss and gradient are those of the whole batch, but for penalties, which see one part.
        remat: whether networks hold only what goes into their blocks, and compute the rest again for the gradient.
        compute: type in which networks are evaluated in training, "float32" or "bfloat16". Weights, noise levels, laws
            of the code and all terms of the loss stay in float32, as does everything that is not training.
        learning_rate: the highest learning rate; it falls to zero as a cosine.
        warmup: steps over which the learning rate rises linearly.
        clip: largest norm of the gradient.
        weight_decay: of the matrices and kernels of the networks (AdamW, Loshchilov & Hutter 2019), per step and unit
            of learning rate; biases, gains and the prior have none.
        ema: decay of the running average of the weights, which is what a fit returns.
        target: "joint", the program itself, or "marginal", its denoiser alone as a model of x.
        train: the parts that are trained, of "denoiser", "encoder", "prior"; the prior is trained with the encoder too,
            ("prior",) fits it to the posteriors at hand, by their KL alone.
        denoiser_loss: whose error teaches the denoiser, "guided", its "own", or "none" (`decoders.training.Objective`).
        discount: c of the weight exp(−c max(λ, 0)) of noise levels: less effort where the observation says it all by
            itself; what is logged and reported stays the bound, c = 0.
        weighting: "bound" or "simple", the weight of noise levels beside the discount (`decoders.training.Objective`).
        proposal: density from which noise levels are drawn, `evidence.elbo.importance_proposal` or shares of equal bins
            of the noise range from its noisy end; the expected loss is that of the uniform density, None.
        penalties: further terms of the loss by name, weights of those of `fitting.penalties`, {"consistency": 0.3}, or
            functions of a `fitting.penalties.Draw`; they are logged apart. A function made anew is compiled anew.
        dropped: share of the observations in a step whose code is kept from a conditioned denoiser, which learns to do
            without; what is logged and reported never drops any. Other decoders have no use for it.
        beta: weight of the KL.
        beta_start: where given, the weight from which it goes to `beta` linearly.
        beta_steps: the first steps, over which β goes there.
        free_bits: floor of the KL in nats (see `ScoreELBO`), of each site by name where it is a mapping.
        site_beta: weights of single sites, times β.
        capacity: nats C of single sites, which draw the KL to them, β |KL − C|.
        capacity_steps: the first steps, over which they grow from 0.
        label_weight: teaches discrete sites the values that are known (see `ScoreELBO`).
        augment: symmetries by which every batch is moved and mirrored (`data.augmented`); validation is not.
        validate_every: steps between two validations.
        patience: validations without a better loss after which the stage ends; None, never.

    Raises ValueError for a number out of its range, an unknown target, part or loss.
    """

    steps: int = 2000
    epochs: int | None = None
    batch: int = 128
    accumulate: int = 1
    remat: bool = False
    compute: Compute = "float32"
    learning_rate: float = 1e-3
    warmup: int = 100
    clip: float = 100.0
    weight_decay: float = 0.0
    ema: float = 0.999
    target: Target = "joint"
    train: tuple[str, ...] = NETWORKS
    denoiser_loss: DenoiserLoss = "guided"
    discount: float = 0.0
    weighting: Weighting = "bound"
    proposal: NoiseProposal | tuple[float, ...] | None = None
    dropped: float = 0.1
    penalties: dict[str, float | Penalty] = field(default_factory=dict)
    beta: float = 0.1
    beta_start: float | None = None
    beta_steps: int = 0
    free_bits: float | dict[str, float] = 0.0
    site_beta: dict[str, float] = field(default_factory=dict)
    capacity: dict[str, float] = field(default_factory=dict)
    capacity_steps: int = 0
    label_weight: float = 1.0
    augment: Augmentation | None = None
    validate_every: int = 200
    patience: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "validate_every", "learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("epochs", "patience"):
            value = getattr(self, name)
            if value is not None and not value >= 1:
                raise ValueError(f"{name} must be None or at least 1, got {value}")
        floors = self.free_bits.values() if isinstance(self.free_bits, dict) else (self.free_bits,)
        if not all(floor >= 0 for floor in floors):
            raise ValueError(f"free_bits must be at least 0 nats, got {self.free_bits}")
        if not self.label_weight >= 0:
            raise ValueError(f"label_weight must be at least 0, got {self.label_weight}: 0 is the bound itself")
        check_penalties(self.penalties)
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must lie in [0, 1), got {self.ema}: 0 keeps no average")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay}")
        if self.target not in get_args(Target):
            raise ValueError(f"target must be 'joint' or 'marginal', got {self.target!r}")
        if isinstance(self.train, str) or not self.train or set(self.train) - set(PARTS):
            wanted = [part for part in PARTS if part in ((self.train,) if isinstance(self.train, str) else self.train)]
            write = f"train=({', '.join(map(repr, wanted or ['encoder']))},)"
            raise ValueError(f"train must name one or more of {PARTS}, got {self.train!r}: write {write}")
        object.__setattr__(self, "train", tuple(self.train))
        object.__setattr__(self, "proposal", self.objective.proposal)
        if self.target == "marginal" and "denoiser" not in self.train:
            raise ValueError(
                f"target='marginal' fits the denoiser alone, got train={self.train}: leave train out, or target"
            )

    def __hash__(self) -> int:
        plain = (tuple(sorted(v.items())) if isinstance(v, dict) else v for v in vars(self).values())
        return hash(tuple(plain))

    @property
    def objective(self) -> Objective:
        """What of the bound is trained: nothing teaches a denoiser that is not."""
        frozen = self.target == "joint" and "denoiser" not in self.train
        return Objective(
            "none" if frozen else self.denoiser_loss, self.discount, self.proposal, self.dropped, self.weighting,
            self.remat, self.compute,
        )  # fmt: skip

    @property
    def has_codes(self) -> bool:
        """Whether the decoder is trained at codes: not where the denoiser or the prior is fitted by itself."""
        return self.target == "joint" and self.train != ("prior",)

    def check(self, program: Program, observations: int | None) -> None:
        """Raise ValueError where the stage cannot be run on a program and so many observations.

        Cheap: call it before long stages.
        """
        if self.train == ("prior",) and not program.prior_params:
            raise ValueError(
                "train=('prior',) needs target='joint' and a prior with parameters: make them in it by numpyro.param "
                "or eqx_module"
            )
        if self.target == "marginal" or self.denoiser_loss == "own":
            own = "target='marginal'" if self.target == "marginal" else "denoiser_loss='own'"
            check_guided(program.denoiser, f"a stage with {own}")
        parts = {"denoiser": program.denoiser} | ({"encoder": program.encoder} if self.target == "joint" else {})
        if (self.remat or self.compute != "float32") and not any(map(has_network, parts.values())):
            raise ValueError(
                f"remat and compute are of networks, and the {' and '.join(parts)} of this program "
                f"({', '.join(type(part).__name__ for part in parts.values())}) have none in a field called network: "
                "leave both out, or give your network's field that name"
            )
        if self.augment is not None:
            self.augment.check(program.event_shape, program.event_dims)
        self.check_sites(program.latents)
        global_names = ", ".join(sorted(site.name for site in program.latents.global_sites))
        if observations is None and global_names:
            raise ValueError(
                f"observations must be given with global sites ({global_names}): their KL counts once for all of them"
            )
        if observations is not None and observations < self.batch:
            raise ValueError(
                f"a batch of {self.batch} needs at least as many observations for training, got {observations}: give "
                f"more data or set batch={observations}"
            )
        found = parallel.current_devices()
        devices = 1 if found is None else found.size
        pieces = devices * self.accumulate
        if self.batch % pieces:
            how = f"split evenly over {devices} devices"
            if self.accumulate > 1:
                each = f" on each of {devices} devices" if devices > 1 else ""
                how = f"taken in {self.accumulate} equal parts{each}"
            raise ValueError(f"a batch of {self.batch} cannot be {how}: set batch={-(-self.batch // pieces) * pieces}")

    def beta_at(self, step: Array | int) -> Array:
        """β at a step: a runtime value, so that a schedule compiles once."""
        start = self.beta if self.beta_start is None else self.beta_start
        share = jnp.clip((jnp.asarray(step, jnp.float32) + 1) / max(self.beta_steps, 1), 0, 1)
        return start + (self.beta - start) * share

    def sites_named(self) -> set[str]:
        """Sites that have a weight of their own."""
        return {*self.site_beta, *self.sites_held()}

    def sites_held(self) -> set[str]:
        """Sites whose KL is held at a floor or a capacity."""
        return {*self.capacity, *(self.free_bits if isinstance(self.free_bits, dict) else {})}

    def check_sites(self, latents: Latents) -> None:
        """Raise ValueError where a weight names no site of a prior, or holds the nats of a global one.

        And where a penalty has the name of a site, or there is no code to penalise.
        """
        global_names = {site.name for site in latents.global_sites}
        sites = [*(site.name for site in latents.sites), *global_names]
        if unknown := sorted(self.sites_named() - set(sites)):
            raise ValueError(
                f"site_beta, free_bits or capacity name {', '.join(unknown)}, but the prior's sites are "
                f"{', '.join(sites)}"
            )
        if held := sorted(self.sites_held() & global_names):
            raise ValueError(
                f"free_bits or capacity name {', '.join(held)}, shared by all observations: they hold the nats of each "
                "observation. Give global sites a weight by site_beta"
            )
        if taken := sorted(self.penalties.keys() & {*sites, "x"}):
            raise ValueError(f"penalties name {', '.join(taken)}, which is a site of the program: choose other names")
        if self.penalties and self.target == "marginal":
            raise ValueError("penalties are of codes, and target='marginal' has none: leave them out")

    def weights_at(self, step: Array | int, sites: Iterable[str]) -> Beta:
        """β at a step: one number, or one for each site where they differ."""
        beta = self.beta_at(step)
        return {name: beta * self.site_beta.get(name, 1.0) for name in sites} if self.site_beta else beta

    def capacity_at(self, step: Array | int) -> dict[str, Array]:
        """Capacity of single sites at a step, in nats."""
        share = jnp.clip((jnp.asarray(step, jnp.float32) + 1) / max(self.capacity_steps, 1), 0, 1)
        return {name: share * nats for name, nats in self.capacity.items()}

    def count(self, observations: int) -> int:
        """Number of steps on a data set of this size."""
        return self.steps if self.epochs is None else max(1, math.ceil(self.epochs * observations / self.batch))


def batches(
    seed: int, observations: int, batch: int, first: int, count: int,
    order: Callable[[int, int], np.ndarray] | None = None,
) -> np.ndarray:  # fmt: skip
    """Rows of the observations of steps first … first + count − 1, shape (count, batch): a new shuffle every epoch.

    A function of the step's number alone. Epochs follow each other without a gap, so every observation comes up once
    an epoch and no batch is short. `order`: all rows in the order of an epoch, of seed and epoch; default, any order.
    """
    stream = np.arange(first * batch, (first + count) * batch)
    epochs = stream // observations
    rows = np.empty_like(stream)
    for epoch in np.unique(epochs):
        own = (seed, int(epoch))
        taken = np.random.default_rng(own).permutation(observations) if order is None else order(*own)
        rows[epochs == epoch] = taken[stream[epochs == epoch] % observations]
    return rows.reshape(count, batch).astype(np.int32)
