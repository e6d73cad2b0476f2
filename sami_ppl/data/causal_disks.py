"""Disks whose factors depend on each other by mechanisms that are known, so that interventions have known answers:

centre_x   = ½ + 3/10 n₁
centre_y   = ½ + 3/5 (centre_x − ½) + 3/25 n₂                       n₁, n₂, n₃ ~ Uniform(−1, 1)
background = −¼ + 3/2 (centre_y − ½) + 3/10 n₃
"""

from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Array, Key
import numpy as np
import xarray as xr

from sami_ppl._util.keys import check_key
from sami_ppl.data.disks import FACTORS, render

PARENT = {"centre_x": None, "centre_y": "centre_x", "background": "centre_y"}
WEIGHT = {"centre_y": 0.6, "background": 1.5}
NOISE = {"centre_x": 0.3, "centre_y": 0.12, "background": 0.3}
# Centre of every factor, and a unit to measure it in.
UNITS = {"centre_x": (0.5, 0.2), "centre_y": (0.5, 0.2), "background": (-0.25, 0.5)}


def mechanisms(noise: Mapping[str, Any], do: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The factors from their noises n, by name, with those in `do` set to the values given there."""
    value: dict[str, Any] = {}
    for name, parent in PARENT.items():
        moved = 0.0 if parent is None else WEIGHT[name] * (value[parent] - UNITS[parent][0])
        value[name] = {name: UNITS[name][0] + moved + NOISE[name] * noise[name], **(do or {})}[name]
    return value


def causal_disks(key: Key[Array, ""], n: int, *, resolution: int = 16, radius: float = 0.2) -> xr.Dataset:
    """Draw n images x (obs, channel, row, column), with their factors centre_x, centre_y, background (obs), float32.

    Centres and radius are in image widths, backgrounds are intensities. Raises ValueError for fewer than one image.
    """
    check_key(key)
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    noise: dict[str, Any] = dict(zip(FACTORS, jax.random.uniform(key, (3, n), minval=-1.0), strict=True))
    factors = {name: np.asarray(value) for name, value in mechanisms(noise).items()}
    x = np.asarray(render(**factors, resolution=resolution, radius=radius))
    return xr.Dataset({"x": (("obs", "channel", "row", "column"), x)} | {k: ("obs", v) for k, v in factors.items()})
