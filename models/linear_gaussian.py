"""Linear Gaussian: vectors x = W z + noise, the one family in which every quantity of the method is known exactly.

A fit is read beside the truth: `sami evidence` sets the bound beside the exact evidence log p(x), and
docs/linear_gaussian.md goes through posterior, guidance, information and samples. With `networks=exact` the program is
built of the exact denoiser and posterior, and needs no fit.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
import xarray as xr

from sami_ppl import DiagonalEncoder, LinearGaussian, PreconditionedDenoiser, Program, VariancePreserving
from sami_ppl.data import split
from sami_ppl.nn import ResidualMLP


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


RECOMMENDED = {
    "denoiser.steps": 3000,
    "denoiser.learning_rate": 2e-3,
    "encoder.steps": 2000,
    "warm_steps": 300,
}


def make_prior(latents: int):
    """Independent standard normal factors: here the truth."""

    def prior():
        numpyro.sample("z", dist.Normal(0, 1).expand([latents]).to_event(1), infer={"event_dims": ["factor"]})

    return prior


def exact(config: Config) -> LinearGaussian:
    """The law of the data. The columns of W are cosines, orthogonal to each other, so the posterior is diagonal."""
    row, column = np.arange(config.features)[:, None] + 0.5, np.arange(1, len(config.spreads) + 1)
    cosines = np.cos(np.pi * row * column / config.features) * np.sqrt(2 / config.features)
    weights = jnp.asarray(cosines * np.asarray(config.spreads), jnp.float32)
    schedule = VariancePreserving(config.log_snr_min, config.log_snr_max)
    return LinearGaussian(weights, config.noise_std, schedule)


def load(config: Config, *, key: jax.Array) -> xr.Dataset:
    """Observations with the factors that each came from, four fifths for training."""
    data_key, split_key = jax.random.split(key)
    x, z = exact(config).sample(data_key, config.observations)
    factors = {f"factor_{j}": ("obs", np.asarray(z[:, j])) for j in range(z.shape[1])}
    return split(xr.Dataset({"x": (("obs", "feature"), np.asarray(x)), **factors}), test=0.2, key=split_key)


def build(config: Config, *, key: jax.Array) -> Program:
    """The program: perceptrons to be fitted, or the exact networks."""
    model, latents = exact(config), len(config.spreads)
    prior = make_prior(latents)
    if config.networks == "exact":
        return Program(prior, model.denoiser, model.mean_field_encoder)
    shape, schedule = (config.features,), model.schedule
    denoiser_key, trunk_key, encoder_key = jax.random.split(key, 3)
    size: dict[str, Any] = {"width": config.width, "depth": config.depth}
    std = float(np.sqrt(np.sum(np.square(config.spreads)) / config.features + config.noise_std**2))
    network = ResidualMLP(shape, shape, **size, key=denoiser_key)
    trunk = ResidualMLP(shape, (32,), **size, key=trunk_key)
    return Program(
        prior,
        PreconditionedDenoiser(network, schedule, shape, std=std, predict="noise"),
        DiagonalEncoder(trunk, schedule, shape, latents, std=std, key=encoder_key),
    )
