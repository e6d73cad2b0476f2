"""Supports: vectors whose factors live on different spaces: a positive one, a share, a simplex, a correlation.

The program to copy where factors are independent and have each a meaning: its distribution says where it may lie, and
its posterior does lie there. The data are drawn from the prior itself, so that factors, ranges and widths can be
checked against the truth.
"""

from dataclasses import dataclass

import jax
import numpy as np
from numpyro import distributions as dist
from numpyro.infer import Predictive
import xarray as xr

import sami_ppl as sp
from sami_ppl.data import split


@dataclass(frozen=True)
class Config:
    """Settings; `mixing` seeds the linear map from factors to features."""

    features: int = 24
    noise_std: float = 0.1
    mixing: int = 0
    observations: int = 20_000
    width: int = 256
    depth: int = 3
    log_snr_min: float = -7.0
    log_snr_max: float = 7.0


# The bound itself, since the truth is of the model's own kind.
RECOMMENDED = {"encoder.beta": 1.0, "encoder.discount": 0.0, "warm_steps": 0, "align": False}
# What every factor is: its distribution, and by it where it may lie.
prior = sp.factors(
    level=dist.Normal(0.0, 1.0),
    place=dist.Uniform(-1.0, 1.0),
    share=dist.Beta(2.0, 3.0),
    rate=dist.Gamma(3.0, 2.0),
    width=dist.HalfNormal(1.0),
    shift=dist.Laplace(0.0, 0.7),
    shock=dist.StudentT(5.0),
    parts=dist.Dirichlet(np.array([2.0, 3.0, 4.0], np.float32)),
    factor=dist.LKJCholesky(2, 2.0),
)


def load(config: Config, *, key: jax.Array) -> xr.Dataset:
    """Noisy linear mixtures of the factors' elements, each of unit variance; scalar factors are variables too."""
    draw_key, noise_key, split_key = jax.random.split(key, 3)
    values = {n: np.asarray(v) for n, v in Predictive(prior, num_samples=config.observations)(draw_key).items()}
    flat = np.concatenate([v.reshape(config.observations, -1) for v in values.values()], 1)
    flat = (flat - flat.mean(0)) / np.maximum(flat.std(0), 1e-6)  # a Cholesky factor has constant elements
    weights = np.random.default_rng(config.mixing).normal(size=(flat.shape[1], config.features))
    x = flat @ weights / np.sqrt(flat.shape[1])
    x = x + config.noise_std * np.asarray(jax.random.normal(noise_key, x.shape))
    known = {name: ("obs", value) for name, value in values.items() if value.ndim == 1}
    known |= {"correlation": ("obs", values["factor"][:, 1, 0])}
    return split(xr.Dataset({"x": (("obs", "feature"), x.astype(np.float32)), **known}), test=0.2, key=split_key)


def build(config: Config, data: xr.Dataset, *, key: jax.Array) -> sp.Program:
    """The program: perceptrons, and a Gaussian for each factor in unconstrained space."""
    return sp.autoencoder(
        prior, data, network="mlp", size={"width": config.width, "depth": config.depth}, mean=0.0, std=1.0,
        schedule=sp.VariancePreserving(config.log_snr_min, config.log_snr_max), progress=False, key=key,
    )  # fmt: skip
