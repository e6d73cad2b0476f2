"""Posteriors of discrete sites, relaxed ones, and of sites whose prior depends on a discrete one."""

from collections.abc import Callable, Mapping
import math
from typing import Any, ClassVar, cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
from numpyro import distributions as dist
from numpyro.distributions import constraints

from sami_ppl.distributions.gaussian import Affine
from sami_ppl.distributions.relaxed import LogRatios
from sami_ppl.encoders.families.base import AbstractFamily, with_min_scale
from sami_ppl.encoders.families.gaussian import Diagonal
from sami_ppl.priors.sites import Discrete, LatentSite, Relaxed


class Categorical(AbstractFamily):
    """Probabilities of a discrete site's values: a classifier of noisy observations."""

    logits: eqx.nn.Linear

    def __init__(self, features: int, site: LatentSite, *, min_scale: float = 0.03, key: Key[Array, ""]):
        if not isinstance(site, Discrete):
            raise ValueError(
                f"prior site {site.name!r} is continuous: Categorical is for discrete sites, such as dist.Categorical; "
                "leave it out of families"
            )
        self.logits = eqx.nn.Linear(features, site.categories, key=key)

    def parameters(self, features: Float[Array, " features"]) -> Array:
        return jax.nn.log_softmax(self.logits(features))

    def distribution(self, parameters: Array) -> dist.Distribution:
        return OneHot(parameters)


class OneHot(dist.Distribution):
    """Law of a one-hot code. Its log density is linear in the code, so that it has a value between the corners too."""

    support = cast(Any, constraints.real_vector)
    arg_constraints: dict = {}
    pytree_data_fields = ("log_probs",)

    def __init__(self, log_probs: Float[Array, "*batch K"]):
        self.log_probs = log_probs
        super().__init__(jnp.shape(log_probs)[:-1], jnp.shape(log_probs)[-1:], validate_args=False)

    @property
    def mean(self) -> Float[Array, "*batch K"]:
        """The probabilities."""
        return jnp.exp(self.log_probs)

    @property
    def variance(self) -> Float[Array, "*batch K"]:
        """P (1 − p), and a little, so that its root has a gradient."""
        return self.mean * (1 - self.mean) + 1e-8

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """One-hot draws of shape sample_shape + batch_shape + (K,)."""
        which = jax.random.categorical(key, self.log_probs, shape=sample_shape + self.batch_shape)
        return jax.nn.one_hot(which, self.event_shape[0], dtype=self.log_probs.dtype)

    def log_prob(self, value: Array, intermediates: None = None) -> Array:
        """Log probability in nats."""
        return jnp.sum(value * self.log_probs, -1)


class PerCategory(AbstractFamily):
    """q(z | kind, x_λ): a family of its own for every value of the discrete sites that the prior of z depends on.

    With the exact posteriors in it, the sum over kinds is the mixture that marginalising them gives. `family` is that
    of each; several parents have a head for every combination of their values.
    """

    depends: ClassVar[bool] = True
    heads: AbstractFamily
    parents: tuple[str, ...] = eqx.field(static=True)

    def __init__(
        self,
        features: int,
        site: LatentSite,
        *,
        sizes: Mapping[str, int],
        family: Callable = Diagonal,
        min_scale: float = 0.03,
        key: Key[Array, ""],
    ):
        self.parents = site.kinds
        keys = jax.random.split(key, math.prod(sizes[parent] for parent in site.kinds))
        self.heads = eqx.filter_vmap(lambda key: with_min_scale(family, min_scale)(features, site, key=key))(keys)

    def parameters(self, features: Float[Array, " features"]) -> Any:
        return eqx.filter_vmap(lambda head: head.parameters(features))(self.heads)

    def given(self, parameters: Any, codes: Mapping[str, Float[Array, "*batch K"]]) -> Any:
        """The parameters of the head that the one-hot codes of the parents pick."""
        weights = self._joint(codes)

        def pick(leaf: Array) -> Array:
            spread = weights.reshape(weights.shape + (1,) * (leaf.ndim - weights.ndim))
            return jnp.sum(spread * leaf, axis=weights.ndim - 1)

        return jax.tree.map(pick, parameters)

    def distribution(self, parameters: Any) -> dist.Distribution:
        return self.heads.distribution(parameters)

    def marginal_moments(self, parameters: Any, means: Mapping[str, Array]) -> tuple[Array, Array]:
        """Mean and variance over the parents, whose means are their probabilities."""
        weights, law = self._joint(means)[..., None], self.distribution(parameters)
        mean, variance = jnp.asarray(law.mean), jnp.asarray(law.variance)
        centre = jnp.sum(weights * mean, -2)
        return centre, jnp.sum(weights * (variance + (mean - centre[..., None, :]) ** 2), -2)

    def _joint(self, codes: Mapping[str, Array]) -> Array:
        """Products of the parents' weights, one for every combination of values."""
        joint = jnp.ones(1)
        for parent in self.parents:
            joint = (joint[..., :, None] * codes[parent][..., None, :]).reshape(*codes[parent].shape[:-1], -1)
        return joint


class RelaxedCategorical(AbstractFamily):
    """Relaxed categorical at the prior's temperature, of the log ratios that are its code."""

    logits: eqx.nn.Linear
    temperature: float = eqx.field(static=True)
    shift: tuple[float, ...] = eqx.field(static=True)
    scale: tuple[float, ...] = eqx.field(static=True)

    def __init__(
        self,
        features: int,
        site: LatentSite,
        *,
        temperature: float | None = None,
        min_scale: float = 0.03,
        key: Key[Array, ""],
    ):
        if not isinstance(site, Relaxed):
            raise ValueError(
                f"prior site {site.name!r} is not relaxed: RelaxedCategorical is for RelaxedOneHotCategorical; leave "
                "it out of families"
            )
        if temperature is not None and not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.temperature = temperature or site.temperature
        self.shift, self.scale = tuple(map(float, site.shift)), tuple(map(float, site.scale))
        self.logits = eqx.nn.Linear(features, site.size + 1, key=key)

    def parameters(self, features: Float[Array, " features"]) -> Array:
        return self.logits(features)

    def distribution(self, parameters: Array) -> dist.Distribution:
        shift, scale = (jnp.asarray(p, parameters.dtype) for p in (self.shift, self.scale))
        return Affine(LogRatios(self.temperature, parameters), -shift / scale, 1 / scale)
