"""Reads a prior: a NumPyro function over the latent factors of one observation.

A prior is a function that calls `numpyro.sample`. From one trace of it follow the sites, their supports and shapes,
and from these the code z: all sites mapped to unconstrained space by `biject_to(support)`, centred and scaled by the
prior's own location and spread, and concatenated. Discrete sites with finitely many values have one-hot codes.

With an argument `obs`, the plate over observations, a prior is hierarchical: sites outside the plate are global, shared
by all observations. What it makes by `numpyro.param` or `eqx_module` is learned. Any other argument, such as u, is data
on the observations, a label or a time: the prior is p(z | u).
"""

from collections.abc import Hashable, Mapping
from dataclasses import replace
import functools
import math
from pathlib import Path
import traceback
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np
from numpyro import distributions as dist
from numpyro import handlers
from numpyro.distributions.transforms import biject_to

from sami_ppl.data.checks import as_numbers
from sami_ppl.distributions.matern import Matern
from sami_ppl.distributions.relaxed import RelaxedOneHotCategorical
from sami_ppl.distributions.supports import described, manifold, mixture_components, normal_base, unwrapped
from sami_ppl.priors.alike import first_alike
from sami_ppl.priors.dependence import Dependence, Names, dependences
from sami_ppl.priors.discrete import OneHotTransform, categories, check_combinations
from sami_ppl.priors.factors import default_dims
from sami_ppl.priors.latents import Derived, Latents, check_site_dims
from sami_ppl.priors.lookups import check_lookups, table_rows
from sami_ppl.priors.run import Given, Prior, check_event, check_latent, class_name, prior_arguments
from sami_ppl.priors.run import sample_prior as sample_prior
from sami_ppl.priors.several import run, runs_by_rows
from sami_ppl.priors.sites import Direction, Discrete, Euclidean, LatentSite, Process, Relaxed

PACKAGE = str(Path(__file__).parents[1])


def read_prior(prior: Prior, given: "Given | GivenValues | None" = None) -> Latents:
    """Read a prior from its trace; reading the same function again, or one written alike, gives the same object.

    `given`: for a prior p(z | u), the u of some observations, over which the code is centred and scaled. Raises
    TypeError if it is no function or takes an argument that is not given, ValueError if it has no site, an observed
    one, a discrete one that cannot be summed over, or one whose support has no bijection from unconstrained space, and
    for labels in `given` outside the table that the prior looks up by them. The message names the site or variable.
    """
    if not callable(prior) or isinstance(prior, dist.Distribution):
        raise TypeError(
            f"prior must be a function that calls numpyro.sample, got {type(prior).__name__}; write for instance\n"
            '    def prior():\n        numpyro.sample("z", dist.Normal(0, 1).expand([3]).to_event(1))'
        )
    prior = first_alike(prior)
    arguments = prior_arguments(prior)
    frozen = given if isinstance(given, GivenValues) else GivenValues.of(given or {})
    if missing := [name for name in arguments if name not in frozen.names]:
        raise TypeError(
            f"prior takes the argument {missing[0]!r}, which is not given: pass the values of some observations, "
            f"given={{{missing[0]!r}: array of shape (obs, ...)}}; bind constants with functools.partial"
        )
    if unused := sorted(set(frozen.names) - set(arguments)):
        raise TypeError(f"given holds {', '.join(unused)}, but the prior takes {', '.join(arguments) or 'none'}")
    # A program may be built inside a transformation, such as eval_shape when it is loaded; a prior has no inputs.
    with jax.ensure_compile_time_eval():
        return _read(prior, frozen) if isinstance(prior, Hashable) else _read.__wrapped__(prior, frozen)


