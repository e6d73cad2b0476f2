"""Linear-Gaussian frames and a smooth prior of their sequences, for tests."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist

import sami_ppl as sp
from sami_ppl.decoders.exact import LinearGaussian

KEY = jax.random.key(0)
TIMES = np.array([0.0, 1.0, 1.5, 4.0, 5.0, 6.0])
LENGTHS = np.array([3.0, 8.0])
T, D, FEATURES, NOISE = 6, 2, 3, 0.3
GAPS = (2, 3)


def frames():
    """z ~ N(0, I₂), x = μ + Wz + noise with WᵀW not diagonal: the exact encoder has a full covariance."""
    rng = np.random.default_rng(0)
    weights, mean = rng.normal(size=(FEATURES, D)), rng.normal(size=FEATURES)
    schedule = sp.VariancePreserving(-14.0, 11.0)
    return LinearGaussian(jnp.asarray(weights, jnp.float32), NOISE, schedule, mean=jnp.asarray(mean, jnp.float32))


def normal():
    numpyro.sample("z", dist.Normal(0, 1).expand([D]).to_event(1), infer={"event_dims": ["factor"]})


def smooth():
    numpyro.sample("z", sp.Matern(TIMES, LENGTHS))
