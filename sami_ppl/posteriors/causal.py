"""Interventions and counterfactuals: a prior whose sites depend on each other, read as a structural causal model.

Each site is v = f(parents, u) with a noise u of its own: u = (v − loc)/scale where the law has location and scale, as a
Normal, u = F(v | parents) for other scalars. The graph is what the program says; nothing here tests that it is the
world's.

- An intervention do(v = c) replaces one mechanism by a constant. Descendants feel it, ancestors do not.
- A counterfactual of an observed x asks what x would have been (Pearl 2009, *Causality*, sec. 7.1): abduction of the
  factors from q(z | x), of their noises, and of the image's own noise by the probability flow given z; action;
  prediction with the same noises.
"""

from collections.abc import Mapping
import json
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Key
import numpy as np
from numpyro import distributions as dist
from numpyro import handlers, plate
import xarray as xr

from sami_ppl._util.chunks import padded_chunks
from sami_ppl._util.keys import check_key
from sami_ppl.diffusion.inversion import check_deterministic, from_noise, to_noise
from sami_ppl.diffusion.sampler import AbstractSampler, Heun
from sami_ppl.distributions.supports import unwrapped
from sami_ppl.posteriors.generate import decode
from sami_ppl.posteriors.tree import site_coords
from sami_ppl.priors.latents import Latents
from sami_ppl.priors.sites import Discrete, LatentSite
from sami_ppl.program.program import Program

LOCATION_SCALE = (dist.Normal, dist.Laplace, dist.Logistic, dist.Gumbel, dist.Cauchy)
"""Laws whose noise is the standardised value: far from the centre it keeps its digits, where a share of 1 has none."""

Do = Mapping[str, Any]
"""Values of sites set from outside, by name."""


def descendants(latents: Latents, names: Mapping[str, Any] | list[str]) -> tuple[str, ...]:
    """The sites of one observation that depend on some of those named, directly or through others."""
    reached: list[str] = []
    for site in latents.sites:
        if site.name not in names and {*names, *reached} & set(site.parents):
            reached.append(site.name)
    return tuple(reached)


@eqx.filter_jit
def _prior_codes(program: Program, size: int, key: Array, do: dict[str, Array]) -> Array:
    return program.prior_codes(key, size, do)


def intervene(
    program: Program, do: Do, *, key: Key[Array, ""], size: int, sampler: AbstractSampler | None = None
) -> xr.Dataset:
    """Draws of factors and observations under an intervention: one variable for each site, and x, on `draw`.

    `do`: values of the event shape of their sites; {} draws without any. `sampler` replaces the program's own. Raises
    ValueError for a site that the prior has not or that is global, and for a value of another shape or off its support.
    """
    check_key(key)
    values = _check(program, do, ())
    code_key, image_key = jax.random.split(key)
    z = _prior_codes(program, size, code_key, values)
    x = decode(program, z, jax.random.split(image_key, size), sampler=sampler)
    found = _dataset(program, program.latents.from_code(z), ("draw",), x)
    return found.assign_coords(draw=np.arange(size)).assign_attrs(_described(do))


def counterfactual(
    program: Program,
    data: xr.Dataset | Array | np.ndarray,
    do: Do,
    *,
    key: Key[Array, ""],
    draws: int = 4,
    sampler: AbstractSampler | None = None,
    chunk: int = 64,
) -> xr.DataTree:
    """What observations would have been under an intervention.

    Groups: `factual`, the factors abducted (draw, obs, dims of the site) and the observed x; `counterfactual`, factors
    and x (draw, obs, *event). Sites that do not descend from those set keep their values.

    `do`: values of shape (draws, obs, *event) of their sites, or any that broadcasts to it; {} gives the observations
    back, up to the error of the solver. `sampler`: a deterministic one (default: `Heun(101)`). Raises ValueError as
    `intervene` does, for a stochastic sampler, and for a descendant whose law has no noise to hold, such as a mixture.
    """
    check_key(key)
    sampler = Heun(101) if sampler is None else sampler
    check_deterministic(sampler)
    if draws < 1 or chunk < 1:
        raise ValueError(f"draws and chunk must be at least 1, got draws={draws}, chunk={chunk}")
    x, given = program.observations(data)
    values = _check(program, do, (draws, len(x)))
    keys, parts = jax.random.split(key, draws), []
    for i, (rows, count) in enumerate(padded_chunks(len(x), chunk)):
        part = {name: jnp.asarray(v[rows]) for name, v in given.items()}
        new = {name: v[:, rows] for name, v in values.items()}
        found = _counterfactual(program, sampler, jnp.asarray(x[rows]), part, new, keys, jnp.asarray(i))
        parts.append(jax.tree.map(lambda leaf, count=count: np.asarray(leaf)[:, :count], found))
    factual, after, images = jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *parts)
    obs = data.coords["obs"].values if isinstance(data, xr.Dataset) and "obs" in data.coords else np.arange(len(x))
    coords = {"draw": np.arange(draws), "obs": obs}
    before = _dataset(program, factual, ("draw", "obs"), None).assign(x=(("obs", *program.event_dims), x))
    tree = {"factual": before, "counterfactual": _dataset(program, after, ("draw", "obs"), images)}
    tree = {name: group.assign_coords(coords) for name, group in tree.items()}
    return xr.DataTree.from_dict(tree | {"/": xr.Dataset(attrs=_described(do))})