class GivenValues:
    """Named arrays that compare and hash by their content."""

    def __init__(self, names: tuple[str, ...], arrays: tuple[np.ndarray, ...]):
        self.names, self.arrays = names, arrays
        self._content = (names, tuple((a.shape, str(a.dtype), a.tobytes()) for a in arrays))

    @classmethod
    def of(cls, given: Given) -> "GivenValues":
        """Raises ValueError unless all are numbers, finite, and of one length."""
        arrays = tuple(as_numbers(name, value) for name, value in given.items())
        if len({array.shape[:1] for array in arrays}) > 1 or any(array.ndim == 0 for array in arrays):
            shapes = ", ".join(f"{name} {array.shape}" for name, array in zip(given, arrays, strict=True))
            raise ValueError(f"given must hold arrays of shape (obs, ...) for the same observations, got {shapes}")
        return cls(tuple(given), arrays)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GivenValues) and self._content == other._content

    def __hash__(self) -> int:
        return hash(self._content)

    def rows(self, rows: Any) -> dict[str, Array]:
        """The values of single observations."""
        return {name: jnp.asarray(array)[rows] for name, array in zip(self.names, self.arrays, strict=True)}

    def __len__(self) -> int:
        return len(self.arrays[0]) if self.arrays else 1


@functools.lru_cache(maxsize=128)
def _read(prior: Prior, given: GivenValues) -> Latents:
    by_rows = runs_by_rows(prior, given)
    run_once = functools.partial(run, prior, 1, by_rows=by_rows)
    trace, params, computed = _trace(run_once, given)
    tables = table_rows(lambda rows: [site["value"] for site in run_once(rows).values()], given.rows(slice(1)))
    check_lookups(dict(zip(given.names, given.arrays, strict=True)), tables)
    if any("known" in site for site in trace.values()):
        run(prior, len(given), given.rows(slice(None)), by_rows=by_rows)  # refuses labels that a site has not
    is_global = {name: not site["cond_indep_stack"] for name, site in trace.items()}
    if all(is_global.values()):
        plate = "    with obs:\n    " if is_global else ""
        raise ValueError(
            f"prior has no latent site{' in the plate obs' if is_global else ''}: call numpyro.sample at least once "
            f'in it, for instance\n{plate}    numpyro.sample("z", dist.Normal(0, 1).expand([3]).to_event(1))'
        )
    draws, constants = _marginal_draws(run_once, given, trace)
    depends = _dependences(run_once, given, trace, params)
    sites, global_sites, start = [], [], 0
    kinds = _kinds(trace, depends)
    for name, traced in trace.items():
        first = 0 if is_global[name] else start
        site = _read_site(name, traced, draws[name], constants.get(name), depends[name].law, first)
        site = replace(site, kinds=kinds[name])
        if is_global[name] and isinstance(site, Direction):
            raise ValueError(
                f"global prior site {name!r} lives on a {site.manifold}, but the guide of global sites is Gaussian: "
                "sample it in the plate obs, or give it a support without one, such as dist.Uniform"
            )
        (global_sites if is_global[name] else sites).append(site)
        start += 0 if is_global[name] else site.size
    derived = [_derived(name, site, bool(global_sites)) for name, site in computed.items()]
    check_site_dims((*sites, *global_sites, *derived))
    return Latents(tuple(sites), tuple(global_sites), params, given.names, tuple(derived), by_rows, tables)


