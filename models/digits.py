"""Digits: 1,797 real handwritten digits of 8×8 pixels (scikit-learn's); the classes are kept for probes only.

A small real data set without known continuous factors: what a representation is worth is read from held-out probes
beside a principal component analysis of the same dimension.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import numpyro
from numpyro import distributions as dist
import xarray as xr

from sami_ppl import DiagonalEncoder, PreconditionedDenoiser, Program, VariancePreserving
from sami_ppl.data import digits, split
from sami_ppl.nn import ResidualMLP


@dataclass(frozen=True)
class Config:
    """Settings; size in pixels."""

    latents: int = 8
    size: int = 8
    width: int = 256
    depth: int = 4
    log_snr_min: float = -6.0
    log_snr_max: float = 6.0
    noise: Literal["full", "variance", "blind"] = "full"
    mean: float = 0.0
    std: float = 1.0


# 1,437 images are soon known by heart: stop where held-out ones say so.
RECOMMENDED = {
    "denoiser.steps": 3000,
    "denoiser.batch": 128,
    "denoiser.learning_rate": 1e-3,
    "denoiser.validate_every": 200,
    "denoiser.patience": 4,
    "encoder.steps": 1500,
    "encoder.validate_every": 150,
    "encoder.patience": 4,
}


def make_prior(latents: int):
    """Independent standard normal factors."""

    def prior():
        numpyro.sample("z", dist.Normal(0, 1).expand([latents]).to_event(1), infer={"event_dims": ["factor"]})

    return prior


def load(config: Config, *, key: jax.Array) -> xr.Dataset:
    """The images with their classes, four fifths for training."""
    return split(digits(), test=0.2, key=key)


def adapt(config: Config, data: xr.Dataset) -> Config:
    """What follows from the data: image size, pixel mean and standard deviation."""
    x = data["x"]
    return replace(config, size=x.shape[-1], mean=float(x.mean()), std=float(x.std()))


def build(config: Config, *, key: jax.Array) -> Program:
    """The program: residual perceptrons for denoiser and encoder."""
    shape = (1, config.size, config.size)
    schedule = VariancePreserving(config.log_snr_min, config.log_snr_max)
    denoiser_key, trunk_key, encoder_key = jax.random.split(key, 3)
    size: dict[str, Any] = {"width": config.width, "depth": config.depth}
    network = ResidualMLP(shape, shape, **size, key=denoiser_key)
    trunk = ResidualMLP(shape, (64,), **size, noise=config.noise == "full", key=trunk_key)
    statistics: dict[str, Any] = {"mean": config.mean, "std": config.std}
    return Program(
        prior=make_prior(config.latents),
        denoiser=PreconditionedDenoiser(network, schedule, shape, **statistics),
        encoder=DiagonalEncoder(
            trunk, schedule, shape, config.latents, noise=config.noise, **statistics, key=encoder_key
        ),
    )
