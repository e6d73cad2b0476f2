"""Clusters: which component of a mixture prior an observation belongs to."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int
import numpy as np
import numpyro
from numpyro import distributions as dist
from numpyro import handlers
import xarray as xr

from sami_ppl.program import Program


def clusters(
    program: Program, data: xr.Dataset | Float[np.ndarray, "obs *event"]
) -> dict[str, Int[np.ndarray, " obs"]]:
    """For every site with a mixture prior, the component that is most probable at the posterior mean, by observation.

    The prior is the fitted one, at the variables that the data give it: a label that it takes decides the component.
    Raises ValueError where no site has a mixture prior, and what `Program.observations` raises.
    """
    mixtures = [site for site in program.latents.sites if site.components > 1]
    if not mixtures:
        raise ValueError(
            f"no site of the prior is a mixture ({', '.join(s.name for s in program.latents.sites)}): write "
            'numpyro.sample("z", dist.MixtureSameFamily(dist.Categorical(weights), components))'
        )
    x, given = program.observations(data)
    values = program.latents.from_code(jnp.asarray(program.encode(x)[0]))

    def prior() -> None:
        program.sample_shared()
        program.sample_prior(numpyro.plate("obs", len(x)), len(x), given)

    held = handlers.substitute(handlers.seed(prior, jax.random.key(0)), data=values)
    trace = handlers.trace(held).get_trace()
    return {site.name: _most_probable(trace[site.name]["fn"], values[site.name]) for site in mixtures}


def _most_probable(fn: Any, value: jax.Array) -> np.ndarray:
    while isinstance(fn, dist.Independent | dist.ExpandedDistribution | dist.MaskedDistribution):
        fn = fn.base_dist
    return np.asarray(jnp.argmax(fn.component_log_probs(value), axis=-1))
