"""What the groups of a posterior hold: draws and their densities, one chunk of observations after another."""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Key
import numpy as np
import numpyro
from numpyro import handlers
from numpyro.infer import Predictive, log_likelihood

from sami_ppl._util.chunks import chunk_of
from sami_ppl.decoders.decoder import NoisePass, ScoreDecoder
from sami_ppl.evidence.elbo import draw_latents
from sami_ppl.evidence.iwae import weight_tails
from sami_ppl.priors.read import Given
from sami_ppl.program.kl import global_kl
from sami_ppl.program.program import Program
from sami_ppl.program.tabulated import (
    NoiseTerms,
    Table,
    ends,
    noise_terms,
    parameter_count,
    tabulated_log_likelihood,
)

TABULATED_LEVELS, LEVELS = 64, 8
"""Noise levels of the bound unless asked for: where it can be tabulated, fewer of large observations, and where every
draw calls the encoder."""

Groups = dict[str, dict[str, np.ndarray]]
"""Arrays by group and variable, with the dims of `layout`."""


def layout(program: Program) -> dict[str, dict[str, tuple[str, ...]]]:
    """Dims of every variable of every group."""
    draw, each = ("chain", "draw"), ("chain", "draw", "obs")
    sites = {site.name: (*each, *site.dims) for site in program.latents.sites}
    sites |= {site.name: (*draw, *site.dims) for site in program.latents.global_sites}
    sites |= {s.name: (*(draw if s.is_global else each), *s.dims) for s in program.latents.derived}
    image = {"x": (*each, *program.event_dims)}
    densities: dict[str, tuple[str, ...]] = {site.name: each for site in program.latents.sites}
    return {
        "posterior": sites,
        "prior": sites,
        "unconstrained_posterior": {"code": (*each, "axis"), "global_code": (*draw, "global_axis")},
        "posterior_predictive": image,
        "prior_predictive": image,
        "log_likelihood": {"x": each},
        "log_prior": densities | {site.name: draw for site in program.latents.global_sites},
        "sample_stats": {
            "kl": ("chain", "obs", "site"), "kl_axis": ("chain", "obs", "axis"), "kl_global": ("chain", "global_site"),
            "lp": each, "log_weight": each, "pareto_k": ("chain", "obs"), "importance_ess": ("chain", "obs"),
        },
        "observed_data": {"x": ("obs", *program.event_dims)},
    }  # fmt: skip


def concatenate(program: Program, chunks: list[Groups]) -> Groups:
    """Chunks of observations behind one another."""
    dims = layout(program)
    return {
        group: {
            name: np.concatenate([chunk[group][name] for chunk in chunks], axis=dims[group][name].index("obs"))
            for name in variables
        }
        for group, variables in chunks[0].items()
    }


