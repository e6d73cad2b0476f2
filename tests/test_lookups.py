"""Variables that number the rows of a prior's table: found in the computation, refused where there is no such row."""

from discrete_priors import labelled
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
import pytest
import xarray as xr

import sami_ppl as sp
from sami_ppl.priors.lookups import table_rows

TABLE, PAIRS = jnp.ones((3, 2)), jnp.ones((3, 4, 2))
GIVEN = {"u": np.zeros(1, int), "v": np.ones(1, np.uint8)}
KEY = jax.random.key(0)
N = 6
X = np.linspace(-1.5, 1.5, 4 * N, dtype=np.float32).reshape(N, 4)
U = np.arange(N) % 3

ROWS = {
    "as it is": (lambda u, v: TABLE[u], {"u": 3}),
    "of one observation": (lambda u, v: TABLE[u[0]], {"u": 3}),
    "taken": (lambda u, v: jnp.take(TABLE, u, axis=0), {"u": 3}),
    "one for each under vmap": (lambda u, v: jax.vmap(lambda u: TABLE[u])(u), {"u": 3}),
    "a float": (lambda u, v: jnp.exp(TABLE)[(u * 1.0).astype(int)], {}),
    "by columns": (lambda u, v: PAIRS[u, v], {"u": 3, "v": 4}),
    "by columns of one observation": (lambda u, v: PAIRS[u[0], v[0]], {"u": 3, "v": 4}),
    "the smaller of two": (lambda u, v: PAIRS[:, u].sum(0) + TABLE[u], {"u": 3}),
    "computed with": (lambda u, v: TABLE[u + 1] + PAIRS[0, v // 2] + TABLE[jnp.maximum(u[0], 0)], {}),
    "one computed with": (lambda u, v: PAIRS[u + 1, v], {"v": 4}),
    "a number": (lambda u, v: TABLE * u + jax.nn.one_hot(v, 2), {}),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_found_in_the_computation(name):
    function, rows = ROWS[name]
    assert table_rows(lambda given: function(**given), GIVEN) == rows


def by_class(u):
    numpyro.sample("z", dist.Normal(3 * TABLE[u], 0.5).to_event(1))


def dataset(**variables):
    return xr.Dataset({"x": (("obs", "feature"), X)} | {name: ("obs", v) for name, v in variables.items()})


CALLS = {
    "fit": lambda p, data: sp.fit(p, data, sp.Stage(steps=1, batch=2), key=KEY, progress=False),
    "evidence_bound": lambda p, data: sp.evidence_bound(p, data, key=KEY, levels=2),
    "posterior": lambda p, data: p.posterior(data, key=KEY, draws=2),
    "counterfactual": lambda p, data: sp.counterfactual(p, data, {}, key=KEY),
    "given": lambda p, data: p.replace(given={name: v.values for name, v in data.items() if name != "x"}),
    "model": lambda p, data: numpyro.handlers.seed(p.model, KEY)(
        X, given={name: v.values for name, v in data.items() if name != "x"}
    ),
}


@pytest.mark.parametrize("label", [3, -1])
@pytest.mark.parametrize("call", [pytest.param(name, marks=[pytest.mark.slow] * (name == "fit")) for name in CALLS])
def test_classes_without_a_row_are_refused(tiny_program, call, label):
    program = tiny_program().replace(prior=by_class, given={"u": U[:1]})
    program.observations(dataset(u=U))  # classes that the few given have not are known all the same
    wrong = np.where(np.arange(N) == 4, label, U)
    with pytest.raises(ValueError, match=rf"'u', by which .* rows 0 … 2 of a table, is {label} at observation 4"):
        CALLS[call](program, dataset(u=wrong))


def kinds(label):
    """Of one observation; known where `label` is not −1."""
    kind = numpyro.sample("kind", dist.Categorical(jnp.ones(3) / 3), obs=label, obs_mask=label != -1)
    numpyro.sample("z", dist.Normal(0.5 * kind, 0.5))


@pytest.mark.parametrize("prior", [labelled, kinds])
@pytest.mark.parametrize("call", [pytest.param(name, marks=[pytest.mark.slow] * (name == "fit")) for name in CALLS])
def test_labels_that_a_site_has_not_are_refused(build, call, prior):
    program, known = build(prior, given={"label": np.zeros(1, int)}), np.where(U == 1, -1, U)
    program.observations(dataset(label=known))
    wrong = 3 if prior is labelled else -2
    with pytest.raises(ValueError, match=rf"prior site 'kind' must be 0 … 2, .* got {wrong}"):
        CALLS[call](program, dataset(label=np.where(np.arange(N) == 4, wrong, known)))
