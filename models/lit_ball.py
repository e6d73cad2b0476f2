"""Lit ball: a ball under one lamp, whose direction is a point on the sphere, and so is its code.

Use a prior on the sphere for directions in space. On a plane (`--set prior=plane`) a sphere has to be torn or folded.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np
from numpyro import distributions as dist
import xarray as xr

import sami_ppl as sp
from sami_ppl.data import lit_balls, split


@dataclass(frozen=True)
class Config:
    """Settings of data and networks. None: `mean` and `std` of the data."""

    prior: Literal["sphere", "plane"] = "sphere"
    resolution: int = 16
    observations: int = 20_000
    width: int = 512
    depth: int = 3
    log_snr_min: float = -6.0
    log_snr_max: float = 6.0
    mean: float | None = None
    std: float | None = None


RECOMMENDED = {"denoiser.steps": 2000, "encoder.steps": 1500, "warm_steps": 300}
# A direction of which nothing is known, and as many coordinates without the sphere: the negative control.
sphere = sp.factors(light=dist.ProjectedNormal(np.zeros(3, np.float32)), dims={"light": "component"})
plane = sp.factors(light=dist.Normal(0, 1).expand([2]), dims={"light": "component"})


def load(config: Config, *, key: jax.Array) -> xr.Dataset:
    """Images with their true factors, four fifths for training."""
    data_key, split_key = jax.random.split(key)
    return split(lit_balls(data_key, config.observations, resolution=config.resolution), test=0.2, key=split_key)


def build(config: Config, data: xr.Dataset, *, key: jax.Array) -> sp.Program:
    """The program: residual perceptrons, and the posteriors that suit the prior."""
    return sp.autoencoder(
        {"sphere": sphere, "plane": plane}[config.prior], data, network="mlp",
        size={"width": config.width, "depth": config.depth}, mean=config.mean, std=config.std,
        schedule=sp.VariancePreserving(config.log_snr_min, config.log_snr_max), progress=False, key=key,
    )  # fmt: skip
