"""Fields: the temperature of the tropical sea surface, in which land is missing; `--data` takes other fields.

Monthly means from 2006 to 2010 (OSTIA, Met Office, Open Government Licence), as the package `iris-sample-data` carries
them: windows of 36 degrees of longitude around the equator, in which land is NaN. Networks are told which places are
sea, the bound is that of the sea alone. The latest months are for testing.
"""

from dataclasses import dataclass
import importlib.util
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from numpyro import distributions as dist
import xarray as xr

import sami_ppl as sp

FILE, VARIABLE, WINDOW = "ostia_monthly.nc", "surface_temperature", 36
TESTED = 12
"""Months for testing."""


@dataclass(frozen=True)
class Config:
    """Settings; `step` is the distance of windows in degrees of longitude, `least` the share of sea that one has."""

    step: int = 12
    least: float = 0.3
    latents: int = 6
    decoder: Literal["guided", "conditioned", "gaussian"] = "guided"
    network: Literal["mlp", "unet", "hybrid", "dit"] | None = None
    widths: tuple[int, ...] | None = None


def load(config: Config, *, key: jax.Array) -> xr.Dataset:
    """Temperatures in units of their spread, windows of all months, with their `longitude` (period 360) and `month`."""
    with xr.open_dataset(sample_data() / FILE, engine="h5netcdf") as file:
        field = file[VARIABLE].load()
    kelvin = field.transpose("time", "latitude", "longitude").values.astype(np.float32)
    degrees = 360 / kelvin.shape[2]
    columns, step = round(WINDOW / degrees), max(1, round(config.step / degrees))
    round_the_world = np.concatenate([kelvin, kelvin[:, :, :columns]], axis=2)
    starts = np.arange(0, kelvin.shape[2], step)
    windows = np.stack([round_the_world[:, :, start : start + columns] for start in starts], axis=1)
    month, place = np.indices(windows.shape[:2])
    scale = float(np.nanmean(kelvin)), float(np.nanstd(kelvin))
    x = ((windows - scale[0]) / scale[1]).reshape(-1, 1, *windows.shape[2:])
    longitude = (field["longitude"].values[starts[place]] + WINDOW / 2) % 360
    data = xr.Dataset(
        {
            "x": (("obs", "channel", "latitude", "longitude_in_window"), x),
            "longitude": ("obs", longitude.reshape(-1).astype(np.float32), {"units": "degrees", "period": 360.0}),
            "month": ("obs", (month.reshape(-1) % 12).astype(np.float32), {"period": 12.0}),
        },
        coords={"split": ("obs", np.where(month.reshape(-1) < len(kelvin) - TESTED, "train", "test"))},
        attrs={"mean_kelvin": scale[0], "spread_kelvin": scale[1]},
    )
    sea = (~np.isnan(x)).reshape(len(x), -1).mean(1)
    return data.isel(obs=sea >= config.least)


def sample_data() -> Path:
    """The folder of the package's files. Raises ValueError, with the call to write, where it is not installed."""
    found = importlib.util.find_spec("iris_sample_data")
    if found is None or found.origin is None:
        raise ValueError(
            "the fields of this program come with the package iris-sample-data: pip install iris-sample-data, or give "
            "your own by --data"
        )
    return Path(found.origin).parent / "sample_data"


def build(config: Config, data: xr.Dataset, *, key: jax.Array) -> sp.Program:
    """The program: independent standard normal factors, and networks that suit the fields' size."""
    prior = sp.factors(z=dist.Normal(0, 1).expand([config.latents]), dims={"z": "factor"})
    size = {} if config.widths is None else {"widths": config.widths}
    return sp.autoencoder(
        prior, data, decoder=config.decoder, network=config.network, size=size, progress=False, key=key
    )
