"""The amortised guide: the encoder's Gaussian posterior of the code z, as sample statements at the prior's sites."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float
import numpyro
from numpyro import distributions as dist

from sami_ppl.prior import Latents, LatentSite, elementwise_transform, is_unbounded


def sample_latents(latents: Latents, loc: Float[Array, "*batch D"], scale: Array) -> dict[str, Array]:
    """Sample every site of the prior from the posterior of the code, N(loc, scale²) or N(loc, A Aᵀ).

    A diagonal posterior is independent over sites. A full one is written site by site as the chain of Gaussian
    conditionals q(z₁) q(z₂ | z₁) …, the same distribution, so that each site keeps its name.
    """
    values = {}
    if scale.ndim == loc.ndim:
        for site in latents.sites:
            values[site.name] = numpyro.sample(
                site.name, _diagonal(site, loc[..., site.code], scale[..., site.code]), infer=_dims(site)
            )
        return values

    factor = jnp.linalg.cholesky(scale @ jnp.swapaxes(scale, -1, -2))
    noise = jnp.zeros((*loc.shape[:-1], 0))
    for site in latents.sites:
        before = factor[..., site.code, : site.start]
        mean = loc[..., site.code] + (before @ noise[..., None])[..., 0]
        own = factor[..., site.code, site.code]
        value: Any = numpyro.sample(site.name, _full(site, mean, own), infer=_dims(site))
        values[site.name] = value
        centred = site.to_code(value) - mean
        fresh = jnp.linalg.solve(own, centred[..., None])[..., 0]
        noise = jnp.concatenate([noise, fresh], axis=-1)
    return values


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


def _full(site: LatentSite, loc: Array, factor: Array) -> dist.Distribution:
    shift, spread = (jnp.asarray(p, loc.dtype) for p in (site.shift, site.scale))
    if site.unconstrained_shape == ():
        base = dist.Normal((shift + spread * loc)[..., 0], (spread * factor[..., 0])[..., 0])
        return base if is_unbounded(site.transform) else dist.TransformedDistribution(base, site.transform)
    base = dist.MultivariateNormal(shift + spread * loc, scale_tril=spread[:, None] * factor)
    if len(site.unconstrained_shape) > 1:
        reshape = dist.transforms.ReshapeTransform(site.unconstrained_shape, (site.size,))
        base = dist.TransformedDistribution(base, reshape)
    return base if is_unbounded(site.transform) else dist.TransformedDistribution(base, site.transform)
