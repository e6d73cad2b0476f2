"""Importance-weighted bounds: tighter ones from several draws of z, and what their weights say about the guide."""

from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpy as np
from scipy.special import logsumexp
import xarray as xr

from sami_ppl._util.chunks import chunk_of, padded_chunks
from sami_ppl._util.keys import check_key
from sami_ppl.decoders.bound import bound
from sami_ppl.diffusion.schedule import NoiseProposal
from sami_ppl.evidence.elbo import chosen_proposal, draw_latents
from sami_ppl.priors.read import Given
from sami_ppl.program.program import Program


@eqx.filter_jit
@jax.default_matmul_precision("highest")  # on a GPU products are of TF32 otherwise: three digits
def _log_weights(
    program: Program, proposal: NoiseProposal, x: Array, given: Given, key: Array, draws: int, levels: int
) -> Array:
    """Log weights (2, draws, obs) of the same draws of z under two independent noise sets, each shared by all draws."""
    z_key, offset_key, noise_key = jax.random.split(key, 3)
    latent = jax.lax.map(lambda key: draw_latents(program, x, key, given), jax.random.split(z_key, draws))
    offset = jax.random.uniform(offset_key, (2, len(x)))

    def add_level(total: Array, inputs: tuple[Array, Array]) -> tuple[Array, None]:
        stratum, key = inputs

        def one(z: Array, x: Array, log_snr: Array, weight: Array, key: Array) -> Array:
            eps = jax.random.normal(key, x.shape, x.dtype)
            return bound(program.denoiser, program.encoder, x, z, log_snr, weight, eps).total

        log_snr, weight = proposal.at((stratum + offset) / levels)
        keys = jax.random.split(key, (2, len(x)))
        over_obs = jax.vmap(one)
        over_draws = jax.vmap(over_obs, in_axes=(0, None, None, None, None))
        both = jax.vmap(over_draws, in_axes=(None, None, 0, 0, 0))(latent.z, x, log_snr, weight, keys)
        return total + both, None

    start = jnp.zeros((2, draws, len(x)))
    total, _ = jax.lax.scan(add_level, start, (jnp.arange(levels), jax.random.split(noise_key, levels)))
    return sum(latent.log_p.values(), start=-latent.log_q) - total / levels


def importance_weighted_bound(
    program: Program,
    data: xr.Dataset | Float[Array | np.ndarray, "obs *event"],
    *,
    key: Key[Array, ""],
    draws: int = 64,
    levels: int = 128,
    proposal: NoiseProposal | Literal["fitted"] | None = None,
    chunk: int | None = None,
) -> xr.Dataset:
    """Bounds on −log p(x) from K = 1, 2, 4 … `draws` draws of z (Burda et al. 2016), in nats, and their diagnostics.

    log w = log p(x | z) + log p(z) − log q(z | x), where log p(x | z) is minus the diffusion bound on one fixed set of
    noise levels and noise per observation, the same for all draws. An estimate inside an exponential pulls such
    bounds down: `weight_noise` says by how much they may be trusted.

    Variables: `bound` (obs, particles), as that of `evidence_bound` an upper bound on −log p(x), for each K the mean
    over disjoint groups of K draws, so that it never rises with K; `pareto_k` (obs,), the shape of the weights' tail
    (below .5 good, above .7 the bound at large K and the guide's moments are not to be trusted); `ess` (obs,),
    effective number of draws; `weight_noise` (obs,), the variance of log w between draws that is owed to the noise set,
    estimated from a second one: about half of it is the downward bias at large K, in nats; `log_weight` (draw, obs).

    `proposal`: density of the noise levels, as for `evidence_bound`. `chunk`: observations at a time, default 16, fewer
    of large ones. Raises ValueError for observations of another
    shape, and unless `draws` is a power of two, at least 32.
    """
    check_key(key)
    x, given = program.observations(data)
    if draws < 32 or draws & (draws - 1):
        raise ValueError(
            "draws must be a power of two, at least 32, so that groups of draws nest and the tail of the weights can "
            f"be fitted; got {draws}"
        )
    proposal, key = chosen_proposal(program, x, given, proposal, key)
    chunk, parts = chunk_of(16, program.event_shape, passes=2 * draws) if chunk is None else chunk, []
    for i, (rows, count) in enumerate(padded_chunks(len(x), chunk)):
        part = {name: jnp.asarray(value[rows]) for name, value in given.items()}
        part_key = jax.random.fold_in(key, i)
        found = _log_weights(program, proposal, jnp.asarray(x[rows]), part, part_key, draws, levels)
        parts.append(np.asarray(found, float)[..., :count])
    log_weight, other = np.concatenate(parts, axis=-1)
    particles = [2**i for i in range(draws.bit_length())]
    pareto_k, ess = weight_tails(log_weight)
    variables = {
        "bound": (("obs", "particles"), -np.stack([nested_log_mean(log_weight, k) for k in particles], axis=1)),
        "pareto_k": ("obs", pareto_k),
        "ess": ("obs", ess),
        "weight_noise": ("obs", 0.5 * (log_weight - other).var(0, ddof=1)),
        "log_weight": (("draw", "obs"), log_weight),
    }
    attrs = {"units": "nats", "levels": levels, "long_name": "upper bound on −log p(x)"}
    return xr.Dataset(variables, coords={"particles": particles}, attrs=attrs)


def weight_tails(
    log_weight: Float[np.ndarray, "draw obs"],
) -> tuple[Float[np.ndarray, " obs"], Float[np.ndarray, " obs"]]:
    """Pareto k-hat of the weights of each observation, and the effective number of draws, 1 / Σ w² of normalised w.

    k-hat is NaN for fewer than 32 draws, of which too few make up the tail.
    """
    from arviz_stats.base import array_stats  # pyright: ignore[reportPrivateImportUsage]

    normalised = np.exp(log_weight - logsumexp(log_weight, axis=0))
    ess = 1 / (normalised**2).sum(0)
    if len(log_weight) < 32:
        return np.full(ess.shape, np.nan), ess
    # ArviZ smooths the weights of leave-one-out, which are inverse likelihoods: it takes minus the log weights.
    return np.asarray(array_stats.psislw(-log_weight.T, axis=-1)[1]), ess


def nested_log_mean(log_weight: Float[np.ndarray, "draw obs"], particles: int) -> Float[np.ndarray, " obs"]:
    """The mean over disjoint groups of `particles` draws of log mean w: monotone in `particles` over powers of two."""
    groups = log_weight.reshape(-1, particles, log_weight.shape[1])
    return (logsumexp(groups, axis=1) - np.log(particles)).mean(0)
