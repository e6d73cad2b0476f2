"""Shapes: a disk, a ring or a cross somewhere in the image; which one is discrete, where it is continuous.

The prior samples the kind, observed where it is known, and the objective sums over it. Agreement of the kinds found
with the true ones is in `metrics.json` under `clusters`, beside k-means and a Gaussian mixture of principal components.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
import xarray as xr

from sami_ppl import PreconditionedDenoiser, Program, RelaxedOneHotCategorical, VariancePreserving, encoder_for
from sami_ppl.data import labelled, split
from sami_ppl.nn import ResidualMLP


@dataclass(frozen=True)
class Config:
    """Settings; `radius` in units of the image's side. `labelled`: share of the training images whose kind is told.

    `kind`: "summed" over by the objective, or "relaxed" to a point of the simplex, which takes no labels.
    """

    kind: Literal["summed", "relaxed"] = "summed"
    labelled: float = 0.02
    resolution: int = 16
    radius: float = 0.2
    observations: int = 10_000
    width: int = 256
    depth: int = 3
    log_snr_min: float = -6.0
    log_snr_max: float = 6.0
    mean: float = 0.0
    std: float = 1.0


RECOMMENDED = {
    "denoiser.steps": 3000,
    "encoder.steps": 2000,
    "warm_steps": 300,
}


def place():
    """Where the shape is."""
    numpyro.sample("place", dist.Normal(0, 1).expand([2]).to_event(1), infer={"event_dims": ["coordinate"]})


def summed(label):
    """Which shape, observed where its label is known, and where it is."""
    numpyro.sample("kind", dist.CategoricalLogits(jnp.zeros(3)), obs=label, obs_mask=label >= 0)
    place()


def relaxed():
    """Shares of the three shapes, near a corner of the simplex, and where it is."""
    numpyro.sample("kind", RelaxedOneHotCategorical(0.5, jnp.zeros(3)), infer={"event_dims": ["shape"]})
    place()


def load(config: Config, *, key: jax.Array) -> xr.Dataset:
    """Images with true kinds and places, four fifths for training.

    For the prior that takes it, `label` is the kind where it is told, else −1.
    """
    kind_key, place_key, split_key, label_key = jax.random.split(key, 4)
    kind = np.asarray(jax.random.randint(kind_key, (config.observations,), 0, 3))
    place = np.asarray(jax.random.uniform(place_key, (2, config.observations), minval=0.25, maxval=0.75))
    pixel = (np.arange(config.resolution, dtype=np.float32) + 0.5) / config.resolution
    dx, dy = pixel - place[0][:, None, None], pixel[:, None] - place[1][:, None, None]
    far, arm, r = np.hypot(dx, dy), np.minimum(abs(dx), abs(dy)), config.radius
    edges = np.stack([far - r, abs(far - r) - 0.06, np.maximum(arm - 0.06, np.maximum(abs(dx), abs(dy)) - r)])
    x = np.clip(0.5 - config.resolution * edges[kind, np.arange(len(kind))], 0, 1)[:, None]
    factors = {"shape": kind, "centre_x": place[0], "centre_y": place[1]}
    images = {"x": (("obs", "channel", "row", "column"), x.astype(np.float32))}
    data = split(xr.Dataset(images | {n: ("obs", v) for n, v in factors.items()}), test=0.2, key=split_key)
    if config.kind == "relaxed":
        return data
    told = labelled(data, config.labelled, key=label_key)
    return data.assign(label=("obs", np.where(told, data["shape"].values, -1)))


def adapt(config: Config, data: xr.Dataset) -> Config:
    """What follows from the data: image size, pixel mean and standard deviation."""
    x = data["x"]
    return replace(config, resolution=x.shape[-1], mean=float(x.mean()), std=float(x.std()))


def build(config: Config, *, key: jax.Array) -> Program:
    """The program: a denoiser, and an encoder that classifies and places."""
    shape = (1, config.resolution, config.resolution)
    schedule = VariancePreserving(config.log_snr_min, config.log_snr_max)
    denoiser_key, trunk_key, encoder_key = jax.random.split(key, 3)
    size: dict[str, Any] = {"width": config.width, "depth": config.depth}
    statistics: dict[str, Any] = {"mean": config.mean, "std": config.std}
    given = {"label": np.array([-1])} if config.kind == "summed" else None
    prior = {"summed": summed, "relaxed": relaxed}[config.kind]
    network = ResidualMLP(shape, shape, **size, key=denoiser_key)
    trunk = ResidualMLP(shape, (64,), **size, key=trunk_key)
    return Program(
        prior=prior,
        denoiser=PreconditionedDenoiser(network, schedule, shape, **statistics),
        encoder=encoder_for(prior, trunk, schedule, shape, given=given, **statistics, key=encoder_key),
        given=given,
    )
