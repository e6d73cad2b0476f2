"""Latent diffusion: the autoencoder of a pipeline of diffusers, data as its latents, and samples as images again.

autoencoder = sp.diffusion.autoencoder_from_diffusers("dit-faces")           # a pipeline with vae/, or a model
latents = sp.diffusion.to_latents(autoencoder, images)
program = sp.autoencoder(prior, latents, network=sp.diffusion.from_diffusers("dit-faces"), key=a)
program, history = sp.fit(program, latents, sp.EncoderOnly(), key=b)
images = sp.diffusion.to_images(autoencoder, sp.generate(program, size=8, key=c))
"""

from functools import partial
import math
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float
import numpy as np
import xarray as xr

from sami_ppl._util.chunks import by_chunks, chunk_of
from sami_ppl._util.tensors import TensorFileError, read_tensors
from sami_ppl.data.checks import as_array, as_floats
from sami_ppl.data.layout import arranged, layout_of
from sami_ppl.diffusion.folders import read_json, root_of, weights_of
from sami_ppl.nn.diffusers.autoencoder import AutoencoderKL, AutoencoderKLSettings

CHUNK = 16
"""Images at a time, fewer of large ones."""


def autoencoder_from_diffusers(folder: str | Path) -> AutoencoderKL:
    """The `AutoencoderKL` that diffusers' `save_pretrained` wrote; PyTorch is not needed.

    Its latents are the means, shifted and scaled by its `scaling_factor` as the denoiser of the same pipeline takes
    them.

    Args:
        folder: of a pipeline (`vae/`) or of the autoencoder itself, or the name of a repository in the cache, as for
            `from_diffusers`.

    Returns:
        The autoencoder, whose `encode` and `decode` are of one image; `to_latents` and `to_images` of many.

    Raises:
        FileNotFoundError: no such folder or repository, or one that lacks a file; with what to do.
        ValueError: an autoencoder, or a setting of it, that is not supported, by its name; weights of another one.
        TensorFileError: weights that are damaged, or a file that asks for more than tensors.
    """
    root = root_of(folder)
    model = root / "vae" if (root / "vae" / "config.json").is_file() else root
    missing = f"{root} holds no autoencoder of diffusers (no vae/config.json, no config.json)"
    config = read_json(model / "config.json", missing)
    try:
        return AutoencoderKL.of(AutoencoderKLSettings.of(config), read_tensors(weights_of(model)))
    except TensorFileError:
        raise
    except ValueError as error:
        raise ValueError(f"{model}: {error}") from error


def has_autoencoder(folder: str | Path) -> bool:
    """Whether a folder, or a repository in the cache, is of a pipeline with an autoencoder: of latent diffusion."""
    try:
        return (root_of(folder) / "vae" / "config.json").is_file()
    except FileNotFoundError:
        return False


def to_latents[Data: (xr.Dataset, np.ndarray)](autoencoder: AutoencoderKL, data: Data) -> Data:
    """Images as latents of an autoencoder, to be given to `sp.autoencoder`, `sp.fit` and all else in their place.

    Args:
        autoencoder: what `autoencoder_from_diffusers` read.
        data: images as `sp.autoencoder` takes them: an array (obs, *event), or a Dataset with the variable x on obs;
            8-bit ones are scaled to [−1, 1], channels may be last, or none.

    Returns:
        An array (obs, channel, row, column) of latents, or a Dataset that has them as x, and everything else as it was.

    Raises:
        TypeError: observations that are no numbers.
        ValueError: images of another number of channels, or of sides that the autoencoder does not divide; what is
            missing, NaN, or infinite.
    """
    named = isinstance(data, xr.Dataset)
    raw = as_array(data["x"].values if named else data)
    layout = layout_of(data if named else raw)
    dims = data["x"].dims[1:] if named else None
    x = as_floats(arranged(raw, dims, layout.event_shape, layout.event_dims))
    latents = by_chunks(partial(_encoded, autoencoder), chunk_of(CHUNK, layout.event_shape), x)
    if not named:
        return latents
    kept: Any = data.drop_dims(data["x"].dims[1:])
    return kept.assign(x=(("obs", "channel", "row", "column"), latents))


def to_images(
    autoencoder: AutoencoderKL, latents: Float[Array | np.ndarray, "*n channel row column"]
) -> Float[np.ndarray, "*n channel row2 column2"]:
    """Latents, such as samples of a program that was fitted to them, as the images that the autoencoder decodes.

    Args:
        autoencoder: what `autoencoder_from_diffusers` read.
        latents: of any number of leading dims, such as draws of observations.

    Returns:
        Images, as a rule in [−1, 1], and beyond where the decoder goes.

    Raises:
        ValueError: latents of another number of channels.
    """
    latents = np.asarray(latents)
    settings, (channels, *sides) = autoencoder.settings, latents.shape[-3:]
    if latents.ndim < 4 or channels != settings.latent_channels:
        raise ValueError(f"latents must have shape (…, {settings.latent_channels}, row, column), got {latents.shape}")
    size = chunk_of(CHUNK, (settings.in_channels, math.prod(sides) * settings.unit**2))
    images = by_chunks(partial(_decoded, autoencoder), size, latents.reshape(-1, channels, *sides))
    return images.reshape(*latents.shape[:-3], *images.shape[1:])


@eqx.filter_jit
def _encoded(autoencoder: AutoencoderKL, x: Array) -> Array:
    return jax.vmap(autoencoder.encode)(x)


@eqx.filter_jit
def _decoded(autoencoder: AutoencoderKL, latents: Array) -> Array:
    return jax.vmap(autoencoder.decode)(latents)
