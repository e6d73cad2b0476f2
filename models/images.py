"""Images: any set of images of one size, by networks that suit their size; `--data` takes a folder or an array.

Without `--data`, real images that scikit-image carries (install the extra: `pip install "sami_ppl[images]"`): patches
of its photographs, or its 200 small pictures of faces and non-faces.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np
from numpyro import distributions as dist
import xarray as xr

import sami_ppl as sp
from sami_ppl.data import split

PHOTOGRAPHS = ("astronaut", "camera", "chelsea", "coffee", "rocket", "coins", "moon", "brick", "grass", "gravel")


@dataclass(frozen=True)
class Config:
    """Settings; `source`, `patches` and `size`, in pixels, choose among scikit-image's pictures.

    None: `mean` and `std` of the data.
    """

    source: Literal["patches", "faces"] = "patches"
    patches: int = 8000
    latents: int = 8
    decoder: Literal["guided", "conditioned", "gaussian"] = "guided"
    size: int = 16
    network: Literal["mlp", "unet", "hybrid", "dit"] | None = None
    widths: tuple[int, ...] | None = None
    patch: int | None = None
    log_snr_min: float = -6.0
    log_snr_max: float = 6.0
    mean: float | None = None
    std: float | None = None


def load(config: Config, *, key: jax.Array) -> xr.Dataset:
    """Grey images in [−1, 1], four fifths for training."""
    try:
        from skimage import color, data
    except ImportError as error:
        raise ValueError(
            "the images of this program come with scikit-image: pip install 'sami_ppl[images]', or give your own by "
            "--data"
        ) from error
    patch_key, split_key = jax.random.split(key)
    dims = ("obs", "channel", "row", "column")
    if config.source == "faces":
        # 25 pixels a side, cut to a size that two halvings divide; the first hundred are faces.
        images = data.lfw_subset()[:, None, :24, :24].astype(np.float32) * 2 - 1
        face = (np.arange(len(images)) < 100).astype(np.int32)
        return split(xr.Dataset({"x": (dims, images), "face": ("obs", face)}), test=0.2, key=split_key)
    rng = np.random.default_rng(int(jax.random.randint(patch_key, (), 0, 2**31 - 1)))
    sources = rng.integers(len(PHOTOGRAPHS), size=config.patches)
    images = np.empty((config.patches, 1, config.size, config.size), np.float32)
    for i, name in enumerate(PHOTOGRAPHS):
        photograph = np.asarray(getattr(data, name)())
        grey = color.rgb2gray(photograph) if photograph.ndim == 3 else photograph / 255.0
        for row in np.flatnonzero(sources == i):
            top, left = (rng.integers(side - config.size + 1) for side in grey.shape)
            images[row, 0] = grey[top : top + config.size, left : left + config.size] * 2 - 1
    photographs = xr.Dataset({"x": (dims, images), "photograph": ("obs", sources.astype(np.int32))})
    return split(photographs, test=0.2, key=split_key)


def build(config: Config, data: xr.Dataset, *, key: jax.Array) -> sp.Program:
    """The program: independent standard normal factors, and networks that suit the images' size."""
    size = {name: value for name in ("widths", "patch") if (value := getattr(config, name)) is not None}
    prior = sp.factors(z=dist.Normal(0, 1).expand([config.latents]), dims={"z": "factor"})
    return sp.autoencoder(
        prior, data, decoder=config.decoder, network=config.network, size=size,
        schedule=sp.VariancePreserving(config.log_snr_min, config.log_snr_max),
        mean=config.mean, std=config.std, progress=False, key=key,
    )  # fmt: skip
