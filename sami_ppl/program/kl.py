"""Traces of model and guide, and KL terms of their sites, in nats: closed forms where there are any."""

from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
from numpyro import distributions as dist
from numpyro import handlers

from sami_ppl.distributions.supports import unwrapped


def traces(
    rng_key: Key[Array, ""], param_map: dict[str, Any], model: Any, guide: Any, *args: Any, **kwargs: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Traces of the model and of its guide, the latent sites of both at one draw from the guide.

    Raises ValueError unless both have the same latent sites: NumPyro only warns, or optimises on.
    """
    model_key, guide_key = jax.random.split(rng_key)
    seeded_guide = handlers.substitute(handlers.seed(guide, guide_key), data=param_map)
    guide_trace = handlers.trace(seeded_guide).get_trace(*args, **kwargs)
    replayed = handlers.replay(handlers.seed(model, model_key), guide_trace)
    model_trace = handlers.trace(handlers.substitute(replayed, data=param_map)).get_trace(*args, **kwargs)
    check_sites_match(model_trace, guide_trace)
    return model_trace, guide_trace


def site_kl(
    q: dist.Distribution, p: dist.Distribution, value: Float[Array, "*batch_and_event"]
) -> Float[Array, "batch axes"]:
    """KL(q ‖ p) per observation and axis, in nats.

    In closed form where there is one, else at the one draw `value`. Axes are kept apart where q and p are independent
    over the elements of the event; a site of another kind has a single axis.
    """
    shape = value.shape
    elements_q, elements_p = _elements(q, shape), _elements(p, shape)
    if elements_q is not None and elements_p is not None:
        return _kl(elements_q, elements_p, value).reshape(shape[0], -1)
    if isinstance(q, dist.MultivariateNormal) and isinstance(elements_p, dist.Normal):
        return _full_normal_kl(q, elements_p)[:, None]
    return _kl(q, p, value)[:, None]


def global_kl(q: dist.Distribution, p: dist.Distribution, value: Float[Array, "*event"]) -> Float[Array, ""]:
    """KL(q ‖ p) of a global site in nats, in closed form where there is one, else at the one draw `value`."""
    elements_q, elements_p = _elements(q, value.shape), _elements(p, value.shape)
    if elements_q is not None and elements_p is not None:
        return jnp.sum(_kl(elements_q, elements_p, value))
    return _kl(q, p, value)


def _kl(q: Any, p: Any, value: Array) -> Array:
    try:
        return dist.kl_divergence(q, p)
    except NotImplementedError:
        return q.log_prob(value) - p.log_prob(value)


def _elements(fn: Any, shape: tuple[int, ...]) -> Any:
    """The distribution of the single elements of a site, of batch shape `shape`; None if they depend on each other."""
    fn = unwrapped(fn, masks=False)
    if isinstance(fn, dist.Normal):
        loc, scale = (jnp.broadcast_to(cast(Array, p), shape) for p in (fn.loc, fn.scale))
        return dist.Normal(loc, scale)
    return None if fn.event_shape or isinstance(fn, dist.MaskedDistribution) else fn.expand(shape)


def _full_normal_kl(q: Any, p: Any) -> Float[Array, " batch"]:
    """KL(N(m, LLᵀ) ‖ N(loc, diag(scale²))), closed form."""
    factor = q.scale_tril / p.scale[..., None]
    log_det = jnp.sum(jnp.log(jnp.abs(jnp.diagonal(factor, axis1=-2, axis2=-1))), -1)
    square = jnp.sum(factor**2, (-2, -1)) + jnp.sum(((q.loc - p.loc) / p.scale) ** 2, -1)
    return 0.5 * (square - q.event_shape[0]) - log_det


def check_sites_match(model_trace: dict[str, Any], guide_trace: dict[str, Any]) -> None:
    """Raise ValueError unless model and guide have the same latent sites: NumPyro only warns, or optimises on."""
    latent = {n for n, s in model_trace.items() if s["type"] == "sample" and not s["is_observed"]}
    guided = {n for n, s in guide_trace.items() if s["type"] == "sample" and not s["is_observed"]}
    if latent != guided:
        raise ValueError(
            f"model and guide must have the same latent sites, got {sorted(latent)} in the model and {sorted(guided)} "
            "in the guide: build the guide from the same prior, as Program does"
        )
