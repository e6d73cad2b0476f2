"""Priors over time: stationary Gaussian processes in state-space form, and the posteriors of their sequences.

A Matérn process of smoothness ½ or 3/2 is a linear stochastic differential equation of order 1 or 2 (Hartikainen &
Särkkä 2010), so that at times t₁ < … < t_T it is a Gaussian Markov chain of states s = (z, z'/rate), each N(0, I):

    s₁ ~ N(0, I),    s_t = A_t s_{t−1} + N(0, Q_t),    z_t = first coordinate of s_t,    Q_t = I − A_t A_tᵀ.

All costs are linear in T. The posterior given Gaussian potentials of single times (structured variational
autoencoders; Johnson et al. 2016),

    q(z) = p(z) ∏_t ψ_t(z_t) / Z,        ψ_t(z) = exp(−½ (z − c_t)ᵀ Λ_t (z − c_t)),

needs the Kalman filter only: it gives log Z, and the rest are derivatives of it, in reverse mode the pass back through
time that smoothers make. With log Z(h, β) = log E_p exp Σ_t [h_tᵀ z_t − β/2 (z_t − c_t)ᵀ Λ_t (z_t − c_t)],

    E_q z = ∂ log Z/∂h,        KL(q ‖ p) = ∂ log Z/∂β − log Z        at h = 0, β = 1.

Draws are draws of p, corrected by what they leave unexplained (Matheron's rule; Durbin & Koopman 2002).
"""

from functools import partial
import math
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpy as np
from numpyro import distributions as dist
from numpyro.distributions import constraints
from numpyro.distributions.kl import kl_divergence
from numpyro.util import not_jax_tracer


class Matern(dist.Distribution):
    """D independent stationary Gaussian processes of unit variance at T times, event shape (T, D).

    Covariances at distance Δ, by `smoothness`:

    - 0.5: exp(−Δ/ℓ), the Ornstein–Uhlenbeck process; at times 0, 1, 2, … the AR(1) process with coefficient exp(−1/ℓ);
    - 1.5: (1 + √3 Δ/ℓ) exp(−√3 Δ/ℓ), whose paths have a velocity.

    `times` (…, T), increasing, in any unit; `lengthscale` ℓ, positive, in the same unit, one for all processes (then
    `size` is their number D, default 1) or (…, D). Leading dims are the batch. A lengthscale far below the distances
    of the times makes them independent: the prior N(0, I) of every single time.

    Known times are taken from the first on, in 64 bits, so that dates, in days or seconds, keep their differences.

    Raises ValueError for other shapes and smoothness, and, where they are known when it is made, for times that do not
    increase or whose steps 32 bits do not hold, and lengthscales that are not positive.
    """

    arg_constraints: dict = {}
    support = cast(Any, constraints.independent(constraints.real, 2))
    pytree_data_fields = ("times", "lengthscale")
    pytree_aux_fields = ("smoothness",)
    reparametrized_params = list(pytree_data_fields)

    def __init__(
        self,
        times: Float[Array | np.ndarray, "*batch T"],
        lengthscale: float | Float[Array | np.ndarray, "*batch D"],
        *,
        smoothness: float = 1.5,
        size: int | None = None,
    ):
        if smoothness not in (0.5, 1.5):
            raise ValueError(f"smoothness must be 0.5 (Ornstein–Uhlenbeck, AR(1)) or 1.5, got {smoothness}")
        given: tuple[Any, Any] = (times, lengthscale)
        times, lengthscale = (np.asarray(p) if not_jax_tracer(p) else p for p in given)
        if np.ndim(times) == 0 or np.shape(times)[-1] == 0:
            raise ValueError(f"times must be a vector, one for each frame, got shape {np.shape(times)}")
        if np.ndim(lengthscale) == 0:
            broadcast = np.broadcast_to if isinstance(lengthscale, np.ndarray) else jnp.broadcast_to
            lengthscale = broadcast(lengthscale, (1 if size is None else size,))
        if size is not None and np.shape(lengthscale)[-1] != size:
            raise ValueError(
                f"lengthscale has {np.shape(lengthscale)[-1]} elements for size={size} processes: give one, or one each"
            )
        if isinstance(times, np.ndarray) and not np.all(np.diff(times, axis=-1) > 0):
            raise ValueError(f"times must increase from frame to frame, got {times}")
        if isinstance(times, np.ndarray):
            times = _from_the_first(times)
        if isinstance(lengthscale, np.ndarray) and not np.all(lengthscale > 0):
            raise ValueError(f"lengthscale must be positive, got {lengthscale}")
        dtype = jnp.promote_types(jnp.result_type(times, lengthscale), jnp.result_type(float))
        self.times, self.lengthscale = (jnp.asarray(p, dtype) for p in (times, lengthscale))
        self.smoothness = smoothness
        batch = jnp.broadcast_shapes(self.times.shape[:-1], self.lengthscale.shape[:-1])
        super().__init__(batch, (self.times.shape[-1], self.lengthscale.shape[-1]), validate_args=False)

    def expand(self, batch_shape: tuple[int, ...]) -> "Matern":
        """The same process with a batch of this shape."""
        times, lengthscale = (jnp.broadcast_to(p, (*batch_shape, p.shape[-1])) for p in (self.times, self.lengthscale))
        return Matern(times, lengthscale, smoothness=self.smoothness)

    @property
    def transitions(self) -> tuple[Float[Array, "*batch T D S S"], Float[Array, "*batch T D S S"]]:
        """A_t and Q_t; those of the first time, A = 0 and Q = I, draw from the stationary law."""
        steps = jnp.diff(self.times)[..., :, None] / self.lengthscale[..., None, :]
        if self.smoothness == 0.5:
            a = jnp.exp(-steps)[..., None, None]
            q = -jnp.expm1(-2 * steps)[..., None, None]
        else:
            s = np.sqrt(3.0).astype(self.times.dtype) * steps
            a = _matrix(1 + s, s, -s, 1 - s) * jnp.exp(-s)[..., None, None]
            # 1 − e^{−2s}(1 + 2s + 2s²), by the incomplete gamma function that it is: it must not cancel for small s.
            first, cross = jax.scipy.special.gammainc(3.0, 2 * s), 2 * s**2 * jnp.exp(-2 * s)
            q = _matrix(first, cross, cross, first + 4 * s * jnp.exp(-2 * s))
        start = jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), (*a.shape[:-4], 1, *a.shape[-3:]))
        return jnp.concatenate([0 * start, a], -4), jnp.concatenate([start, q], -4)

    def sample(self, key: Key[Array, ""], sample_shape: tuple[int, ...] = ()) -> Float[Array, "*shape T D"]:
        """Draws of shape sample_shape + batch_shape + (T, D)."""
        a, q = self.transitions
        noise = jax.random.normal(key, sample_shape + self.batch_shape + (*self.event_shape, a.shape[-1]), a.dtype)
        return _walk(a, jnp.linalg.cholesky(q), noise)

    def log_prob(self, value: Float[Array, "*shape T D"], intermediates: None = None) -> Float[Array, "*shape"]:
        """Log density in nats."""
        return _log_density(*self.transitions, value)


