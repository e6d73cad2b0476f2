"""Ramps: a bar on a ramp of light, two angles on circles of their own; together they are a torus.

Use several periodic factors where several come back to where they began. On lines (`--set prior=plane`) each has to be
torn or folded.
"""

from dataclasses import dataclass
from typing import Literal

import jax
from numpyro import distributions as dist
import xarray as xr

import sami_ppl as sp
from sami_ppl.data import ramps, split


@dataclass(frozen=True)
class Config:
    """Settings of data and networks. None: `mean` and `std` of the data."""

    prior: Literal["torus", "plane"] = "torus"
    resolution: int = 16
    observations: int = 20_000
    width: int = 512
    depth: int = 3
    log_snr_min: float = -6.0
    log_snr_max: float = 6.0
    mean: float | None = None
    std: float | None = None


RECOMMENDED = {"denoiser.steps": 2000, "encoder.steps": 1500, "warm_steps": 300}
torus = sp.factors(bar=dist.VonMises(0.0, 1e-3), ramp=dist.VonMises(0.0, 1e-3))
plane = sp.factors(bar=dist.Normal(0, 1), ramp=dist.Normal(0, 1))


def load(config: Config, *, key: jax.Array) -> xr.Dataset:
    """Images with their true factors, four fifths for training."""
    data_key, split_key = jax.random.split(key)
    return split(ramps(data_key, config.observations, resolution=config.resolution), test=0.2, key=split_key)


def build(config: Config, data: xr.Dataset, *, key: jax.Array) -> sp.Program:
    """The program: residual perceptrons, and the posteriors that suit the prior."""
    return sp.autoencoder(
        {"torus": torus, "plane": plane}[config.prior], data, network="mlp",
        size={"width": config.width, "depth": config.depth}, mean=config.mean, std=config.std,
        schedule=sp.VariancePreserving(config.log_snr_min, config.log_snr_max), progress=False, key=key,
    )  # fmt: skip
