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
from sami_ppl.program.program import Program
from sami_ppl.refinement.target import Target, log_joint, targets

PAIRS = 64


def result(
    program: Program,
    data: xr.Dataset | Array | np.ndarray,
    codes: Float[np.ndarray, "chain draw obs D"],
    *,
    key: Key[Array, ""],
    levels: int,
    sample_stats: dict[str, np.ndarray] | None = None,
) -> xr.DataTree:
    """Groups: `posterior`, the refined sites (chain, draw, obs, …); `amortised`, draws of the guide of the same shape;
    `unconstrained_posterior`, the refined `code` (…, axis); `agreement`; `observed_data`.

    `agreement`, on (obs, axis): `mean_shift`, refined minus amortised mean of the code in amortised standard
    deviations, and `sd_ratio`, refined over amortised; on obs `bound`, that on −log p(x) under the amortised posterior,
    and `gain`, by how many nats it falls when the Gaussian of the refined mean and covariance stands for it, with its
    Monte-Carlo error `gain_se`, on a noise set that neither has seen.
    """
    import arviz as az

    amortised_key, target_key, gain_key = jax.random.split(key, 3)
    x = program.observed(data)
    shape, axes = codes.shape[:2], list(program.latents.axes)
    plain = np.asarray(_amortised(program, jnp.asarray(x), jax.random.split(amortised_key, shape[0] * shape[1])))
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

    loc, sd = program.encode(x)
    mean, flat = codes.mean((0, 1)), codes.reshape(-1, *codes.shape[2:])
    found = targets(program, data, target_key, levels)
    gains = [
        _gain(program, target, jnp.asarray(one), jnp.asarray(mean[i]), jnp.asarray(_root(flat[:, i], sd[i])), gain_key)
        for i, (one, target) in enumerate(zip(x, found, strict=True))
    ]
    joint, gain, gain_se = np.asarray(gains, float).T
    variables = {
        "mean_shift": (("obs", "axis"), (mean - loc) / sd),
        "sd_ratio": (("obs", "axis"), flat.std(0, ddof=1) / sd),
        "bound": ("obs", -joint, {"units": "nats", "long_name": "upper bound on −log p(x)"}),
        "gain": ("obs", gain, {"units": "nats"}),
        "gain_se": ("obs", gain_se, {"units": "nats"}),
    }
    tree["agreement"] = xr.DataTree(xr.Dataset(variables, coords={"obs": labels, "axis": axes}))
    return tree


@eqx.filter_jit
def _amortised(program: Program, x: Array, keys: Array) -> Array:
    return jax.vmap(program.code_law(x).sample)(keys)


def check_draws(count: int, program: Program) -> None:
    """Raises UserError where so few draws have no covariance: it takes more than the code has axes."""
    if count <= (size := program.latents.size):
        raise UserError(f"draws, of all chains together, must be more than the {size} axes of the code, got {count}")


def _root(z: Float[np.ndarray, "draws D"], sd: Float[np.ndarray, " D"]) -> Float[np.ndarray, "D D"]:
    """Root of the covariance; a chain that never moved gets a trace of the amortised spread, as it must have some."""
    return np.linalg.cholesky(np.atleast_2d(np.cov(z, rowvar=False)) + np.diag(1e-8 * sd**2))


@eqx.filter_jit
def _gain(program: Program, target: Target, x: Array, mean: Array, root: Array, key: Array) -> tuple[Array, ...]:
    """Minus the bound of the amortised posterior, the gain of N(mean, root rootᵀ), in nats, its standard error."""
    encoder = program.encoder
    refined_key, amortised_key = jax.random.split(key)
    q = encoder.law(x)
    half = jax.random.normal(refined_key, (PAIRS, len(mean)))
    refined = mean + jnp.concatenate([half, -half]) @ root.T
    amortised = jax.vmap(q.sample)(jax.random.split(amortised_key, 2 * PAIRS))

    joint = jax.vmap(lambda z: log_joint(program, target, z))
    ours = joint(refined) - multivariate_normal.logpdf(refined, mean, root @ root.T)
    theirs = joint(amortised) - jnp.asarray(q.log_prob(amortised))
    se = jnp.sqrt((jnp.var(ours, ddof=1) + jnp.var(theirs, ddof=1)) / (2 * PAIRS))
    return theirs.mean(), ours.mean() - theirs.mean(), se
