"""Bits per dimension of 8-bit images: the bound on −log P(x) of the values 0 … 255 themselves.

A density's bound may fall without end where pixels lie on a grid; the probability of the grid's values does not, and it
is what other models publish. Of a diffusion decoder only the last term of the bound changes: the value of a pixel is
told from its noisy value at λmax by

    P(x_i = v | y_i) ∝ N(y_i; α v, σ²),   v on the grid,                 y_i = α x_i + σ ε

(Kingma et al. 2021, *Variational Diffusion Models*, eq. 12). Its expectation depends on the pixel's value alone, so
that it is a table of 256 numbers. A Gaussian likelihood N(m, s²) gives a value the mass of its bin, of which the first
and last reach to infinity.
"""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpy as np
import xarray as xr

from sami_ppl._util.chunks import by_chunks, chunk_of
from sami_ppl._util.keys import check_key
from sami_ppl.data.checks import as_array
from sami_ppl.decoders.conditional import NormalDenoiser
from sami_ppl.decoders.guidance import given
from sami_ppl.diffusion.schedule import AbstractSchedule
from sami_ppl.evidence.elbo import evidence_bound, mean_and_error
from sami_ppl.priors.read import Given
from sami_ppl.program.program import Program

VALUES = 256
NODES = 200
"""Of the quadrature over ε, by which the table is exact to rounding up to λmax = 14, where σ/α is a ninth of a step."""


def pixel_values(values: int = VALUES) -> Float[np.ndarray, " values"]:
    """The grid: so many values from −1 to 1."""
    return np.linspace(-1.0, 1.0, values)


def reconstruction_table(schedule: AbstractSchedule, values: int = VALUES) -> Float[np.ndarray, " values"]:
    """−E log P(x = v | y) at λmax for every value v of the grid, in nats; y = v + (σ/α) ε, by quadrature over ε."""
    grid, noise = pixel_values(values), float(np.exp(-0.5 * schedule.log_snr_max))
    eps, weights = np.polynomial.hermite_e.hermegauss(NODES)
    y = grid[:, None] + noise * eps
    logits = -0.5 * ((y[..., None] - grid) / noise) ** 2
    own = np.take_along_axis(logits, np.arange(values)[:, None, None], axis=2)[..., 0]
    log_p = own - np.logaddexp.reduce(logits, axis=2)
    return -(log_p @ weights) / weights.sum()


def bits_per_dim(
    program: Program,
    data: xr.Dataset | Float[Array | np.ndarray, "obs *event"],
    *,
    key: Key[Array, ""],
    levels: int = 32,
) -> dict[str, float]:
    """Bound on −log P(x) of 8-bit images in bits per dimension, its mean over observations and standard error.

    A high `log_snr_max` suits it: at 6, the default, σ/α is six steps of the grid, and the last term alone costs some
    4.7 bits; from 12 on it costs a tenth of one.

    Args:
        program: the program, with any decoder.
        data: images of 8 bits, 0 … 255 or scaled from there to [−1, 1], as an array or a Dataset.
        key: random key.
        levels: noise levels, or draws of the code, for each observation.

    Returns:
        {"mean", "se"}.

    Raises:
        ValueError: observations that are not 8-bit images scaled to [−1, 1].
    """
    check_key(key)
    raw = as_array(data["x"].values if isinstance(data, xr.Dataset) else data)
    x, variables = program.observations(data)
    steps = (x.astype(np.float64) + 1) * (VALUES - 1) / 2
    index = np.clip(np.nan_to_num(np.rint(steps)), 0, VALUES - 1).astype(np.int64)
    if not np.abs(steps - index).max() < 1e-3:  # nor where frames are missing
        raise ValueError(
            "x must be 8-bit images, 0 … 255, or those scaled to [−1, 1], to have bits per dimension, got values "
            f"between {raw.min():g} and {raw.max():g} that lie on no such grid: give the bytes, x.astype('uint8')"
        )
    bound = evidence_bound(program, data, key=key, levels=levels)
    nats = bound["bound"].values - bound["reconstruction"].values
    if isinstance(_decoder(program), NormalDenoiser):
        keys, kl = jax.random.split(key, len(x)), bound["kl"].sum("site").values
        nats = kl + by_chunks(partial(_bins, program, levels), chunk_of(64, program.event_shape), x, variables, keys)
    else:
        nats = nats + reconstruction_table(program.denoiser.schedule)[index].reshape(len(x), -1).sum(1)
    return mean_and_error(nats / (x[0].size * np.log(2)))


def _decoder(program: Program) -> Any:
    return eqx.filter_eval_shape(lambda p: given(p.denoiser, p.encoder, jnp.zeros(p.latents.size)), program)


@eqx.filter_jit
def _bins(program: Program, levels: int, x: Array, variables: Given, keys: Array) -> Float[Array, " obs"]:
    """−log P(x | z) of a Gaussian likelihood, the mean over draws of z, in nats."""
    codes = program.code_law(x, variables).sample(keys[0], (levels,))

    def one(x: Array, z: Array) -> Array:
        decoder: Any = given(program.denoiser, program.encoder, z)
        return -jnp.sum(bin_log_prob(x, decoder.mean, decoder.std))

    return jax.lax.map(lambda z: jax.vmap(one)(x, z), codes).mean(0)


def bin_log_prob(
    x: Float[Array, "*event"], mean: Float[Array, "*event"], std: Float[Array, ""], values: int = VALUES
) -> Float[Array, "*event"]:
    """log of the mass that N(mean, std²) has in the bin of each value of the grid; the outer bins reach to infinity."""
    half = 1.0 / (values - 1)
    upper = jnp.where(x > 1 - half, jnp.inf, (x + half - mean) / std)
    lower = jnp.where(x < half - 1, -jnp.inf, (x - half - mean) / std)
    # On the side where both tails are small: there differences of logarithms keep their digits.
    flip = (x - mean) > 0
    a, b = jnp.where(flip, -upper, lower), jnp.where(flip, -lower, upper)
    log_a, log_b = (jax.scipy.stats.norm.logcdf(v) for v in (a, b))
    return log_b + jnp.log1p(-jnp.exp(jnp.minimum(log_a - log_b, -1e-7)))
