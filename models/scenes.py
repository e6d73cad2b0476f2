"""Scenes: colour images of one object in a room; three hues, scale, shape and azimuth are to be recovered.

Of each factor it is known what kind of thing it is: a hue goes round, a scale is positive, a shape is one of four, an
azimuth has limits. `sami run scenes --set prior=factors` says so, where the default has as many Normal axes.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np
from numpyro import distributions as dist
import xarray as xr

import sami_ppl as sp
from sami_ppl.data import scenes, split


@dataclass(frozen=True)
class Config:
    """Settings; `resolution` in pixels. `latents`: axes of the prior "normal". None: what suits images and data."""

    prior: Literal["normal", "factors"] = "normal"
    latents: int = 8
    decoder: Literal["guided", "conditioned", "gaussian"] = "guided"
    resolution: int = 64
    observations: int = 20_000
    network: Literal["mlp", "unet", "hybrid", "dit"] | None = None
    widths: tuple[int, ...] | None = None
    patch: int | None = None
    log_snr_min: float = -6.0
    log_snr_max: float = 6.0
    mean: float | None = None
    std: float | None = None


hue = dist.VonMises(0.0, 1e-3)  # uniform on the circle, nearly
kinds = sp.factors(
    floor=hue,
    wall=hue,
    object=hue,
    scale=dist.LogNormal(0.0, 0.2),
    kind=sp.RelaxedOneHotCategorical(0.5, np.zeros(4, np.float32)),
    azimuth=dist.Uniform(-np.pi / 6, np.pi / 6),
    dims={"kind": "shape"},
)


def load(config: Config, *, key: jax.Array) -> xr.Dataset:
    """Images with their true factors, four fifths for training."""
    data_key, split_key = jax.random.split(key)
    return split(scenes(data_key, config.observations, resolution=config.resolution), test=0.2, key=split_key)


def build(config: Config, data: xr.Dataset, *, key: jax.Array) -> sp.Program:
    """The program: networks that suit the images' size, and the posteriors that suit the prior."""
    size = {name: value for name in ("widths", "patch") if (value := getattr(config, name)) is not None}
    normal = sp.factors(z=dist.Normal(0, 1).expand([config.latents]), dims={"z": "factor"})
    return sp.autoencoder(
        {"normal": normal, "factors": kinds}[config.prior], data,
        decoder=config.decoder, network=config.network, size=size,
        schedule=sp.VariancePreserving(config.log_snr_min, config.log_snr_max),
        mean=config.mean, std=config.std, progress=False, key=key,
    )  # fmt: skip
