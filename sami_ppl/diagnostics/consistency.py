"""Do noisy posteriors agree with the guide? E[q(z | x) | x_λ] = q(z | x_λ, λ) at every noise level.

Noise that is added step by step makes x_λ a Markov chain, so that the exact posteriors p(z | x_λ) are a martingale
along it: what one expects to believe later is what one believes now. Posteriors fitted through their gradient alone may
break that, and then guidance by them draws another x than the guide would recognise. Of z ~ q(z | x), with x_λ the
observation in noise, the standardised (z − m) / s by mean and standard deviation of q(z | x_λ, λ) has mean 0 and mean
square 1 if they agree, whatever the family; and log q(z | x_λ, λ) has the mean that it has for draws of q(z | x_λ, λ).
"""

from statistics import NormalDist

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpy as np
import xarray as xr

from sami_ppl._util.chunks import by_chunks, chunk_of
from sami_ppl._util.keys import check_key
from sami_ppl.decoders.guidance import check_guided
from sami_ppl.diagnostics.gain import draw_codes
from sami_ppl.encoders.frames import check_single
from sami_ppl.encoders.law import CodeLaw
from sami_ppl.program.program import Program


def consistency(
    program: Program,
    data: xr.Dataset | Float[Array | np.ndarray, "obs *event"],
    *,
    key: Key[Array, ""],
    levels: int = 16,
    false_alarm: float = 0.01,
) -> xr.Dataset:
    """How far the noisy posteriors of observations are from the mean of what their guide says, by noise level.

    Args:
        program: a program with a guided decoder.
        data: observations x, an array (obs, *event) or a Dataset, with the variables that the prior takes; a hundred or
            more.
        key: random key.
        levels: noise levels, equally spaced over the range.
        false_alarm: the probability that any level is flagged where all agree, at most: it is divided among them.

    Returns:
        Variables on `log_snr` and `axis`: `shift`, the mean of (z − m) / s, 0 if they agree; `spread`, its root mean
        square, above 1 where q(z | x_λ, λ) is too narrow or beside the truth, below 1 where too wide; with the standard
        errors `shift_se` and `spread_se`. On `log_snr`: `gap`, by how many nats log q(z | x_λ, λ) is lower for the
        guide's z than for draws of its own, `gap_se`, and `flagged`, whether that is too far from 0 to be chance.

    Raises:
        ValueError: a decoder that is not guided, a program of sequences (take `frames_of(program)`), fewer than 1 level
            or than 2 observations, a false-alarm rate outside (0, 1).
    """
    check_key(key)
    check_guided(program.denoiser, "consistency")
    check_single(program.encoder, "consistency")
    x, given = program.observations(data)
    if levels < 1 or len(x) < 2 or not 0 < false_alarm < 1:
        raise ValueError(
            f"levels must be at least 1, observations 2, false_alarm between 0 and 1; got {levels}, {len(x)} and "
            f"{false_alarm}"
        )
    schedule = program.denoiser.schedule
    at = np.linspace(schedule.log_snr_min, schedule.log_snr_max, levels)
    z_key, *keys = jax.random.split(key, 1 + levels)
    chunk = chunk_of(512, program.event_shape)
    z = draw_codes(program, x, z_key, given=given)
    parts = []
    for level, level_key in zip(at, keys, strict=True):
        own = lambda x, z, keys, level=level: _compared(program, x, z, jnp.asarray(level, x.dtype), keys)  # noqa: E731
        parts.append(by_chunks(own, chunk, x, z, jax.random.split(level_key, len(x))))
    standard, gap = (np.stack([np.asarray(part[i], float) for part in parts]) for i in range(2))
    count = np.sqrt(len(x))
    square = np.mean(standard**2, 1)
    gap_mean, gap_se = gap.mean(1), gap.std(1, ddof=1) / count
    far = NormalDist().inv_cdf(1 - false_alarm / levels / 2)
    each = ("log_snr", "axis")
    return xr.Dataset(
        {
            "shift": (each, standard.mean(1)),
            "shift_se": (each, standard.std(1, ddof=1) / count),
            "spread": (each, np.sqrt(square)),
            "spread_se": (each, (standard**2).std(1, ddof=1) / count / (2 * np.sqrt(np.maximum(square, 1e-12)))),
            "gap": ("log_snr", gap_mean, {"units": "nats"}),
            "gap_se": ("log_snr", gap_se, {"units": "nats"}),
            "flagged": ("log_snr", np.abs(gap_mean) > far * np.maximum(gap_se, 1e-12)),
        },
        coords={"log_snr": at, "axis": list(program.latents.axes)},
        attrs={"observations": len(x), "false_alarm": false_alarm},
    )


@eqx.filter_jit
def _compared(program: Program, x: Array, z: Array, level: Array, keys: Array) -> tuple[Array, Array]:
    """Standardised codes (obs, D), and by how much log q is lower for them than for a draw of q (obs,)."""

    def one(x: Array, z: Array, key: Array) -> tuple[Array, Array]:
        noise_key, draw_key = jax.random.split(key)
        q = noisy_posterior(program, x, level, jax.random.normal(noise_key, x.shape, x.dtype))
        own = jnp.asarray(q.sample(draw_key))
        return standardised(q, z), jnp.asarray(q.log_prob(own)) - jnp.asarray(q.log_prob(z))

    return jax.vmap(one)(x, z, keys)


def noisy_posterior(
    program: Program, x: Float[Array, "*event"], log_snr: Float[Array, ""], eps: Float[Array, "*event"]
) -> CodeLaw:
    """q(z | x_λ, λ) of one observation in the noise ε."""
    x, _ = program.denoiser.fill_missing(x)
    x_noisy = program.denoiser.schedule.add_noise(x, log_snr, eps)
    return program.encoder.distribution(program.encoder.parameters(x_noisy, log_snr))


def standardised(q: CodeLaw, z: Float[Array, " D"]) -> Float[Array, " D"]:
    """(z − m) / s by mean and standard deviation of a posterior."""
    return (z - jnp.asarray(q.mean)) / jnp.sqrt(jnp.asarray(q.variance))
