"""log p(z) + lower bound on log p(x | z) of one observation as a fixed function of z: for refinement log p(x, z).

The bound's noise is drawn once, so that samplers and optimisers see a smooth function: noise levels at the midpoints of
equal shares of a density of levels, and at each ε and −ε, which cancels what is linear in ε. Of guided decoders all
that does not depend on z is computed beforehand (`tabulated`), frame by frame: an evaluation costs some products of
small matrices. One that takes the code itself is called at every level.

What is moved are points of a Euclidean space, whatever the sites (`log_density`). A direction u is that of a vector v,
whose length r is given a law of its own, N(1, .25²): with v = r u the density p(u, x) N(r; 1, .25²) r^(1−d) of v has
p(u, x) as that of its directions. Discrete sites are summed over; given the others they are drawn by their
probabilities.
"""

from collections.abc import Mapping
import itertools
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpy as np
import numpyro
from numpyro import handlers
from numpyro.infer.util import log_density as numpyro_log_density
import xarray as xr

from sami_ppl._util.errors import UserError
from sami_ppl._util.tables import readable
from sami_ppl.decoders.bound import bound
from sami_ppl.diffusion.schedule import NoiseLevels
from sami_ppl.encoders.frames import seen_frames
from sami_ppl.evidence import importance_proposal
from sami_ppl.priors.latents import Latents
from sami_ppl.priors.sites import Direction, Discrete
from sami_ppl.program.guide import values_of
from sami_ppl.program.program import Program
from sami_ppl.program.tabulated import Table, ends, noise_terms, tabulated_log_likelihood

GLOBAL_DRAWS = 64
LENGTH_SD = 0.25
"""Of the lengths of the vectors that stand for directions, about 1. In a much thinner shell, which is curved, a step of
the sampler and the Gaussian of `svi` come out of it."""


class NoiseSet(NamedTuple):
    """An observation, and the noise at which a decoder is called: a row for every noise level and sign of ε."""

    x: Float[Array, "*event"]
    log_snr: Float[Array, " rows"]
    weight: Float[Array, " rows"]
    eps: Float[Array, "rows *event"]


@readable
class Target(NamedTuple):
    """What log p(x, z) needs of one observation: the bound on log p(x | z) as a table for every frame (of what is no
    sequence, one), a row for every noise level and sign of ε, or the noise set where there is none.

    `mean` and `sd` of the code under the amortised posterior. `loc` and `factor` A: of the coordinates that are moved,
    all but those of discrete sites, M in number, its mean and a root of the covariance, so that u in loc + A u is near
    N(0, I). `kinds`: a row for every combination of values of the discrete sites, their codes, 0 elsewhere. `given`:
    the variables that the prior takes, of this observation; `global_values`: draws of the global sites, (draw, …).
    """

    table: Table | NoiseSet
    mean: Float[Array, " D"]
    sd: Float[Array, " D"]
    loc: Float[Array, " M"]
    factor: Float[Array, "M M"]
    kinds: Float[Array, "K D"]
    given: Mapping[str, Array]
    global_values: Mapping[str, Array]


def targets(program: Program, data: xr.Dataset | Array | np.ndarray, key: Key[Array, ""], levels: int) -> list[Target]:
    """The target of every observation, with a noise set of its own.

    Global sites are left as their guide has them, since one observation tells next to nothing of them: the prior of an
    observation's own sites is averaged over draws of that guide. Of a discrete site whose value is known there is no
    other.

    Raises UserError for observations of another shape, fewer than 2 levels, and priors of discrete sites alone.
    """
    x, given = program.observations(data)
    if levels < 2:
        raise UserError(f"levels must be at least 2, got {levels}")
    if not moving(program.latents).any():
        raise UserError(
            f"the prior has discrete sites alone ({', '.join(site.name for site in program.latents.sites)}), of which "
            "there is nothing to move: their posterior is the classifier's, program.posterior(data, key=key); judge it "
            "by sp.importance_weighted_bound(program, data, key=key)"
        )
    pilot_key, global_key, key = jax.random.split(key, 3)
    proposal = importance_proposal(program, data, key=pilot_key)
    spread = proposal.at((jnp.arange(levels) + 0.5) / levels)
    global_values = _global_values(program, global_key)
    known = program.known_values(given, len(x))
    frames = program.single()[0]
    return [
        _target(
            program, frames, spread, jnp.asarray(x[i]), k, {name: jnp.asarray(v[i]) for name, v in given.items()},
            global_values, jnp.asarray(combinations(program.latents, {name: v[i] for name, v in known.items()})),
        )
        for i, k in enumerate(jax.random.split(key, len(x)))
    ]  # fmt: skip


