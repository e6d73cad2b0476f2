"""log p(z) + lower bound on log p(x | z) of one observation as a fixed function of z: for refinement log p(x, z).

The bound's noise is drawn once, so that samplers and optimisers see a smooth function: noise levels at the midpoints of
equal shares of a density of levels, and at each ε and −ε, which cancels what is linear in ε. Of guided decoders all
that does not depend on z is computed beforehand (`tabulated`): an evaluation costs some products of small matrices. One
that takes the code itself is called at every level.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpy as np
import numpyro
from numpyro import handlers
from numpyro.infer.util import log_density
import xarray as xr

from sami_ppl._util.errors import UserError
from sami_ppl._util.tables import readable
from sami_ppl.decoders.bound import bound
from sami_ppl.diffusion.schedule import NoiseLevels
from sami_ppl.evidence import importance_proposal
from sami_ppl.priors.sites import Direction, Discrete, Process
from sami_ppl.program.guide import values_of
from sami_ppl.program.program import Program
from sami_ppl.program.tabulated import Table, ends, noise_terms, tabulated_log_likelihood

GLOBAL_DRAWS = 64


class NoiseSet(NamedTuple):
    """An observation, and the noise at which a decoder is called: a row for every noise level and sign of ε."""

    x: Float[Array, "*event"]
    log_snr: Float[Array, " rows"]
    weight: Float[Array, " rows"]
    eps: Float[Array, "rows *event"]


@readable
class Target(NamedTuple):
    """What log p(x, z) needs of one observation: the bound on log p(x | z) as a table, a row for every noise level and
    sign of ε, or the noise set where there is none.

    `loc` and `factor` A: amortised mean and a root of the covariance, so that u in z = loc + A u is near N(0, I).
    `given`: the variables that the prior takes, of this observation; `global_values`: draws of the global sites,
    (draw, …).
    """

    table: Table | NoiseSet
    loc: Float[Array, " D"]
    factor: Float[Array, "D D"]
    given: Mapping[str, Array]
    global_values: Mapping[str, Array]


def targets(program: Program, data: xr.Dataset | Array | np.ndarray, key: Key[Array, ""], levels: int) -> list[Target]:
    """The target of every observation, with a noise set of its own.

    Global sites are left as their guide has them, since one observation tells next to nothing of them: the prior of an
    observation's own sites is averaged over draws of that guide.

    Raises UserError for observations of another shape, fewer than 2 levels, priors over time or with directions or
    discrete sites.
    """
    x, given = program.observations(data)
    if levels < 2:
        raise UserError(f"levels must be at least 2, got {levels}")
    if any(isinstance(site, Process) for site in program.latents.sites):
        raise UserError("the prior is one over time: refinement is for single observations, give frames_of(program)")
    for site in program.latents.sites:
        if isinstance(site, Discrete):
            raise UserError(
                f"prior site {site.name!r} is discrete: refinement moves codes in unconstrained space. Marginalise it "
                "by dist.MixtureSameFamily, or use importance_weighted_bound to judge such a posterior"
            )
        if isinstance(site, Direction):
            raise UserError(
                f"prior site {site.name!r} lives on a {site.manifold}: refinement moves codes in unconstrained space. "
                "Use importance_weighted_bound to judge such a posterior"
            )
    pilot_key, global_key, key = jax.random.split(key, 3)
    proposal = importance_proposal(program, data, key=pilot_key)
    spread = proposal.at((jnp.arange(levels) + 0.5) / levels)
    global_values = _global_values(program, global_key)
    return [
        _target(
            program, spread, jnp.asarray(x[i]), k, {name: jnp.asarray(v[i]) for name, v in given.items()}, global_values
        )
        for i, k in enumerate(jax.random.split(key, len(x)))
    ]


def _global_values(program: Program, key: Array) -> dict[str, Array]:
    """Draws of the global sites from their guide."""

    def one(key: Array) -> dict[str, Array]:
        return values_of(program.latents.global_sites, handlers.seed(program.sample_global_sites, key))

    return jax.vmap(one)(jax.random.split(key, GLOBAL_DRAWS)) if program.latents.global_sites else {}


@eqx.filter_jit
def _target(
    program: Program,
    levels: NoiseLevels,
    x: Array,
    key: Array,
    given: dict[str, Array],
    global_values: dict[str, Array],
) -> Target:
    encoder = program.encoder
    log_snr, eps = _noise(levels, x, key)
    q = encoder.law(x)
    root = jnp.diag(jnp.sqrt(jnp.asarray(q.variance))) if q.root is None else q.root
    weight = jnp.tile(levels.weight, 2)
    table: Table | NoiseSet = NoiseSet(x, log_snr, weight, eps)
    if program.guided:
        terms = jax.lax.map(lambda row: noise_terms(program.denoiser, encoder, x, *row), (log_snr, eps))
        table = Table(terms, weight / len(log_snr), ends(encoder, x))
    return Target(table, jnp.asarray(q.mean), jnp.linalg.cholesky(root @ root.T), given, global_values)


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
        return log_density(held, (), {}, {})[0]

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
        return tabulated_log_likelihood(program.encoder, table, z)
    one = lambda *row: bound(program.denoiser, program.encoder, table.x, z, *row).total  # noqa: E731
    return -jnp.mean(jax.vmap(one)(table.log_snr, table.weight, table.eps))
