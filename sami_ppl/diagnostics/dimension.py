"""How many directions the data leave free: the dimension of the manifold that a denoiser has learned."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpy as np

from sami_ppl.denoiser import AbstractDenoiser


def manifold_dimension(
    denoiser: AbstractDenoiser, x: Float[Array | np.ndarray, "obs *event"], *, key: Key[Array, ""], log_snr: float = 3.0
) -> int:
    """Median over observations of the number of directions that the denoiser passes on rather than removes.

    At low noise an exact denoiser projects onto the tangent space of the data: α ∂x̂/∂x_λ, which is the posterior
    covariance of x over σ²/α² (Tweedie's second order formula), has singular values near 1 along it and near 0
    across. Those above ½ are counted at `log_snr`.
    """
    level = jnp.asarray(log_snr, dtype=jnp.result_type(float))
    alpha = denoiser.schedule.alpha(level)

    @jax.jit
    def count(inputs: tuple[Array, Array]) -> Array:
        x, key = inputs
        x_noisy = denoiser.schedule.add_noise(x, level, jax.random.normal(key, x.shape, x.dtype))
        jacobian = alpha * jax.jacfwd(lambda at: denoiser.x_hat(at, level).reshape(-1))(x_noisy)
        singular = jnp.linalg.svd(jacobian.reshape(x.size, x.size), compute_uv=False)
        return jnp.sum(singular > 0.5)

    return int(np.median(jax.lax.map(count, (jnp.asarray(x), jax.random.split(key, len(x))))))
