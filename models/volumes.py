"""Volumes: cubes of the brain, by networks that convolve along three sides; `--data` takes others.

The brain is the mean of 152 people's (MNI ICBM 2009a, symmetric, T1-weighted, a voxel is 1 mm wide), as the package
nilearn carries it with its maps of grey and white matter. Of its slabs from front to back, every third is for testing:
left and right, which mirror each other, are in the same slab. Others' volumes: x on (obs, channel, depth, row, column).
"""

from dataclasses import dataclass
import importlib.util
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from numpyro import distributions as dist
import xarray as xr

import sami_ppl as sp

FILE = "datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"


@dataclass(frozen=True)
class Config:
    """Settings; `side` of a cube and `step` between cubes in voxels, `least` the share of brain that a cube has."""

    side: int = 16
    step: int = 6
    least: float = 0.5
    latents: int = 8
    decoder: Literal["guided", "conditioned", "gaussian"] = "guided"
    network: Literal["mlp", "unet", "hybrid"] = "unet"
    widths: tuple[int, ...] | None = None


def load(config: Config, *, key: jax.Array) -> xr.Dataset:
    """Cubes in [−1, 1] as slices from below to above; none for training overlaps with one for testing.

    Known of each: the place of its middle in mm, `right` of, in `front` of and `up` from the point that the template
    counts from (the anterior commissure), and its shares of `grey` and `white` matter.
    """
    if not (4 <= config.side <= 32 and config.step >= 1):
        raise ValueError(f"side must be from 4 to 32 voxels, step 1 or more, got {config.side} and {config.step}")
    brain, origin = volume("t1")
    cubes = windows(brain, config)
    start = np.indices(cubes.shape[:3]) * config.step
    row = start[1] - np.flatnonzero(brain.any((0, 2)))[0]
    tested, same = (at // (2 * config.side) % 3 == 1 for at in (row, row + config.side - 1))
    enough = windows(brain > 0, config).mean((3, 4, 5)) >= config.least
    kept = np.argwhere(enough & (tested == same))  # a cube is half as long as a slab
    kept = tuple(np.asarray(jax.random.permutation(key, kept)).T)  # figures are of the first of them
    up, back, right = start[:, *kept] + (config.side - 1) / 2 + origin[:, None]
    grey, white = (windows(volume(name)[0], config)[kept].mean((1, 2, 3)) / 255 for name in ("gm", "wm"))
    factors = {"right": right, "front": -back, "up": up, "grey": grey, "white": white}
    return xr.Dataset(
        {
            "x": (("obs", "channel", "depth", "row", "column"), cubes[kept][:, None] / np.float32(127.5) - 1),
            **{name: ("obs", values.astype(np.float32)) for name, values in factors.items()},
        },
        coords={"split": ("obs", np.where(tested[kept], "test", "train"))},
    )


def volume(name: str) -> tuple[np.ndarray, np.ndarray]:
    """A volume of the package, 8-bit (depth, row, column) from below, front and left; the place of its first voxel.

    Raises ValueError, with the call to write, where the package is not installed.
    """
    found = importlib.util.find_spec("nilearn")
    if found is None or found.origin is None:
        raise ValueError(
            "the volumes of this program come with nilearn: pip install nilearn, or give your own by --data"
        )
    import nibabel  # that nilearn brings  # pyright: ignore[reportMissingImports]

    image: Any = nibabel.load(Path(found.origin).parent / FILE.format(name))
    voxels = np.asarray(image.dataobj)  # to the right, to the front, up
    right, front, up = image.affine[:3, 3]
    return voxels.T[:, ::-1], np.array([up, -(front + voxels.shape[1] - 1), right])


def windows(voxels: np.ndarray, config: Config) -> np.ndarray:
    """All cubes of a volume, `step` apart, as a view: (depths, rows, columns, side, side, side)."""
    views = np.lib.stride_tricks.sliding_window_view(voxels, (config.side,) * 3)
    return views[:: config.step, :: config.step, :: config.step]


def build(config: Config, data: xr.Dataset, *, key: jax.Array) -> sp.Program:
    """The program: independent standard normal factors, and networks along the three sides."""
    prior = sp.factors(z=dist.Normal(0, 1).expand([config.latents]), dims={"z": "factor"})
    size = {} if config.widths is None else {"widths": config.widths}
    return sp.autoencoder(
        prior, data, decoder=config.decoder, network=config.network, size=size, progress=False, key=key
    )
