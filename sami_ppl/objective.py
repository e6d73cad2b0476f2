"""What SVI minimises: the negative evidence bound per observation, in nats, with free bits.

`ScoreELBO` gives what NumPyro's `TraceMeanField_ELBO` gives divided by the number of observations, with two
additions: KL terms are kept per latent axis where they have a closed form, and each may be held at a floor.
"""

from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
from numpyro import distributions as dist
from numpyro import handlers
from numpyro.infer.elbo import ELBO


class ScoreELBO(ELBO):
    """Negative evidence bound per observation, in nats.

    `free_bits`: floor of the KL per axis, in nats, averaged over the batch; below it the KL has no gradient, so that
    an axis may keep that much information free of charge (Kingma et al. 2016, app. C.8). It acts per axis on
    Gaussian sites with Gaussian priors, else per site. 0 is the bound itself. A mapping gives each site its own. The
    KL of global sites, shared by all observations, has no floor.

    `capacity`: nats of single sites. Their KL is drawn to it from either side, β |KL − C| (Burgess et al. 2018, eq. 8;
    per group of factors: Dupont 2018).
    """

    def __init__(
        self,
        free_bits: float | Mapping[str, float] = 0.0,
        capacity: Mapping[str, Float[Array, ""] | float] | None = None,
    ):
        floors = free_bits.values() if isinstance(free_bits, Mapping) else (free_bits,)
        if any(floor < 0 for floor in floors):
            raise ValueError(f"free_bits must be at least 0 nats, got {free_bits}")
        self.free_bits, self.capacity = free_bits, dict(capacity or {})
        super().__init__(num_particles=1)

    def loss_with_mutable_state(
        self, rng_key: Key[Array, ""], param_map: dict[str, Any], model: Any, guide: Any, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """The loss of one draw of the latents, in the form that NumPyro's SVI calls for."""
        terms = self.terms(rng_key, param_map, model, guide, *args, **kwargs)
        return {"loss": sum((jnp.sum(term) for term in terms.values()), start=jnp.zeros(())), "mutable_state": None}

    def terms(
        self, rng_key: Key[Array, ""], param_map: dict[str, Any], model: Any, guide: Any, *args: Any, **kwargs: Any
    ) -> dict[str, Array]:
        """The loss by site, in nats per observation: KL per axis at latent sites, a scalar at observed ones."""
        model_trace, guide_trace = traces(rng_key, param_map, model, guide, *args, **kwargs)
        terms = {}
        for name, site in model_trace.items():
            if site["type"] != "sample":
                continue
            weight, count = _weight_per_observation(site, model_trace)
            if site["is_observed"]:
                terms[name] = -weight * jnp.sum(site["fn"].log_prob(site["value"]))
                continue
            if not site["cond_indep_stack"]:
                terms[name] = weight * shared_kl(guide_trace[name]["fn"], site["fn"], site["value"])
                continue
            kl = weight * site_kl(guide_trace[name]["fn"], site["fn"], site["value"]).sum(0)
            floor = self.free_bits.get(name, 0.0) if isinstance(self.free_bits, Mapping) else self.free_bits
            terms[name] = jnp.maximum(kl, floor * weight * count) if floor else kl
            if name in self.capacity:
                terms[name] = jnp.abs(jnp.sum(kl, keepdims=True) - self.capacity[name] * weight * count)
        return terms


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


def _weight_per_observation(site: dict[str, Any], model_trace: dict[str, Any]) -> tuple[Array | float, int]:
    """The factor of one observation's term in the loss, and the number of observations in the batch.

    A site's scale is β times total / batch, by which a subsampling plate lets a batch stand for all observations.
    """
    scale = 1.0 if site["scale"] is None else site["scale"]
    total, _ = model_trace["obs"]["args"]
    return scale / total, site["fn"].batch_shape[0] if site["cond_indep_stack"] else 1


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


def shared_kl(q: dist.Distribution, p: dist.Distribution, value: Float[Array, "*event"]) -> Float[Array, ""]:
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
    while isinstance(fn, dist.Independent | dist.ExpandedDistribution):
        fn = fn.base_dist
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
