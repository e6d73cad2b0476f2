"""Whether the family of posteriors suits the prior: what q(z | x_λ, λ) is where the noise has hidden the observation.

There the exact noisy posterior is the prior itself. A family that cannot represent the prior, such as one Gaussian
where the prior has several modes, guides wrongly at high noise.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpy as np
import numpyro
from numpyro import handlers
import xarray as xr

from sami_ppl._util.keys import check_key
from sami_ppl.decoders.guidance import check_guided
from sami_ppl.encoders.frames import check_single
from sami_ppl.program.guide import sample_latents
from sami_ppl.program.kl import site_kl
from sami_ppl.program.program import Program


def noise_end_kl(
    program: Program,
    data: xr.Dataset | Float[Array | np.ndarray, "obs *event"],
    *,
    key: Key[Array, ""],
    draws: int = 16,
) -> dict[str, float]:
    """E KL(q(z | x_λmin, λmin) ‖ p(z)) of every site in nats, over observations, noise and, without closed form, z.

    Near 0 if the family suits the prior and the fit has found it; what an observation still tells at λmin adds to it.
    Axes that carry nothing may have any q here that is the same for all observations: guidance, a gradient in x_λ, does
    not see a constant, and it does no harm. Look for a large value on axes in use.

    Raises ValueError for programs of sequences, whose frames are guided under N(0, I), not under the prior over time,
    and unless the decoder is guided: others leave the noisy posteriors untrained.
    """
    check_key(key)
    check_guided(program.denoiser, "noise_end_kl")
    check_single(program.encoder, "noise_end_kl")
    observed, given = program.observations(data)
    encoder, latents, schedule = program.encoder, program.latents, program.denoiser.schedule

    def guide(x_noisy: Array, level: Array) -> None:
        program.sample_global_sites()
        with numpyro.plate("obs", len(x_noisy)):
            parameters = jax.vmap(encoder.parameters, in_axes=(0, None))(x_noisy, level)
            sample_latents(latents, encoder.distribution(parameters))

    def prior(size: int) -> None:
        program.sample_prior(numpyro.plate("obs", size), size, given)

    def one(key: Array, x: Array) -> dict[str, Array]:
        noise_key, guide_key, prior_key = jax.random.split(key, 3)
        level = jnp.asarray(schedule.log_snr_min, x.dtype)
        x_noisy = schedule.add_noise(x, level, jax.random.normal(noise_key, x.shape, x.dtype))
        q = handlers.trace(handlers.seed(guide, guide_key)).get_trace(x_noisy, level)
        p = handlers.trace(handlers.replay(handlers.seed(prior, prior_key), q)).get_trace(len(x))
        return {
            s.name: site_kl(q[s.name]["fn"], p[s.name]["fn"], q[s.name]["value"]).sum(1).mean() for s in latents.sites
        }

    found = jax.lax.map(lambda key: one(key, jnp.asarray(observed)), jax.random.split(key, draws))
    return {name: float(value.mean()) for name, value in found.items()}
