"""A Gaussian of its own for each chosen observation, from the amortised posterior as a start."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Key
import numpy as np
import optax
import xarray as xr

from sami_ppl._util.keys import check_key
from sami_ppl._util.progress import progress_bar
from sami_ppl.program.program import Program
from sami_ppl.refinement.result import check_draws, result
from sami_ppl.refinement.target import Target, log_joint, targets

PAIRS, LEARNING_RATE = 8, 0.1
"""Antithetic pairs of draws in a step, and the first step's length in units of the amortised posterior's spread."""


def svi(
    program: Program,
    data: xr.Dataset | Array | np.ndarray,
    *,
    key: Key[Array, ""],
    draws: int = 500,
    steps: int = 300,
    levels: int = 64,
    progress: bool = False,
) -> xr.DataTree:
    """The posterior of each observation by the full Gaussian of the code that minimises the bound on −log p(x).

    `steps` of Adam, with rates that fall to zero, on z = loc + A (m + L e), e ~ N(0, I): loc and A are mean and root of
    the covariance of the amortised posterior, m = 0 and L = I at the start. Gradients leave out the score of the
    Gaussian itself (Roeder et al. 2017), so that they have no noise where it is the posterior. `levels`: noise levels
    of the fixed noise set, each with ε and −ε. Groups are those of `refinement.result`, `draws` in one chain.

    Raises ValueError for counts below 1, for no more draws than the code has axes, and what `refinement.target.targets`
    raises.
    """
    check_key(key)
    for name, value in (("draws", draws), ("steps", steps)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    check_draws(draws, program)
    target_key, fit_key, draw_key, result_key = jax.random.split(key, 4)
    codes = []
    found = targets(program, data, target_key, levels)
    with progress_bar(len(found), "refining", show=progress) as bar:
        for i, target in enumerate(found):
            mean, factor = _fit(program, steps, target, jax.random.fold_in(fit_key, i))
            noise = jax.random.normal(jax.random.fold_in(draw_key, i), (draws, len(mean)))
            codes.append(np.asarray(mean + noise @ factor.T))
            bar.update()
    return result(program, data, np.stack(codes, axis=1)[None], key=result_key, levels=levels)


@eqx.filter_jit
def _fit(program: Program, steps: int, target: Target, key: Array) -> tuple[Array, Array]:
    """Mean (D,) and root of the covariance (D, D) of the code under the fitted Gaussian."""
    size = program.latents.size
    optimiser = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))

    def root(raw: Array) -> Array:
        return jnp.tril(raw, -1) + jnp.diag(jnp.exp(jnp.diagonal(raw)))

    def loss(parameters: tuple[Array, Array], key: Array) -> Array:
        mean, raw = parameters
        half = jax.random.normal(key, (PAIRS, size))
        u = mean + jnp.concatenate([half, -half]) @ root(raw).T
        own_mean, own_root = jax.lax.stop_gradient((mean, root(raw)))
        white = jax.scipy.linalg.solve_triangular(own_root, (u - own_mean).T, lower=True)
        log_q = -0.5 * jnp.sum(white**2, 0) - jnp.sum(jnp.log(jnp.diagonal(own_root)))
        log_p = jax.vmap(lambda u: log_joint(program, target, target.loc + target.factor @ u))(u)
        return jnp.mean(log_q - log_p)

    def step(carry: tuple, key: Array) -> tuple[tuple, None]:
        parameters, state = carry
        updates, state = optimiser.update(jax.grad(loss)(parameters, key), state, parameters)
        return (optax.apply_updates(parameters, updates), state), None

    start = (jnp.zeros(size), jnp.zeros((size, size)))
    ((mean, raw), _), _ = jax.lax.scan(step, (start, optimiser.init(start)), jax.random.split(key, steps))
    return target.loc + target.factor @ mean, target.factor @ root(raw)