def _from_the_first(times: np.ndarray) -> np.ndarray:
    """Times since the first, in 64 bits: in the 32 that are computed with, dates in seconds have no differences."""
    steps, first = np.diff(times.astype(np.float64), axis=-1), times[..., :1].astype(np.float64)
    if times.dtype == np.float32 and steps.size and np.spacing(np.abs(times).max()) > 0.1 * np.median(steps):
        raise ValueError(
            f"times are float32 up to {times.max():g}, whose differences are lost to rounding: give them as float64 of "
            "numpy, np.asarray(times, float), before they are of 32 bits"
        )
    since = times.astype(np.float64) - first
    if steps.size and not np.allclose(np.diff(since.astype(jnp.result_type(float)), axis=-1), steps, rtol=1e-2, atol=0):
        raise ValueError(
            f"times have steps of {steps.min():g} over {since.max():g}, which 32 bits do not hold: give fewer times, "
            "or leave out those that nearly agree"
        )
    return since


class Smoothed(dist.Distribution):
    """q(z) ∝ p(z) ∏_t exp(−½ (z_t − c_t)ᵀ Λ_t (z_t − c_t)), a Gaussian over sequences of event shape (T, D).

    `process`: p. `centre` c (…, T, D); `precision` Λ (…, T, D, D), positive definite, or zero where nothing is seen.
    `kl_divergence(q, p)` is in closed form, for the p that q was made of.
    """

    arg_constraints: dict = {}
    support = cast(Any, constraints.independent(constraints.real, 2))
    pytree_data_fields = ("process", "centre", "precision")
    reparametrized_params = list(pytree_data_fields)

    def __init__(self, process: Matern, centre: Float[Array, "*batch T D"], precision: Float[Array, "*batch T D D"]):
        if jnp.shape(centre)[-2:] != process.event_shape or jnp.shape(precision) != (*centre.shape, centre.shape[-1]):
            raise ValueError(
                f"centre and precision must be (…, T, D) and (…, T, D, D) with T, D = {process.event_shape}, got "
                f"{jnp.shape(centre)} and {jnp.shape(precision)}"
            )
        self.process, self.centre, self.precision = process, centre, precision
        batch = jnp.broadcast_shapes(process.batch_shape, centre.shape[:-2])
        super().__init__(batch, process.event_shape, validate_args=False)

    def _log_normaliser(self, tilt: Array, centre: Array, precision: Array) -> Array:
        return _filter(*self.process.transitions, tilt, centre, precision)

    @property
    def log_normaliser(self) -> Float[Array, "*batch"]:
        """Log Z = log E_p ∏_t ψ_t, in nats."""
        return self._log_normaliser(jnp.zeros_like(self.centre), self.centre, self.precision)

    @property
    def mean(self) -> Float[Array, "*batch T D"]:
        """E_q z."""
        return self._mean(self.centre)

    @property
    def variance(self) -> Float[Array, "*batch T D"]:
        """Var_q z of every coordinate, from ∂ log Z/∂Λ_t = −½ E_q (z_t − c_t)(z_t − c_t)ᵀ.

        Taken at c = 0, where the mean is 0: the covariance does not depend on c, and nothing cancels.
        """
        zero = jnp.zeros_like(self.centre)
        total = lambda precision: jnp.sum(self._log_normaliser(zero, zero, precision))  # noqa: E731
        each = jnp.broadcast_to(self.precision, (*self.shape(), self.event_shape[1]))
        return -2 * jnp.diagonal(jax.grad(total)(each), axis1=-2, axis2=-1)

    @property
    def covariance(self) -> Float[Array, "*batch TD TD"]:
        """Cov_q of all coordinates, frame after frame: the second derivative of log E_p exp(hᵀz) ∏_t ψ_t in h."""
        zero = jnp.zeros(self.shape(), self.centre.dtype)
        total = lambda tilt: jnp.sum(self._log_normaliser(tilt, zero, self.precision))  # noqa: E731
        size = math.prod(self.event_shape)
        units = jnp.eye(size, dtype=zero.dtype).reshape(size, *self.event_shape)
        along = lambda unit: jax.jvp(jax.grad(total), (zero,), (jnp.broadcast_to(unit, zero.shape),))[1]  # noqa: E731
        return jnp.moveaxis(jax.vmap(along)(units).reshape(size, *self.batch_shape, size), 0, -1)

    def _mean(self, centre: Array) -> Array:
        total = lambda tilt: jnp.sum(self._log_normaliser(tilt, centre, self.precision))  # noqa: E731
        return jax.grad(total)(jnp.zeros(jnp.broadcast_shapes(centre.shape, self.shape()), centre.dtype))

    def sample(self, key: Key[Array, ""], sample_shape: tuple[int, ...] = ()) -> Float[Array, "*shape T D"]:
        """Draws of shape sample_shape + batch_shape + (T, D), differentiable in all parameters."""
        prior_key, noise_key = jax.random.split(key)
        prior = self.process.expand(self.batch_shape).sample(prior_key, sample_shape)
        # What p's own draw would have shown: its value and noise of covariance 1/Λ. Where Λ is 0 it does not matter.
        seen = jnp.any(self.precision != 0, (-2, -1), keepdims=True)
        root = jnp.linalg.cholesky(jnp.where(seen, self.precision, jnp.eye(self.event_shape[1], dtype=prior.dtype)))
        noise = jax.random.normal(noise_key, prior.shape, prior.dtype)[..., None]
        root = jnp.broadcast_to(root, (*noise.shape[:-1], root.shape[-1]))
        noise = jax.scipy.linalg.solve_triangular(root, noise, lower=True, trans=1)[..., 0]
        return prior + self._mean(self.centre - prior - noise)

    def log_prob(self, value: Float[Array, "*shape T D"], intermediates: None = None) -> Float[Array, "*shape"]:
        """Log density in nats."""
        gap = value - self.centre
        potentials = -0.5 * jnp.sum(gap * (self.precision @ gap[..., None])[..., 0], (-2, -1))
        return self.process.log_prob(value) + potentials - self.log_normaliser

    def divergence(self) -> Float[Array, "*batch"]:
        """KL(q ‖ p) in nats."""
        at = lambda beta: self._log_normaliser(jnp.zeros_like(self.centre), self.centre, beta * self.precision)  # noqa: E731
        one = jnp.ones((), self.centre.dtype)
        log_z, slope = jax.jvp(at, (one,), (one,))
        return slope - log_z


