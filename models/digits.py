"""Digits: 1,797 real handwritten digits of 8×8 pixels (scikit-learn's); the classes are kept for probes only.

A small real data set without known continuous factors: what a representation is worth is read from held-out probes
beside a principal component analysis of the same dimension.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
import xarray as xr

from sami_ppl import PreconditionedDenoiser, Program, VariancePreserving, encoder_for
from sami_ppl.data import digits, labelled, split
from sami_ppl.nn import ResidualMLP


@dataclass(frozen=True)
class Config:
    """Settings; size in pixels. `labelled`: share of the training images whose class the prior is told."""

    latents: int = 8
    prior: Literal["normal", "mixture", "kinds"] = "normal"
    clusters: int = 10
    labelled: float = 0.0
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


def make_prior(config: Config):
    """Standard normal factors; a mixture of learned Gaussians; or the same with its component as a site of its own.

    Where a label is known, it picks the component: the mixture's weights say so, and "kinds" observes it.
    """
    shape, dims = (config.clusters, config.latents), {"event_dims": ["factor"]}

    def normal():
        numpyro.sample("z", dist.Normal(0, 1).expand([config.latents]).to_event(1), infer=dims)

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

    return {"normal": normal, "mixture": mixture, "kinds": kinds}[config.prior]


def load(config: Config, *, key: jax.Array) -> xr.Dataset:
    """The images with their classes, four fifths for training.

    For priors that take it, `label` is the class where it is told, else −1.
    """
    split_key, label_key = jax.random.split(key)
    data = split(digits(), test=0.2, key=split_key)
    if config.prior == "normal":
        return data
    told = labelled(data, config.labelled, key=label_key) & (data["digit"].values < config.clusters)
    return data.assign(label=("obs", np.where(told, data["digit"].values, -1)))


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
    prior = make_prior(config)
    given = {"label": np.full(1, -1)} if config.prior != "normal" else None
    return Program(
        prior=prior,
        denoiser=PreconditionedDenoiser(network, schedule, shape, **statistics),
        encoder=encoder_for(
            prior, trunk, schedule, shape, given=given, noise=config.noise, **statistics, key=encoder_key
        ),
        given=given,
    )
