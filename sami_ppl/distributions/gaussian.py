"""Gaussians by any square root of their covariance, and what other distributions' Gaussians have as one."""

from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from numpyro import distributions as dist
from numpyro.distributions import constraints

from sami_ppl.distributions.supports import normal_base


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


def gaussian_root(q: Any) -> Float[Array, "*batch d d"] | None:
    """A with covariance A Aᵀ of a Gaussian over vectors; None for other distributions."""
    if (base := normal_base(q)) is not None:
        scale = jnp.broadcast_to(jnp.asarray(base.scale), q.shape())
        return scale[..., None] * jnp.eye(scale.shape[-1], dtype=scale.dtype)
    if isinstance(q, RootedNormal):
        return q.root
    if isinstance(q, dist.MultivariateNormal):
        return cast(Array, q.scale_tril)
    if isinstance(q, dist.LowRankMultivariateNormal):
        return jnp.linalg.cholesky(q.covariance_matrix)
    return None


class Affine(dist.Distribution):
    """Law of loc + scale · u, u ~ `base` over vectors (d,); its mean and variance are those of `base`, moved."""

    support = cast(Any, constraints.real_vector)
    arg_constraints: dict = {}
    pytree_data_fields = ("base", "loc", "scale")
    reparametrized_params = list(pytree_data_fields)

    def __init__(self, base: dist.Distribution, loc: Float[Array, "*batch d"], scale: Float[Array, "*batch d"]):
        self.base, self.loc, self.scale = base, loc, scale
        batch = jnp.broadcast_shapes(base.batch_shape, jnp.shape(loc)[:-1], jnp.shape(scale)[:-1])
        super().__init__(batch, base.event_shape, validate_args=False)

    @property
    def mean(self) -> Float[Array, "*batch d"]:
        """The mean."""
        return self.loc + self.scale * jnp.asarray(self.base.mean)

    @property
    def variance(self) -> Float[Array, "*batch d"]:
        """The variance of every coordinate."""
        return self.scale**2 * jnp.asarray(self.base.variance)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draws of shape sample_shape + batch_shape + (d,)."""
        return self.loc + self.scale * jnp.asarray(self.base.sample(key, sample_shape))

    def log_prob(self, value: Array, intermediates: None = None) -> Array:
        """Log density in nats."""
        log_scale = jnp.sum(jnp.broadcast_to(jnp.log(self.scale), jnp.shape(value)), -1)
        return jnp.asarray(self.base.log_prob((value - self.loc) / self.scale)) - log_scale
