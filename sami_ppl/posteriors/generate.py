"""Samples of a program: given codes, given images, from the prior, or from the denoiser alone."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpy as np

from sami_ppl._util.chunks import by_chunks, chunk_of
from sami_ppl._util.keys import check_key
from sami_ppl.decoders.guidance import given
from sami_ppl.diagnostics.fitted import warn_if_not_fitted
from sami_ppl.diagnostics.gain import draw_code
from sami_ppl.diffusion.denoiser import AbstractDenoiser
from sami_ppl.diffusion.sampler import AbstractSampler
from sami_ppl.encoders.encoder import AbstractEncoder
from sami_ppl.priors.read import Given
from sami_ppl.program.program import Program

CHUNK = 64
"""Samples at a time, fewer of large observations."""


def decode(
    program: Program,
    z: Float[Array | np.ndarray, "n D"],
    keys: Key[Array, " n"],
    *,
    sampler: AbstractSampler | None = None,
    seconds: float | None = None,
) -> Float[np.ndarray, "n *event"]:
    """Observations given codes z, chunk by chunk on the host. Warns where the program has never been fitted.

    Args:
        program: the program.
        z: codes, as `program.encode` or `program.latents.to_code` give them.
        keys: random keys, one for each code: equal ones are common random numbers.
        sampler: of reverse diffusion; default the program's own.
        seconds: after so many no further chunk is begun: the samples are those of the first codes.

    Returns:
        One observation for each code.

    Raises:
        ValueError: codes of another width, more or fewer keys than codes.
    """
    z = jnp.asarray(z)
    if z.ndim != 2 or z.shape[1] != program.latents.size:
        raise ValueError(
            f"z must have shape (n, {program.latents.size}), one column per axis "
            f"({', '.join(program.latents.axes)}), got {z.shape}; for site values use program.latents.to_code(values)"
        )
    if jnp.shape(keys) != (len(z),):
        raise ValueError(
            f"keys must be one per code, ({len(z)},), got {jnp.shape(keys)}: jax.random.split(key, {len(z)})"
        )
    warn_if_not_fitted(program)
    sampler = program.sampler if sampler is None else sampler
    size = chunk_of(CHUNK, program.event_shape)
    return by_chunks(partial(_decode, sampler, program.denoiser, program.encoder), size, keys, z, seconds=seconds)


@eqx.filter_jit
def _decode(sampler: AbstractSampler, denoiser: AbstractDenoiser, encoder: AbstractEncoder, keys: Array, z: Array):
    return jax.vmap(lambda key, z: sampler.sample(given(denoiser, encoder, z), key))(keys, z)


@eqx.filter_jit
def _sample(sampler: AbstractSampler, denoiser: AbstractDenoiser, keys: Array) -> Array:
    return jax.vmap(lambda key: sampler.sample(denoiser, key))(keys)


@eqx.filter_jit
def prior_codes(program: Program, size: int, key: Array, given: Given | None = None) -> Array:
    """`program.prior_codes`, compiled once for all programs of the same structure."""
    return program.prior_codes(key, size, given=given)


@eqx.filter_jit
def _draw_code(program: Program, x: Array, key: Array) -> Array:
    return draw_code(program, x, key)


def sampled_values(program: Program, samples: Float[np.ndarray, "n *event"]) -> Float[np.ndarray, "n values"]:
    """The values of samples that should be numbers: entries that no observation ever had are NaN in them."""
    seen = program.denoiser.seen
    return samples.reshape(len(samples), -1) if seen is None else samples[:, np.asarray(seen)]


def generate(
    program: Program,
    *,
    key: Key[Array, ""],
    z: Float[Array | np.ndarray, "n D"] | None = None,
    x: Float[Array | np.ndarray, "n *event"] | None = None,
    size: int | None = None,
    guided: bool = True,
    sampler: AbstractSampler | None = None,
) -> Float[np.ndarray, "n *event"]:
    """Samples, given exactly one of `z`, `x` and `size`.

    Args:
        program: the program.
        key: random key.
        z: codes, one sample of each.
        x: observations, whose posteriors give a code each.
        size: number of samples, whose codes are drawn from the prior.
        guided: with `size`: False for samples of the denoiser alone, without codes.
        sampler: of reverse diffusion; default the program's own.

    Returns:
        The samples.

    Raises:
        ValueError: not one of the three is given, `guided=False` with z or x, or with a Gaussian decoder, which has no
            denoiser alone.
    """
    check_key(key)
    if sum(given is not None for given in (z, x, size)) != 1:
        raise ValueError(
            "give exactly one of z (codes), x (images whose posteriors give codes), size (number of samples)"
        )
    if size is None and not guided:
        raise ValueError("guided=False samples the denoiser alone, without codes: give size, not z or x")
    code_key, sample_key = jax.random.split(key)
    if size is not None and not guided:
        warn_if_not_fitted(program)
        plain = program.sampler if sampler is None else sampler
        keys = jax.random.split(sample_key, size)
        return by_chunks(partial(_sample, plain, program.denoiser), chunk_of(CHUNK, program.event_shape), keys)
    if size is not None:
        z = prior_codes(program, size, code_key)
    elif x is not None:
        z = _draw_code(program, jnp.asarray(program.observed(x)), code_key)
    assert z is not None
    return decode(program, z, jax.random.split(sample_key, len(z)), sampler=sampler)
