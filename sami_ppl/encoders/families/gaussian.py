"""Gaussian families: independent coordinates, a low-rank covariance, a full one."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpy as np
from numpyro import distributions as dist

from sami_ppl.encoders.families.base import AbstractFamily, squashed_scale
from sami_ppl.priors.sites import LatentSite


class Diagonal(AbstractFamily):
    """Gaussian with independent coordinates, scales between `min_scale` and 2."""

    loc: eqx.nn.Linear
    scale: eqx.nn.Linear
    min_scale: float = eqx.field(static=True)

    def __init__(self, features: int, site: LatentSite, *, min_scale: float = 0.03, key: Key[Array, ""]):
        loc_key, scale_key = jax.random.split(key)
        self.loc = eqx.nn.Linear(features, site.size, key=loc_key)
        self.scale = eqx.nn.Linear(features, site.size, key=scale_key)
        self.min_scale = min_scale

    def parameters(self, features: Float[Array, " features"]) -> tuple[Array, Array]:
        return self.loc(features), squashed_scale(self.scale(features), self.min_scale)

    def distribution(self, parameters: tuple[Array, Array]) -> dist.Distribution:
        return dist.Normal(*parameters).to_event(1)


class LowRank(AbstractFamily):
    """Gaussian with covariance diag(s²) + U Uᵀ, U of `rank` columns."""

    diagonal: Diagonal
    factor: eqx.nn.Linear
    rank: int = eqx.field(static=True)

    def __init__(self, features: int, site: LatentSite, *, rank: int = 2, min_scale: float = 0.03, key: Key[Array, ""]):
        if rank < 1:
            raise ValueError(f"rank must be positive, got {rank}")
        diagonal_key, factor_key = jax.random.split(key)
        self.diagonal = Diagonal(features, site, min_scale=min_scale, key=diagonal_key)
        linear = eqx.nn.Linear(features, site.size * rank, key=factor_key)
        # Not zero, where U Uᵀ has no gradient.
        self.factor = eqx.tree_at(lambda one: one.weight, linear, 0.1 * linear.weight)
        self.rank = rank

    def parameters(self, features: Float[Array, " features"]) -> tuple[Array, Array, Array]:
        loc, scale = self.diagonal.parameters(features)
        return loc, scale, self.factor(features).reshape(-1, self.rank)

    def distribution(self, parameters: tuple[Array, Array, Array]) -> dist.Distribution:
        loc, scale, factor = parameters
        return dist.LowRankMultivariateNormal(loc, cov_factor=factor, cov_diag=scale**2)


class Full(AbstractFamily):
    """Gaussian with any covariance, by its Cholesky factor."""

    diagonal: Diagonal
    lower: eqx.nn.Linear | None
    size: int = eqx.field(static=True)

    def __init__(self, features: int, site: LatentSite, *, min_scale: float = 0.03, key: Key[Array, ""]):
        diagonal_key, lower_key = jax.random.split(key)
        self.diagonal = Diagonal(features, site, min_scale=min_scale, key=diagonal_key)
        self.size = site.size
        below = site.size * (site.size - 1) // 2
        self.lower = eqx.nn.Linear(features, below, key=lower_key) if below else None

    def parameters(self, features: Float[Array, " features"]) -> tuple[Array, Array]:
        loc, scale = self.diagonal.parameters(features)
        factor = jnp.diag(scale)
        if self.lower is not None:
            factor = factor.at[np.tril_indices(self.size, -1)].set(self.lower(features))
        return loc, factor

    def distribution(self, parameters: tuple[Array, Array]) -> dist.Distribution:
        loc, factor = parameters
        return dist.MultivariateNormal(loc, scale_tril=factor)
