"""Mixtures of Gaussians, with draws that are differentiable in everything."""

from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
from numpyro import distributions as dist
from numpyro.distributions import constraints

from sami_ppl.encoders.families.base import AbstractFamily, squashed_scale
from sami_ppl.priors.sites import LatentSite


class Mixture(AbstractFamily):
    """Mixture of Gaussians with independent coordinates.

    `components` is the number of the prior's own where that is a mixture, else 4, unless given.
    """

    weights: eqx.nn.Linear
    loc: eqx.nn.Linear
    scale: eqx.nn.Linear
    components: int = eqx.field(static=True)
    min_scale: float = eqx.field(static=True)

    def __init__(
        self,
        features: int,
        site: LatentSite,
        *,
        components: int | None = None,
        min_scale: float = 0.03,
        key: Key[Array, ""],
    ):
        self.components = components or (site.clusters if site.clusters > 1 else 4)
        weight_key, loc_key, scale_key, spread_key = jax.random.split(key, 4)
        self.weights = eqx.nn.Linear(features, self.components, key=weight_key)
        loc = eqx.nn.Linear(features, self.components * site.size, key=loc_key)
        # Components that start in one place stay there.
        apart = jax.random.normal(spread_key, loc.bias.shape) if loc.bias is not None else None
        self.loc = eqx.tree_at(lambda one: one.bias, loc, apart)
        self.scale = eqx.nn.Linear(features, self.components * site.size, key=scale_key)
        self.min_scale = min_scale

    def parameters(self, features: Float[Array, " features"]) -> tuple[Array, Array, Array]:
        shape = (self.components, -1)
        scale = squashed_scale(self.scale(features), self.min_scale)
        return jax.nn.log_softmax(self.weights(features)), self.loc(features).reshape(shape), scale.reshape(shape)

    def distribution(self, parameters: tuple[Array, Array, Array]) -> dist.Distribution:
        return DiagonalMixture(*parameters)


class DiagonalMixture(dist.Distribution):
    """Mixture of Gaussians with independent coordinates, whose draws are differentiable in all parameters.

    NumPyro's mixtures are not: which component a draw is from has no derivative. Implicit reparametrisation gives one
    (Figurnov, Mohamed & Mnih 2018): with F_i(z_i | z_<i) the conditional distribution functions, F_i stays what it is
    as the parameters move, so that dz_i = −dF_i / p_i(z_i | z_<i).

    `log_weights` (…, K), normalised; `loc` and `scale` (…, K, d).
    """

    support = cast(Any, constraints.real_vector)
    arg_constraints: dict = {}
    pytree_data_fields = ("log_weights", "loc", "scale")
    reparametrized_params = list(pytree_data_fields)

    def __init__(self, log_weights: Array, loc: Array, scale: Array):
        self.log_weights, self.loc, self.scale = log_weights, loc, scale
        super().__init__(jnp.shape(log_weights)[:-1], jnp.shape(loc)[-1:], validate_args=False)

    @property
    def mean(self) -> Float[Array, "*batch d"]:
        """The mean."""
        return jnp.sum(jnp.exp(self.log_weights)[..., None] * self.loc, -2)

    @property
    def variance(self) -> Float[Array, "*batch d"]:
        """The variance of every coordinate."""
        weights = jnp.exp(self.log_weights)[..., None]
        return jnp.sum(weights * (self.scale**2 + (self.loc - self.mean[..., None, :]) ** 2), -2)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draws of shape sample_shape + batch_shape + (d,)."""
        shape = sample_shape + self.batch_shape
        which_key, noise_key = jax.random.split(key)
        which = jax.random.categorical(which_key, self.log_weights, shape=shape)[..., None, None]
        loc, scale = (
            jnp.take_along_axis(jnp.broadcast_to(p, shape + p.shape[-2:]), which, -2)[..., 0, :]
            for p in (self.loc, self.scale)
        )
        noise = jax.random.normal(noise_key, shape + self.event_shape, loc.dtype)
        return self._differentiable(jax.lax.stop_gradient(loc + scale * noise))

    def _differentiable(self, draw: Array) -> Array:
        log_weights, coordinates = self.log_weights, []
        for i in range(draw.shape[-1]):
            loc, scale, at = self.loc[..., i], self.scale[..., i], draw[..., i]
            weights = jax.nn.softmax(log_weights)
            standard = (at[..., None] - loc) / scale
            cdf = jnp.sum(weights * jax.scipy.stats.norm.cdf(standard), -1)
            density = jnp.sum(weights * jax.scipy.stats.norm.pdf(standard) / scale, -1)
            moved = at - (cdf - jax.lax.stop_gradient(cdf)) / jax.lax.stop_gradient(density + 1e-12)
            coordinates.append(moved)
            log_weights = log_weights + jax.scipy.stats.norm.logpdf(moved[..., None], loc, scale)
        return jnp.stack(coordinates, -1)

    def log_prob(self, value: Array, intermediates: None = None) -> Array:
        """Log density in nats."""
        each = jax.scipy.stats.norm.logpdf(value[..., None, :], self.loc, self.scale).sum(-1)
        return jax.nn.logsumexp(self.log_weights + each, -1)
