"""Shapes: a disk, a ring or a cross somewhere in the image; which one is discrete, where it is continuous.

The prior samples the kind, observed where it is known, and the objective sums over it. Agreement of the kinds found
with the true ones is in `metrics.json` under `clusters`, beside k-means and a Gaussian mixture of principal components.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
import xarray as xr

import sami_ppl as sp
from sami_ppl.data import labelled, split


@dataclass(frozen=True)
class Config:
    """Settings; `radius` in units of the image's side. `labelled`: share of the training images whose kind is told.

    `kind`: "summed" over by the objective, or "relaxed" to a point of the simplex, which takes no labels. None: `mean`
    and `std` of the data.
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
    mean: float | None = None
    std: float | None = None


RECOMMENDED = {"denoiser.steps": 3000, "encoder.steps": 2000, "warm_steps": 300}


def summed(label):
    """Which shape, observed where its label is known, and where it is."""
    numpyro.sample("kind", dist.CategoricalLogits(jnp.zeros(3)), obs=label, obs_mask=label >= 0)
    numpyro.sample("place", dist.Normal(0, 1).expand([2]).to_event(1), infer={"event_dims": ["coordinate"]})


def relaxed():
    """Shares of the three shapes, near a corner of the simplex, and where it is."""
    numpyro.sample("kind", sp.RelaxedOneHotCategorical(0.5, jnp.zeros(3)), infer={"event_dims": ["shape"]})
    numpyro.sample("place", dist.Normal(0, 1).expand([2]).to_event(1), infer={"event_dims": ["coordinate"]})


def load(config: Config, *, key: jax.Array) -> xr.Dataset:
    """Images with true kinds and places; `label`, for the prior that takes it: the kind where it is told, else −1."""
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


def build(config: Config, data: xr.Dataset, *, key: jax.Array) -> sp.Program:
    """The program: an encoder that classifies and places. By itself the prior is drawn without labels."""
    prior, given = {"summed": (summed, {"label": np.array([-1])}), "relaxed": (relaxed, None)}[config.kind]
    return sp.autoencoder(
        prior, data, network="mlp", size={"width": config.width, "depth": config.depth}, given=given,
        schedule=sp.VariancePreserving(config.log_snr_min, config.log_snr_max),
        mean=config.mean, std=config.std, progress=False, key=key,
    )  # fmt: skip
