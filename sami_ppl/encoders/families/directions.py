"""Directions: projected Gaussians on the circle and the sphere."""

import math
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpy as np
from numpyro import distributions as dist
from numpyro.distributions import constraints

from sami_ppl.encoders.families.base import AbstractFamily
from sami_ppl.priors.sites import Direction, LatentSite


class Directions(AbstractFamily):
    """Projected Gaussians: independent directions on the circle (angles) or the sphere (unit vectors in 3 dimensions).

    The code of a direction is the unit vector, (cos, sin) of an angle. Concentrations are at most 1 / `min_scale`, so
    that directions are uncertain by at least `min_scale` radians.
    """

    concentration: eqx.nn.Linear
    shape: tuple[int, int] = eqx.field(static=True)
    most: float = eqx.field(static=True)

    def __init__(self, features: int, site: LatentSite, *, min_scale: float = 0.03, key: Key[Array, ""]):
        if not isinstance(site, Direction):
            raise ValueError(
                f"prior site {site.name!r} has no directions: Directions is for dist.VonMises (angles) and "
                "dist.ProjectedNormal (unit vectors); leave it out of families"
            )
        dim = site.dimension
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

    @property
    def mean(self) -> Float[Array, "*batch k_dim"]:
        """The mean vectors, inside the circle or sphere."""
        return self._moments()[0]

    @property
    def variance(self) -> Float[Array, "*batch k_dim"]:
        """The variance of every coordinate."""
        return self._moments()[1]

    def _moments(self) -> tuple[Array, Array]:
        # The mean of a projected Gaussian by quadrature over its angle from its own direction.
        parameters = self.concentration
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
        return mean.reshape(flat), jnp.maximum(variance, 1e-12).reshape(flat)

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