def moving(latents: Latents) -> np.ndarray:
    """Which coordinates of the code are moved, (D,): all but those of discrete sites."""
    return np.concatenate([np.full(site.size, not isinstance(site, Discrete)) for site in latents.sites])


def combinations(latents: Latents, known: Mapping[str, Any]) -> Float[np.ndarray, "K D"]:
    """A code for every combination of values of the discrete sites, 0 elsewhere; `known` ones are held, −1 is none."""
    values = [
        range(site.categories) if (value := int(known.get(site.name, -1))) < 0 else [value] for site in latents.discrete
    ]
    rows = list(itertools.product(*values))
    codes = np.zeros((len(rows), latents.size), np.float32)
    for i, row in enumerate(rows):
        for site, value in zip(latents.discrete, row, strict=True):
            codes[i, site.start + value] = 1.0
    return codes


def _global_values(program: Program, key: Array) -> dict[str, Array]:
    """Draws of the global sites from their guide."""

    def one(key: Array) -> dict[str, Array]:
        return values_of(program.latents.global_sites, handlers.seed(program.sample_global_sites, key))

    return jax.vmap(one)(jax.random.split(key, GLOBAL_DRAWS)) if program.latents.global_sites else {}


@eqx.filter_jit
def _target(
    program: Program,
    frames: Program,
    levels: NoiseLevels,
    x: Array,
    key: Array,
    given: dict[str, Array],
    global_values: dict[str, Array],
    kinds: Array,
) -> Target:
    """`frames`: the program of single frames, of what is no sequence the program itself."""
    log_snr, eps = _noise(levels, x, key)
    q = program.code_law(x[None], {name: value[None] for name, value in given.items()})
    weight = jnp.tile(levels.weight, 2)
    table: Table | NoiseSet = NoiseSet(x, log_snr, weight, eps)
    if program.guided:
        shape = frames.event_shape
        seen = seen_frames(x) if program.of_sequences else jnp.ones(1, bool)
        each = x.reshape(-1, *shape)
        if program.of_sequences:
            each = jnp.where(seen.reshape(-1, *(1,) * len(shape)), each, 0)

        def one(x: Array, eps: Array) -> Any:
            return jax.lax.map(lambda row: noise_terms(frames.denoiser, frames.encoder, x, *row), (log_snr, eps))

        terms = jax.vmap(one, in_axes=(0, 1))(each, eps.reshape(len(eps), -1, *shape))
        shown = seen.astype(x.dtype)
        at_ends = jax.vmap(lambda x: ends(frames.encoder, x))(each)
        table = Table(terms, shown[:, None] * (weight / len(log_snr))[None], shown * at_ends)
    mean, variance = jnp.asarray(q.mean)[0], jnp.asarray(q.variance)[0]
    loc, cov = _around(program.latents, mean, jnp.asarray(q.covariance)[0])
    move = np.flatnonzero(moving(program.latents))
    # Of smooth processes covariances are singular but for rounding; it is a scale to move on, no more.
    spread = cov[move][:, move] + 1e-4 * jnp.diag(jnp.diagonal(cov)[move])
    factor = jnp.linalg.cholesky(spread)
    return Target(table, mean, jnp.sqrt(variance), loc[move], factor, kinds, given, global_values)


def _around(latents: Latents, mean: Array, cov: Array) -> tuple[Array, Array]:
    """Mean and covariance of the points that are moved: directions by vectors of length 1, about."""
    for site in latents.sites:
        if not isinstance(site, Direction):
            continue
        inside = mean[site.code].reshape(-1, site.dimension)
        length = jnp.linalg.norm(inside, axis=-1, keepdims=True)
        first = jnp.eye(site.dimension, dtype=mean.dtype)[:1]
        unit = jnp.where(length > 1e-6, inside / jnp.maximum(length, 1e-6), first)
        # The variance of a unit vector is 1 − ‖mean‖², across its own direction but for what is of higher order.
        across = jnp.clip(1 - length**2, 1e-6, 1.0)[..., None] / (site.dimension - 1)
        along = unit[:, :, None] * unit[:, None, :]
        blocks = LENGTH_SD**2 * along + across * (jnp.eye(site.dimension) - along)
        cov = cov.at[site.code].set(0).at[:, site.code].set(0)
        cov = cov.at[site.code, site.code].set(jax.scipy.linalg.block_diag(*blocks))
        mean = mean.at[site.code].set(unit.reshape(-1))
    return mean, cov


