"""Mixing: vectors that are a nonlinear mixture of factors, with a class u that says something about them.

Without u no method can find the factors of a nonlinear mixture: rotations of Normal factors explain the data as well.
With a prior p(z | u), whose means and scales differ enough between classes, they are determined up to order, sign and
scale (Khemakhem et al. 2020). The prior's means and scales are learned; `sami run mixing --set prior=normal` is the
control.
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
from sami_ppl.data import split
from sami_ppl.metrics import check_variability


@dataclass(frozen=True)
class Config:
    """Settings; `mixing` seeds the mixture and the classes, `classes` is the number of values of u.

    `turn`: a rotation of the code learned behind the encoder.
    """

    prior: Literal["conditional", "normal"] = "conditional"
    turn: bool = False
    factors: int = 2
    features: int = 4
    classes: int = 9
    noise_std: float = 0.05
    mixing: int = 0
    observations: int = 20_000
    width: int = 256
    depth: int = 3
    log_snr_min: float = -7.0
    log_snr_max: float = 7.0


RECOMMENDED = {
    "denoiser.steps": 3000, "denoiser.learning_rate": 2e-3,
    "encoder.steps": 4000, "encoder.beta": 1.0, "encoder.learning_rate": 1e-3, "warm_steps": 0,
}  # fmt: skip


def make_prior(config: Config, classes: int):
    """One Normal for all, or one of learned mean and scale for each class."""

    def conditional(u):
        loc: Any = numpyro.param("loc", jnp.zeros((classes, config.factors)))
        log_scale: Any = numpyro.param("log_scale", jnp.zeros((classes, config.factors)))
        own, width = (p.at[u].get(mode="fill") for p in (loc, jnp.exp(log_scale)))  # NaN for a class there is not
        numpyro.sample("z", dist.Normal(own, width).to_event(1), infer={"event_dims": ["factor"]})

    normal = sp.factors(z=dist.Normal(0, 1).expand([config.factors]), dims={"z": "factor"})
    return {"normal": normal, "conditional": conditional}[config.prior]


def classes(config: Config) -> tuple[np.ndarray, np.ndarray]:
    """True means and scales of the factors for every value of u."""
    rng = np.random.default_rng((config.mixing, 1))
    shape = (config.classes, config.factors)
    return rng.uniform(-2, 2, shape), rng.uniform(0.2, 1.0, shape)


def load(config: Config, *, key: jax.Array) -> xr.Dataset:
    """Observations with class and factors, four fifths for training. The mixture is injective: two leaky layers."""
    loc, scale = classes(config)
    check_variability(loc, scale)
    seed = int(jax.random.randint(key, (), 0, 2**31 - 1))
    rng, mixer = np.random.default_rng(seed), np.random.default_rng((config.mixing, 2))
    u = rng.integers(0, config.classes, config.observations)
    z = loc[u] + scale[u] * rng.standard_normal((config.observations, config.factors))
    h = z
    for size in (config.features, config.features):
        weights = np.linalg.qr(mixer.standard_normal((max(size, h.shape[1]),) * 2))[0][: h.shape[1], :size]
        h = h @ weights * np.sqrt(size / h.shape[1])
        h = np.where(h > 0, h, 0.2 * h)
    x = h / h.std() + config.noise_std * rng.standard_normal(h.shape)
    factors = {f"factor_{j}": ("obs", z[:, j].astype(np.float32)) for j in range(config.factors)}
    data = xr.Dataset({"x": (("obs", "feature"), x.astype(np.float32)), "u": ("obs", u), **factors})
    return split(data, test=0.2, key=jax.random.fold_in(key, 1))


def build(config: Config, data: xr.Dataset, *, key: jax.Array) -> sp.Program:
    """The program: perceptrons, and the class as an argument of the prior; classes are counted from 0.

    Raises ValueError for a class below 0.
    """
    classes = config.classes
    if "u" in data:
        if (low := int(data["u"].min())) < 0:
            raise ValueError(f"u counts classes from 0, got {low}")
        classes = max(classes, int(data["u"].max()) + 1)
    program = sp.autoencoder(
        make_prior(config, classes), data, network="mlp", size={"width": config.width, "depth": config.depth},
        given={"u": np.arange(classes)} if config.prior == "conditional" else None, mean=0.0, std=1.0,
        schedule=sp.VariancePreserving(config.log_snr_min, config.log_snr_max), progress=False, key=key,
    )  # fmt: skip
    return program.replace(encoder=sp.TurningEncoder(program.encoder)) if config.turn else program
