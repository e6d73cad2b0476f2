"""Families of noisy posteriors: what q(z | x_λ, λ) of one site of the prior may look like.

A family is a head on the features of the encoder's network. It lives in the coordinates of the code z, and its log
density can be evaluated at any z and differentiated in x_λ, which guidance needs; draws are differentiable in the
features, which training needs. As noise grows, the exact noisy posterior tends to the prior itself: a family suits a
prior if it can represent that too (see `diagnostics.noise_end_kl`).

| family | for |
|---|---|
| `Diagonal` | independent coordinates (default) |
| `LowRank`, `Full` | coordinates that depend on each other given an observation |
| `Mixture` | several modes: mixture priors (their default), ambiguous observations |
| `Directions` | angles and unit vectors (their default) |
"""

import abc
from collections.abc import Callable, Mapping
import math
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpy as np
from numpyro import distributions as dist
from numpyro.distributions import constraints

from sami_ppl.prior import Latents, LatentSite


class AbstractFamily(eqx.Module):
    """q of the code of one site, given the features of one observation."""

    @abc.abstractmethod
    def parameters(self, features: Float[Array, " features"]) -> Any:
        """Parameters of q for one observation, a tree of arrays."""

    @abc.abstractmethod
    def distribution(self, parameters: Any) -> dist.Distribution:
        """Law of the site's d coordinates of z, event shape (d,); leading dims of the parameters are its batch."""

    @abc.abstractmethod
    def moments(self, parameters: Any) -> tuple[Float[Array, "*batch d"], Float[Array, "*batch d"]]:
        """Mean and standard deviation of every coordinate of z under q."""


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

    def moments(self, parameters: tuple[Array, Array]) -> tuple[Array, Array]:
        return parameters


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

    def moments(self, parameters: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        loc, scale, factor = parameters
        return loc, jnp.sqrt(scale**2 + jnp.sum(factor**2, -1))


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

    def moments(self, parameters: tuple[Array, Array]) -> tuple[Array, Array]:
        loc, factor = parameters
        return loc, jnp.sqrt(jnp.sum(factor**2, -1))


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
        self.components = components or (site.components if site.components > 1 else 4)
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

    def moments(self, parameters: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        log_weights, loc, scale = parameters
        weights = jnp.exp(log_weights)[..., None]
        mean = jnp.sum(weights * loc, -2)
        variance = jnp.sum(weights * (scale**2 + (loc - mean[..., None, :]) ** 2), -2)
        return mean, jnp.sqrt(variance)


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


class Directions(AbstractFamily):
    """Projected Gaussians: independent directions on the circle (angles) or the sphere (unit vectors in 3 dimensions).

    The code of a direction is the unit vector, (cos, sin) of an angle. Concentrations are at most 1 / `min_scale`, so
    that directions are uncertain by at least `min_scale` radians.
    """

    concentration: eqx.nn.Linear
    shape: tuple[int, int] = eqx.field(static=True)
    most: float = eqx.field(static=True)

    def __init__(self, features: int, site: LatentSite, *, min_scale: float = 0.03, key: Key[Array, ""]):
        if site.manifold is None:
            raise ValueError(
                f"prior site {site.name!r} has no directions: Directions is for dist.VonMises (angles) and "
                "dist.ProjectedNormal (unit vectors); leave it out of families"
            )
        dim = site.unconstrained_shape[-1]
        if dim not in (2, 3):
            raise ValueError(
                f"prior site {site.name!r} has unit vectors in {dim} dimensions: the density of a projected Gaussian "
                "is known in 2 and 3"
            )
        self.concentration = eqx.nn.Linear(features, site.size, key=key)
        self.shape, self.most = (site.size // dim, dim), 1 / min_scale

    def parameters(self, features: Float[Array, " features"]) -> Array:
        raw = self.concentration(features).reshape(self.shape)
        length = jnp.sqrt(jnp.sum(raw**2, -1, keepdims=True) + 1e-12)
        return raw * (self.most * jnp.tanh(length / self.most) / length)

    def distribution(self, parameters: Array) -> dist.Distribution:
        return ProjectedNormals(parameters)

    def moments(self, parameters: Array) -> tuple[Array, Array]:
        # The mean of a projected Gaussian by quadrature over its angle from its own direction.
        length = jnp.linalg.norm(parameters, axis=-1, keepdims=True)
        dim = parameters.shape[-1]
        nodes, rule = np.polynomial.legendre.leggauss(64)
        angle = np.pi / 2 * (nodes + 1)
        log_density = projected_normal_log_prob(length * np.cos(angle), length, dim)
        weight = jnp.exp(log_density) * rule * (np.pi / 2) * (2 if dim == 2 else 2 * np.pi * np.sin(angle))
        weight = weight / jnp.sum(weight, -1, keepdims=True)
        resultant = jnp.sum(weight * np.cos(angle), -1, keepdims=True)
        mean = resultant * parameters / jnp.maximum(length, 1e-12)
        along = jnp.sum(weight * np.cos(angle) ** 2, -1, keepdims=True)
        across = (1 - along) / (dim - 1)
        unit = parameters / jnp.maximum(length, 1e-12)
        variance = across + (along - across) * unit**2 - mean**2
        flat = (*parameters.shape[:-2], -1)
        return mean.reshape(flat), jnp.sqrt(jnp.maximum(variance, 1e-12)).reshape(flat)


class ProjectedNormals(dist.Distribution):
    """Independent directions u = v/‖v‖, v ~ N(concentration, I), as one vector of length k · dim.

    NumPyro's `ProjectedNormal` has the same law; its density loses all digits where a direction lies opposite to a
    high concentration, which guidance meets.
    """

    support = cast(Any, constraints.real_vector)
    arg_constraints: dict = {}
    pytree_data_fields = ("concentration",)
    reparametrized_params = list(pytree_data_fields)

    def __init__(self, concentration: Float[Array, "*batch k dim"]):
        self.concentration = concentration
        shape = jnp.shape(concentration)
        super().__init__(shape[:-2], (math.prod(shape[-2:]),), validate_args=False)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draws of shape sample_shape + batch_shape + (k · dim,)."""
        shape = sample_shape + jnp.shape(self.concentration)
        v = self.concentration + jax.random.normal(key, shape, self.concentration.dtype)
        unit = v / jnp.sqrt(jnp.sum(v**2, -1, keepdims=True) + 1e-12)
        return unit.reshape(sample_shape + self.batch_shape + self.event_shape)

    def log_prob(self, value: Array, intermediates: None = None) -> Array:
        """Log density with respect to length of arc or area of the sphere, in nats."""
        k, dim = jnp.shape(self.concentration)[-2:]
        value = value.reshape(*jnp.shape(value)[:-1], k, dim)
        along = jnp.sum(value * self.concentration, -1)
        length = jnp.sqrt(jnp.sum(self.concentration**2, -1) + 1e-24)
        return jnp.sum(projected_normal_log_prob(along, length, dim), -1)


def projected_normal_log_prob(along: Array, length: Array, dim: int) -> Array:
    """Log density of a projected Gaussian in 2 or 3 dimensions, by the direction's component along the mean.

    With t = ⟨u, c⟩: log ∫₀^∞ r^(dim−1) φ(r − t) dr − (‖c‖² − t²)/2 − (dim − 1)/2 log 2π. The integral is φ + tΦ, or
    tφ + (1 + t²)Φ; both cancel to nothing for t ≪ 0, where their asymptotic series are used instead.
    """
    far = along < -5.0
    t = jnp.where(far, 0.0, along)
    pdf, cdf = jax.scipy.stats.norm.pdf(t), jax.scipy.stats.norm.cdf(t)
    near = jnp.log(pdf + t * cdf) if dim == 2 else jnp.log(t * pdf + (1 + t**2) * cdf)
    u = jnp.where(far, along, -5.0) ** -2
    # ∫₀^∞ r^(dim−1) e^(−rs − r²/2) dr by powers of 1/s, s = −t; their Padé form is good to 5e-4 from s = 5 on.
    if dim == 2:
        series = (1 + 7 * u) / (1 + 10 * u + 15 * u**2)
    else:
        series = 2 * (1 + 32 / 3 * u) / (1 + 50 / 3 * u + 55 * u**2)
    tail = jax.scipy.stats.norm.logpdf(jnp.where(far, along, -5.0)) + 0.5 * dim * jnp.log(u) + jnp.log(series)
    radial = jnp.where(far, tail, near)
    return radial - 0.5 * (length**2 - along**2) - 0.5 * (dim - 1) * math.log(2 * math.pi)


def default_family(site: LatentSite) -> type[AbstractFamily]:
    """The family that suits a site of a prior unless another is asked for."""
    if site.manifold is not None:
        return Directions
    return Mixture if site.components > 1 else Diagonal


def choose_families(latents: Latents, families: Mapping[str, Callable] | None) -> dict[str, Callable]:
    """The family of every site: the one given, else the one that suits it.

    Raises ValueError for a site that the prior has not, and for a family that cannot live on a site's support.
    """
    given = dict(families or {})
    names = [site.name for site in latents.sites]
    if unknown := sorted(set(given) - set(names)):
        raise ValueError(f"families names {', '.join(unknown)}, but the prior's sites are {', '.join(names)}")
    chosen = {site.name: given.get(site.name, default_family(site)) for site in latents.sites}
    for site in latents.sites:
        family = chosen[site.name]
        if site.manifold is not None and Directions not in (family, getattr(family, "func", None)):
            raise ValueError(
                f"prior site {site.name!r} lives on a {site.manifold}, where a Gaussian would tear: leave it out of "
                "families, or give families.Directions"
            )
    return chosen


def check_min_scale(min_scale: float) -> None:
    """Raise ValueError unless the least scale lies between 0 and the prior's own spread."""
    if not 0 < min_scale < 1:
        raise ValueError(f"min_scale must lie between 0 and 1, the prior's own spread, got {min_scale}")


def squashed_scale(raw: Float[Array, "*d"], min_scale: float) -> Float[Array, "*d"]:
    """A standard deviation between `min_scale` and 2, 1 where `raw` is 0."""
    low, high = math.log(min_scale), math.log(2.0)
    return jnp.exp(low + (high - low) * jax.nn.sigmoid(raw + math.log(-low / high)))
