"""The amortised guide: the encoder's posterior of the code z, as sample statements at the prior's sites."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
import math
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np
import numpyro
from numpyro import distributions as dist
from numpyro import handlers
from numpyro.primitives import Messenger

from sami_ppl.encoders.law import CodeLaw, GaussianLaw
from sami_ppl.priors.latents import Latents
from sami_ppl.priors.sites import LatentSite

Beta = Array | float | Mapping[str, Array | float]
"""Weight of the latent sites in the objective: one number, or one for each site named."""

GlobalGuide = Literal["diagonal", "full"] | Callable[[], Any]
"""The guide of global sites: a Gaussian with independent coordinates, one of all of them, or a NumPyro function."""


class scale_sites(Messenger):
    """Scale log densities by β: one number for all sites, or one for each site named, 1 for the others."""

    def __init__(self, beta: Beta):
        self.beta = beta
        super().__init__()

    def process_message(self, msg: dict[str, Any]) -> None:
        """NumPyro's hook: multiply the site's scale."""
        if msg["type"] == "sample":
            beta = self.beta.get(msg["name"], 1.0) if isinstance(self.beta, Mapping) else self.beta
            msg["scale"] = beta if msg.get("scale") is None else beta * msg["scale"]


def sample_latents(latents: Latents, q: CodeLaw) -> dict[str, Any]:
    """Sample every site of the prior from a law of the code, one after another; their values."""
    values: dict[str, Any] = {}
    codes: dict[str, Array] = {}
    for site in latents.sites:
        law = site.value_law(q.of_site(site, codes))
        values[site.name] = numpyro.sample(site.name, law, infer=_dims(site))
        codes[site.name] = site.to_code(values[site.name])
    return values


def initial_guide(latents: Latents, kind: GlobalGuide = "diagonal") -> dict[str, Any]:
    """Parameters of the guide of global sites as it begins: at the centre of the prior, a fiftieth as wide.

    Those of a function are what it makes by `numpyro.param`. Raises ValueError for another kind, and for a function
    that samples other sites than the global ones.
    """
    size, log_scale = sum(site.size for site in latents.global_sites), math.log(0.02)
    if callable(kind):
        return _read_guide(latents, kind)
    if kind not in ("diagonal", "full"):
        raise ValueError(f"global_guide must be 'diagonal', 'full' or a function of no arguments, got {kind!r}")
    if kind == "full" and size:
        return {"globals$loc": jnp.zeros(size), "globals$factor": log_scale * jnp.eye(size)}
    params: dict[str, Any] = {}
    for site in latents.global_sites:
        params[f"{site.name}$loc"] = jnp.zeros(site.size)
        params[f"{site.name}$log_scale"] = jnp.full(site.size, log_scale, jnp.float32)
    return params


def _read_guide(latents: Latents, guide: Callable[[], Any]) -> dict[str, Any]:
    with jax.ensure_compile_time_eval():
        trace = handlers.trace(handlers.seed(guide, jax.random.key(0))).get_trace()
    found = sorted(name for name, site in trace.items() if site["type"] == "sample")
    if found != sorted(site.name for site in latents.global_sites):
        raise ValueError(
            f"global_guide samples {', '.join(found) or 'nothing'}, but the global sites of the prior are "
            f"{', '.join(site.name for site in latents.global_sites) or 'none'}: call numpyro.sample once for each of "
            "them"
        )
    return {name: site["value"] for name, site in trace.items() if site["type"] == "param"}


def sample_global_sites(latents: Latents, params: Mapping[str, Any], kind: GlobalGuide = "diagonal") -> None:
    """Sample the global sites from their guide.

    "diagonal": an independent Gaussian for every coordinate in unconstrained space; "full": one Gaussian of all of
    them, its root lower triangular with the logarithm of the diagonal as the parameter; or the user's own function.
    """
    if callable(kind):
        with handlers.substitute(data=dict(params)):
            kind()
        return
    if kind == "full" and latents.global_sites:
        loc, raw = (cast(Array, numpyro.param(name, params[name])) for name in ("globals$loc", "globals$factor"))
        q = GaussianLaw(loc, jnp.tril(raw, -1) + jnp.diag(jnp.exp(jnp.diagonal(raw))))
        ends = np.cumsum([site.size for site in latents.global_sites])
        sites = [
            replace(site, start=int(end) - site.size) for site, end in zip(latents.global_sites, ends, strict=True)
        ]
        sample_latents(Latents(tuple(sites)), q)
        return
    for site in latents.global_sites:
        names = (f"{site.name}${parameter}" for parameter in ("loc", "log_scale"))
        loc, log_scale = (cast(Array, numpyro.param(name, params[name])) for name in names)
        q = dist.Normal(loc, jnp.exp(log_scale)).to_event(1)
        numpyro.sample(site.name, site.value_law(q), infer=_dims(site))


def values_of(sites: Sequence[LatentSite], run: Callable[[], Any]) -> dict[str, Any]:
    """Run a NumPyro function; the values that it has drawn at these sites."""
    trace = handlers.trace(run).get_trace()
    return {site.name: trace[site.name]["value"] for site in sites}


def _dims(site: LatentSite) -> dict:
    return {"event_dims": list(site.dims)} if site.dims else {}
