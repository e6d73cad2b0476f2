"""Causal disks: centre x moves centre y, centre y the background; interventions and counterfactuals have known answers.

The mechanisms are those of `sami_ppl.data.causal_disks`; the prior "causal" has the same graph, its coefficients and
scales are learned. Neither a graph of Normals nor independent ones determine axes by themselves, so a share of the
training images is `labelled` with its factors.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
import xarray as xr

import sami_ppl as sp
from sami_ppl.data import causal_disks, fit_disks, labelled, split
from sami_ppl.data.causal_disks import PARENT, UNITS, WEIGHT

# Adam moves a parameter by at most the learning rate a step: coefficients are learned in larger steps than weights.
STEP = 5.0


@dataclass(frozen=True)
class Config:
    """Settings; `labelled`: share of the training images whose factors the prior is told, to within `told` units.

    Priors: "causal", a graph of Normals; "independent", the same without its edges; "normal", three N(0, 1) without
    labels. None: `mean` and `std` of the data.
    """

    prior: Literal["causal", "independent", "normal"] = "causal"
    labelled: float = 0.05
    told: float = 0.05
    resolution: int = 16
    radius: float = 0.2
    observations: int = 25_000
    width: int = 512
    depth: int = 4
    log_snr_min: float = -6.0
    log_snr_max: float = 6.0
    mean: float | None = None
    std: float | None = None


def make_prior(config: Config):
    """A Normal for every factor, around what its parent says, or its own mean, or around its label where it is told."""

    def learned(name):
        start: Any = numpyro.param(name, jnp.zeros(()))
        return STEP * start

    def linear(label, labelled):
        value: dict[str, Any] = {}
        for j, (name, parent) in enumerate(PARENT.items()):
            centre, unit = UNITS[name]
            mean = learned(f"{name}_mean")
            log_scale = learned(f"{name}_log_scale")
            if parent is not None and config.prior == "causal":
                weight = learned(f"{name}_weight")
                mean = mean + weight * (value[parent] - UNITS[parent][0]) / UNITS[parent][1]
            loc = jnp.where(labelled > 0, label[:, j], centre + unit * mean)
            scale = unit * jnp.where(labelled > 0, config.told, jnp.exp(log_scale))
            value[name] = numpyro.sample(name, dist.Normal(loc, scale))

    normal = sp.factors(z=dist.Normal(0, 1).expand([3]), dims={"z": "factor"})
    return normal if config.prior == "normal" else linear


def weights(program: sp.Program) -> dict[str, float]:
    """The coefficients that a program's causal prior has learned, in the units of WEIGHT."""
    return {
        name: STEP * float(program.prior_params[f"{name}_weight"]) * UNITS[name][1] / UNITS[str(PARENT[name])][1]
        for name in WEIGHT
    }


def load(config: Config, *, key: jax.Array) -> xr.Dataset:
    """Images with their true factors and noises, four fifths for training; labels where they are told, else 0."""
    noise_key, split_key, label_key = jax.random.split(key, 3)
    drawn = causal_disks(noise_key, config.observations, resolution=config.resolution, radius=config.radius)
    data = split(drawn, test=0.2, key=split_key)
    if config.prior == "normal":
        return data
    told = labelled(data, config.labelled, key=label_key)
    label = np.where(told[:, None], np.stack([data[name].values for name in PARENT], -1), 0.0)
    return data.assign(label=(("obs", "factor"), label), labelled=("obs", told.astype(int)))


def build(config: Config, data: xr.Dataset, *, key: jax.Array) -> sp.Program:
    """The program: residual perceptrons. By itself the prior is drawn without labels."""
    return sp.autoencoder(
        make_prior(config), data, network="mlp", size={"width": config.width, "depth": config.depth},
        given=None if config.prior == "normal" else {"label": np.zeros((1, 3)), "labelled": np.zeros(1)},
        schedule=sp.VariancePreserving(config.log_snr_min, config.log_snr_max),
        mean=config.mean, std=config.std, progress=False, key=key,
    )  # fmt: skip


def distance(images: np.ndarray, config: Config) -> np.ndarray:
    """Root-mean-square distance of each image to the nearest true disk."""
    return np.asarray(fit_disks(images, radius=config.radius)[1])
