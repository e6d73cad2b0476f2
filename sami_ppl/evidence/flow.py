"""The density of the probability-flow ODE: the law of the deterministic sampler, another model than the bound's.

With r² = 1 + e^{−λ} and u = x_λ/√(α² + σ²), the flow that carries p(x_λ) from level to level (Song et al. 2021,
*Score-Based Generative Modeling through SDEs*, sec. 4.3) is, in λ and for every schedule,

    du/dλ = ½ (e^{−λ}/r²) u − ½ (e^{−λ/2}/r) ε̂(x_λ, λ),

and along it d log p/dλ = −div. It ends at λmin in N(0, I), and an observation is taken for x_λmax/α.
"""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpy as np

from sami_ppl._util.chunks import chunk_of, padded_chunks
from sami_ppl._util.errors import UserError
from sami_ppl._util.keys import check_key
from sami_ppl.diffusion.denoiser import AbstractDenoiser

EXACT_UP_TO = 64
"""Number of dimensions up to which the divergence is computed exactly, at the price of one derivative each."""


def flow_log_prob(
    denoiser: AbstractDenoiser,
    x: Float[Array | np.ndarray, "obs *event"],
    *,
    key: Key[Array, ""],
    probes: int = 1,
    exact: bool | None = None,
    tolerance: float = 1e-5,
    chunk: int | None = None,
) -> Float[np.ndarray, " obs"]:
    """Log density of each observation under the probability flow of a denoiser, in nats.

    Given z, pass `program.decoder(z)`. `exact`: the divergence by all its terms
    (default: up to 64 dimensions), else by `probes` random directions, fixed along the flow (Hutchinson's estimate,
    unbiased). Steps are adapted to `tolerance`, relative and absolute (Tsitouras 5(4), by diffrax).
    `chunk`: observations at a time, default 64, fewer of large ones.

    **Not the model whose bound is trained**, unless the scores are exact: never compare the two as one likelihood.
    Raises ValueError for observations of another shape, UserError where something is missing (NaN).
    """
    check_key(key)
    if jnp.shape(x)[1:] != denoiser.event_shape:
        raise ValueError(f"x must have shape (obs, {', '.join(map(str, denoiser.event_shape))}), got {jnp.shape(x)}")
    if jnp.isnan(x).any():
        raise UserError("x is NaN somewhere: the flow has a density of whole observations only")
    every_term = math.prod(denoiser.event_shape) <= EXACT_UP_TO if exact is None else exact
    keys, parts = jax.random.split(key, len(x)), []
    chunk = chunk_of(64, denoiser.event_shape) if chunk is None else chunk
    for rows, count in padded_chunks(len(x), chunk):
        found = _solve(denoiser, jnp.asarray(x[rows]), keys[rows], every_term, probes, tolerance)
        parts.append(np.asarray(found)[:count])
    return np.concatenate(parts)


@eqx.filter_jit
@jax.default_matmul_precision("highest")  # on a GPU products are of TF32 otherwise: three digits
def _solve(denoiser: AbstractDenoiser, x: Array, keys: Array, exact: bool, probes: int, tolerance: float) -> Array:
    import diffrax

    schedule = denoiser.schedule
    low, high = (jnp.asarray(end, x.dtype) for end in (schedule.log_snr_min, schedule.log_snr_max))

    def velocity(u: Array, log_snr: Array) -> Array:
        spread = jnp.sqrt(schedule.alpha(log_snr) ** 2 + schedule.sigma(log_snr) ** 2)
        noise = jnp.exp(-log_snr)
        r = jnp.sqrt(1 + noise)
        return 0.5 * noise / r**2 * u - 0.5 * jnp.sqrt(noise) / r * denoiser(spread * u, log_snr)

    def one(x: Array, key: Array) -> Array:
        directions = jax.random.rademacher(key, (probes, *x.shape), x.dtype)

        def field(log_snr: Any, state: Any, _: Any) -> Any:
            u, _ = state
            flow, push = jax.linearize(lambda u: velocity(u, log_snr), u)
            if exact:
                basis = jnp.eye(x.size, dtype=x.dtype).reshape(-1, *x.shape)
                return flow, jnp.trace(jax.vmap(push)(basis).reshape(x.size, x.size))
            return flow, jnp.mean(jax.vmap(lambda d: jnp.sum(d * push(d)))(directions))

        r = jnp.sqrt(1 + jnp.exp(-high))
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field), diffrax.Tsit5(), high, low, None, (x / r, jnp.zeros((), x.dtype)),
            stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance), max_steps=16**4,
        )  # fmt: skip
        assert solution.ys is not None
        end, divergence = (leaf[0] for leaf in solution.ys)
        base = -0.5 * jnp.sum(end**2 + jnp.log(2 * jnp.pi))
        return base + divergence - x.size * jnp.log(r)

    return jax.vmap(one)(x, keys)
