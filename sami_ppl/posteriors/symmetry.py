"""What a prior cannot tell apart: orders of the elements along a dim, and signs."""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np
import numpyro
from numpyro import handlers

from sami_ppl.priors.read import Given
from sami_ppl.priors.sites import Discrete
from sami_ppl.program.program import Program

KINDS = ("permute", "flip")
TRIALS = 64


def symmetries(program: Program) -> dict[str, list[str]]:
    """`permute`: dims along which all sites that have them may be reordered together; `flip`: sites any element of
    which may change its sign, all else being equal.

    Found by trying, at draws from the fitted prior: a swap of the first two elements and a cyclic shift make up every
    order.
    """
    moves, log_p = _moves(program), np.asarray(_trials(program), float)
    same = np.isclose(log_p[:, 1:], log_p[:, :1], rtol=1e-4, atol=1e-4).all(0)
    names = dict.fromkeys((kind, name) for kind, name, _ in moves)
    broken = {(kind, name) for (kind, name, _), equal in zip(moves, same, strict=True) if not equal}
    return {what: [name for kind, name in names if kind == what and (kind, name) not in broken] for what in KINDS}


def _moves(program: Program) -> list[tuple[str, str, dict[str, Any]]]:
    """Kind, name, and by site what is done to its value."""
    sites = (*program.latents.sites, *program.latents.global_sites)
    own = {site.name for site in program.latents.sites}
    moves: list[tuple[str, str, dict[str, Any]]] = []
    for dim in dict.fromkeys(dim for site in sites for dim in site.dims):
        having = [site for site in sites if dim in site.dims]
        sizes = {site.event_shape[site.dims.index(dim)] for site in having}
        if len(sizes) > 1 or (size := sizes.pop()) < 2:
            continue
        axes = {site.name: (site.name in own) + site.dims.index(dim) for site in having}
        for order in (np.roll(np.arange(size), 1), np.array([1, 0, *range(2, size)])):
            taken = {name: partial(jnp.take, indices=order, axis=axis) for name, axis in axes.items()}
            moves.append(("permute", dim, taken))
    for site in sites:
        for index in np.ndindex(site.event_shape) if not isinstance(site, Discrete) else ():
            signs = np.ones(site.event_shape, np.float32)
            signs[index] = -1
            moves.append(("flip", site.name, {site.name: partial(jnp.multiply, signs)}))
    return moves


@eqx.filter_jit
def _trials(program: Program) -> Float[Array, "trials moves"]:
    """Log density of draws from the prior, as they are and after every move."""
    sites = (*program.latents.sites, *program.latents.global_sites)

    def prior(given: Given) -> None:
        program.sample_prior(numpyro.plate("obs", 1), 1, given)

    def log_p(values: dict[str, Array], given: Given) -> Array:
        # Densities say nothing of values beyond the support, such as a negative scale.
        trace = handlers.trace(handlers.substitute(prior, data=values)).get_trace(given)
        parts = [
            jnp.sum(jnp.where(jnp.all(trace[name]["fn"].support(value)), trace[name]["fn"].log_prob(value), -jnp.inf))
            for name, value in values.items()
        ]
        return sum(parts, start=jnp.zeros(()))

    def trial(key: Array, row: Array) -> Array:
        given = program.given.rows(row[None])
        trace = handlers.trace(handlers.seed(prior, key)).get_trace(given)
        start = {site.name: trace[site.name]["value"] for site in sites}
        moved = [start | {name: do(start[name]) for name, do in what.items()} for _, _, what in _moves(program)]
        stacked = jax.tree.map(lambda *values: jnp.stack(values), start, *moved)
        return jax.vmap(log_p, in_axes=(0, None))(stacked, given)

    keys, rows = jax.random.split(jax.random.key(0), TRIALS), jnp.arange(TRIALS) % len(program.given)
    return jax.vmap(trial)(keys, rows)
