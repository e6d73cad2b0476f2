"""What a denoiser knows without an encoder: principal components of the activations at the bottom of its U-Net.

The bottom map of a diffusion model's U-Net, its *h-space*, is linear in much of what an image shows (Kwon, Jeong & Uh
2023, *Diffusion Models Already Have a Semantic Latent Space*; Haas et al. 2024, *Discovering Interpretable Directions
in the Semantic Latent Space of Diffusion Models*, take its principal components). A code made of it costs no training,
and is what a fitted encoder is to be compared to.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpy as np

from sami_ppl._util.chunks import by_chunks, chunk_of
from sami_ppl._util.keys import check_key
from sami_ppl.analyses.codes import CHUNK
from sami_ppl.diffusion.denoiser import AbstractDenoiser


class BottleneckComponents(NamedTuple):
    """Leading principal components of a denoiser's bottom map at one noise level.

    `mean` and `directions` are of the flattened map; a code is (map − mean) · directions, each of variance 1 over the
    observations that the components were found from. `share`: that of the variance of the map which each has.
    """

    denoiser: AbstractDenoiser
    log_snr: float
    mean: Float[np.ndarray, " features"]
    directions: Float[np.ndarray, "features D"]
    share: Float[np.ndarray, " D"]

    def encode(self, x: Float[Array | np.ndarray, "obs *event"], *, key: Key[Array, ""]) -> Float[np.ndarray, "obs D"]:
        """Codes of observations, noised by the key. Raises ValueError for observations of another shape."""
        return (_maps(self.denoiser, x, self.log_snr, key) - self.mean) @ self.directions


def bottleneck_components(
    denoiser: AbstractDenoiser,
    x: Float[Array | np.ndarray, "obs *event"],
    size: int,
    *,
    log_snr: float,
    key: Key[Array, ""],
) -> BottleneckComponents:
    """Codes of `size` numbers out of a denoiser alone, a U-Net of this library or of diffusers.

        found = analyses.bottleneck_components(program.denoiser, train, 8, log_snr=0.0, key=a)
        codes = found.encode(test, key=b)

    Args:
        denoiser: one whose network is a U-Net, `program.denoiser` or `diffusion.from_diffusers(folder)`.
        x: observations, clean; each is noised to x_λ once.
        size: number of components.
        log_snr: the noise level λ, within the denoiser's range.
        key: random key of the noise.

    Returns:
        The components, which encode observations.

    Raises:
        ValueError: a denoiser without a bottom map, observations of another shape, a noise level out of its range, more
            components than there are observations or features.
    """
    from sklearn.decomposition import PCA

    check_key(key)
    low, high = denoiser.schedule.log_snr_min, denoiser.schedule.log_snr_max
    if not low <= log_snr <= high:
        raise ValueError(f"log_snr={log_snr:g}, but the denoiser knows noise levels from {low:.4g} to {high:.4g}")
    maps = _maps(denoiser, x, log_snr, key)
    if not 1 <= size < min(maps.shape):
        raise ValueError(f"size={size}: there are {len(maps)} observations of {maps.shape[1]} features, give fewer")
    found: Any = PCA(size, random_state=0).fit(maps)
    spread = np.sqrt(found.explained_variance_ * (len(maps) - 1) / len(maps))
    return BottleneckComponents(
        denoiser, float(log_snr), found.mean_, found.components_.T / spread, found.explained_variance_ratio_
    )


def _maps(denoiser: AbstractDenoiser, x: Array | np.ndarray, log_snr: float, key: Array) -> np.ndarray:
    """Flattened bottom maps (obs, features) of noisy observations."""
    if np.shape(x)[1:] != denoiser.event_shape or not len(x):
        shape = ", ".join(map(str, denoiser.event_shape))
        raise ValueError(f"x must have shape (obs, {shape}), got {np.shape(x)}")
    noisy = jax.ShapeDtypeStruct(denoiser.event_shape, jnp.float32)
    if eqx.filter_eval_shape(denoiser.bottleneck, noisy, jax.ShapeDtypeStruct((), jnp.float32)) is None:
        raise ValueError(
            f"{type(denoiser).__name__} has no bottom map, which U-Nets have: build the program with network='unet', "
            "or give a denoiser of diffusion.from_diffusers"
        )
    keys, level = jax.random.split(key, len(x)), jnp.asarray(log_snr, jnp.float32)
    size = chunk_of(CHUNK, denoiser.event_shape)
    return by_chunks(lambda x, keys: _noised_maps(denoiser, x, keys, level), size, np.asarray(x, np.float32), keys)


@eqx.filter_jit
def _noised_maps(denoiser: AbstractDenoiser, x: Array, keys: Array, log_snr: Array) -> Array:
    def one(x: Array, key: Array) -> Array:
        noisy = denoiser.schedule.add_noise(x, log_snr, jax.random.normal(key, x.shape, x.dtype))
        found = denoiser.bottleneck(noisy, log_snr)
        assert found is not None
        return found.reshape(-1)

    return jax.vmap(one)(x, keys)
