"""The amortised guide: the encoder's posterior of the code z, as sample statements at the prior's sites."""

from collections.abc import Callable, Mapping, Sequence
import math
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpyro
from numpyro import distributions as dist
from numpyro import handlers
from numpyro.primitives import Messenger

from sami_ppl.distributions.matern import Smoothed
from sami_ppl.distributions.supports import elementwise_transform, is_unbounded, normal_base
from sami_ppl.encoders.encoder import AbstractEncoder, FamilyEncoder, diagonal_log_prob
from sami_ppl.priors.sites import Latents, LatentSite

Beta = Array | float | Mapping[str, Array | float]
"""Weight of the latent sites in the objective: one number, or one for each site named."""

GlobalGuide = Literal["diagonal", "full"] | Callable[[], Any]
"""The guide of global sites: a Gaussian with independent coordinates, one of all of them, or a NumPyro function."""


class scale_sites(Messenger):
    """Scale log densities by β: one number for all sites, or one for each site named, 1 for the others."""

    def __init__(self, beta: Beta):
        self.beta = beta
        super().__init__()

    def process_message(self, msg: dict[str, Any]) -> None:
        """NumPyro's hook: multiply the site's scale."""
        if msg["type"] == "sample":
            beta = self.beta.get(msg["name"], 1.0) if isinstance(self.beta, Mapping) else self.beta
            msg["scale"] = beta if msg.get("scale") is None else beta * msg["scale"]


def sample_latents(latents: Latents, encoder: AbstractEncoder, parameters: Any) -> dict[str, Any]:
    """Sample every site of the prior from the guide's posterior of the code, given its `parameters` of a batch.

    They are those of the encoder at the clean end, or, for sequences, the posterior smoothed over time.
    """
    if isinstance(parameters, Smoothed):
        (site,) = latents.sites
        return {site.name: numpyro.sample(site.name, parameters, infer=_dims(site))}
    if not isinstance(encoder, FamilyEncoder):
        return _sample_gaussian(latents, *parameters)
    values: dict[str, Any] = {}
    codes: dict[str, Array] = {}
    for site in latents.sites:
        law = _on_support(site, encoder.distribution(site.name, parameters, codes))
        values[site.name] = numpyro.sample(site.name, law, infer=_dims(site))
        if site.categories:
            codes[site.name] = site.to_code(values[site.name])
    return values


def initial_guide(latents: Latents, kind: GlobalGuide = "diagonal") -> dict[str, Any]:
    """Parameters of the guide of global sites as it begins: at the centre of the prior, a fiftieth as wide.

    Those of a function are what it makes by `numpyro.param`. Raises ValueError for another kind, and for a function
    that samples other sites than the global ones.
    """
    size, log_scale = sum(site.size for site in latents.shared), math.log(0.02)
    if callable(kind):
        return _read_guide(latents, kind)
    if kind not in ("diagonal", "full"):
        raise ValueError(f"global_guide must be 'diagonal', 'full' or a function of no arguments, got {kind!r}")
    if kind == "full" and size:
        return {"globals$loc": jnp.zeros(size), "globals$factor": log_scale * jnp.eye(size)}
    params: dict[str, Any] = {}
    for site in latents.shared:
        params[f"{site.name}$loc"] = jnp.zeros(site.size)
        params[f"{site.name}$log_scale"] = jnp.full(site.size, log_scale, jnp.float32)
    return params


def _read_guide(latents: Latents, guide: Callable[[], Any]) -> dict[str, Any]:
    with jax.ensure_compile_time_eval():
        trace = handlers.trace(handlers.seed(guide, jax.random.key(0))).get_trace()
    found = sorted(name for name, site in trace.items() if site["type"] == "sample")
    if found != sorted(site.name for site in latents.shared):
        raise ValueError(
            f"global_guide samples {', '.join(found) or 'nothing'}, but the global sites of the prior are "
            f"{', '.join(site.name for site in latents.shared) or 'none'}: call numpyro.sample once for each of them"
        )
    return {name: site["value"] for name, site in trace.items() if site["type"] == "param"}


