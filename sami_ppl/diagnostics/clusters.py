"""Clusters: which value of a discrete site, or component of a mixture prior, an observation belongs to."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int
import numpy as np
import numpyro
from numpyro import handlers
import xarray as xr

from sami_ppl.distributions.supports import unwrapped
from sami_ppl.priors.sites import Euclidean
from sami_ppl.program.program import Program


def clusters(
    program: Program, data: xr.Dataset | Float[np.ndarray, "obs *event"]
) -> dict[str, Int[np.ndarray, " obs"]]:
    """Of every discrete site, its most probable value; of every mixture prior, its most probable component.

    The latter at the posterior mean, under the fitted prior at the variables that the data give it: a label that it
    takes decides the component. Values of discrete sites are the classifier's own, whether labels are known or not.
    Raises ValueError where no site is discrete or has a mixture prior, and what `Program.observations` raises.
    """
    discrete = program.latents.discrete
    mixtures = [site for site in program.latents.sites if isinstance(site, Euclidean) and site.components > 1]
    if not mixtures and not discrete:
        raise ValueError(
            f"no site of the prior is a mixture or discrete ({', '.join(s.name for s in program.latents.sites)}): "
            'write numpyro.sample("z", dist.MixtureSameFamily(dist.Categorical(weights), components))'
        )
    x, given = program.observations(data)
    values = program.latents.from_code(jnp.asarray(program.encode(x)[0]))
    found = {site.name: np.asarray(values[site.name]) for site in discrete}
    if not mixtures:
        return found

    def prior() -> None:
        program.sample_global_sites()
        program.sample_prior(numpyro.plate("obs", len(x)), len(x), given)

    held = handlers.substitute(handlers.seed(prior, jax.random.key(0)), data=values)
    trace = handlers.trace(held).get_trace()
    return found | {site.name: _most_probable(trace[site.name]["fn"], values[site.name]) for site in mixtures}


def _most_probable(fn: Any, value: jax.Array) -> np.ndarray:
    return np.asarray(jnp.argmax(unwrapped(fn).component_log_probs(value), axis=-1))
