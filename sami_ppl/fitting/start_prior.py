"""Warm starts of what a prior has to find: kinds of observations, and the parameters that it learns.

A classifier trained from random weights may divide the data in any way that helps the decoder at first, and keeps to
it. It may start on clusters of the observations instead: a mixture of Gaussians on their principal components, found
without labels; where some labels are known, clusters take their names.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int
import numpy as np
import numpyro
from numpyro import distributions as dist
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.infer.util import log_density
import optax
from scipy.optimize import linear_sum_assignment

from sami_ppl.priors.run import Given, sample_prior
from sami_ppl.program.program import Program

MOST = 5000
"""Observations that clusters and parameters are fitted to, at most."""


def cluster(
    x: Float[np.ndarray, "obs *event"], count: int, components: int, *, known: Int[np.ndarray, " obs"] | None = None,
    seed: int = 0,
) -> Int[np.ndarray, " obs"]:  # fmt: skip
    """Clusters 0 … count − 1 of observations: a Gaussian mixture, the best of five, on principal components.

    `known`: labels, −1 where there is none; clusters are then named so that as many as can be agree with them.
    """
    from sklearn.decomposition import PCA
    from sklearn.mixture import GaussianMixture

    flat = np.asarray(x).reshape(len(x), -1)
    reduced = PCA(min(components, *flat.shape), random_state=seed).fit_transform(flat)
    found = GaussianMixture(count, n_init=5, random_state=seed).fit(reduced[:MOST]).predict(reduced)
    if known is not None:
        agree = np.zeros((count, count))
        np.add.at(agree, (found[known >= 0], known[known >= 0]), 1)
        names = np.empty(count, int)
        rows, columns = linear_sum_assignment(agree, maximize=True)
        names[rows] = columns
        found = np.where(known >= 0, known, names[found])
    return found


def with_clusters(
    program: Program, x: Float[np.ndarray, "obs *event"], given: Given, codes: Float[np.ndarray, "obs D"]
) -> Float[np.ndarray, "obs D"]:
    """The codes with those of discrete sites one-hot on clusters of the observations."""
    known: Mapping[str, np.ndarray] = program.known_values(given, len(x))
    codes = codes.copy()
    for site in program.latents.discrete:
        found = cluster(x, site.categories, program.latents.size, known=known.get(site.name))
        codes[:, site.code] = np.eye(site.categories)[found]
    return codes


def fit_prior(
    program: Program, codes: Float[np.ndarray, "obs D"], given: Given, *, steps: int = 400, learning_rate: float = 0.03
) -> Program:
    """The program with the learned parameters of its prior fitted to codes by maximum likelihood (Adam).

    Parameters move where their constraints are none, and come back under them.
    """
    codes, given = codes[:MOST], {name: jnp.asarray(value[:MOST]) for name, value in given.items()}
    values, count = program.latents.from_code(jnp.asarray(codes)), len(codes)
    optimiser = optax.adam(learning_rate)

    def model() -> None:
        sample_prior(program.prior, numpyro.plate("obs", count), given, by_rows=program.latents.by_rows)

    sites = handlers.trace(handlers.substitute(handlers.seed(model, jax.random.key(0)), data=values)).get_trace()
    free = {
        name: biject_to(sites[name]["kwargs"].get("constraint", dist.constraints.real))
        for name in program.latents.params
        if name in sites
    }
    constrained = lambda params: {n: free[n](v) if n in free else v for n, v in params.items()}  # noqa: E731

    def loss(params: dict) -> Any:
        return -log_density(model, (), {}, values | constrained(params))[0] / count

    def step(carry: tuple, _: None) -> tuple:
        params, state = carry
        updates, state = optimiser.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    start = {name: program.prior_params[name] for name in program.latents.params}
    start = {name: free[name].inv(value) if name in free else value for name, value in start.items()}
    (params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, None, steps))((start, optimiser.init(start)))
    return program.replace(prior_params=program.prior_params | constrained(params))
