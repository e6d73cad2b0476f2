"""Two priors for tests of programs under NumPyro, and their losses of many draws."""

import functools

import jax
import numpy as np
import numpyro
from numpyro import distributions as dist
from numpyro import handlers

N = 5
X = np.linspace(-1.5, 1.5, 4 * N, dtype=np.float32).reshape(N, 4)[:, [2, 0, 3, 1]]


def gaussian():
    """Two Gaussian sites, so that axes of different sites can be rotated into each other."""
    numpyro.sample("a", dist.Normal(0.0, 1.0))
    numpyro.sample("b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))


def constrained():
    """No closed form for the KL of either site."""
    numpyro.sample("u", dist.Uniform(-1.0, 2.0))
    numpyro.sample("g", dist.Gamma(2.0, 1.0).expand([2]).to_event(1))


PRIORS = {"gaussian": gaussian, "constrained": constrained}


def traced(function, key, **kwargs):
    return handlers.trace(handlers.seed(function, jax.random.key(key))).get_trace(**kwargs)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def losses(elbo, program_hashable, total, params, keys):
    p = program_hashable.value
    return jax.vmap(lambda key: elbo.loss(key, params, p.model, p.guide, X, total=total))(keys)


class Hashed:
    """A program as a static argument of jit, hashed by identity."""

    def __init__(self, value):
        self.value = value