def _trace(run_once: Any, given: GivenValues) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Of one observation: sites, values of parameters, and deterministic sites."""
    try:
        trace = run_once(given.rows(slice(1)))
    except NotImplementedError as error:
        raise ValueError(
            "the prior cannot be drawn from, as a generative model must: one of its distributions is improper or has "
            "no sampler. Use a proper one, such as a wide dist.Normal"
        ) from error
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1].filename
        code = getattr(run_once.args[0], "__code__", None)
        if where.startswith(PACKAGE) or (code is not None and where == code.co_filename):
            raise  # with a message of ours, or in a line of the user's own
        raise ValueError(f"the prior cannot be run: {type(error).__name__}: {error}") from error
    for name, site in trace.items():
        if site["type"] == "sample":
            check_latent(name, site)
        if name == "x" and site["type"] in ("sample", "deterministic"):
            raise ValueError("prior site 'x' takes the name of the observation: give it another name")
        if site["type"] == "param" and name.removesuffix("$params") in ("denoiser", "encoder"):
            raise ValueError(f"prior parameter {name!r} takes the name of a network of the program: rename it")
        if site["type"] == "sample":
            _check_site(name, site)
    of = {kind: {n: s for n, s in trace.items() if s["type"] == kind} for kind in ("sample", "param", "deterministic")}
    check_combinations(_sizes(of["sample"]))
    return of["sample"], {name: site["value"] for name, site in of["param"].items()}, of["deterministic"]


def _derived(name: str, site: dict[str, Any], hierarchical: bool) -> Derived:
    shape, infer = jnp.shape(site["value"]), site.get("infer") or {}
    is_global = hierarchical and not site["cond_indep_stack"]
    shape = shape if is_global or shape[:1] != (1,) else shape[1:]
    dims = tuple(infer.get("event_dims") or ())
    dims = dims if len(dims) == len(shape) else default_dims(name, shape)
    coords = {dim: tuple(labels) for dim, labels in (infer.get("coords") or {}).items() if dim in dims}
    return Derived(name=name, event_shape=shape, dims=dims, coords=coords, is_global=is_global)


def _check_site(name: str, traced: dict[str, Any]) -> None:
    fn: Any = traced["fn"]
    size = categories(name, fn, class_name(fn))
    if size and not traced["cond_indep_stack"]:
        raise ValueError(
            f"global prior site {name!r} is discrete ({class_name(fn)}), but the guide of global sites is Gaussian: "
            "sample it in the plate obs, or fit a program for each value"
        )
    if "known" in traced and not size:
        raise ValueError(
            f"prior site {name!r} is continuous and observed for some observations (obs_mask): only discrete sites may "
            "be. Take obs and obs_mask away"
        )
    check_event(name, fn, tuple(frame.name for frame in traced["cond_indep_stack"]))


def _sizes(trace: dict[str, Any]) -> dict[str, int]:
    """The number of values of every discrete site."""
    sizes = {name: categories(name, site["fn"], class_name(site["fn"])) for name, site in trace.items()}
    return {name: size for name, size in sizes.items() if size}


def _kinds(trace: dict[str, Any], depends: Mapping[str, Dependence]) -> dict[str, tuple[str, ...]]:
    """The discrete sites that continuous ones depend on, directly or through continuous ones."""
    sizes = _sizes(trace)
    found: dict[str, tuple[str, ...]] = {}
    for name in trace:
        parents = depends[name].law["sites"] if name not in sizes else ()
        reached = {kind for parent in parents for kind in ((parent,) if parent in sizes else found[parent])}
        found[name] = tuple(kind for kind in sizes if kind in reached)
    return found


def _marginal_draws(
    run_once: Any, given: GivenValues, trace: dict[str, Any], count: int = 4096
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Draws of every site, dependences included, and location and scale of the Normal sites that depend on none."""
    normals = [name for name, site in trace.items() if normal_base(site["fn"]) is not None]

    def draw(key: Array, row: Array) -> tuple[dict[str, Array], dict[str, Any]]:
        sites = run_once(given.rows(row[None]), key=key)
        moments = {name: _moments(sites[name]["fn"]) for name in normals}
        return {name: sites[name]["value"] for name in trace}, moments

    draws, moments = jax.vmap(draw)(jax.random.split(jax.random.key(0), count), jnp.arange(count) % len(given))
    draws = {name: value.reshape(count, *trace[name]["fn"].event_shape) for name, value in draws.items()}
    moments = {name: tuple(np.asarray(p) for p in pair) for name, pair in moments.items()}
    constants = {
        name: tuple(p[0] for p in pair)
        for name, pair in moments.items()
        if all(np.array_equal(p, np.broadcast_to(p[:1], p.shape)) for p in pair)
    }
    return draws, constants


