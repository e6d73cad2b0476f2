"""Digits: 1,797 real handwritten digits of 8×8 pixels (scikit-learn's); the classes are kept for probes only.

A small real data set without known continuous factors: what a representation is worth is read from held-out probes
beside a principal component analysis of the same dimension.
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
from sami_ppl.data import digits, labelled, split


@dataclass(frozen=True)
class Config:
    """Settings. `labelled`: share of the training images whose class the prior is told.

    None: `mean` and `std` of the data.
    """

    latents: int = 8
    decoder: Literal["guided", "conditioned", "gaussian"] = "guided"
    prior: Literal["normal", "mixture", "kinds"] = "normal"
    clusters: int = 10
    labelled: float = 0.0
    width: int = 256
    depth: int = 4
    log_snr_min: float = -6.0
    log_snr_max: float = 6.0
    noise: Literal["full", "variance", "blind"] = "full"
    mean: float | None = None
    std: float | None = None


# 1,437 images are soon known by heart: stop where held-out ones say so.
RECOMMENDED = {
    "denoiser.steps": 3000, "denoiser.batch": 128, "denoiser.learning_rate": 1e-3, "denoiser.validate_every": 200,
    "denoiser.patience": 4, "encoder.steps": 1500, "encoder.validate_every": 150, "encoder.patience": 4,
}  # fmt: skip


def make_prior(config: Config):
    """Standard normal factors; a mixture of learned Gaussians; or the same with its component as a site of its own.

    Where a label is known, it picks the component: the mixture's weights say so, and "kinds" observes it.
    """
    shape, dims = (config.clusters, config.latents), {"event_dims": ["factor"]}

    def components() -> tuple[Any, Any, Any]:
        loc = numpyro.param("loc", jax.random.normal(jax.random.key(0), shape))
        log_scale: Any = numpyro.param("log_scale", jnp.full(shape, -0.7))
        return loc, jnp.exp(log_scale), numpyro.param("weights", jnp.zeros(config.clusters))

    def mixture(label):
        loc, scale, weights = components()
        told = jnp.log(jax.nn.one_hot(label, config.clusters) + 1e-6)
        logits = jnp.where(label[:, None] >= 0, told, weights)
        each: Any = dist.Normal(loc, scale).to_event(1)
        numpyro.sample("z", dist.MixtureSameFamily(dist.Categorical(logits=logits), each), infer=dims)

    def kinds(label):
        loc, scale, weights = components()
        kind: Any = numpyro.sample("kind", dist.CategoricalLogits(weights), obs=label, obs_mask=label >= 0)
        own: Any = dist.Normal(loc[kind], scale[kind]).to_event(1)
        numpyro.sample("z", own, infer=dims)

    normal = sp.factors(z=dist.Normal(0, 1).expand([config.latents]), dims={"z": "factor"})
    return {"normal": normal, "mixture": mixture, "kinds": kinds}[config.prior]


def load(config: Config, *, key: jax.Array) -> xr.Dataset:
    """The images with their classes; `label`, for priors that take it: the class where it is told, else −1."""
    split_key, label_key = jax.random.split(key)
    data = split(digits(), test=0.2, key=split_key)
    if config.prior == "normal":
        return data
    told = labelled(data, config.labelled, key=label_key) & (data["digit"].values < config.clusters)
    return data.assign(label=("obs", np.where(told, data["digit"].values, -1)))


def build(config: Config, data: xr.Dataset, *, key: jax.Array) -> sp.Program:
    """The program: residual perceptrons. By itself the prior is drawn without labels."""
    return sp.autoencoder(
        make_prior(config), data, decoder=config.decoder, network="mlp",
        size={"width": config.width, "depth": config.depth},
        given=None if config.prior == "normal" else {"label": np.full(1, -1)}, noise=config.noise,
        schedule=sp.VariancePreserving(config.log_snr_min, config.log_snr_max),
        mean=config.mean, std=config.std, progress=False, key=key,
    )  # fmt: skip
