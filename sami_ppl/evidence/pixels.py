"""Bits per dimension of 8-bit images: the bound on −log P(x) of the values 0 … 255 themselves.

A density's bound may fall without end where pixels lie on a grid; the probability of the grid's values does not, and it
is what other models publish. Of a diffusion decoder only the last term of the bound changes: the value of a pixel is
told from its noisy value at λmax by

    P(x_i = v | y_i) ∝ N(y_i; α v, σ²),   v on the grid,                 y_i = α x_i + σ ε

(Kingma et al. 2021, *Variational Diffusion Models*, eq. 12). Its expectation depends on the pixel's value alone, so
that it is a table of 256 numbers. A Gaussian likelihood N(m, s²) gives a value the mass of its bin, of which the first
and last reach to infinity.

At a modest λmax that last term is most of the bound, for it takes no notice of what the denoiser makes of the noisy
value, and a likelihood's one s none of where it is sure. The bound is one with any law of the values there. So they may
be told from the *denoised* value x̂_i(y) instead, or the likelihood's m_i, by a table P(v | x̂) that is counted on
training images (Ho et al. 2020, *Denoising Diffusion Probabilistic Models*, sec. 3.3, who take a Gaussian about it).
"""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key
import numpy as np
from scipy.ndimage import gaussian_filter
import xarray as xr

from sami_ppl._util.chunks import by_chunks, chunk_of
from sami_ppl._util.keys import check_key
from sami_ppl.data.checks import as_array
from sami_ppl.decoders.conditional import NormalDenoiser
from sami_ppl.decoders.guidance import given
from sami_ppl.diffusion.denoiser import AbstractDenoiser
from sami_ppl.diffusion.schedule import AbstractSchedule
from sami_ppl.evidence.elbo import evidence_bound, mean_and_error
from sami_ppl.priors.read import Given
from sami_ppl.program.program import Program

VALUES = 256
NODES = 200
"""Of the quadrature over ε, by which the table is exact to rounding up to λmax = 14, where σ/α is a ninth of a step."""


SPREAD = 0.01
"""Probability that a counted table gives to all values alike: what no training pixel did may be seen."""


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
    train: xr.Dataset | Float[Array | np.ndarray, "obs *event"] | None = None,
) -> dict[str, float]:
    """Bound on −log P(x) of 8-bit images in bits per dimension, its mean over observations and standard error.

    Without `train`, values are told from the noisy ones at λmax, as published bounds do, and a high `log_snr_max` suits
    it: at 6, the default, σ/α is six steps of the grid, and the last term alone costs some 4.7 bits; from 12 on it
    costs a tenth of one. With `train` they are told from the denoised ones, by a table counted on these images.

    Args:
        program: the program, with any decoder.
        data: images of 8 bits, 0 … 255 or scaled from there to [−1, 1], as an array or a Dataset.
        key: random key.
        levels: noise levels, or draws of the code, for each observation.
        train: images that the program was fitted to, as `data` are given; 1,000 are plenty. Not those of `data`, whose
            bound would then be too low.

    Returns:
        {"mean", "se"}.

    Raises:
        ValueError: observations that are not 8-bit images scaled to [−1, 1].
    """
    check_key(key)
    x, variables, index = _pixels(program, data)
    bound = evidence_bound(program, data, key=key, levels=levels)
    nats = bound["bound"].values - bound["reconstruction"].values
    gaussian = isinstance(_decoder(program), NormalDenoiser)
    if gaussian:  # whose bound is the density at the observation, and no sum of terms
        nats = bound["kl"].sum("site").values
    size, table_key, end_key = chunk_of(64, program.event_shape), *jax.random.split(key)
    if train is not None:
        seen, given_seen, values = _pixels(program, train)
        told = partial(_denoised, program)
        table = value_table(by_chunks(told, size, seen, given_seen, jax.random.split(table_key, len(seen))), values)
        rows = nearest_values(by_chunks(told, size, x, variables, jax.random.split(end_key, len(x))))
        nats = nats - np.log(table[rows, index]).reshape(len(x), -1).sum(1)
    elif gaussian:
        nats = nats + by_chunks(partial(_bins, program, levels), size, x, variables, jax.random.split(key, len(x)))
    else:
        nats = nats + reconstruction_table(program.denoiser.schedule)[index].reshape(len(x), -1).sum(1)
    return mean_and_error(nats / (x[0].size * np.log(2)))


def nearest_values(x: Float[np.ndarray, "*n"], values: int = VALUES) -> Int[np.ndarray, "*n"]:
    """Which value of the grid each number is nearest to."""
    return np.clip(np.rint((x + 1) * (values - 1) / 2), 0, values - 1).astype(np.int64)


def value_table(
    denoised: Float[np.ndarray, "obs *event"], index: Int[np.ndarray, "obs *event"], values: int = VALUES
) -> Float[np.ndarray, "values values"]:
    """P(value | nearest value to the denoised one), a row for each of the latter, counted on images; none is 0.

    Counts are smoothed by four values of the denoised, about which few pixels may be seen, and by one of the value;
    a hundredth is spread over all values.
    """
    counts = np.zeros((values, values))
    np.add.at(counts, (nearest_values(denoised, values).ravel(), index.ravel()), 1)
    counts += gaussian_filter(counts, (4.0, 1.0), mode="constant")
    total = counts.sum(1, keepdims=True)
    return np.where(total > 0, (1 - SPREAD) * counts / np.where(total > 0, total, 1) + SPREAD / values, 1 / values)


def _pixels(program: Program, data: Any) -> tuple[np.ndarray, Given, Int[np.ndarray, "obs *event"]]:
    """Observations, the variables that the prior takes, and which value of the grid each pixel has."""
    raw = as_array(data["x"].values if isinstance(data, xr.Dataset) else data)
    x, variables = program.observations(data)
    steps = (x.astype(np.float64) + 1) * (VALUES - 1) / 2
    index = nearest_values(np.nan_to_num(x.astype(np.float64)))
    if not np.abs(steps - index).max() < 1e-3:  # nor where frames are missing
        raise ValueError(
            "x must be 8-bit images, 0 … 255, or those scaled to [−1, 1], to have bits per dimension, got values "
            f"between {raw.min():g} and {raw.max():g} that lie on no such grid: give the bytes, x.astype('uint8')"
        )
    return x, variables, index


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


@eqx.filter_jit
def _denoised(program: Program, x: Array, variables: Given, keys: Array) -> Float[Array, "obs *event"]:
    """x̂ at λmax given a draw of the code, of a noisy observation there; of a Gaussian likelihood its mean."""
    z = program.code_law(x, variables).sample(jax.random.fold_in(keys[0], 1))

    def one(x: Array, z: Array, key: Array) -> Array:
        decoder: AbstractDenoiser = given(program.denoiser, program.encoder, z)
        if isinstance(decoder, NormalDenoiser):
            return decoder.mean
        log_snr = jnp.asarray(decoder.schedule.log_snr_max, x.dtype)
        noisy = decoder.schedule.add_noise(x, log_snr, jax.random.normal(key, x.shape, x.dtype))
        return decoder.x_hat(noisy, log_snr)

    return jax.vmap(one)(x, z, keys)


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
