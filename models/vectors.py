"""Vectors: measurements of patients, tumours or wines (scikit-learn's), by perceptrons; `--data` takes others.

Three small tables of real measurements, each in units of its spread. What is known beside them, the course
of an illness or a class, is kept for probes only.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np
from numpyro import distributions as dist
import xarray as xr

import sami_ppl as sp
from sami_ppl.data import split


@dataclass(frozen=True)
class Config:
    """Settings; `source` is one of 442 patients with diabetes (10 measurements), 569 tumours (30) and 178 wines (13).

    None: `width` and `depth` that suit the length of a vector.
    """

    source: Literal["diabetes", "tumours", "wines"] = "diabetes"
    latents: int = 4
    decoder: Literal["guided", "conditioned", "gaussian"] = "guided"
    width: int | None = None
    depth: int | None = None


def load(config: Config, *, key: jax.Array) -> xr.Dataset:
    """Vectors of which each entry has mean 0 and standard deviation 1 in the training part, four fifths of them.

    Beside them of patients the `progression` of diabetes a year later, else the class `benign` or `cultivar`.
    """
    from sklearn import datasets

    known, read = {
        "diabetes": ("progression", datasets.load_diabetes),
        "tumours": ("benign", datasets.load_breast_cancer),
        "wines": ("cultivar", datasets.load_wine),
    }[config.source]
    table = read()
    target = table.target.astype(np.float32 if config.source == "diabetes" else np.int64)
    data = xr.Dataset(
        {"x": (("obs", "feature"), table.data), known: ("obs", target)},
        coords={"feature": [str(name) for name in table.feature_names]},
    )
    order_key, split_key = jax.random.split(key)
    data = data.isel(obs=np.asarray(jax.random.permutation(order_key, len(target))))  # tables are sorted by class
    data = split(data, test=0.2, key=split_key)
    fitted = data["x"].isel(obs=np.flatnonzero(data["split"] == "train"))
    return data.assign(x=((data["x"] - fitted.mean("obs")) / fitted.std("obs")).astype(np.float32))


def build(config: Config, data: xr.Dataset, *, key: jax.Array) -> sp.Program:
    """The program: independent standard normal factors, and residual perceptrons."""
    size = {name: value for name in ("width", "depth") if (value := getattr(config, name)) is not None}
    prior = sp.factors(z=dist.Normal(0, 1).expand([config.latents]), dims={"z": "factor"})
    return sp.autoencoder(prior, data, decoder=config.decoder, network="mlp", size=size, progress=False, key=key)
