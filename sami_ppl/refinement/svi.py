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
from sami_ppl.refinement.target import Target, code_at, log_density, targets

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

    `steps` of Adam, with rates that fall to zero, on loc + A (m + L e), e ~ N(0, I): loc and A are mean and root of the
    covariance of the amortised posterior, m = 0 and L = I at the start. It is a Gaussian of the points that are moved:
    directions are those of its vectors, discrete sites are summed over, then drawn given the others
    (`refinement.target`). Gradients leave out the score of the Gaussian itself (Roeder et al. 2017), so that they have
    no noise where it is the posterior. `levels`: noise levels of the fixed noise set, each with ε and −ε. Groups are
    those of `refinement.result`, `draws` in one chain.

    Raises ValueError for counts below 1, for no more draws than the code has axes, and what `refinement.target.targets`
    raises.
    """
    check_key(key)
    for name, value in (("draws", draws), ("steps", steps)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    check_draws(draws, program)
    target_key, fit_key, draw_key, result_key = jax.random.split(key, 4)
    codes, points = [], []
    found = targets(program, data, target_key, levels)
    with progress_bar(len(found), "refining", show=progress) as bar:
        for i, target in enumerate(found):
            mean, factor = _fit(program, steps, target, jax.random.fold_in(fit_key, i))
            one, point = _draw(program, draws, target, mean, factor, jax.random.fold_in(draw_key, i))
            codes.append(np.asarray(one))
            points.append(np.asarray(point))
            bar.update()
    drawn = np.stack(codes, axis=1)[None], np.stack(points, axis=1)[None]
    return result(program, data, *drawn, key=result_key, levels=levels)


@eqx.filter_jit
def _draw(program: Program, draws: int, target: Target, mean: Array, factor: Array, key: Array) -> tuple[Array, Array]:
    """Codes (draw, D) under the Gaussian, and their points."""
    noise_key, kind_key = jax.random.split(key)
    points = mean + jax.random.normal(noise_key, (draws, len(mean))) @ factor.T
    code = lambda point, key: code_at(program, target, point, key)  # noqa: E731
    return jax.vmap(code)(points, jax.random.split(kind_key, draws)), points


@eqx.filter_jit
def _fit(program: Program, steps: int, target: Target, key: Array) -> tuple[Array, Array]:
    """Mean (M,) and root of the covariance (M, M) of the points under the fitted Gaussian."""
    size = len(target.loc)
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
        log_p = jax.vmap(lambda u: log_density(program, target, target.loc + target.factor @ u))(u)
        return jnp.mean(log_q - log_p)

    def step(carry: tuple, key: Array) -> tuple[tuple, None]:
        parameters, state = carry
        updates, state = optimiser.update(jax.grad(loss)(parameters, key), state, parameters)
        return (optax.apply_updates(parameters, updates), state), None

    start = (jnp.zeros(size), jnp.zeros((size, size)))
    ((mean, raw), _), _ = jax.lax.scan(step, (start, optimiser.init(start)), jax.random.split(key, steps))
    return target.loc + target.factor @ mean, target.factor @ root(raw)
