"""Ramps: a bar on a ramp of light, two angles on circles of their own; together they are a torus.

Use several periodic sites where several factors come back to where they began. On lines (`--set prior=plane`) each has
to be torn or folded.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import numpyro
from numpyro import distributions as dist
import xarray as xr

from sami_ppl import PreconditionedDenoiser, Program, VariancePreserving, encoder_for
from sami_ppl.data import ramps, split
from sami_ppl.nn import ResidualMLP


@dataclass(frozen=True)
class Config:
    """Settings of data and networks."""

    prior: Literal["torus", "plane"] = "torus"
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


def torus():
    """Two angles of which nothing is known."""
    numpyro.sample("bar", dist.VonMises(0.0, 1e-3))
    numpyro.sample("ramp", dist.VonMises(0.0, 1e-3))


def plane():
    """The same without circles: the negative control."""
    numpyro.sample("bar", dist.Normal(0, 1))
    numpyro.sample("ramp", dist.Normal(0, 1))


def load(config: Config, *, key: jax.Array) -> xr.Dataset:
    """Images with their true factors, four fifths for training."""
    data_key, split_key = jax.random.split(key)
    return split(ramps(data_key, config.observations, resolution=config.resolution), test=0.2, key=split_key)


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
    prior = {"torus": torus, "plane": plane}[config.prior]
    network = ResidualMLP(shape, shape, **size, key=denoiser_key)
    trunk = ResidualMLP(shape, (64,), **size, key=trunk_key)
    return Program(
        prior=prior,
        denoiser=PreconditionedDenoiser(network, schedule, shape, **statistics),
        encoder=encoder_for(prior, trunk, schedule, shape, **statistics, key=encoder_key),
    )
