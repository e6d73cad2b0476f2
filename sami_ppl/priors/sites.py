"""The sites of a prior: what each lives on, its place in the code z, and the laws that its values can have.

Coordinates of z are unconstrained, but for directions, whose code is the unit vector, and discrete sites, whose code is
one-hot.
"""

import abc
from collections.abc import Mapping
from dataclasses import dataclass, field
import itertools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np
from numpyro import distributions as dist
from numpyro.distributions.transforms import AffineTransform, IndependentTransform, ReshapeTransform, Transform

from sami_ppl.distributions.gaussian import RootedNormal
from sami_ppl.distributions.supports import elementwise_transform, is_unbounded, normal_base


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class LatentSite(abc.ABC):
    """One site of the prior and its place in the code z.

    `standard`: a fixed Normal, so that the prior of z is N(0, I). `parents`: the sites that its law depends on
    directly. `kinds`: the discrete sites that a continuous site's prior depends on, through others too. `law`: the
    prior's in plain values, with its numbers where these are fixed. `coords`: dim → labels of its values, where the
    prior gives them. A code is (value in unconstrained space − `shift`) / `scale`.
    """

    name: str
    event_shape: tuple[int, ...]
    dims: tuple[str, ...]
    transform: Transform
    unconstrained_shape: tuple[int, ...]
    start: int
    shift: np.ndarray
    scale: np.ndarray
    standard: bool = False
    parents: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    law: Mapping[str, Any] = field(default_factory=dict)
    coords: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of coordinates of the code."""
        return math.prod(self.unconstrained_shape)

    @property
    def code(self) -> slice:
        """The coordinates of the code z that belong to this site."""
        return slice(self.start, self.start + self.size)

    @property
    @abc.abstractmethod
    def family(self) -> str:
        """The family of posteriors that suits it, by its name in `sami_ppl.families`."""

    @property
    def why_not_gaussian(self) -> str:
        """Why no Gaussian, and no family but its own, can be its posterior; empty where one can."""
        return ""

    @property
    def clusters(self) -> int:
        """How many kinds of values there are: components of a mixture prior, values of a discrete site; else 1."""
        return 1

    @property
    def axes(self) -> tuple[str, ...]:
        """One label per coordinate: the site's name, indexed where it has several, by the labels of its dims."""
        if self.unconstrained_shape == ():
            return (self.name,)
        shape = self.unconstrained_shape
        # Unconstrained coordinates of a simplex, or one-hot ones, are not those that the prior's labels name.
        own = self.coords if shape == self.event_shape else {}
        dims = self.dims if shape == self.event_shape else ("",) * len(shape)
        labels = [own.get(dim, range(size)) for dim, size in zip(dims, shape, strict=True)]
        return tuple(f"{self.name}[{','.join(map(str, label))}]" for label in itertools.product(*labels))

    def __repr__(self) -> str:
        shape = "×".join(map(str, self.event_shape)) or "scalar"
        law = f", {self.law['kind']}" if "kind" in self.law else ""
        return f"{type(self).__name__}({self.name!r}, {shape}{law}, {type(self.transform).__name__})"

    def to_code(self, value: Float[Array, "*batch_and_event"]) -> Float[Array, "*batch d"]:
        """Site value → its coordinates of z."""
        batch = value.shape[: value.ndim - len(self.event_shape)]
        unconstrained = jnp.asarray(self.transform.inv(value)).reshape((*batch, self.size))
        dtype = unconstrained.dtype
        return (unconstrained - jnp.asarray(self.shift, dtype)) / jnp.asarray(self.scale, dtype)

    def from_code(self, z: Float[Array, "*batch d"]) -> Float[Array, "*batch_and_event"]:
        """Coordinates of z → site value."""
        unconstrained = jnp.asarray(self.shift, z.dtype) + jnp.asarray(self.scale, z.dtype) * z
        return jnp.asarray(self.transform(unconstrained.reshape(z.shape[:-1] + self.unconstrained_shape)))

    def onto_support(self, z: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """The nearest code that a value has."""
        return z

    def value_law(self, q: dist.Distribution) -> dist.Distribution:
        """Law of the site's value, from that of its code, with the closed forms that Gaussians have."""
        if (base := normal_base(q)) is not None:
            return self._of_independent(jnp.asarray(base.loc), jnp.asarray(base.scale))
        if isinstance(q, RootedNormal):
            return self._of_gaussian(jnp.asarray(q.loc), q.root, RootedNormal)
        if type(q) is dist.MultivariateNormal:
            return self._of_gaussian(jnp.asarray(q.loc), jnp.asarray(q.scale_tril), _by_lower_root)
        steps: list[Any] = [*self._from_code_steps(), ReshapeTransform(self.unconstrained_shape, (self.size,))]
        steps += [] if is_unbounded(self.transform) else [self.transform]
        return dist.TransformedDistribution(q, steps)

    def _from_code_steps(self) -> list[Transform]:
        shift, scale = jnp.asarray(self.shift), jnp.asarray(self.scale)
        return [IndependentTransform(AffineTransform(shift, scale), 1)]

    def _of_independent(self, loc: Array, scale: Array) -> dist.Distribution:
        shape = loc.shape[:-1] + self.unconstrained_shape
        shift, spread = (jnp.asarray(p, loc.dtype) for p in (self.shift, self.scale))
        base = dist.Normal((shift + spread * loc).reshape(shape), (spread * scale).reshape(shape))
        dims = len(self.unconstrained_shape)
        elementwise = elementwise_transform(self.transform)
        if elementwise is None:
            return dist.TransformedDistribution(base.to_event(dims), self.transform)
        # Elements independent in unconstrained space stay so on the support: KL terms are then kept per axis, in
        # closed form where the support is all of space.
        on_support = base if is_unbounded(elementwise) else dist.TransformedDistribution(base, elementwise)
        return on_support.to_event(dims)

    def _of_gaussian(self, loc: Array, root: Array, law: Any) -> dist.Distribution:
        shift, spread = (jnp.asarray(p, loc.dtype) for p in (self.shift, self.scale))
        if self.unconstrained_shape == ():
            base = dist.Normal((shift + spread * loc)[..., 0], (spread * root[..., 0])[..., 0])
            return base if is_unbounded(self.transform) else dist.TransformedDistribution(base, self.transform)
        base = law(shift + spread * loc, spread[:, None] * root)
        if len(self.unconstrained_shape) > 1:
            base = dist.TransformedDistribution(base, ReshapeTransform(self.unconstrained_shape, (self.size,)))
        return base if is_unbounded(self.transform) else dist.TransformedDistribution(base, self.transform)


def _by_lower_root(loc: Array, root: Array) -> dist.Distribution:
    return dist.MultivariateNormal(loc, scale_tril=root)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Euclidean(LatentSite):
    """A site whose support is mapped onto all of space by a bijection. `components`: of a mixture prior, else 1."""

    components: int = 1

    @property
    def family(self) -> str:
        return "Mixture" if self.components > 1 else "Diagonal"

    @property
    def clusters(self) -> int:
        return self.components


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Relaxed(LatentSite):
    """A relaxed categorical at a `temperature`, whose code are log ratios."""

    temperature: float

    @property
    def family(self) -> str:
        return "RelaxedCategorical"


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Direction(LatentSite):
    """Angles or unit vectors: the code of an angle is (cos, sin), that of a unit vector itself."""

    manifold: Literal["circle", "sphere"]

    @property
    def family(self) -> str:
        return "Directions"

    @property
    def why_not_gaussian(self) -> str:
        return f"lives on a {self.manifold}, where a Gaussian would tear"

    @property
    def dimension(self) -> int:
        """Coordinates of one unit vector."""
        return self.unconstrained_shape[-1]

    def onto_support(self, z: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """Vectors get length 1."""
        vectors = z.reshape(*z.shape[:-1], -1, self.dimension)
        length = jnp.sqrt(jnp.sum(vectors**2, -1, keepdims=True) + 1e-12)
        return (vectors / length).reshape(z.shape)

    def _from_code_steps(self) -> list[Transform]:
        return []  # of length 1 as they are: moved and spread they would not be


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Discrete(LatentSite):
    """A site with finitely many values, `categories` of them, whose code is one-hot."""

    categories: int

    @property
    def family(self) -> str:
        return "Categorical"

    @property
    def why_not_gaussian(self) -> str:
        return f"is discrete, with {self.categories} values"

    @property
    def clusters(self) -> int:
        return self.categories

    def onto_support(self, z: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """The largest coordinate is 1, the others 0."""
        return jax.nn.one_hot(jnp.argmax(z, -1), self.categories, dtype=z.dtype)

    def value_law(self, q: Any) -> dist.Distribution:
        return dist.CategoricalLogits(q.log_probs)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Process(LatentSite):
    """A process over time, whose frames have the prior N(0, I) each; its values are its code."""

    @property
    def family(self) -> str:
        return "Diagonal"

    def value_law(self, q: dist.Distribution) -> dist.Distribution:
        return q if q.event_shape == self.event_shape else super().value_law(q)
