"""How one stage of a fit runs: steps, batches, learning rate, weights of the sites."""

from collections.abc import Iterable
from dataclasses import dataclass, field
import math

import jax.numpy as jnp
from jaxtyping import Array
import numpy as np

from sami_ppl.priors.latents import Latents
from sami_ppl.program.guide import Beta


@dataclass(frozen=True)
class Stage:
    """How one stage of a fit runs. Units: steps, observations, nats.

    `epochs`, where given, sets the number of steps by the size of the data. The learning rate warms up linearly over
    `warmup` steps and falls to zero as a cosine. β goes linearly from `beta_start` to `beta` over the first
    `beta_steps` steps. `discount` c weights noise levels by exp(−c max(λ, 0)): less effort where the observation says
    it all by itself; what is logged and reported stays the bound, c = 0. Single sites of the prior may have weights of
    their own: `site_beta` times β, `free_bits` for each, and a `capacity` C in nats that grows from 0 over the first
    `capacity_steps` steps and draws their KL to it, β |KL − C|. `label_weight` teaches discrete sites the values that
    are known (see `ScoreELBO`). `patience`: validations without a better loss
    after which the stage ends; None, never.
    """

    steps: int = 2000
    epochs: int | None = None
    batch: int = 128
    learning_rate: float = 1e-3
    warmup: int = 100
    clip: float = 100.0
    ema: float = 0.999
    beta: float = 0.1
    beta_start: float | None = None
    beta_steps: int = 0
    free_bits: float | dict[str, float] = 0.0
    site_beta: dict[str, float] = field(default_factory=dict)
    capacity: dict[str, float] = field(default_factory=dict)
    capacity_steps: int = 0
    label_weight: float = 1.0
    discount: float = 0.0
    validate_every: int = 200
    patience: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "validate_every", "learning_rate", "clip"):
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
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must lie in [0, 1), got {self.ema}: 0 keeps no average")

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
        """Raise ValueError where a weight names no site of a prior, or holds the nats of a global one."""
        shared = {site.name for site in latents.shared}
        sites = [*(site.name for site in latents.sites), *shared]
        if unknown := sorted(self.sites_named() - set(sites)):
            raise ValueError(
                f"site_beta, free_bits or capacity name {', '.join(unknown)}, but the prior's sites are "
                f"{', '.join(sites)}"
            )
        if held := sorted(self.sites_held() & shared):
            raise ValueError(
                f"free_bits or capacity name {', '.join(held)}, shared by all observations: they hold the nats of each "
                "observation. Give global sites a weight by site_beta"
            )

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


def batches(seed: int, observations: int, batch: int, first: int, count: int) -> np.ndarray:
    """Rows of the observations of steps first … first + count − 1, shape (count, batch): a new shuffle every epoch.

    A function of the step's number alone. Epochs follow each other without a gap, so every observation comes up once
    an epoch and no batch is short.
    """
    stream = np.arange(first * batch, (first + count) * batch)
    epochs = stream // observations
    rows = np.empty_like(stream)
    for epoch in np.unique(epochs):
        order = np.random.default_rng((seed, int(epoch))).permutation(observations)
        rows[epochs == epoch] = order[stream[epochs == epoch] % observations]
    return rows.reshape(count, batch).astype(np.int32)
