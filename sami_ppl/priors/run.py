"""Runs a prior for several observations: inside their plate, or one by one.

A prior describes one observation. Many are written so that values may have a leading dim of observations too, and run
inside the plate as they are. Others are not: `dist.Normal(0, tau).expand([2])` and `z[0]` mean one tau and one z. They
run under `vmap`, up to one site after the other, and what is sampled in the plate are the laws of all observations.
"""

from collections.abc import Callable, Mapping
import inspect
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np
import numpyro
from numpyro import distributions as dist
from numpyro import handlers
from numpyro.distributions.distribution import Unit
from numpyro.primitives import Messenger

from sami_ppl.distributions.rows import law_of_one, law_of_rows
from sami_ppl.distributions.supports import unwrapped
from sami_ppl.priors.discrete import partly_observed

Prior = Callable[..., Any]
"""A function of no arguments, or of the plate `obs`, or of variables of the data, each with a leading dim obs."""

Given = Mapping[str, Array | np.ndarray]
"""The variables that a prior takes, by name, each (obs, ...)."""


def sample_prior(prior: Prior, plate: Any, given: Given | None = None, *, by_rows: bool = False) -> None:
    """Sample all sites of a prior for the observations of a plate; `by_rows` as `Latents` has it."""
    with partly_observed():
        if takes_plate(prior):
            prior(obs=plate, **(given or {}))
        else:
            with plate:
                _sample_rows(prior, plate.subsample_size, given or {}) if by_rows else prior(**(given or {}))


def takes_plate(prior: Prior) -> bool:
    """Whether a prior is hierarchical, and enters the plate over observations itself."""
    return "obs" in _arguments(prior)


def prior_arguments(prior: Prior) -> tuple[str, ...]:
    """The variables of the data that a prior takes."""
    return tuple(name for name in _arguments(prior) if name != "obs")


def _arguments(prior: Any) -> list[str]:
    """The arguments that a prior needs, under the handlers that decorate it."""
    while isinstance(prior, Messenger) and prior.fn is not None:
        prior = prior.fn
    known = inspect.signature(prior).parameters.values()
    return [p.name for p in known if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def check_latent(name: str, site: Mapping[str, Any]) -> None:
    """Raise ValueError for what is no latent site: an observed one, a factor, one whose density is scaled."""
    if isinstance(unwrapped(site["fn"]), Unit):
        raise ValueError(
            f"prior site {name!r} is a numpyro.factor, but a prior must be drawn from, which no factor changes: use a "
            "distribution that has this density, or take it out and write Stage(penalties={...})"
        )
    if site["is_observed"]:
        raise ValueError(f"prior site {name!r} is observed: a prior has latent sites only; take its obs= away")
    if site["scale"] is not None and np.any(np.asarray(site["scale"]) != 1):
        raise ValueError(
            f"prior site {name!r} is scaled by handlers.scale, which would be no density: take it away, and weight the "
            f"site in a fit, write Stage(beta={{{name!r}: ...}})"
        )


class _Reached(Exception):
    """The next site of a prior that has no value yet."""

    def __init__(self, message: dict[str, Any]):
        self.message = message


class _held(Messenger):
    """Gives sites their values, and stops the function at the first that has none."""

    def __init__(self, values: Mapping[str, Array]):
        self.values = values
        super().__init__()

    def process_message(self, msg: dict[str, Any]) -> None:
        """NumPyro's hook: the value, or the end of this run."""
        if msg["type"] != "sample":
            return
        check_latent(msg["name"], msg)
        if msg["name"] not in self.values:
            raise _Reached(msg)
        msg["value"] = self.values[msg["name"]]


def _sample_rows(prior: Prior, size: int, given: Given) -> None:
    """Sample the sites of a prior of one observation for `size` of them, and tell its deterministic sites."""
    values: dict[str, Array] = {}
    while True:
        site: dict[str, Any] = {}

        def one(values: dict[str, Array], given: Given, site: dict[str, Any] = site) -> Any:
            # Parameters are those of all observations; everything else stays in here.
            hidden = handlers.block(hide_fn=lambda msg: msg["type"] != "param")
            try:
                with hidden, handlers.trace() as trace, _held(values), partly_observed():
                    prior(**given)
            except _Reached as reached:
                site |= reached.message
                check_event(site["name"], site["fn"])
                return law_of_one(site["fn"]), site.get("known")
            return {name: jnp.asarray(s["value"]) for name, s in trace.items() if s["type"] == "deterministic"}

        rows = {name: jnp.asarray(value) for name, value in given.items()}
        if size == 1:  # as it is, so that whoever reads the law finds the user's own
            found = one({name: v[0] for name, v in values.items()}, {name: v[0] for name, v in rows.items()})
        else:
            found = eqx.filter_vmap(one, axis_size=size)(values, rows)
        if not site:
            for name, value in found.items():
                numpyro.deterministic(name, value[None] if size == 1 else value)
            return
        fn, known = found
        fn = site["fn"].expand((1,)) if size == 1 else law_of_rows(fn, size)
        told: dict[str, Any] = {}
        if known is not None:
            known = jnp.reshape(known, (size,))
            told = {"obs": known, "obs_mask": known != -1}
        drawn: Any = numpyro.sample(site["name"], fn, infer=dict(site["infer"]), **told)
        values[site["name"]] = drawn


def check_event(name: str, fn: Any, plates: tuple[str, ...] = ()) -> None:
    """Raise ValueError unless a site is one of a single observation, without a batch but that of the plate obs."""
    if 0 in fn.event_shape:
        raise ValueError(f"prior site {name!r} has shape {fn.event_shape}, which holds no value: leave it out")
    if plates in ((), ("obs",)) and fn.batch_shape == (1,) * len(plates):
        return
    shape = fn.batch_shape if fn.batch_shape[-1:] != (1,) else fn.batch_shape[:-1]
    raise ValueError(
        f"prior site {name!r} has batch shape {shape}; a prior describes one observation, so every dim of a site "
        f"is an event dim: write dist.{class_name(fn)}(...).to_event({len(shape)}), without plates but obs"
    )


def class_name(fn: Any) -> str:
    """The name of a distribution's class; a plate wraps it."""
    return type(fn.base_dist if isinstance(fn, dist.ExpandedDistribution) else fn).__name__