def sample_shared(latents: Latents, params: Mapping[str, Any], kind: GlobalGuide = "diagonal") -> None:
    """Sample the global sites from their guide.

    "diagonal": an independent Gaussian for every coordinate in unconstrained space; "full": one Gaussian of all of
    them, its root lower triangular with the logarithm of the diagonal as the parameter; or the user's own function.
    """
    if callable(kind):
        with handlers.substitute(data=dict(params)):
            kind()
        return
    if kind == "full" and latents.shared:
        loc, raw = (cast(Array, numpyro.param(name, params[name])) for name in ("globals$loc", "globals$factor"))
        _sample_chain(latents.shared, loc, jnp.tril(raw, -1) + jnp.diag(jnp.exp(jnp.diagonal(raw))))
        return
    for site in latents.shared:
        names = (f"{site.name}${parameter}" for parameter in ("loc", "log_scale"))
        loc, log_scale = (cast(Array, numpyro.param(name, params[name])) for name in names)
        numpyro.sample(site.name, _diagonal(site, loc, jnp.exp(log_scale)), infer=_dims(site))


def values_of(sites: Sequence[LatentSite], run: Callable[[], Any]) -> dict[str, Any]:
    """Run a NumPyro function; the values that it has drawn at these sites."""
    trace = handlers.trace(run).get_trace()
    return {site.name: trace[site.name]["value"] for site in sites}


def sample_code(encoder: AbstractEncoder, parameters: Any, key: Key[Array, ""]) -> Float[Array, "*batch D"]:
    """One draw of the code z from the guide's posterior, given its `parameters` of a batch."""
    if isinstance(parameters, Smoothed):
        draw = parameters.sample(key)
        return draw.reshape(*draw.shape[:-2], -1)
    if isinstance(encoder, FamilyEncoder):
        codes: dict[str, Array] = {}
        for name, own_key in zip(encoder.sites, jax.random.split(key, len(encoder.sites)), strict=True):
            codes[name] = cast(Array, encoder.distribution(name, parameters, codes).sample(own_key))
        return jnp.concatenate(list(codes.values()), axis=-1)
    loc, scale = parameters
    noise = jax.random.normal(key, loc.shape, loc.dtype)
    return loc + (scale * noise if scale.ndim == loc.ndim else (scale @ noise[..., None])[..., 0])


def code_log_prob(encoder: AbstractEncoder, parameters: Any, z: Float[Array, " D"]) -> Float[Array, ""]:
    """Log density of a code under the law that `sample_code` draws from, of one observation, in nats."""
    if isinstance(encoder, FamilyEncoder):
        return encoder.code_log_prob(parameters, z)
    loc, scale = parameters
    if scale.ndim == loc.ndim:
        return diagonal_log_prob(z, loc, scale)
    white = jnp.linalg.solve(scale, z - loc)
    return -0.5 * jnp.sum(white**2 + jnp.log(2 * jnp.pi)) - jnp.linalg.slogdet(scale)[1]


def _sample_gaussian(latents: Latents, loc: Float[Array, "*batch D"], scale: Array) -> dict[str, Array]:
    """Sample every site from N(loc, scale²) or N(loc, A Aᵀ)."""
    if scale.ndim > loc.ndim and len(latents.sites) == 1:
        (site,) = latents.sites
        values = numpyro.sample(site.name, _full(site, loc, scale, RootedNormal), infer=_dims(site))
        return {site.name: cast(Array, values)}
    if scale.ndim > loc.ndim:
        return _sample_chain(latents.sites, loc, jnp.linalg.cholesky(scale @ jnp.swapaxes(scale, -1, -2)))
    values = {}
    for site in latents.sites:
        one = _diagonal(site, loc[..., site.code], scale[..., site.code])
        values[site.name] = numpyro.sample(site.name, one, infer=_dims(site))
    return values


