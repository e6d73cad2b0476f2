"""Priors with discrete sites for tests, a batch of observations and the labels of some."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
import xarray as xr

KEY = jax.random.key(0)
LOCS = jnp.array([[-1.0, 0.5], [1.0, 0.0], [0.0, -1.5]])
X = np.linspace(-1.5, 1.5, 20, dtype=np.float32).reshape(5, 4)[:, [2, 0, 3, 1]]
LABEL = np.array([-1, 2, 0, -1, 1])


def joint():
    kind = numpyro.sample("kind", dist.Categorical(jnp.array([0.5, 0.3, 0.2])))
    numpyro.sample("z", dist.Normal(LOCS[kind], 0.5).to_event(1))
    numpyro.sample("light", dist.Normal(0.0, 1.0))


def two():
    kind = numpyro.sample("kind", dist.Categorical(jnp.array([0.5, 0.3, 0.2])))
    flip = numpyro.sample("flip", dist.Bernoulli(jnp.array([0.2, 0.7, 0.4])[kind]))
    numpyro.sample("z", dist.Normal(LOCS[kind] * (1 - 2 * flip)[..., None], 0.5).to_event(1))


def labelled(label):
    logits = numpyro.param("weights", jnp.array([0.2, 0.0, -0.3]))
    kind = numpyro.sample("kind", dist.Categorical(logits=logits), obs=label, obs_mask=label >= 0)
    numpyro.sample("z", dist.Normal(LOCS[kind], 0.5).to_event(1))


def dataset(x=X, label=LABEL):
    return xr.Dataset({"x": (("obs", "feature"), x), "label": ("obs", label)})