@eqx.filter_jit
def _counterfactual(
    program: Program, sampler: AbstractSampler, x: Array, given: dict, do: dict[str, Array], keys: Array, chunk: Array
) -> tuple[dict[str, Array], dict[str, Array], Array]:
    """Factors before and after, and observations after, each (draws, obs, ...)."""
    latents, moved = program.latents, descendants(program.latents, do)

    def image(x: Array, z: Array, new: Array) -> Array:
        given_z, given_new = program.decoder(z), program.decoder(new)
        return from_noise(sampler, given_new, to_noise(sampler, given_z, x))

    def one(inputs: tuple) -> tuple:
        key, do = inputs
        global_key, own_key = jax.random.split(key)
        # Global sites are drawn once, for all chunks of observations.
        global_values = handlers.trace(handlers.seed(program.sample_global_sites, global_key)).get_trace()
        guide = handlers.seed(handlers.replay(program.guide, global_values), jax.random.fold_in(own_key, chunk))
        factual = {name: site["value"] for name, site in handlers.trace(guide).get_trace(x, given=given).items()
                   if site["type"] == "sample"}  # fmt: skip
        prior = handlers.seed(program.sample_prior, own_key)
        batch = (plate("obs", len(x)), len(x), given)
        trace = handlers.trace(handlers.substitute(prior, data=factual)).get_trace(*batch)
        noise = {name: _noise(name, trace[name]["fn"], factual[name]) for name in moved}
        kept = {name: value for name, value in factual.items() if name not in moved} | do

        def mechanism(site: dict[str, Any]) -> Array | None:
            if site["type"] != "sample":
                return None
            name = site["name"]
            return kept[name] if name in kept else _value(site["fn"], noise[name])

        trace = handlers.trace(handlers.substitute(prior, substitute_fn=mechanism)).get_trace(*batch)
        own = [site.name for site in latents.sites]
        before, after = {name: factual[name] for name in own}, {name: trace[name]["value"] for name in own}
        return before, after, jax.vmap(image)(x, latents.to_code(before), latents.to_code(after))

    return jax.lax.map(one, (keys, do))


def _noise(name: str, fn: Any, value: Array) -> Array:
    """The noise of a site's value: standardised where that is a noise, else a share of 1, for every element."""
    base: Any = unwrapped(fn, masks=False)
    if type(base) is dist.MultivariateNormal:
        factor: Any = base.scale_tril
        return jax.scipy.linalg.solve_triangular(factor, (value - base.loc)[..., None], lower=True)[..., 0]
    if type(base) in LOCATION_SCALE:
        return (value - base.loc) / base.scale
    try:
        if base.event_shape:
            raise NotImplementedError
        share = base.cdf(value)
        base.icdf(share)
    except (NotImplementedError, ImportError) as error:
        raise ValueError(
            f"prior site {name!r} ({type(base).__name__}) depends on a site that is set, but has no noise that can be "
            "held: a cdf with its inverse. Give it such a law, like dist.Normal or dist.Laplace, or use intervene"
        ) from error
    # Far from the centre a share rounds to 0 or 1, and the value to the last one that differs.
    finest = jnp.finfo(share.dtype)
    return jnp.clip(share, finest.tiny, 1 - finest.epsneg)


def _value(fn: Any, noise: Array) -> Array:
    """The value of a site that has this noise."""
    base: Any = unwrapped(fn, masks=False)
    if type(base) is dist.MultivariateNormal:
        factor: Any = base.scale_tril
        return base.loc + (factor @ noise[..., None])[..., 0]
    return base.loc + base.scale * noise if type(base) in LOCATION_SCALE else base.icdf(noise)


def _check(program: Program, do: Do, batch: tuple[int, ...]) -> dict[str, Array]:
    """The values of an intervention, each of shape batch + event."""
    sites = {site.name: site for site in program.latents.sites}
    values = {}
    for name, value in do.items():
        if name in {site.name for site in program.latents.global_sites}:
            raise ValueError(
                f"do names {name!r}, a global site, shared by all observations: set a site in the plate obs "
                f"({', '.join(sites)}), or fix it in a prior handlers.substitute(prior, {{{name!r}: ...}})"
            )
        if name not in sites:
            raise ValueError(f"do names {name!r}, but the sites of the prior are {', '.join(sites)}")
        values[name] = _check_value(sites[name], value, batch)
    return values


def _check_value(site: LatentSite, value: Any, batch: tuple[int, ...]) -> Array:
    shape, given = (*batch, *site.event_shape), np.asarray(value)
    value = jnp.asarray(given, jnp.result_type(int if isinstance(site, Discrete) else float))
    try:
        whole = jnp.broadcast_to(value, shape)
    except ValueError as error:
        raise ValueError(
            f"do gives {site.name!r} a value of shape {value.shape}: it must have the shape of one value, "
            f"{site.event_shape}" + (f", or broadcast to {shape}, (draws, obs, ...)" if batch else "")
        ) from error
    codomain: Any = site.transform.codomain
    rounded = isinstance(site, Discrete) and not np.array_equal(given, value)
    if rounded or not (np.all(codomain(whole)) and np.all(np.isfinite(site.to_code(whole)))):
        raise ValueError(
            f"do gives {site.name!r} a value off its support, or on the edge of it: got {given}, expected {codomain}"
        )
    return whole


def _dataset(program: Program, values: Mapping[str, Any], batch: tuple[str, ...], x: Any) -> xr.Dataset:
    found = {s.name: ((*batch, *s.dims), np.asarray(values[s.name])) for s in program.latents.sites}
    made = xr.Dataset(found if x is None else found | {"x": ((*batch, *program.event_dims), np.asarray(x))})
    return made.assign_coords(site_coords(program, made))


def _described(do: Do) -> dict[str, str]:
    return {"do": json.dumps({name: np.asarray(value).tolist() for name, value in do.items()})}
