"""Linear Gaussian: vectors x = W z + noise, the one family in which every quantity of the method is known exactly.

A fit is read beside the truth: `sami evidence` sets the bound beside the exact evidence log p(x), and
docs/linear_gaussian.md goes through posterior, guidance, information and samples. With `networks=exact` the program is
built of the exact denoiser and posterior, and needs no fit.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import distributions as dist
import xarray as xr

import sami_ppl as sp
from sami_ppl.data import split


@dataclass(frozen=True)
class Config:
    """Settings; `spreads` are the lengths of the columns of W, one per factor, `noise_std` the noise's deviation."""

    features: int = 8
    spreads: tuple[float, ...] = (2.0, 1.0)
    noise_std: float = 0.5
    observations: int = 20_000
    networks: Literal["mlp", "exact"] = "mlp"
    width: int = 128
    depth: int = 3
    log_snr_min: float = -8.0
    log_snr_max: float = 8.0


# Normal factors have no axes that are less Gaussian than others, and those of the exact posterior are to be compared.
RECOMMENDED = {
    "denoiser.steps": 3000, "denoiser.learning_rate": 2e-3, "encoder.steps": 2000, "encoder.beta": 0.2,
    "encoder.discount": 0.0, "warm_steps": 300, "align": False,
}  # fmt: skip


def exact(config: Config) -> sp.LinearGaussian:
    """The law of the data. The columns of W are cosines, orthogonal to each other, so the posterior is diagonal."""
    row, column = np.arange(config.features)[:, None] + 0.5, np.arange(1, len(config.spreads) + 1)
    cosines = np.cos(np.pi * row * column / config.features) * np.sqrt(2 / config.features)
    weights = jnp.asarray(cosines * np.asarray(config.spreads), jnp.float32)
    return sp.LinearGaussian(
        weights, config.noise_std, sp.VariancePreserving(config.log_snr_min, config.log_snr_max)
    )  # fmt: skip


def load(config: Config, *, key: jax.Array) -> xr.Dataset:
    """Observations with the factors that each came from, four fifths for training."""
    data_key, split_key = jax.random.split(key)
    x, z = exact(config).sample(data_key, config.observations)
    factors = {f"factor_{j}": ("obs", np.asarray(z[:, j])) for j in range(z.shape[1])}
    return split(xr.Dataset({"x": (("obs", "feature"), np.asarray(x)), **factors}), test=0.2, key=split_key)


def build(config: Config, data: xr.Dataset, *, key: jax.Array) -> sp.Program:
    """The program: perceptrons to be fitted, or the exact networks. The prior is the truth: standard normal factors."""
    prior = sp.factors(z=dist.Normal(0, 1).expand([len(config.spreads)]), dims={"z": "factor"})
    law = exact(config)
    if config.networks == "exact":
        return sp.Program(prior, law.denoiser, law.mean_field_encoder)
    std = float(np.sqrt(np.sum(np.square(config.spreads)) / config.features + config.noise_std**2))
    return sp.autoencoder(
        prior, data, network="mlp", size={"width": config.width, "depth": config.depth}, features=32,
        schedule=law.schedule, predict="noise", mean=0.0, std=std, progress=False, key=key,
    )  # fmt: skip
