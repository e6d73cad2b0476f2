"""Whether a prior says the same of several observations as of each alone."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np
import numpyro
from numpyro import handlers

from sami_ppl.priors.run import Given, Prior, check_event, sample_prior, takes_plate

COUNTS = (5, 7, 11, 13, 17, 19, 23)
"""Numbers of observations of which one is no size of a site: what is of this length is one value for each."""


def run(prior: Prior, size: int, given: Given, *, by_rows: bool = False, key: Any = None) -> dict[str, Any]:
    """The trace of a prior for `size` observations; sites in its plate have a leading dim of `size`."""

    def sampled() -> None:
        sample_prior(prior, numpyro.plate("obs", size), given, by_rows=by_rows)

    return handlers.trace(handlers.seed(sampled, jax.random.key(0) if key is None else key)).get_trace()


def runs_by_rows(prior: Prior, given: Any) -> bool:
    """Whether a prior must run for one observation at a time (`priors.run`).

    Raises ValueError for a prior that runs for one observation and neither way for several, and where it says
    something else of several; the message names the site.
    """
    alone = not takes_plate(prior) and _fails(prior, given, by_rows=True) is None
    try:
        one = run(prior, 1, given.rows(slice(1)))
        for name, site in _latent(one).items():
            check_event(name, site["fn"], tuple(frame.name for frame in site["cond_indep_stack"]))
    except Exception:  # whatever a wrong shape makes a user's function raise; raised again where it is read
        return alone
    wrong = _fails(prior, given) or _differs(prior, given, one, alone)
    if wrong is not None and not alone:
        raise ValueError(
            f"the prior runs for one observation and not for several: {wrong}. In the plate obs a value has a leading "
            "dim of observations: count dims from the end, z[..., 0] and sum(-1), and give parameters an event dim of "
            "their own, dist.Normal(jnp.zeros(2), tau[..., None]).to_event(1)"
        )
    return wrong is not None


def count_of(trace: Mapping[str, Any]) -> int:
    """A number of observations that is no size of a site or parameter."""
    sizes = {n for site in trace.values() for leaf in jax.tree.leaves(site["value"]) for n in jnp.shape(leaf)}
    return next((count for count in COUNTS if count not in sizes), max(sizes, default=0) + 1)


def several_rows(given: Any, count: int) -> dict[str, Array]:
    """The variables that the prior takes of `count` observations, those at hand again and again."""
    return given.rows(np.arange(count) % len(given))


def _latent(trace: Mapping[str, Any]) -> dict[str, Any]:
    return {name: s for name, s in trace.items() if s["type"] == "sample" and not s["is_observed"]}


def _fails(prior: Prior, given: Any, *, by_rows: bool = False) -> str | None:
    """What goes wrong with several observations, found by shapes alone."""
    reached, wrong = ["its first site"], []

    def shapes() -> None:
        trace: dict[str, Any] = {}
        try:
            count = count_of(run(prior, 1, given.rows(slice(1)), by_rows=by_rows))
            with handlers.trace() as trace:
                sample_prior(prior, numpyro.plate("obs", count), several_rows(given, count), by_rows=by_rows)
        finally:
            reached.extend(trace)
        wrong.extend(
            f"site {name!r} has the batch shape {site['fn'].batch_shape} of {count} observations"
            for name, site in _latent(trace).items()
            if site["fn"].batch_shape != ((count,) if site["cond_indep_stack"] else ())
        )

    try:
        jax.eval_shape(handlers.seed(shapes, jax.random.key(0)))
    except Exception as error:  # whatever a wrong shape makes a user's function raise
        return f"after {reached[-1]!r}, {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return wrong[0] if wrong else None


def _differs(prior: Prior, given: Any, one: Mapping[str, Any], alone: bool) -> str | None:
    """The first site whose law, or value where it is computed, is another beside other observations than alone."""
    own = _latent(one)
    computed = [name for name, site in one.items() if site["type"] == "deterministic"]
    in_plate = [name for name, site in own.items() if site["cond_indep_stack"]]
    if not in_plate or (len(own) == 1 and not computed and not given.names):
        return None  # nothing that it could depend on
    count = count_of(one)
    params = {name: site["value"] for name, site in one.items() if site["type"] == "param"}

    def told(trace: Mapping[str, Any]) -> dict[str, Any]:
        laws = {name: trace[name]["fn"].log_prob(trace[name]["value"]) for name in own}
        return laws | {name: trace[name]["value"] for name in computed}

    @jax.jit
    def both() -> tuple[dict[str, Any], dict[str, Any]]:
        rows = several_rows(given, count)
        with handlers.substitute(data=params):
            several = run(prior, count, rows)
        values = {name: several[name]["value"] for name in own}
        global_values = {name: v for name, v in values.items() if name not in in_plate}

        def each(values: dict[str, Array], rows: dict[str, Array]) -> dict[str, Any]:
            data = global_values | {name: v[None] for name, v in values.items()} | params
            with handlers.substitute(data=data):
                return told(run(prior, 1, {name: v[None] for name, v in rows.items()}, by_rows=alone))

        apart = jax.vmap(each)({name: values[name] for name in in_plate}, rows)
        return told(several), apart

    together, apart = both()
    for name, value in together.items():
        rows = np.reshape(value, (count if np.shape(value)[:1] == (count,) else 1, -1))
        others = np.reshape(apart[name], (count, -1))
        if rows.shape[1] != others.shape[1] or not np.allclose(rows, others, rtol=1e-3, atol=1e-2, equal_nan=True):
            return f"{name!r} is another beside others than alone"
    return None