class Sampler:
    """Draws the groups of chunks of at most `size` observations; every function is compiled once.

    Global sites are drawn once, for all chunks: `shared_groups` holds what there is of them.
    """

    def __init__(
        self, program: Program, size: int, *, key: Key[Array, ""], draws: int, predictive: int, levels: int | None
    ):
        self.program, self.size, self.draws, self.predictive = program, size, draws, predictive
        self.tabulated = levels != 0 and _can_tabulate(program, draws)
        borne = chunk_of(TABULATED_LEVELS, program.event_shape, passes=4) if self.tabulated else LEVELS
        self.levels = max(borne, LEVELS) if levels is None else levels
        # Keys of their own for what is drawn once: those of chunks are folded, and fold_in(k, i) is split(k, n)[i].
        *self.keys, global_key, global_prior_key = jax.random.split(key, 6)
        self.global_values, self.global_prior, self.global_groups = _global_values(
            program, draws, global_key, global_prior_key
        )

    def __call__(self, i: int, x: np.ndarray, given: Given) -> Groups:
        """All groups of chunk number i."""
        rows, count = np.minimum(np.arange(self.size), len(x) - 1), len(x)  # a short chunk is filled up
        whole = jnp.asarray(x[rows])
        at = {name: jnp.asarray(value[rows]) for name, value in given.items()}
        keys = [jax.random.fold_in(key, i) for key in self.keys]
        drawn = _draw_posterior(self.program, self.draws, keys[0], whole, at, self.global_values)
        prior, computed = _draw_prior(self.program, self.draws, self.size, keys[1], at, self.global_prior)
        host = partial(jax.tree.map, lambda leaf: np.asarray(leaf)[:, :count][None])
        groups: Groups = {
            "posterior": host(drawn["values"] | drawn["derived"]), "prior": host(prior | computed),
            "log_prior": host(drawn["log_p"]),
            "unconstrained_posterior": {"code": host(drawn["z"])},
            "sample_stats": self._kl(np.asarray(drawn["kl"])[:count]),
        }  # fmt: skip
        if self.predictive:
            for group, key, values, global_values in (
                ("posterior_predictive", keys[2], drawn["values"], self.global_values),
                ("prior_predictive", keys[3], prior, self.global_prior),
            ):
                first = {name: value[: self.predictive] for name, value in (values | global_values).items()}
                groups[group] = {"x": host(_draw_observations(self.program, self.size, key, at, first))}
        if self.levels:
            score = _tabulated_bound if self.tabulated else _bound
            bound = score(self.program, self.levels, whole, at, drawn, self.global_values)
            groups["log_likelihood"] = {"x": host(bound)}
            lp = np.asarray(bound + sum(drawn["log_p"].values()))[:, :count]
            log_weight = lp - np.asarray(drawn["log_q"])[:, :count]
            pareto_k, ess = weight_tails(log_weight.astype(float))
            stats = {"lp": lp, "log_weight": log_weight, "pareto_k": pareto_k, "importance_ess": ess}
            groups["sample_stats"] |= {name: value[None] for name, value in stats.items()}
        return groups

    def _kl(self, axes: np.ndarray) -> dict[str, np.ndarray]:
        sites = [axes[:, site.code].sum(1) for site in self.program.latents.sites]
        return {"kl": np.stack(sites, axis=1)[None], "kl_axis": axes[None]}


# Compiled once for all programs of the same structure: weights are arguments.


@eqx.filter_jit
def _draw_posterior(
    program: Program, draws: int, key: Array, x: Array, given: Given, global_values: dict[str, Array]
) -> dict[str, Any]:
    def one(key: Array, global_values: dict[str, Array]) -> dict[str, Any]:
        drawn = draw_latents(program, x, key, given, global_values)
        return drawn._asdict() | {"derived": program.derived(drawn.values | global_values, len(x), given)}

    drawn = jax.vmap(one)(jax.random.split(key, draws), global_values)
    return drawn | {"kl": drawn["kl"].mean(0)}


