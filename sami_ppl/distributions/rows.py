"""Laws of several observations, made of the law of one by `vmap`."""

from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Key
from numpyro import distributions as dist

from sami_ppl.distributions.matern import Matern
from sami_ppl.distributions.supports import normal_base, unwrapped


class Rows(dist.Distribution):
    """Laws of single observations, beside each other: batch shape (obs,), event shape that of one.

    `laws`: a distribution whose parameters have a leading dim obs more than its shapes say, as `vmap` returns it.
    """

    arg_constraints: dict = {}
    pytree_data_fields = ("laws",)

    def __init__(self, laws: Any, size: int):
        self.laws = laws
        super().__init__((size,), laws.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        """That of the first law: supports of a prior are fixed."""
        return jax.tree.map(lambda leaf: leaf[0] if eqx.is_array(leaf) else leaf, self.laws).support

    def sample(self, key: Key[Array, ""], sample_shape: tuple[int, ...] = ()) -> Array:
        """Draws of shape sample_shape + (obs,) + event."""
        draw = eqx.filter_vmap(lambda law, key: law.sample(key, sample_shape))
        return jnp.moveaxis(draw(self.laws, jax.random.split(key, self.batch_shape[0])), 0, len(sample_shape))

    def log_prob(self, value: Array, intermediates: None = None) -> Array:
        """Log density in nats."""
        return self._each("log_prob", value)

    def cdf(self, value: Array) -> Array:
        """Share of the law below a value."""
        return self._each("cdf", value)

    def icdf(self, q: Array) -> Array:
        """The value that has this share below it."""
        return self._each("icdf", q)

    def component_log_probs(self, value: Array) -> Array:
        """Of mixtures: log weight and density of each component."""
        return self._each("component_log_probs", value)

    def _each(self, method: str, value: Array) -> Array:
        at = eqx.filter_vmap(lambda law, value: getattr(unwrapped(law) if method != "log_prob" else law, method)(value))
        lead = jnp.ndim(value) - len(self.event_shape)
        value = jnp.broadcast_to(value, jnp.broadcast_shapes(jnp.shape(value), self.batch_shape + self.event_shape))
        for _ in range(lead - 1):  # draws before the observations
            at = cast(Any, jax.vmap(at, in_axes=(None, 0)))
        return at(self.laws, value)


def law_of_one(fn: Any) -> Any:
    """The same law with parameters of the event's full shape where it is of independent Normals."""
    base = normal_base(fn)
    if base is None:
        return fn
    loc, scale = (jnp.broadcast_to(cast(Array, p), fn.event_shape) for p in (base.loc, base.scale))
    return dist.Normal(loc, scale).to_event(len(fn.event_shape))


def law_of_rows(laws: Any, size: int) -> dist.Distribution:
    """The joint law (obs,) of what `vmap` of `law_of_one` returns; of Gaussians it has closed forms too."""
    base: Any = unwrapped(laws, masks=False)
    if isinstance(base, dist.Normal):
        return dist.Normal(base.loc, base.scale).to_event(len(laws.event_shape))
    if type(base) is dist.MultivariateNormal and not laws.batch_shape and len(laws.event_shape) == 1:
        return dist.MultivariateNormal(base.loc, scale_tril=base.scale_tril)
    if isinstance(base, Matern):
        return Matern(base.times, base.lengthscale, smoothness=base.smoothness)
    return Rows(laws, size)