def _dependences(
    run_once: Any, given: GivenValues, trace: dict[str, Any], params: dict[str, Any]
) -> dict[str, Dependence]:
    """What the law of every site depends on. Raises ValueError for a support that is not fixed."""

    def trace_of(held: dict[str, dict[str, Any]]) -> dict[str, Any]:
        # From outside, where partly observed sites have one name.
        with handlers.substitute(data=held["sites"] | held["params"]):
            return run_once(held["given"])

    sites = {name: site["value"] for name, site in trace.items()}
    found = dependences(trace_of, {"sites": sites, "params": params, "given": given.rows(slice(1))})
    for name, dependence in found.items():
        if moving := sorted(frozenset().union(*dependence.support.values())):
            raise ValueError(
                f"the support of prior site {name!r} moves with {', '.join(moving)}, but its code is made by one fixed "
                "bijection: take a law on all of space, such as dist.Normal or dist.Laplace, or sample the noise and "
                "compute from it"
            )
    return found


def _moments(fn: dist.Distribution) -> tuple[Array, Array]:
    base = normal_base(fn)
    assert base is not None
    loc, scale = (jnp.broadcast_to(jnp.asarray(p, jnp.float32), fn.shape()) for p in (base.loc, base.scale))
    return loc.reshape(fn.event_shape), scale.reshape(fn.event_shape)


def _read_site(
    name: str, traced: dict[str, Any], draws: Array, constant: Any, depends: Names, start: int
) -> LatentSite:
    fn: Any = traced["fn"]
    law = described(fn, numbers=not any(depends.values()))
    common: dict[str, Any] = {"name": name, "start": start, "law": law, "parents": tuple(sorted(depends["sites"]))}
    if size := categories(name, fn, class_name(fn)):
        return Discrete(
            **common, event_shape=(), dims=(), transform=OneHotTransform(size), unconstrained_shape=(size,),
            shift=np.zeros(size), scale=np.ones(size), categories=size,
        )  # fmt: skip
    on, transform = manifold(fn.support)
    try:
        transform = biject_to(fn.support) if transform is None else transform
    except NotImplementedError as error:
        raise ValueError(
            f"prior site {name!r} ({class_name(fn)}) has support {fn.support}, which has no bijection from "
            "unconstrained space (numpyro's biject_to): use a distribution on such a space"
        ) from error
    shape, process = tuple(transform.inverse_shape(fn.event_shape)), isinstance(fn, Matern)
    if on is not None or process:
        shift, scale = np.zeros(math.prod(shape)), np.ones(math.prod(shape))
    elif constant is not None:
        shift, scale = (np.array(p, dtype=float).reshape(-1) for p in constant)
    else:
        # Median and interquartile range exist for every prior, heavy tails included, and the centre and scale of the
        # code need not be exact.
        unconstrained = np.asarray(transform.inv(draws)).reshape(len(draws), math.prod(shape))
        low, shift, high = np.quantile(unconstrained, [0.25, 0.5, 0.75], axis=0)
        scale = np.maximum((high - low) / 1.349, 1e-6)
    default = ("time", "factor") if process else default_dims(name, tuple(fn.event_shape))
    dims = traced["infer"].get("event_dims") or default
    if len(dims) != len(fn.event_shape):
        raise ValueError(
            f"prior site {name!r} has {len(fn.event_shape)} event dims but infer={{'event_dims': {list(dims)}}} names "
            f"{len(dims)}: give one name per dim"
        )
    coords = {dim: tuple(labels) for dim, labels in (traced["infer"].get("coords") or {}).items() if dim in dims}
    common |= {
        "event_shape": tuple(fn.event_shape), "dims": tuple(dims), "transform": transform, "unconstrained_shape": shape,
        "shift": shift, "scale": scale, "coords": coords,
    }  # fmt: skip
    if on is not None:
        return Direction(**common, manifold=on)
    if process:
        return Process(**common)
    if isinstance(base := unwrapped(fn), RelaxedOneHotCategorical):
        return Relaxed(**common, temperature=base.temperature)
    # A coefficient or a mean that is learned may leave its start.
    standard = constant is not None and not any(depends.values())
    return Euclidean(**common, standard=standard, components=mixture_components(fn))