@eqx.filter_jit
def _draw_prior(
    program: Program, draws: int, size: int, key: Array, given: Given, global_values: dict[str, Array]
) -> tuple[dict[str, Array], dict[str, Array]]:
    def one(key: Array, global_values: dict[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
        run = handlers.seed(handlers.substitute(program.sample_prior, data=global_values), key)
        trace = handlers.trace(run).get_trace(numpyro.plate("obs", size), size, given)
        values = {site.name: trace[site.name]["value"] for site in program.latents.sites}
        return values, program.derived(values | global_values, size, given)

    return jax.vmap(one)(jax.random.split(key, draws), global_values)


@eqx.filter_jit
def _draw_observations(program: Program, size: int, key: Array, given: Given, values: dict[str, Array]) -> Array:
    sampler = Predictive(program.model, values, params=program.params(), return_sites=["x"])
    return sampler(key, size=size, given=given)["x"]


@eqx.filter_jit
def _bound(
    program: Program, levels: int, x: Array, given: Given, drawn: dict[str, Any], global_values: dict[str, Array]
) -> Array:
    model = handlers.substitute(program.model, data=program.params())
    return log_likelihood(model, drawn["values"] | global_values, x, levels=levels, given=given)["x"]


@eqx.filter_jit
def _tabulated_bound(
    program: Program, levels: int, x: Array, given: Given, drawn: dict[str, Any], global_values: dict[str, Array]
) -> Array:
    table = _tabulate(program, x, levels)
    each = jax.vmap(jax.vmap(partial(tabulated_log_likelihood, program.encoder)), in_axes=(None, 0))
    return each(table, drawn["z"])


def _can_tabulate(program: Program, draws: int) -> bool:
    """Whether the encoder guides, by no more parameters than there are draws; of sequences frames may be missing."""
    return program.guided and not program.of_sequences and parameter_count(program.encoder) <= draws


def _tabulate(program: Program, x: Array, levels: int) -> Table:
    """The table of every observation, on the noise set that NumPyro's `log_likelihood` takes."""
    denoiser, encoder = program.denoiser, program.encoder
    decoder = ScoreDecoder(denoiser, None, None, sampler=program.sampler, levels=levels, batch_shape=(len(x),))

    def one_pass(noise: NoisePass) -> NoiseTerms:
        eps = jax.random.normal(noise.key, x.shape, x.dtype)
        return jax.vmap(partial(noise_terms, denoiser, encoder))(x, noise.log_snr, eps)

    passes = decoder.passes(len(x))
    terms = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), jax.lax.map(one_pass, passes))
    return Table(terms, passes.weight.T / levels, jax.vmap(partial(ends, encoder))(x))


def _global_values(
    program: Program, draws: int, key: Array, prior_key: Array
) -> tuple[dict[str, Array], dict[str, Array], Groups]:
    """Draws of the global sites from their guide and from the prior, and what there is of them in each group."""
    if not program.latents.global_sites:
        return {}, {}, {}
    told, drawn, computed = _draw_global_sites(program, *(jax.random.split(k, draws) for k in (key, prior_key)))
    host = partial(jax.tree.map, lambda leaf: np.asarray(leaf)[None])
    groups: Groups = {
        "posterior": host(told["posterior"] | told["derived"]), "prior": host(drawn | computed),
        "log_prior": host(told["log_prior"]),
        "unconstrained_posterior": {"global_code": host(told["code"])},
        "sample_stats": {"kl_global": np.asarray(told["kl"].mean(0))[None]},
    }  # fmt: skip
    return told["posterior"], drawn, groups


@eqx.filter_jit
def _draw_global_sites(
    program: Program, keys: Array, prior_keys: Array
) -> tuple[dict[str, Any], dict[str, Array], dict[str, Array]]:
    sites, given = program.latents.global_sites, program.given.rows(slice(1))

    def prior(values: dict[str, Array], key: Array) -> dict[str, Any]:
        run = handlers.seed(handlers.substitute(program.sample_prior, data=values), key)
        return handlers.trace(run).get_trace(numpyro.plate("obs", 1), 1, given)

    def computed(values: dict[str, Array]) -> dict[str, Array]:
        return program.derived(values, 1, given, of_globals=True)

    def one(key: Array, prior_key: Array) -> tuple[dict[str, Any], dict[str, Array], dict[str, Array]]:
        q = handlers.trace(handlers.seed(program.sample_global_sites, key)).get_trace()
        values = {site.name: q[site.name]["value"] for site in sites}
        p = prior(values, prior_key)
        told = {
            "posterior": values,
            "derived": computed(values),
            "log_prior": {name: p[name]["fn"].log_prob(value) for name, value in values.items()},
            "kl": jnp.stack([global_kl(q[name]["fn"], p[name]["fn"], value) for name, value in values.items()]),
            "code": jnp.concatenate([site.to_code(values[site.name]) for site in sites]),
        }
        trace = prior({}, prior_key)
        drawn = {site.name: trace[site.name]["value"] for site in sites}
        return told, drawn, computed(drawn)

    return jax.vmap(one)(keys, prior_keys)