def _noise(levels: NoiseLevels, x: Array, key: Array) -> tuple[Array, Array]:
    """Noise levels and noise of all rows, ε first, then −ε at the same levels."""
    eps = jax.random.normal(key, (len(levels.log_snr), *x.shape), x.dtype)
    return jnp.tile(levels.log_snr, 2), jnp.concatenate([eps, -eps])


def log_prior(
    program: Program,
    z: Float[Array, " D"],
    given: Mapping[str, Array] | None = None,
    global_values: Mapping[str, Array] | None = None,
) -> Float[Array, ""]:
    """The fitted prior's log density of a code, in nats: that of the sites' values, and the Jacobians to them.

    `given`: the variables that the prior takes; `global_values`: draws (draw, …) of global sites, over which the
    density is averaged.
    """
    values = program.latents.from_code(z)
    own = {name: value[None] for name, value in values.items()}
    rows = {name: value[None] for name, value in (given or {}).items()}

    def prior() -> None:
        program.sample_prior(numpyro.plate("obs", 1), 1, rows)

    def density(global_values: Mapping[str, Array]) -> Any:
        held = handlers.block(handlers.substitute(prior, data=own | dict(global_values)), hide=list(global_values))
        return numpyro_log_density(held, (), {}, {})[0]

    if global_values:
        total = jax.nn.logsumexp(jax.vmap(density)(global_values)) - jnp.log(len(jax.tree.leaves(global_values)[0]))
    else:
        total = jnp.asarray(density({}))
    for site in program.latents.sites:
        spread = jnp.asarray(site.scale, z.dtype)
        unconstrained = (jnp.asarray(site.shift, z.dtype) + spread * z[site.code]).reshape(site.unconstrained_shape)
        jacobian = site.transform.log_abs_det_jacobian(unconstrained, values[site.name])
        total = total + jnp.sum(jnp.asarray(jacobian)) + jnp.sum(jnp.log(spread))
    return total


def log_joint(program: Program, target: Target, z: Float[Array, " D"]) -> Float[Array, ""]:
    """log p(z) + lower bound on log p(x | z), in nats."""
    prior = log_prior(program, z, target.given, target.global_values)
    return prior + log_likelihood(program, target.table, z)


def log_likelihood(program: Program, table: Table | NoiseSet, z: Float[Array, " D"]) -> Float[Array, ""]:
    """Minus the bound on −log p(x | z) at the noise that is kept, in nats; of a Gaussian decoder, log p(x | z)."""
    if isinstance(table, Table):
        encoder = program.encoder.single
        each = jax.vmap(lambda table, z: tabulated_log_likelihood(encoder, table, z))
        return jnp.sum(each(table, z.reshape(len(table.ends), -1)))
    one = lambda *row: bound(program.denoiser, program.encoder, table.x, z, *row).total  # noqa: E731
    return -jnp.mean(jax.vmap(one)(table.log_snr, table.weight, table.eps))


def log_density(program: Program, target: Target, point: Float[Array, " M"]) -> Float[Array, ""]:
    """log of Σ p(z, x) over the values of discrete sites, times the densities of lengths, in nats.

    As a function of the `point` that is moved it is a density up to p(x).
    """
    each = jax.vmap(lambda z: log_joint(program, target, z))(_codes(program, target, point))
    return jax.nn.logsumexp(each) + _log_lengths(program.latents, point)


def code_at(program: Program, target: Target, point: Float[Array, " M"], key: Key[Array, ""]) -> Float[Array, " D"]:
    """The code of a point, the values of discrete sites drawn given the others."""
    codes = _codes(program, target, point)
    if len(codes) == 1:
        return codes[0]
    each = jax.vmap(lambda z: log_joint(program, target, z))(codes)
    return codes[jax.random.categorical(key, each)]


def _codes(program: Program, target: Target, point: Array) -> Float[Array, "K D"]:
    """The codes of a point, one for every combination of values of the discrete sites."""
    move = np.flatnonzero(moving(program.latents))
    return program.latents.onto_support(target.kinds.astype(point.dtype).at[:, move].set(point[None]))


def _log_lengths(latents: Latents, point: Array) -> Array:
    """log N(r; 1, .25²) − (d − 1) log r of all vectors that stand for directions."""
    z = jnp.zeros(latents.size, point.dtype).at[np.flatnonzero(moving(latents))].set(point)
    total = jnp.zeros((), point.dtype)
    for site in latents.sites:
        if isinstance(site, Direction):
            vectors = z[site.code].reshape(-1, site.dimension)
            length = jnp.sqrt(jnp.sum(vectors**2, -1) + 1e-12)
            total = total + jnp.sum(
                jax.scipy.stats.norm.logpdf(length, 1.0, LENGTH_SD) - (site.dimension - 1) * jnp.log(length)
            )
    return total
