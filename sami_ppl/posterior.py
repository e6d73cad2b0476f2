"""Program and observations → an ArviZ DataTree.

Every group is computed in chunks of observations and moved to the host chunk by chunk, so that memory does not grow
with the number of observations times draws.
"""

from collections.abc import Callable
import json
from pathlib import Path
from typing import Any

import arviz as az
import jax
import jax.numpy as jnp
from jaxtyping import Array, Key
import numpy as np
from numpyro import handlers
from numpyro.infer import Predictive, log_likelihood
import xarray as xr

from sami_ppl.chunks import padded_chunks
from sami_ppl.prior import Given
from sami_ppl.program import Program
from sami_ppl.versions import versions


def posterior(
    program: Program,
    data: xr.Dataset | Array | np.ndarray,
    *,
    key: Key[Array, ""],
    draws: int = 100,
    predictive: int = 4,
    levels: int = 8,
    chunk: int = 64,
    attrs: dict[str, Any] | None = None,
) -> xr.DataTree:
    """The posterior of each observation, as a DataTree.

    Groups: `posterior` (chain = 1, draw, obs, factor dims; global sites without obs); `prior`, draws of the same shape;
    `posterior_predictive`, `predictive` images per observation, at most `draws`, by guided reverse diffusion;
    `log_likelihood`, a **lower bound** on log p(x | z) in nats from `levels` noise levels, with the same noise for
    every draw; `observed_data`; `constant_data`, the other variables of `data` on `obs`, such as true factors.

    `data`: a Dataset with variable x, or an array (obs, *event). `predictive=0` or `levels=0` leave their group out.
    Draws are independent, so effective sample sizes only say how many there are. Raises ValueError for observations of
    another shape and for counts below 1.
    """
    if draws < 1 or chunk < 1 or predictive < 0 or levels < 0:
        raise ValueError(
            f"draws and chunk must be at least 1, predictive and levels at least 0; got draws={draws}, chunk={chunk}, "
            f"predictive={predictive}, levels={levels}"
        )
    if isinstance(data, xr.Dataset) and "x" not in data.data_vars:
        raise ValueError(
            f"data has no variable 'x', the observations; its variables are {', '.join(map(str, data.data_vars))}: "
            'write data.rename({"<name>": "x"})'
        )
    x = np.asarray(data["x"].values if isinstance(data, xr.Dataset) else data, dtype=np.float32)
    if x.ndim == 0 or len(x) == 0:
        raise ValueError("data holds no observations: give an array of shape (obs, *event)")
    _, given = program.observations(data if isinstance(data, xr.Dataset) else x)
    if not isinstance(data, xr.Dataset):
        data = xr.Dataset({"x": (("obs", *program.event_dims), x)})
    draw_key, prior_key, image_key = jax.random.split(key, 3)
    params = program.params()
    own = [site.name for site in program.latents.sites]
    latent = handlers.block(program.model, hide=["x"])
    # Global sites are drawn once, for all chunks of observations.
    shared, shared_prior = _shared_draws(program, draws, draw_key, prior_key)

    def posterior_draws(key: Array, x: Array, given: Given) -> dict[str, Array]:
        return Predictive(program.guide, params=params, num_samples=draws, return_sites=own)(key, x)

    def prior_draws(key: Array, x: Array, given: Given) -> dict[str, Array]:
        sampler = Predictive(latent, shared_prior, params=params, num_samples=draws, return_sites=own)
        return sampler(key, size=len(x), given=given)

    def images(key: Array, x: Array, given: Given, values: dict[str, Array]) -> dict[str, Array]:
        first = {name: value[:predictive] for name, value in (values | shared).items()}
        return Predictive(program.model, first, params=params, return_sites=["x"])(key, size=len(x), given=given)

    def likelihood(key: Array, x: Array, given: Given, values: dict[str, Array]) -> dict[str, Array]:
        model = handlers.substitute(program.model, data=params)
        return log_likelihood(model, values | shared, x, levels=levels, given=given)

    groups: dict[str, dict[str, np.ndarray]] = {"posterior": _chunked(posterior_draws, draw_key, chunk, x, given)}
    drawn = groups["posterior"]
    groups["prior"] = _chunked(prior_draws, prior_key, chunk, x, given)
    if predictive:
        groups["posterior_predictive"] = _chunked(images, image_key, chunk, x, given, drawn)
    if levels:
        groups["log_likelihood"] = _chunked(likelihood, image_key, chunk, x, given, drawn)
    groups["posterior"] = drawn | {name: np.asarray(value) for name, value in shared.items()}
    groups["prior"] |= {name: np.asarray(value) for name, value in shared_prior.items()}
    groups = {name: {k: v[None] for k, v in group.items()} for name, group in groups.items()}
    groups["observed_data"] = {"x": x}
    constants = {str(name): v.values for name, v in data.data_vars.items() if name != "x" and v.dims == ("obs",)}
    if constants:
        groups["constant_data"] = constants

    dims = {site.name: ["obs", *site.dims] for site in program.latents.sites}
    dims |= {site.name: list(site.dims) for site in program.latents.shared}
    dims |= {"x": ["obs", *program.event_dims]} | {name: ["obs"] for name in constants}
    coords = {"obs": data.coords["obs"].values if "obs" in data.coords else np.arange(len(x))}
    return _tree(program, groups, dims, coords, attrs or {}, levels)


