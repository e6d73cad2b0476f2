"""A flow of flowjax as a NumPyro distribution."""

from typing import Any, cast

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpy as np
from numpyro import distributions as dist
from numpyro.distributions import constraints


class FlowDistribution(dist.Distribution):
    """A flowjax distribution over vectors (d,), given a `condition` (…, c) if it takes one.

    flowjax's own bridge (`flowjax.experimental.numpyro`) stops gradients at the condition, so that an encoder whose
    features are the condition would not be trained. Here they pass.
    """

    support = cast(Any, constraints.real_vector)
    arg_constraints: dict = {}
    pytree_data_fields = ("arrays", "condition")
    pytree_aux_fields = ("rest",)
    reparametrized_params = ["condition"]

    def __init__(self, flow: Any, condition: Float[Array, "*batch c"] | None = None):
        # Flows hold functions too, which are no leaves of a distribution.
        self.arrays, self.rest = eqx.partition(flow, eqx.is_array)
        self.condition = condition
        batch = () if condition is None else jnp.shape(condition)[:-1]
        super().__init__(batch, tuple(flow.shape), validate_args=False)

    @property
    def flow(self) -> Any:
        """The flowjax distribution."""
        return eqx.combine(self.arrays, self.rest)

    @property
    def mean(self) -> Float[Array, "*batch d"]:
        """The mean over 256 fixed quasi-random points of the base, where that is N(0, I)."""
        return self._points().mean(-2)

    @property
    def variance(self) -> Float[Array, "*batch d"]:
        """The variance of every coordinate over the same points."""
        return self._points().var(-2)

    def _points(self) -> Float[Array, "*batch points d"]:
        points = jnp.asarray(normal_points(self.event_shape[0]), jnp.float32)
        if self.condition is None:
            return jnp.vectorize(self.flow.bijection.transform, signature="(d)->(d)")(points)
        forward = jnp.vectorize(self.flow.bijection.transform, signature="(d),(c)->(d)")
        return forward(points, self.condition[..., None, :])

    def sample(self, key: Key[Array, ""], sample_shape: tuple[int, ...] = ()) -> Array:
        """Draws of shape sample_shape + batch_shape + (d,), differentiable in weights and condition."""
        return self.flow.sample(key, tuple(sample_shape), self.condition)

    def log_prob(self, value: Array, intermediates: None = None) -> Array:
        """Log density in nats."""
        return self.flow.log_prob(value, self.condition)


def flow_distribution(flow: Any) -> FlowDistribution:
    """A flow as the distribution of a site of a prior.

    Learned with the program: `numpyro.sample("z", flow_distribution(eqx_module("flow", flow)))`. `flow`: a flowjax
    distribution over vectors, such as `coupling_flow` makes. Raises TypeError for anything else, ValueError for a flow
    of another shape or with a condition.
    """
    if not all(hasattr(flow, name) for name in ("shape", "cond_shape", "log_prob", "sample")):
        raise TypeError(
            f"flow must be a flowjax distribution, got {type(flow).__name__}: write coupling_flow(size, key=key)"
        )
    if len(flow.shape) != 1 or flow.cond_shape is not None:
        raise ValueError(
            f"a flow prior is over vectors, without a condition; got shape {flow.shape} and cond_shape "
            f"{flow.cond_shape}: write coupling_flow(size, key=key)"
        )
    return FlowDistribution(flow)


def normal_points(size: int, pairs: int = 128) -> Float[np.ndarray, "points size"]:
    """Points (2 pairs, size) that stand for N(0, I): quasi-random, of mean 0 and variance 1 exactly."""
    from scipy.stats import norm, qmc

    points = norm.ppf(qmc.Sobol(size, rng=0).random(pairs))
    points = np.concatenate([points, -points])
    return points / points.std(0)
