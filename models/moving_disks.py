"""Moving disks: clips of a disk that flies straight and bounces; the codes of their frames have a prior over time.

One observation is a clip. Its frames are independent given their codes, so that networks of single images make it up
(`over_time`); the prior, a Gaussian process for every factor with a lengthscale of its own that is learned, ties them
together: what stands still, the background, gets a long one. Frames may be missing.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
import xarray as xr

from sami_ppl import DiagonalEncoder, Matern, PreconditionedDenoiser, Program, VariancePreserving, over_time
from sami_ppl.data import fit_disks, moving_disks, split
from sami_ppl.nn import ResidualMLP


@dataclass(frozen=True)
class Config:
    """Settings; `speed` in image widths a frame, `lengthscale` in frames, to begin with.

    `smoothness` 1.5: paths have a velocity; 0.5: autoregression. `missing`: share of frames that are not seen.
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
    mean: float = 0.0
    std: float = 1.0


# A clip of twelve frames costs what twelve images cost.
RECOMMENDED = {
    "denoiser.batch": 21,
    "encoder.batch": 12,
    "posterior_obs": 16,
}


def frame_prior(latents: int):
    """Of the code of one frame by itself."""

    def prior():
        numpyro.sample("z", dist.Normal(0, 1).expand([latents]).to_event(1), infer={"event_dims": ["factor"]})

    return prior


def make_prior(config: Config):
    """Of the codes of a clip: one process for every factor."""

    def prior():
        start = jnp.full(config.latents, np.log(config.lengthscale))
        log_lengthscale: Any = numpyro.param("log_lengthscale", start)
        lengthscale = jnp.exp(log_lengthscale)
        numpyro.sample("z", Matern(np.arange(config.frames), lengthscale, smoothness=config.smoothness))

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


def adapt(config: Config, data: xr.Dataset) -> Config:
    """What follows from the data: length of a clip, image size, pixel mean and standard deviation."""
    x = data["x"]
    return replace(
        config, frames=x.shape[1], resolution=x.shape[-1], mean=float(x.mean()), std=float(x.std())
    )  # fmt: skip


def build(config: Config, *, key: jax.Array) -> Program:
    """The program of single frames, and of it that of clips."""
    shape = (1, config.resolution, config.resolution)
    schedule = VariancePreserving(config.log_snr_min, config.log_snr_max)
    denoiser_key, trunk_key, encoder_key = jax.random.split(key, 3)
    size: dict[str, Any] = {"width": config.width, "depth": config.depth}
    statistics: dict[str, Any] = {"mean": config.mean, "std": config.std}
    network = ResidualMLP(shape, shape, **size, key=denoiser_key)
    trunk = ResidualMLP(shape, (64,), **size, key=trunk_key)
    denoiser = PreconditionedDenoiser(network, schedule, shape, **statistics)
    encoder = DiagonalEncoder(trunk, schedule, shape, config.latents, **statistics, key=encoder_key)
    return over_time(Program(frame_prior(config.latents), denoiser, encoder), make_prior(config))


def distance(images: np.ndarray, config: Config) -> np.ndarray:
    """Root-mean-square distance of each image to the nearest true disk: how far samples are from the data's law."""
    return np.asarray(fit_disks(images, radius=config.radius)[1])
