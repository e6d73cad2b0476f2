"""Bars: one bar at some angle on a uniform background; the angle lives on a circle, and so does its code.

Use a periodic prior wherever a factor comes back to where it began: angles, phases, time of day. A code on a line
(`--set prior=line`) has to tear the circle somewhere, or to fold it.
"""

from dataclasses import dataclass
from typing import Literal

import jax
from numpyro import distributions as dist
import xarray as xr

import sami_ppl as sp
from sami_ppl.data import bars, split


@dataclass(frozen=True)
class Config:
    """Settings; length and width of the bar in units of the image's side. None: `mean` and `std` of the data."""

    prior: Literal["circle", "line"] = "circle"
    resolution: int = 16
    length: float = 0.7
    width_of_bar: float = 0.15
    observations: int = 20_000
    width: int = 512
    depth: int = 3
    log_snr_min: float = -6.0
    log_snr_max: float = 6.0
    mean: float | None = None
    std: float | None = None


RECOMMENDED = {"denoiser.steps": 2000, "encoder.steps": 1500, "warm_steps": 300}
circle = sp.factors(angle=dist.VonMises(0.0, 1e-3), light=dist.Normal(0, 1))
line = circle.replace(angle=dist.Normal(0, 1))


def load(config: Config, *, key: jax.Array) -> xr.Dataset:
    """Images with their true factors, four fifths for training."""
    data_key, split_key = jax.random.split(key)
    sizes = {"resolution": config.resolution, "length": config.length, "width": config.width_of_bar}
    return split(bars(data_key, config.observations, **sizes), test=0.2, key=split_key)


def build(config: Config, data: xr.Dataset, *, key: jax.Array) -> sp.Program:
    """The program: residual perceptrons, and the posteriors that suit the prior."""
    return sp.autoencoder(
        {"circle": circle, "line": line}[config.prior], data, network="mlp",
        size={"width": config.width, "depth": config.depth}, mean=config.mean, std=config.std,
        schedule=sp.VariancePreserving(config.log_snr_min, config.log_snr_max), progress=False, key=key,
    )  # fmt: skip
