"""What the latents tell the decoder: denoising errors without guidance, with an observation's own z, with another's.

A KL above zero does not show that samples depend on z. Only the comparison of an observation's own z with the z of
another observation does, noise level by noise level.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpy as np

from sami_ppl._util.chunks import chunk_of, padded_chunks
from sami_ppl._util.keys import check_key
from sami_ppl._util.tables import readable
from sami_ppl.priors.read import Given
from sami_ppl.program.program import Program

BANDS = 6


@readable
class NoiseErrors(NamedTuple):
    """½ ∫ E‖ε − ε̂‖² dλ over each of `BANDS` equal bands of the noise range, in nats; sum over bands for the whole.

    `log_snr`: the centres of the bands. `own` and `shuffled` are None without codes, `unguided`, the error without a
    code, where the decoder has no denoiser without one.
    """

    log_snr: Array
    unguided: Array | None
    own: Array | None
    shuffled: Array | None

    @property
    def gain(self) -> Array:
        """Shuffled minus own error per band, in nats: what knowing the right z is worth."""
        if self.own is None or self.shuffled is None:
            raise ValueError("there is no gain without guidance: call noise_errors with guided=True")
        return self.shuffled - self.own


def draw_code(
    program: Program, x: Float[Array, "obs *event"], key: Key[Array, ""], given: Given | None = None
) -> Float[Array, "obs D"]:
    """One draw of the code z from each observation's posterior."""
    check_key(key)
    return jnp.asarray(program.code_law(x, given).sample(key))


@eqx.filter_jit
def _draw(program: Program, x: Array, key: Array, given: Given) -> Array:
    return draw_code(program, x, key, given)


def draw_codes(
    program: Program, x: Float[np.ndarray, "obs *event"], key: Key[Array, ""], *, given: Given | None = None,
    chunk: int | None = None,
) -> Float[np.ndarray, "obs D"]:  # fmt: skip
    """One draw of the code from the posterior of every observation, chunk by chunk on the host.

    `chunk`: observations at a time; default 256, fewer of large ones.
    """
    chunk, parts = chunk_of(256, program.event_shape) if chunk is None else chunk, []
    for i, (rows, count) in enumerate(padded_chunks(len(x), chunk)):
        own = {name: jnp.asarray(value)[rows] for name, value in (given or {}).items()}
        parts.append(np.asarray(_draw(program, jnp.asarray(x[rows]), jax.random.fold_in(key, i), own))[:count])
    return np.concatenate(parts)


def noise_errors(
    program: Program,
    x: Float[Array, "obs *event"],
    key: Key[Array, ""],
    *,
    guided: bool = True,
    given: Given | None = None,
) -> NoiseErrors:
    """Denoising errors per band of noise levels, on the same noise for all three; the shuffled z is the neighbour's."""
    check_key(key)
    schedule = program.denoiser.schedule
    z_key, level_key, noise_key = jax.random.split(key, 3)
    edges = jnp.linspace(schedule.log_snr_min, schedule.log_snr_max, BANDS + 1)
    width = schedule.span / BANDS
    z = draw_code(program, x, z_key, given) if guided else jnp.zeros((len(x), 0))

    def errors(x: Array, own: Array, other: Array, log_snr: Array, eps: Array) -> Array:
        x, seen = program.denoiser.fill_missing(x)
        x_noisy = schedule.add_noise(x, log_snr, eps)
        found = [program.denoiser(x_noisy, log_snr)[None]] if program.denoiser.marginal or not guided else []
        if guided:
            found.append(jax.vmap(lambda z: program.decoder(z)(x_noisy, log_snr))(jnp.stack([own, other])))
        return jnp.stack([jnp.sum(seen * (eps - eps_hat) ** 2) for eps_hat in jnp.concatenate(found)])

    def band(inputs: tuple) -> Array:
        low, level_key, noise_key = inputs
        share = (jax.random.uniform(level_key) + jnp.arange(len(x)) / len(x)) % 1.0
        eps = jax.random.normal(noise_key, x.shape, x.dtype)
        inputs = (x, z, jnp.roll(z, 1, axis=0), low + width * share, eps)
        batch = chunk_of(len(x), program.event_shape)
        return jax.lax.map(lambda inputs: errors(*inputs), inputs, batch_size=batch).mean(0)

    keys = (jax.random.split(level_key, BANDS), jax.random.split(noise_key, BANDS))
    nats = 0.5 * width * jax.lax.map(band, (edges[:-1], *keys))
    centres = (edges[:-1] + edges[1:]) / 2
    alone = nats[:, 0] if program.denoiser.marginal else None
    return NoiseErrors(centres, alone, *([nats[:, -2], nats[:, -1]] if guided else [None, None]))
