"""NUTS over the code of chosen observations, from draws of the amortised posterior as a start."""

from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Key
import numpy as np
from numpyro.infer.hmc import hmc
import xarray as xr

from sami_ppl._util.keys import check_key
from sami_ppl._util.progress import progress_bar
from sami_ppl.program.program import Program
from sami_ppl.refinement.result import check_draws, result
from sami_ppl.refinement.target import Target, code_at, log_density, targets


def nuts(
    program: Program,
    data: xr.Dataset | Array | np.ndarray,
    *,
    key: Key[Array, ""],
    draws: int = 500,
    warmup: int = 300,
    chains: int = 4,
    levels: int = 64,
    progress: bool = False,
) -> xr.DataTree:
    """The posterior of each observation by the No-U-Turn sampler (NumPyro's), in `chains` of `draws` draws.

    It samples u in loc + A u, where loc and A are mean and root of the covariance of the amortised posterior: the
    closer that is, the closer u is to N(0, I). Chains start at draws of it. Directions are those of vectors that are
    moved, and discrete sites are summed over, then drawn given the others (`refinement.target`). `levels`: noise levels
    of the fixed noise set, each with ε and −ε. Groups are those of `refinement.result`, and `sample_stats`.

    Raises ValueError for counts below 1, for no more draws than the code has axes, and what `refinement.target.targets`
    raises.
    """
    check_key(key)
    for name, value in (("draws", draws), ("warmup", warmup), ("chains", chains)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    check_draws(draws * chains, program)
    target_key, start_key, chain_key, result_key = jax.random.split(key, 4)
    found = targets(program, data, target_key, levels)
    codes, points, stats = [], [], []
    with progress_bar(len(found), "refining", show=progress) as bar:
        for i, target in enumerate(found):
            start = jax.random.normal(jax.random.fold_in(start_key, i), (chains, len(target.loc)))
            keys = jax.random.split(jax.random.fold_in(chain_key, i), chains)
            one, point, told = _sample(program, warmup, draws, target, start, keys)
            codes.append(np.asarray(one))
            points.append(np.asarray(point))
            stats.append(jax.device_get(told))
            bar.update()
    sample_stats = {name: np.stack([told[name] for told in stats], axis=2) for name in stats[0]}
    drawn = np.stack(codes, axis=2), np.stack(points, axis=2)
    return result(program, data, *drawn, key=result_key, levels=levels, sample_stats=sample_stats)


@eqx.filter_jit
def _sample(
    program: Program, warmup: int, draws: int, target: Target, start: Array, keys: Array
) -> tuple[Array, Array, dict[str, Array]]:
    """Codes (chain, draw, D) of one observation, their points, and what the sampler says of each draw."""

    def potential(target: Target) -> Any:
        return lambda u: -log_density(program, target, target.loc + target.factor @ u)

    # NumPyro's MCMC class would compile anew for every observation.
    begin, move = hmc(potential_fn_gen=potential, algo="NUTS")

    def chain(start: Array, key: Array) -> tuple[Array, Array, dict[str, Array]]:
        def step(state: Any, _: None) -> tuple[Any, Any]:
            state = move(state, model_args=(target,))
            told = {"diverging": state.diverging, "n_steps": state.num_steps, "acceptance_rate": state.accept_prob}
            return state, (target.loc + target.factor @ state.z, told)

        key, kind_key = jax.random.split(key)
        state = begin(start, warmup, dense_mass=True, model_args=(target,), rng_key=key)
        state, _ = jax.lax.scan(lambda state, _: (move(state, model_args=(target,)), None), state, length=warmup)
        points, told = jax.lax.scan(step, state, length=draws)[1]
        code = lambda point, key: code_at(program, target, point, key)  # noqa: E731
        return jax.vmap(code)(points, jax.random.split(kind_key, draws)), points, told

    return jax.vmap(chain)(start, keys)
