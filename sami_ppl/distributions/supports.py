"""Supports of the prior's sites: what they live on, and how the code reaches it."""

from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array
import numpy as np
from numpyro import distributions as dist
from numpyro.distributions import constraints
from numpyro.distributions.transforms import IdentityTransform, IndependentTransform, ParameterFreeTransform, Transform


class AngleTransform(ParameterFreeTransform):
    """(cos θ, sin θ) → θ in [−π, π): the coordinates of the code in which an angle does not tear."""

    @property
    def domain(self) -> constraints.Constraint:
        """Unit vectors."""
        return constraints.sphere

    @property
    def codomain(self) -> constraints.Constraint:
        """Angles."""
        return constraints.circular

    def __call__(self, x: Array) -> Array:
        return jnp.arctan2(x[..., 1], x[..., 0])

    def _inverse(self, y: Array) -> Array:
        return jnp.stack([jnp.cos(y), jnp.sin(y)], axis=-1)

    def log_abs_det_jacobian(self, x: Array, y: Array, intermediates: None = None) -> Array:
        """0: an arc is as long as its angle."""
        return jnp.zeros_like(y)

    def forward_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[:-1]

    def inverse_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape, 2)


def manifold(support: Any) -> tuple[Literal["circle", "sphere"] | None, Transform | None]:
    """What a site of directions lives on, and the transform from its code; (None, None) for others."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if support is constraints.circular:
        return "circle", AngleTransform()
    return ("sphere", IdentityTransform()) if support is constraints.sphere else (None, None)


def normal_base(fn: Any) -> dist.Normal | None:
    """The Normal of the single elements, where a distribution is that of independent ones; else None."""
    fn = unwrapped(fn, masks=False)
    return fn if isinstance(fn, dist.Normal) else None


def unwrapped(fn: Any, *, masks: bool = True) -> Any:
    """A distribution without what plates and `to_event` wrap it in, nor, unless `masks` is False, masks.

    A mask changes the density, so that closed forms of the law inside would be of another one.
    """
    wrappers = (dist.Independent, dist.ExpandedDistribution, *([dist.MaskedDistribution] if masks else []))
    while isinstance(fn, wrappers):
        fn = fn.base_dist
    return fn


def described(fn: Any, *, numbers: bool = True) -> dict[str, Any]:
    """A distribution or transform in plain values: its kind, those that it is made of, and its `numbers`, if asked."""
    fn = unwrapped(fn)
    found: dict[str, Any] = {"kind": type(fn).__name__}
    for name, value in vars(fn).items():
        parts = value if isinstance(value, list | tuple) else [value]
        if parts and all(isinstance(part, dist.Distribution | Transform) for part in parts):
            found[name] = [described(part, numbers=numbers) for part in parts]
        elif numbers and not name.startswith("_") and isinstance(value, int | float | np.ndarray | Array):
            found[name] = np.asarray(value, float).tolist()
    return found


def mixture_components(fn: Any) -> int:
    """The number of components of a mixture; 1 for other distributions."""
    fn = unwrapped(fn)
    return fn.mixture_size if isinstance(fn, dist.MixtureSameFamily | dist.MixtureGeneral) else 1


def elementwise_transform(transform: Transform) -> Transform | None:
    """The transform of single elements, where a site's transform acts on each alone; None otherwise."""
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    return transform if transform.domain.event_dim == 0 else None


def is_unbounded(transform: Transform) -> bool:
    """Whether a site lives in unconstrained space already, so that closed forms for it may be used."""
    return isinstance(elementwise_transform(transform), IdentityTransform)
