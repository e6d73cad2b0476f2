"""What SVI minimises: the negative evidence bound per observation, in nats, with free bits.

`ScoreELBO` gives what NumPyro's `TraceMeanField_ELBO` gives divided by the number of observations, with three
additions: KL terms are kept per latent axis where they have a closed form; each may be held at a floor; and discrete
sites are summed over (as in `TraceEnum_ELBO`), each observation with its own weights q(kind | x), so that gradients are
exact and the KL of a discrete site is in closed form.

Cost of K combinations of values: model and guide are mapped over them by `jax.vmap`, with the same noise, so that what
does not depend on the value is computed once: the denoiser, and the encoder up to its densities. The gradient of log q,
K of them, and what follows from it are computed K times.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
from numpyro import handlers
from numpyro.infer.elbo import ELBO

from sami_ppl.program.kl import global_kl, site_kl, traces


class ScoreELBO(ELBO):
    """Negative evidence bound per observation, in nats.

    `free_bits`: floor of the KL per axis, in nats, averaged over the batch; below it the KL has no gradient, so that
    an axis may keep that much information free of charge (Kingma et al. 2016, app. C.8). It acts per axis on
    Gaussian sites with Gaussian priors, else per site. 0 is the bound itself. A mapping gives each site its own. The
    KL of global sites, shared by all observations, has no floor.

    `capacity`: nats of single sites. Their KL is drawn to it from either side, β |KL − C| (Burgess et al. 2018, eq. 8;
    per group of factors: Dupont 2018).

    `label_weight` α: where the value of a discrete site is known (`obs_mask`), its KL is −log p of that value, and
    −α log q(value | x) is added, which teaches the classifier directly (Kingma et al. 2014, eq. 9); in `terms` under
    `<site> label`. 0 is the bound itself.

    `penalties`: further terms by name, functions of the parameters, the `Scores` and a key, scalars in nats per
    observation (see `fitting.penalties`).
    """

    can_infer_discrete = True  # NumPyro's SVI asks

    def __init__(
        self,
        free_bits: float | Mapping[str, float] = 0.0,
        capacity: Mapping[str, Float[Array, ""] | float] | None = None,
        label_weight: float = 0.0,
        penalties: Mapping[str, "Callable[[dict[str, Any], Scores, Array], Array]"] | None = None,
    ):
        floors = free_bits.values() if isinstance(free_bits, Mapping) else (free_bits,)
        if any(floor < 0 for floor in floors):
            raise ValueError(f"free_bits must be at least 0 nats, got {free_bits}")
        self.free_bits, self.capacity, self.label_weight = free_bits, dict(capacity or {}), label_weight
        self.penalties = dict(penalties or {})
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
        """The loss by site, in nats per observation: KL per axis at latent sites, a scalar at observed ones.

        Then the penalties, by name. Raises ValueError for one that is no single number.
        """
        return self.weighed(scores(rng_key, param_map, model, guide, *args, **kwargs), param_map, rng_key)

    def weighed(
        self,
        scored: "Scores",
        param_map: dict[str, Any],
        rng_key: Key[Array, ""],
        means: Mapping[str, Array] | None = None,
    ) -> dict[str, Array]:
        """`terms` of scores. Where these are of a part of a batch, `means` are the KL terms of the whole of it.

        Floors and capacities act on the mean of a batch: on which side of them it lies is asked of `means`, so that the
        mean over the parts, value and gradient, is that of the whole. Raises ValueError as `terms` does.
        """
        terms = {}
        for name, total in mean_terms(scored).items():
            if scored.trace[name]["is_observed"]:
                terms[name] = total
                continue
            weight, count = _weight_per_observation(scored.trace[name], scored.trace)
            whole = total if means is None else means[name]
            floor = self.free_bits.get(name, 0.0) if isinstance(self.free_bits, Mapping) else self.free_bits
            least = floor * weight * count
            # In this order NaN stays NaN, and the fit ends there.
            terms[name] = jnp.where(whole <= least, least, total) if floor else total
            if name in self.capacity:
                nats = self.capacity[name] * weight * count
                side = jnp.sign(jnp.sum(whole, keepdims=True) - nats)
                terms[name] = side * (jnp.sum(total, keepdims=True) - nats)
            if self.label_weight and name in scored.surprise:
                terms[f"{name} label"] = self.label_weight * jnp.mean(scored.surprise[name])
        for name, kl in scored.global_terms.items():
            terms[name] = _weight_per_observation(scored.trace[name], scored.trace)[0] * kl
        for i, (name, penalty) in enumerate(self.penalties.items()):
            terms[name] = jnp.asarray(penalty(param_map, scored, jax.random.fold_in(rng_key, i)))
            if terms[name].shape != ():
                raise ValueError(
                    f"the penalty {name!r} must be one number, in nats per observation, got shape {terms[name].shape}: "
                    "take its mean over the batch"
                )
        return terms


class Scores(NamedTuple):
    """Terms of the bound before they are weighted, in nats: of each observation, of global sites.

    `local`: minus log densities (obs,) at observed sites, KL (obs, axes) at latent ones. `surprise`: −log q of the
    known values of partly observed sites, (obs,), 0 where there is none. `trace`: the model's, at one draw;
    `guide`: the guide's. `args`, `kwargs`: what both were called with.
    """

    local: dict[str, Array]
    global_terms: dict[str, Array]
    surprise: dict[str, Array]
    trace: dict[str, Any]
    guide: dict[str, Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def scores(
    rng_key: Key[Array, ""], param_map: dict[str, Any], model: Any, guide: Any, *args: Any, **kwargs: Any
) -> Scores:
    """Terms at one draw of the continuous latents, in expectation over the discrete ones."""
    model_trace, guide_trace = traces(rng_key, param_map, model, guide, *args, **kwargs)
    local, global_terms = _score(model_trace, guide_trace)
    sizes = {
        name: len(site["fn"].enumerate_support(expand=False))
        for name, site in guide_trace.items()
        if site["type"] == "sample" and site["fn"].support.is_discrete
    }
    if not sizes:
        return Scores(local, global_terms, {}, model_trace, guide_trace, args, kwargs)
    known = {name: model_trace[name].get("known") for name in sizes}

    def at(values: dict[str, Array]) -> tuple[dict[str, Array], Array, dict[str, Array]]:
        held = {name: jnp.full(guide_trace[name]["value"].shape, value) for name, value in values.items()}
        fixed = handlers.substitute(guide, data=held)
        model_trace, guide_trace_ = traces(rng_key, param_map, model, fixed, *args, **kwargs)
        each, weight, surprise = _score(model_trace, guide_trace_)[0], jnp.ones(()), {}
        for name, value in held.items():
            log_q, log_p = (trace[name]["fn"].log_prob(value) for trace in (guide_trace_, model_trace))
            prob, label = jnp.exp(log_q), known[name]
            each[name] = (log_q - log_p)[:, None]
            if label is not None:
                prob = jnp.where(label >= 0, value == label, prob)
                each[name] = jnp.where(label >= 0, -log_p, log_q - log_p)[:, None]
                surprise[name] = jnp.where(value == label, -log_q, 0.0)
            weight = weight * prob
        return each, weight, surprise

    grid = jnp.meshgrid(*(jnp.arange(size) for size in sizes.values()), indexing="ij")
    each, weight, surprise = jax.vmap(at)(dict(zip(sizes, (axis.reshape(-1) for axis in grid), strict=True)))
    local = {name: jnp.sum(score * weight.reshape(weight.shape + (1,) * (score.ndim - 2)), 0)
             for name, score in each.items()}  # fmt: skip
    # Every other discrete site takes each of its values beside a label: count the label once.
    surprise = {name: value.sum(0) * sizes[name] / len(weight) for name, value in surprise.items()}
    return Scores(local, global_terms, surprise, model_trace, guide_trace, args, kwargs)


def _score(model_trace: dict[str, Any], guide_trace: dict[str, Any]) -> tuple[dict[str, Array], dict[str, Array]]:
    """Terms of each observation and of global sites, at the values of the traces."""
    local, global_terms = {}, {}
    for name, site in model_trace.items():
        if site["type"] != "sample":
            continue
        if site["is_observed"]:
            local[name] = -site["fn"].log_prob(site["value"])
        elif not site["cond_indep_stack"]:
            global_terms[name] = global_kl(guide_trace[name]["fn"], site["fn"], site["value"])
        else:
            local[name] = site_kl(guide_trace[name]["fn"], site["fn"], site["value"])
    return local, global_terms


def mean_terms(scored: Scores) -> dict[str, Array]:
    """Terms of observations as the loss counts them, before floors and capacities: their means times β, by site."""
    weights = {name: _weight_per_observation(scored.trace[name], scored.trace)[0] for name in scored.local}
    return {name: weights[name] * score.sum(0) for name, score in scored.local.items()}


def _weight_per_observation(site: dict[str, Any], model_trace: dict[str, Any]) -> tuple[Array | float, int]:
    """The factor of one observation's term in the loss, and the number of observations in the batch.

    A site's scale is β times total / batch, by which a subsampling plate lets a batch stand for all observations.
    """
    scale = 1.0 if site["scale"] is None else site["scale"]
    total, _ = model_trace["obs"]["args"]
    return scale / total, site["fn"].batch_shape[0] if site["cond_indep_stack"] else 1
