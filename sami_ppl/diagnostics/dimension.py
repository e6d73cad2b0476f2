"""How many directions the data leave free: the dimension of the manifold that a denoiser has learned."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpy as np

from sami_ppl._util.keys import check_key
from sami_ppl.diffusion.denoiser import AbstractDenoiser

WHOLE = 1024
"""Size of an observation up to which the whole Jacobian is taken; of larger ones a sketch."""
SKETCH, FEW = 64, 8
"""Directions of a sketch, which are the most it can count, and observations that are sketched."""


def manifold_dimension(
    denoiser: AbstractDenoiser, x: Float[Array | np.ndarray, "obs *event"], *, key: Key[Array, ""], log_snr: float = 3.0
) -> int:
    """Median over observations of the number of directions that the denoiser passes on rather than removes.

    At low noise an exact denoiser projects onto the tangent space of the data: α ∂x̂/∂x_λ, which is the posterior
    covariance of x over σ²/α² (Tweedie's second order formula), has singular values near 1 along it and near 0
    across. Those above ½ are counted at `log_snr`. Of observations of more than 1,024 numbers the first eight are used,
    and the Jacobian on the 64 directions that it favours, found by random projection (Halko, Martinsson & Tropp 2011,
    algorithm 4.4 with one power iteration): 64 then stands for 64 or more.
    """
    check_key(key)
    x = jnp.asarray(x)
    x = x[:FEW] if x[0].size > WHOLE else x
    level = jnp.asarray(log_snr, dtype=jnp.result_type(float))
    return int(np.median(_counts(denoiser, level, x, jax.random.split(key, len(x)))))


@eqx.filter_jit
def _counts(denoiser: AbstractDenoiser, level: Array, x: Array, keys: Array) -> Array:
    alpha, large = denoiser.schedule.alpha(level), x[0].size > WHOLE

    def count(inputs: tuple[Array, Array]) -> Array:
        x, key = inputs
        x_noisy = denoiser.schedule.add_noise(x, level, jax.random.normal(key, x.shape, x.dtype))
        passed = lambda at: alpha * denoiser.x_hat(at.reshape(x.shape), level).reshape(-1)  # noqa: E731
        if large:
            jacobian = _sketch(passed, x_noisy.reshape(-1), jax.random.fold_in(key, 1))
        else:
            jacobian = jax.jacfwd(passed)(x_noisy.reshape(-1))
        return jnp.sum(jnp.linalg.svd(jacobian, compute_uv=False) > 0.5)

    return jax.lax.map(count, (x, keys))


def _sketch(function: Callable[[Array], Array], at: Array, key: Array) -> Float[Array, "sketch d"]:
    """Qᵀ J, J the Jacobian of a function at a point, Q an orthonormal basis of nearly all that it favours."""
    _, backward = jax.vjp(function, at)
    forward = jax.vmap(lambda v: jax.jvp(function, (at,), (v,))[1])
    basis = lambda rows: jnp.linalg.qr(rows.T)[0].T  # noqa: E731
    rows = basis(forward(jax.random.normal(key, (SKETCH, at.size), at.dtype)))
    rows = basis(forward(basis(jax.vmap(lambda v: backward(v)[0])(rows))))
    return jax.vmap(lambda v: backward(v)[0])(rows)
