"""What a family of posteriors is, and how its scales are bounded."""

import abc
from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
import math
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from numpyro import distributions as dist


class AbstractFamily(eqx.Module):
    """q of the code of one site, given the features of one observation.

    `depends`: whether it is another for other values of the sites before it.
    """

    depends: ClassVar[bool] = False

    @abc.abstractmethod
    def parameters(self, features: Float[Array, " features"]) -> Any:
        """Parameters of q for one observation, a tree of arrays."""

    @abc.abstractmethod
    def distribution(self, parameters: Any) -> dist.Distribution:
        """Law of the site's d coordinates of z, event shape (d,); leading dims of the parameters are its batch.

        Everything that is known of a posterior follows from it: draws, log densities, `mean` and `variance`.
        """

    def given(self, parameters: Any, codes: Mapping[str, Float[Array, "*batch K"]]) -> Any:
        """The parameters given the codes of the sites before this one; here they do not depend on them."""
        return parameters

    def marginal_moments(self, parameters: Any, means: Mapping[str, Array]) -> tuple[Array, Array]:
        """Mean and variance (…, d) over what the sites before this one may be, whose codes have these means."""
        q = self.distribution(parameters)
        return jnp.asarray(q.mean), jnp.asarray(q.variance)


def check_min_scale(min_scale: float) -> None:
    """Raise ValueError unless the least scale lies between 0 and the prior's own spread."""
    if not 0 < min_scale < 1:
        raise ValueError(f"min_scale must lie between 0 and 1, the prior's own spread, got {min_scale}")


def with_min_scale(family: Callable, min_scale: float) -> Callable:
    """The family with this least scale, unless it has one of its own or takes none."""
    own = "min_scale" in getattr(family, "keywords", {}) or "min_scale" not in signature(family).parameters
    return family if own else partial(family, min_scale=min_scale)


def squashed_scale(raw: Float[Array, "*d"], min_scale: float) -> Float[Array, "*d"]:
    """A standard deviation between `min_scale` and 2, 1 where `raw` is 0."""
    low, high = math.log(min_scale), math.log(2.0)
    return jnp.exp(low + (high - low) * jax.nn.sigmoid(raw + math.log(-low / high)))
