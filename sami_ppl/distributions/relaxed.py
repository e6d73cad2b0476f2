"""The relaxed categorical distribution, on the simplex and as log ratios.

x_i ∝ exp((log π_i + g_i)/T) with Gumbel noise g (Maddison, Mnih & Teh 2017, *The concrete distribution*; Jang, Gu &
Poole 2017). As T → 0 it tends to one-hot vectors of probabilities π. Its density on the simplex,

    p(x) = Γ(K) T^{K−1} ∏ π_i x_i^{−T−1} / (Σ π_i x_i^{−T})^K                           (Maddison et al., eq. 10)

loses all digits near the corners, where the draws are. The log ratios u_i = log x_i − log x_K, i < K, do not, and are
the coordinates of the code: with u_K = 0, p(u) = Γ(K) T^{K−1} ∏ π_i e^{−T u_i} / (Σ π_i e^{−T u_i})^K, a multivariate
logistic distribution, the counterpart of the same paper's `ExpConcrete`.
"""

import math
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from numpyro import distributions as dist
from numpyro.distributions import constraints
from numpyro.distributions.transforms import ParameterFreeTransform, biject_to

TINY = 1e-37
"""Least coordinate of a draw: float32 has no smaller numbers with all digits."""


class _OpenSimplex(type(constraints.simplex)):  # pyright: ignore[reportGeneralTypeIssues]
    """The simplex, reached by log ratios instead of stick-breaking."""


open_simplex = _OpenSimplex()


class LogRatioTransform(ParameterFreeTransform):
    """u (K − 1,) → softmax of (u, 0): vectors of the simplex by log ratios to their last coordinate."""

    domain = cast(Any, constraints.real_vector)
    codomain = cast(Any, open_simplex)

    def __call__(self, x: Array) -> Array:
        full = jnp.concatenate([x, jnp.zeros_like(x[..., :1])], axis=-1)
        return jnp.maximum(jax.nn.softmax(full, axis=-1), TINY)

    def _inverse(self, y: Array) -> Array:
        logs = jnp.log(jnp.maximum(y, TINY))
        return logs[..., :-1] - logs[..., -1:]

    def log_abs_det_jacobian(self, x: Array, y: Array, intermediates: None = None) -> Array:
        """Log |∂(x_1 … x_{K−1})/∂u| = Σ log x_i over all K."""
        return jnp.sum(jnp.log(y), axis=-1)

    def forward_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[:-1], shape[-1] + 1)

    def inverse_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[:-1], shape[-1] - 1)


biject_to.register(_OpenSimplex)(lambda _: LogRatioTransform())


class LogRatios(dist.Distribution):
    """Law of the K − 1 log ratios of a relaxed categorical: u_i = (log π_i + g_i − log π_K − g_K)/T."""

    support = cast(Any, constraints.real_vector)
    arg_constraints: dict = {}
    pytree_data_fields = ("logits",)
    pytree_aux_fields = ("temperature",)
    reparametrized_params = ["logits"]

    def __init__(self, temperature: float, logits: Float[Array, "*batch K"]):
        self.temperature, self.logits = temperature, logits
        super().__init__(jnp.shape(logits)[:-1], (jnp.shape(logits)[-1] - 1,), validate_args=False)

    @property
    def mean(self) -> Float[Array, "*batch K-1"]:
        """The mean."""
        return (self.logits[..., :-1] - self.logits[..., -1:]) / self.temperature

    @property
    def variance(self) -> Float[Array, "*batch K-1"]:
        """The variance: the difference of two Gumbel variables is logistic, of variance π²/3."""
        return jnp.full(self.batch_shape + self.event_shape, (math.pi / self.temperature) ** 2 / 3, self.logits.dtype)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draws of shape sample_shape + batch_shape + (K − 1,), differentiable in the logits."""
        scores = self.logits + jax.random.gumbel(key, sample_shape + jnp.shape(self.logits), self.logits.dtype)
        return (scores[..., :-1] - scores[..., -1:]) / self.temperature

    def log_prob(self, value: Array, intermediates: None = None) -> Array:
        """Log density in nats."""
        count = jnp.shape(self.logits)[-1]
        full = jnp.concatenate([value, jnp.zeros_like(value[..., :1])], axis=-1)
        each = self.logits - self.temperature * full
        constant = math.lgamma(count) + (count - 1) * math.log(self.temperature)
        return constant + jnp.sum(each, -1) - count * jax.nn.logsumexp(each, -1)


class RelaxedOneHotCategorical(dist.Distribution):
    """Categorical relaxed to the simplex at a temperature: a continuous site with event shape (K,).

        numpyro.sample("kind", RelaxedOneHotCategorical(0.5, jnp.zeros(3)))

    `logits` (…, K) need not be normalised; draws are differentiable in them. Below a temperature of about .2 float32
    cannot hold the draws' small coordinates: they are kept above 1e-37. Raises ValueError unless the temperature is a
    positive number and there are at least two categories.
    """

    support = cast(Any, open_simplex)
    arg_constraints: dict = {}
    pytree_data_fields = ("logits",)
    pytree_aux_fields = ("temperature",)
    reparametrized_params = ["logits"]

    def __init__(self, temperature: float, logits: Float[Array, "*batch K"]):
        if not isinstance(temperature, float | int) or not temperature > 0:
            raise ValueError(f"temperature must be a positive number, fixed, got {temperature!r}: for instance 0.5")
        if jnp.ndim(logits) < 1 or jnp.shape(logits)[-1] < 2:
            raise ValueError(
                f"logits must have shape (…, K) with at least two categories, got {jnp.shape(logits)}: for instance "
                "jnp.zeros(3)"
            )
        self.temperature, self.logits = float(temperature), jnp.asarray(logits)
        super().__init__(jnp.shape(logits)[:-1], jnp.shape(logits)[-1:], validate_args=False)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draws of shape sample_shape + batch_shape + (K,)."""
        return LogRatioTransform()(LogRatios(self.temperature, self.logits).sample(key, sample_shape))

    def log_prob(self, value: Array, intermediates: None = None) -> Array:
        """Log density on the simplex, with respect to its first K − 1 coordinates, in nats."""
        transform = LogRatioTransform()
        u = transform.inv(value)
        return LogRatios(self.temperature, self.logits).log_prob(u) - jnp.sum(jnp.log(jnp.maximum(value, TINY)), -1)
