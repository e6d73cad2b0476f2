"""The end of every refinement: a DataTree of the refined posterior, and how far it lies from the amortised one."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.stats import multivariate_normal
from jaxtyping import Array, Float, Key
import numpy as np
import xarray as xr

from sami_ppl._util.errors import UserError
from sami_ppl.posteriors.tree import obs_labels
from sami_ppl.priors.read import Given
from sami_ppl.program.program import Program
from sami_ppl.refinement.target import Target, log_density, log_joint, moving, targets

PAIRS = 64


def result(
    program: Program,
    data: xr.Dataset | Array | np.ndarray,
    codes: Float[np.ndarray, "chain draw obs D"],
    points: Float[np.ndarray, "chain draw obs M"],
    *,
    key: Key[Array, ""],
    levels: int,
    sample_stats: dict[str, np.ndarray] | None = None,
) -> xr.DataTree:
    """Groups: `posterior`, the refined sites (chain, draw, obs, …); `amortised`, draws of the guide of the same shape;
    `unconstrained_posterior`, the refined `code` (…, axis); `agreement`; `observed_data`.

    `agreement`, on (obs, axis), of all axes but those of discrete sites: `mean_shift`, refined minus amortised mean of
    the code in amortised standard deviations, and `sd_ratio`, refined over amortised; on obs `bound`, that on −log p(x)
    under the amortised posterior, and `gain`, by how many nats it falls when the Gaussian of mean and covariance of the
    refined `points` stands for it, discrete sites summed over, with its Monte-Carlo error `gain_se`, on a noise set
    that neither has seen.
    """
    import arviz as az

    amortised_key, target_key, gain_key = jax.random.split(key, 3)
    x, given = program.observations(data)
    shape, axes = codes.shape[:2], list(program.latents.axes)
    keys = jax.random.split(amortised_key, shape[0] * shape[1])
    plain = np.asarray(_amortised(program, jnp.asarray(x), given, keys))
    sites = {
        group: {name: np.asarray(v) for name, v in program.latents.from_code(jnp.asarray(z, jnp.float32)).items()}
        for group, z in (("posterior", codes), ("amortised", plain.reshape(codes.shape)))
    }
    groups = {**sites, "unconstrained_posterior": {"code": codes}, "observed_data": {"x": x}}
    if sample_stats is not None:
        groups["sample_stats"] = sample_stats
    dims = {site.name: ["obs", *site.dims] for site in program.latents.sites}
    dims |= {"x": ["obs", *program.event_dims], "code": ["obs", "axis"]}
    dims |= {name: ["obs"] for name in sample_stats or {}}
    labels = obs_labels(data, len(x))
    coords: dict[str, Any] = {dim: list(v) for site in program.latents.sites for dim, v in site.coords.items()}
    coords |= {"obs": labels, "axis": axes}
    tree = az.from_dict(groups, dims=dims, coords=coords, attrs={"/": {"noise_levels": levels}})

    found = targets(program, data, target_key, levels)
    flat = points.reshape(-1, *points.shape[2:])
    gains = []
    for i, (one, target) in enumerate(zip(x, found, strict=True)):
        mean, root = jnp.asarray(flat[:, i].mean(0)), jnp.asarray(_root(flat[:, i], np.asarray(target.factor)))
        own = {name: jnp.asarray(value[i : i + 1]) for name, value in given.items()}
        gains.append(_gain(program, target, jnp.asarray(one)[None], own, mean, root, gain_key))
    joint, gain, gain_se = np.asarray(gains, float).T
    move = np.flatnonzero(moving(program.latents))
    loc, sd = (np.stack([np.asarray(getattr(one, of))[move] for one in found]) for of in ("mean", "sd"))
    each = codes[..., move]
    variables = {
        "mean_shift": (("obs", "axis"), (each.mean((0, 1)) - loc) / sd),
        "sd_ratio": (("obs", "axis"), each.reshape(-1, *each.shape[2:]).std(0, ddof=1) / sd),
        "bound": ("obs", -joint, {"units": "nats", "long_name": "upper bound on −log p(x)"}),
        "gain": ("obs", gain, {"units": "nats"}),
        "gain_se": ("obs", gain_se, {"units": "nats"}),
    }
    moved = [axes[place] for place in move]
    tree["agreement"] = xr.DataTree(xr.Dataset(variables, coords={"obs": labels, "axis": moved}))
    return tree


@eqx.filter_jit
def _amortised(program: Program, x: Array, given: Given, keys: Array) -> Array:
    return jax.vmap(program.code_law(x, given).sample)(keys)


def check_draws(count: int, program: Program) -> None:
    """Raises UserError where so few draws have no covariance: it takes more than the code has axes."""
    if count <= (size := program.latents.size):
        raise UserError(f"draws, of all chains together, must be more than the {size} axes of the code, got {count}")


def _root(points: Float[np.ndarray, "draws M"], factor: Float[np.ndarray, "M M"]) -> Float[np.ndarray, "M M"]:
    """Root of the covariance; a chain that never moved gets a trace of the amortised spread, as it must have some."""
    trace = 1e-8 * np.diag((factor**2).sum(1))
    return np.linalg.cholesky(np.atleast_2d(np.cov(points, rowvar=False)) + trace)


@eqx.filter_jit
def _gain(
    program: Program, target: Target, x: Array, given: Given, mean: Array, root: Array, key: Array
) -> tuple[Array, ...]:
    """Minus the bound of the amortised posterior, the gain of N(mean, root rootᵀ), in nats, its standard error."""
    refined_key, amortised_key = jax.random.split(key)
    q = program.code_law(x, given)
    half = jax.random.normal(refined_key, (PAIRS, len(mean)))
    refined = mean + jnp.concatenate([half, -half]) @ root.T
    amortised = jax.vmap(q.sample)(jax.random.split(amortised_key, 2 * PAIRS))

    ours = jax.vmap(lambda point: log_density(program, target, point))(refined)
    ours = ours - multivariate_normal.logpdf(refined, mean, root @ root.T)
    theirs = jax.vmap(lambda z: log_joint(program, target, z))(amortised[:, 0])
    theirs = theirs - jnp.asarray(q.log_prob(amortised))[:, 0]
    se = jnp.sqrt((jnp.var(ours, ddof=1) + jnp.var(theirs, ddof=1)) / (2 * PAIRS))
    return theirs.mean(), ours.mean() - theirs.mean(), se