def _shared_draws(program: Program, draws: int, *keys: Array) -> tuple[dict[str, Array], dict[str, Array]]:
    """Draws of the global sites from their guide and from the prior."""
    names = [site.name for site in program.latents.shared]
    if not names:
        return {}, {}
    draw_key, prior_key = keys
    latent = handlers.block(program.model, hide=["x"])
    return (
        Predictive(program.sample_shared, num_samples=draws, return_sites=names)(draw_key),
        Predictive(latent, params=program.params(), num_samples=draws, return_sites=names)(
            prior_key, size=1, given=program.given.rows(slice(1))
        ),
    )


def _tree(program: Program, groups: dict, dims: dict, coords: dict, attrs: dict[str, Any], levels: int) -> xr.DataTree:
    likelihood = groups.pop("log_likelihood", None)
    # Bool, None and nested attributes do not survive netCDF: everything structured goes in as JSON text.
    common = {
        "inference_library": "sami_ppl",
        "versions": json.dumps(versions()),
        "attrs": json.dumps(attrs, default=str),
    }
    if program.origin is not None:
        common |= {"program": Path(program.origin.file).name, "config": program.origin.config}
    tree = az.from_dict(groups, dims=dims, coords=coords, attrs={"/": common})
    if likelihood is not None:
        dims = {**dims, "x": ["obs"]}
        part = az.from_dict({"log_likelihood": likelihood}, dims=dims, coords=coords)
        tree["log_likelihood"] = part["log_likelihood"]
        tree["log_likelihood"]["x"].attrs |= {
            "long_name": "lower bound on log p(x | z)", "units": "nats", "noise_levels": levels,
            "note": "an evidence bound of the diffusion decoder, not a likelihood",
        }  # fmt: skip
    for site in program.latents.sites:
        tree["posterior"][site.name].attrs["long_name"] = f"q({site.name} | x), amortised"
    for site in program.latents.shared:
        tree["posterior"][site.name].attrs["long_name"] = f"q({site.name}), of all observations"
    return tree


def _chunked(
    function: Callable[..., dict[str, Array]], key: Array, chunk: int, x: np.ndarray, given: Given, values: Any = None
) -> dict:
    """Apply to chunks of observations, compiled once (the last chunk is padded), and gather on the host.

    Results have dims (draw, obs, ...); `values` likewise.
    """
    jitted, parts = jax.jit(function), []
    for i, (rows, count) in enumerate(padded_chunks(len(x), chunk)):
        arguments = () if values is None else ({name: v[:, rows] for name, v in values.items()},)
        part = {name: jnp.asarray(value[rows]) for name, value in given.items()}
        out = jitted(jax.random.fold_in(key, i), jnp.asarray(x[rows]), part, *arguments)
        parts.append({name: np.asarray(v)[:, :count] for name, v in out.items()})
    return {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}


def save_tree(tree: xr.DataTree, file: str | Path) -> None:
    """Write a DataTree as `.nc` (netCDF) or `.zarr`. Raises ValueError for another suffix."""
    if str(file).endswith(".nc"):
        # Written aside and renamed: an interruption leaves the old file, and a reader may still hold it open.
        part = Path(f"{file}.part")
        tree.to_netcdf(part, engine="h5netcdf")
        part.replace(file)
    elif str(file).endswith(".zarr"):
        tree.to_zarr(file, mode="w", consolidated=False)
    else:
        raise ValueError(f"give a file ending in .nc or .zarr, got {file!r}")