def _sample_chain(sites: Sequence[LatentSite], loc: Float[Array, "*batch D"], factor: Array) -> dict[str, Array]:
    """Sample sites whose coordinates, one after another, are N(loc, L Lᵀ), L lower triangular.

    Site by site, as the chain of Gaussian conditionals q(z₁) q(z₂ | z₁) …: each site keeps its name.
    """
    values = {}
    noise = jnp.zeros((*loc.shape[:-1], 0))
    for site in sites:
        start = noise.shape[-1]
        span = slice(start, start + site.size)
        mean = loc[..., span] + (factor[..., span, :start] @ noise[..., None])[..., 0]
        own = factor[..., span, span]
        value: Any = numpyro.sample(site.name, _full(site, mean, own), infer=_dims(site))
        values[site.name] = value
        centred = site.to_code(value) - mean
        fresh = jnp.linalg.solve(own, centred[..., None])[..., 0]
        noise = jnp.concatenate([noise, fresh], axis=-1)
    return values


def _on_support(site: LatentSite, q: Any) -> Any:
    """The law of a site's value, from that of its code."""
    if site.categories:
        return dist.Categorical(logits=q.log_probs)
    if normal_base(q) is not None:
        return _diagonal(site, q.base_dist.loc, q.base_dist.scale)
    if type(q) is dist.MultivariateNormal:
        return _full(site, cast(Array, q.loc), cast(Array, q.scale_tril))
    steps: list[Any] = []
    if site.manifold is None:
        shift, spread = (jnp.asarray(p) for p in (site.shift, site.scale))
        steps.append(dist.transforms.IndependentTransform(dist.transforms.AffineTransform(shift, spread), 1))
    steps.append(dist.transforms.ReshapeTransform(site.unconstrained_shape, (site.size,)))
    if not is_unbounded(site.transform):
        steps.append(site.transform)
    return dist.TransformedDistribution(q, steps)


def _dims(site: LatentSite) -> dict:
    return {"event_dims": list(site.dims)} if site.dims else {}


def _diagonal(site: LatentSite, loc: Array, scale: Array) -> dist.Distribution:
    shape = loc.shape[:-1] + site.unconstrained_shape
    shift, spread = (jnp.asarray(p, loc.dtype) for p in (site.shift, site.scale))
    base = dist.Normal((shift + spread * loc).reshape(shape), (spread * scale).reshape(shape))
    dims = len(site.unconstrained_shape)
    elementwise = elementwise_transform(site.transform)
    if elementwise is None:
        return dist.TransformedDistribution(base.to_event(dims), site.transform)
    # Elements independent in unconstrained space stay so on the support: KL terms are then kept per axis, in closed
    # form where the support is all of space.
    on_support = base if is_unbounded(elementwise) else dist.TransformedDistribution(base, elementwise)
    return on_support.to_event(dims)


class RootedNormal(dist.MultivariateNormal):
    """N(loc, A Aᵀ) whose draws are loc + A ε for the square root A (…, d, d) that is given, lower triangular or not.

    Of R diag(s): draws turn with R, so that what does not change under a rotation has no gradient in it, draw by draw.
    """

    pytree_data_fields = ("root",)

    def __init__(self, loc: Float[Array, "*batch d"], root: Float[Array, "*batch d d"]):
        self.root = root
        super().__init__(loc, scale_tril=jnp.linalg.cholesky(root @ jnp.swapaxes(root, -1, -2)))

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Float[Array, "*draws_batch d"]:
        """Draws loc + A ε."""
        eps = jax.random.normal(key, sample_shape + self.batch_shape + self.event_shape, jnp.result_type(self.root))
        return jnp.asarray(self.loc) + (self.root @ eps[..., None])[..., 0]


def _lower(loc: Array, factor: Array) -> dist.MultivariateNormal:
    return dist.MultivariateNormal(loc, scale_tril=factor)


def _full(site: LatentSite, loc: Array, factor: Array, law: Callable = _lower) -> dist.Distribution:
    shift, spread = (jnp.asarray(p, loc.dtype) for p in (site.shift, site.scale))
    if site.unconstrained_shape == ():
        base = dist.Normal((shift + spread * loc)[..., 0], (spread * factor[..., 0])[..., 0])
        return base if is_unbounded(site.transform) else dist.TransformedDistribution(base, site.transform)
    base = law(shift + spread * loc, spread[:, None] * factor)
    if len(site.unconstrained_shape) > 1:
        reshape = dist.transforms.ReshapeTransform(site.unconstrained_shape, (site.size,))
        base = dist.TransformedDistribution(base, reshape)
    return base if is_unbounded(site.transform) else dist.TransformedDistribution(base, site.transform)
