"""Lit ball: a ball under one lamp, whose direction is a point on the sphere, and so is its code.

Use a prior on the sphere for directions in space. On a plane (`--set prior=plane`) a sphere has to be torn or folded.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpyro
from numpyro import distributions as dist
import xarray as xr

from sami_ppl import PreconditionedDenoiser, Program, VariancePreserving, encoder_for
from sami_ppl.data import lit_balls, split
from sami_ppl.nn import ResidualMLP


@dataclass(frozen=True)
class Config:
    """Settings of data and networks."""

    prior: Literal["sphere", "plane"] = "sphere"
    resolution: int = 16
    observations: int = 20_000
    width: int = 512
    depth: int = 3
    log_snr_min: float = -6.0
    log_snr_max: float = 6.0
    mean: float = 0.0
    std: float = 1.0


RECOMMENDED = {
    "denoiser.steps": 2000,
    "encoder.steps": 1500,
    "warm_steps": 300,
}


def sphere():
    """A direction of which nothing is known."""
    numpyro.sample("light", dist.ProjectedNormal(jnp.zeros(3)), infer={"event_dims": ["component"]})


def plane():
    """As many coordinates as the sphere has, without it: the negative control."""
    numpyro.sample("light", dist.Normal(0, 1).expand([2]).to_event(1), infer={"event_dims": ["component"]})


def load(config: Config, *, key: jax.Array) -> xr.Dataset:
    """Images with their true factors, four fifths for training."""
    data_key, split_key = jax.random.split(key)
    return split(lit_balls(data_key, config.observations, resolution=config.resolution), test=0.2, key=split_key)


def adapt(config: Config, data: xr.Dataset) -> Config:
    """What follows from the data: image size, pixel mean and standard deviation."""
    x = data["x"]
    return replace(config, resolution=x.shape[-1], mean=float(x.mean()), std=float(x.std()))


def build(config: Config, *, key: jax.Array) -> Program:
    """The program: an x-predicting denoiser, and the encoder that suits the prior."""
    shape = (1, config.resolution, config.resolution)
    schedule = VariancePreserving(config.log_snr_min, config.log_snr_max)
    denoiser_key, trunk_key, encoder_key = jax.random.split(key, 3)
    size: dict[str, Any] = {"width": config.width, "depth": config.depth}
    statistics: dict[str, Any] = {"mean": config.mean, "std": config.std}
    prior = {"sphere": sphere, "plane": plane}[config.prior]
    network = ResidualMLP(shape, shape, **size, key=denoiser_key)
    trunk = ResidualMLP(shape, (64,), **size, key=trunk_key)
    return Program(
        prior=prior,
        denoiser=PreconditionedDenoiser(network, schedule, shape, **statistics),
        encoder=encoder_for(prior, trunk, schedule, shape, **statistics, key=encoder_key),
    )
