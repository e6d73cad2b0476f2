"""Laws of several observations made by `vmap` of that of one, against NumPyro's own batches."""

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import distributions as dist
import pytest

from sami_ppl.distributions.rows import Rows, law_of_one, law_of_rows

KEY = jax.random.key(0)
LOC = jnp.asarray([-30.0, 0.0, 10.0, 50.0, 90.0])


def one(kind, loc):
    return kind(loc, 0.5).expand([2]).to_event(1)


def batch(kind):
    return kind(LOC[:, None], 0.5).expand([5, 2]).to_event(1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [dist.Laplace, dist.Normal])
def test_rows_are_numpyros_batch(kind):
    """Densities of draws before the observations and without; draws of every observation about its own place."""
    law, known = law_of_rows(jax.vmap(lambda loc: law_of_one(one(kind, loc)))(LOC), 5), batch(kind)
    assert isinstance(law, Rows) == (kind is dist.Laplace), "a Normal keeps its closed forms"
    assert (law.batch_shape, law.event_shape) == ((5,), (2,))
    for lead in ((), (7,), (3, 4)):
        z = law.sample(KEY, lead)
        assert z.shape == (*lead, 5, 2)
        assert np.abs(z - LOC[:, None]).max() < 10, "each about its own"
        np.testing.assert_allclose(law.log_prob(z), known.log_prob(z), rtol=1e-5)
        assert not np.allclose(law.log_prob(z), known.log_prob(z[..., ::-1, :]), rtol=0.1)
    draws = law.sample(KEY, (200,))
    assert np.unique(np.asarray(draws - LOC[:, None]).round(5)).size > 1900, "no two draws are one"


def test_quantiles_go_there_and_back():
    law = Rows(jax.vmap(lambda loc: dist.Laplace(loc, 0.5))(LOC), 5)
    q = jnp.linspace(0.1, 0.9, 5)
    np.testing.assert_allclose(law.icdf(q), dist.Laplace(LOC, 0.5).icdf(q), rtol=1e-5)
    np.testing.assert_allclose(law.cdf(law.icdf(q)), q, rtol=1e-4)
