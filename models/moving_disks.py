"""Moving disks: clips of a disk that flies straight and bounces; the codes of their frames have a prior over time.

One observation is a clip. Its frames are independent given their codes, so that networks of single images make it up
(`over_time`); the prior, a Gaussian process for every factor with a lengthscale of its own that is learned, ties them
together: what stands still, the background, gets a long one. Frames may be missing.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
import xarray as xr

import sami_ppl as sp
from sami_ppl.data import fit_disks, moving_disks, split


@dataclass(frozen=True)
class Config:
    """Settings; `speed` in image widths a frame, `lengthscale` in frames, to begin with.

    `smoothness` 1.5: paths have a velocity; 0.5: autoregression. `missing`: share of frames that are not seen. None:
    `mean` and `std` of the data.
    """

    latents: int = 3
    frames: int = 12
    speed: float = 0.04
    lengthscale: float = 10.0
    smoothness: float = 1.5
    missing: float = 0.0
    resolution: int = 16
    radius: float = 0.2
    observations: int = 2_500
    width: int = 512
    depth: int = 4
    log_snr_min: float = -6.0
    log_snr_max: float = 6.0
    mean: float | None = None
    std: float | None = None


# A clip of twelve frames costs what twelve images cost.
RECOMMENDED = {"denoiser.batch": 21, "encoder.batch": 12, "posterior_obs": 16}


def make_prior(config: Config, frames: int):
    """Of the codes of a clip: one process for every factor."""

    def prior():
        start = jnp.full(config.latents, np.log(config.lengthscale))
        log_lengthscale: Any = numpyro.param("log_lengthscale", start)
        lengthscale = jnp.exp(log_lengthscale)
        numpyro.sample("z", sp.Matern(np.arange(frames), lengthscale, smoothness=config.smoothness))

    return prior


def load(config: Config, *, key: jax.Array) -> xr.Dataset:
    """Clips with their true factors, four fifths for training. Every clip has a frame that is seen."""
    data_key, split_key, gap_key = jax.random.split(key, 3)
    settings: dict[str, Any] = {"frames": config.frames, "speed": config.speed}
    images: dict[str, Any] = {"resolution": config.resolution, "radius": config.radius}
    clips = moving_disks(data_key, config.observations, **settings, **images)
    data = clips.rename(clip="obs", frame="time").assign_coords(time=np.arange(config.frames))
    gaps = np.array(jax.random.uniform(gap_key, (config.observations, config.frames)) < config.missing)
    gaps[gaps.all(1), 0] = False
    seen = xr.DataArray(~gaps, dims=("obs", "time"))
    return split(data.assign(x=data["x"].where(seen)), test=0.2, key=split_key)


def build(config: Config, data: xr.Dataset, *, key: jax.Array) -> sp.Program:
    """The program of single frames, and of it that of clips."""
    frame_prior = sp.factors(z=dist.Normal(0, 1).expand([config.latents]), dims={"z": "factor"})
    frame = sp.autoencoder(
        frame_prior, sp.single_frames(data), network="mlp", size={"width": config.width, "depth": config.depth},
        schedule=sp.VariancePreserving(config.log_snr_min, config.log_snr_max),
        mean=config.mean, std=config.std, progress=False, key=key,
    )  # fmt: skip
    return sp.over_time(frame, make_prior(config, data.sizes["time"]))


def distance(images: np.ndarray, config: Config) -> np.ndarray:
    """Root-mean-square distance of each image to the nearest true disk: how far samples are from the data's law."""
    return np.asarray(fit_disks(images, radius=config.radius)[1])