@kl_divergence.register(Smoothed, Matern)
def _smoothed_kl(q: Smoothed, p: Matern) -> Array:
    if (q.process.smoothness, q.event_shape) != (p.smoothness, p.event_shape):
        raise ValueError("the divergence of a smoothed process is known from the process that it was made of only")
    return q.divergence()


def _matrix(a: Array, b: Array, c: Array, d: Array) -> Array:
    return jnp.stack([jnp.stack([a, b], -1), jnp.stack([c, d], -1)], -2)


@partial(jnp.vectorize, signature="(t,d,s,s),(t,d,s,s),(t,d,s)->(t,d)")
def _walk(a: Array, root: Array, noise: Array) -> Array:
    """Positions of a chain of states driven by white noise."""

    def step(state: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        a, root, noise = inputs
        state = jnp.einsum("dij,dj->di", a, state) + jnp.einsum("dij,dj->di", root, noise)
        return state, state[:, 0]

    return jax.lax.scan(step, jnp.zeros_like(noise[0]), (a, root, noise))[1]


@partial(jnp.vectorize, signature="(t,d,s,s),(t,d,s,s),(t,d)->()")
def _log_density(a: Array, q: Array, z: Array) -> Array:
    """Log density of the positions, by the Kalman filter with exact observations, one process beside the other."""

    def step(carry: tuple[Array, Array], inputs: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        mean, cov = carry
        a, q, z = inputs
        mean, cov = jnp.einsum("dij,dj->di", a, mean), a @ cov @ jnp.swapaxes(a, -1, -2) + q
        variance, gap = cov[:, 0, 0], z - mean[:, 0]
        gain = cov[:, :, 0] / variance[:, None]
        cov = cov - gain[:, :, None] * cov[:, :1, :]
        return (mean + gain * gap[:, None], cov), -0.5 * jnp.sum(gap**2 / variance + jnp.log(2 * jnp.pi * variance))

    start = (jnp.zeros(a.shape[1:3], z.dtype), jnp.zeros_like(q[0]))
    return jnp.sum(jax.lax.scan(step, start, (a, q, z))[1])


@partial(jnp.vectorize, signature="(t,d,s,s),(t,d,s,s),(t,d),(t,d),(t,d,d)->()")
def _filter(a: Array, q: Array, tilt: Array, centre: Array, precision: Array) -> Array:
    """Log E_p exp Σ_t [h_tᵀ z_t − ½ (z_t − c_t)ᵀ Λ_t (z_t − c_t)], by the Kalman filter of all processes together.

    With z_t ~ N(m, S) given the times before, its update needs F = (I + ΛS)⁻¹Λ only, which is Λ's inverse covariance
    of c_t and exists for every Λ, zero included.
    """
    size, states = a.shape[1:3]
    own = jnp.eye(size, dtype=a.dtype)
    position = jnp.kron(own, jnp.eye(1, states, dtype=a.dtype))
    joint = lambda blocks: jnp.einsum("dij,de->diej", blocks, own).reshape(size * states, -1)  # noqa: E731

    def step(carry: tuple[Array, Array], inputs: tuple) -> tuple[tuple[Array, Array], Array]:
        mean, cov = carry
        a, q, tilt, centre, precision = inputs
        a = joint(a)
        mean, cov = a @ mean, a @ cov @ a.T + joint(q)
        shown, predicted = cov @ position.T, position @ mean
        spread = position @ shown
        matrix = own + precision @ spread
        f = jnp.linalg.solve(matrix, precision)
        f = 0.5 * (f + f.T)
        gap = centre - predicted
        pull, free = f @ gap, tilt - f @ (spread @ tilt)  # free = (I + ΛS)⁻¹ h
        log_z = (
            -0.5 * gap @ pull - 0.5 * jnp.linalg.slogdet(matrix)[1]
            + tilt @ (predicted + spread @ pull) + 0.5 * tilt @ (spread @ free)
        )  # fmt: skip
        return (mean + shown @ (pull + free), cov - shown @ f @ shown.T), log_z

    start = (jnp.zeros(size * states, a.dtype), jnp.zeros((size * states, size * states), a.dtype))
    return jnp.sum(jax.lax.scan(step, start, (a, q, tilt, centre, precision))[1])
