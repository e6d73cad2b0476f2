"""The information spectrum: what z tells about the observation, in nats, per axis and per noise level.

With the true noisy posterior, g = ∇ log q(z | x_λ, λ) carries information at the rate σ² E‖g‖² (Guo, Shamai & Verdú
2005, *Mutual information and minimum mean-square error in Gaussian channels*):

    I(x_λ; z) = ½ ∫_{−∞}^{λ} σ² E‖g‖² du,

so that the energy of the guidance, a by-product of the decoder, says at which noise level which axis speaks.
"""

from functools import partial
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.stats import norm
from jaxtyping import Array, Float, Key
import numpy as np
import xarray as xr

from sami_ppl._util.chunks import by_chunks, chunk_of
from sami_ppl._util.keys import check_key
from sami_ppl.decoders.guidance import check_guided, guidance
from sami_ppl.diagnostics.gain import draw_code
from sami_ppl.encoders.frames import check_single
from sami_ppl.priors.sites import Direction
from sami_ppl.program.program import Program


def axis_log_prob(
    program: Program, z: Float[Array, " D"], x_noisy: Float[Array, "*event"], log_snr: Float[Array, ""]
) -> Float[Array, " D"]:
    """Log density of every axis under its marginal noisy posterior N(loc_j, var_j), in nats; Bernoulli for kinds."""
    loc, scale = program.encoder(x_noisy, log_snr)
    log_prob = norm.logpdf(z, loc, scale)
    for site in program.latents.discrete:
        probs, code = loc[site.code], z[site.code]
        kind = jnp.where(code > 0.5, jnp.log(probs + 1e-12), jnp.log1p(-jnp.minimum(probs, 1 - 1e-6)))
        log_prob = log_prob.at[site.code].set(kind)
    return log_prob


@eqx.filter_jit
def _moments(program: Program, x: Array, key: Array, levels: Array) -> dict[str, Array]:
    """Averages over observations, z ~ q(z | x) and noise, fresh at every level."""
    denoiser, encoder, schedule = program.denoiser, program.encoder, program.denoiser.schedule

    def one(x: Array, z: Array, eps: Array, log_snr: Array) -> dict[str, Array]:
        sigma, x_noisy = schedule.sigma(log_snr), schedule.add_noise(x, log_snr, eps)
        joint = sigma * guidance(encoder, z, x_noisy, log_snr).reshape(-1)
        own = jax.jacrev(lambda at: axis_log_prob(program, z, at, log_snr))(x_noisy).reshape(len(z), -1)
        eps_theta = denoiser(x_noisy, log_snr).reshape(-1)
        residual = eps.reshape(-1) - eps_theta
        return {
            "energy": jnp.sum(joint**2),
            "axis_energy": sigma**2 * jnp.sum(own**2, axis=1),
            "gain": jnp.sum(residual**2) - jnp.sum((residual + joint) ** 2),
            "mean": joint,
            "with_score": joint @ eps_theta,
            "score_energy": eps_theta @ eps_theta,
        }

    def level(inputs: tuple[Array, Array]) -> dict[str, Array]:
        log_snr, key = inputs
        z_key, noise_key = jax.random.split(key)
        z, eps = draw_code(program, x, z_key), jax.random.normal(noise_key, x.shape, x.dtype)
        batch = chunk_of(len(x), program.event_shape, passes=z.shape[1])
        found = jax.lax.map(lambda each: one(each[0], each[1], each[2], log_snr), (x, z, eps), batch_size=batch)
        found["gain_se"] = found["gain"].std() / jnp.sqrt(len(x))
        return jax.tree.map(lambda leaf: leaf if leaf.ndim == 0 else leaf.mean(0), found)

    return jax.lax.map(level, (levels, jax.random.split(key, len(levels))))


def information_spectrum(
    program: Program,
    x: Float[Array | np.ndarray, "obs *event"],
    *,
    key: Key[Array, ""],
    levels: int = 48,
) -> xr.Dataset:
    """Information per axis and noise level, in nats, with the checks that say whether it may be believed.

    Dims `log_snr` (centres of `levels` equal steps, noisy to clean) and `axis`:

    - `energy` (log_snr): σ² E‖g‖², twice the rate of information, in nats per unit of λ;
    - `axis_energy` (log_snr, axis): the same for the marginal posterior of each axis, twice the rate of I(x_λ; z_j);
    - `information` (log_snr), `axis_information` (log_snr, axis): integrals from λmin up to the end of each step;
    - `gain` (log_snr): E‖ε − ε_θ‖² − E‖ε − ε̂‖², how much the guidance really lowers the denoising error; equals
      `energy` where the noisy posterior is the true one; `gain_se`, its standard error;
    - `mean_guidance` (log_snr): ‖E g‖²/E‖g‖², `cosine_with_score` (log_snr): E⟨g, s⟩/√(E‖g‖² E‖s‖²). E[g | x_λ] = 0
      for the true posterior, so both are 0 up to noise of order 1/obs and 1/√obs.

    Attributes: `information`, `gain`: totals over the range in nats; `kl`: E KL(q(z | x) ‖ N(0, I)) of the code (of
    directions from the uniform law), the information by the bound's own account, if the aggregate posterior is the
    prior; `gap`: kl − information.

    Raises ValueError for observations of another shape, for programs of sequences, and unless the decoder is guided.
    """
    check_key(key)
    check_guided(program.denoiser, "information_spectrum")
    check_single(program.encoder, "information_spectrum")
    program.check_observations(x)
    schedule = program.denoiser.schedule
    step = schedule.span / levels
    centres = schedule.log_snr_min + step * (jnp.arange(levels) + 0.5)
    found = jax.device_get(_moments(program, jnp.asarray(x), key, centres))
    energy = found["energy"]
    variables = {
        "energy": ("log_snr", energy),
        "axis_energy": (("log_snr", "axis"), found["axis_energy"]),
        "information": ("log_snr", 0.5 * step * np.cumsum(energy)),
        "axis_information": (("log_snr", "axis"), 0.5 * step * np.cumsum(found["axis_energy"], axis=0)),
        "gain": ("log_snr", found["gain"]),
        "gain_se": ("log_snr", found["gain_se"]),
        "mean_guidance": ("log_snr", (found["mean"] ** 2).sum(1) / np.maximum(energy, 1e-30)),
        "cosine_with_score": (
            "log_snr",
            found["with_score"] / np.sqrt(np.maximum(energy * found["score_energy"], 1e-30)),
        ),
    }
    information, kl = float(0.5 * step * energy.sum()), code_kl(program, x, key)
    attrs = {
        "units": "nats", "information": information, "gain": float(0.5 * step * found["gain"].sum()), "kl": kl,
        "gap": kl - information, "observations": len(x),
    }  # fmt: skip
    return xr.Dataset(
        variables, coords={"log_snr": np.asarray(centres), "axis": list(program.latents.axes)}, attrs=attrs
    )


def code_kl(program: Program, x: Float[Array | np.ndarray, "obs *event"], key: Key[Array, ""]) -> float:
    """E KL(q(z | x) ‖ N(0, I)) of the code in nats, in closed form.

    Of discrete sites from equal probabilities; of directions from the uniform law, by one draw of each observation.
    """
    kl = by_chunks(partial(_code_kl, program, key), chunk_of(1024, program.event_shape), program.observed(x))
    return float(kl.mean())


@eqx.filter_jit
def _code_kl(program: Program, key: Array, x: Array) -> Float[Array, " obs"]:
    q = program.code_law(x)
    loc, sd = jnp.asarray(q.mean), jnp.sqrt(jnp.asarray(q.variance))
    kl = 0.5 * (loc**2 + sd**2 - 1 - 2 * jnp.log(sd))
    for site in program.latents.discrete:
        probs = loc[:, site.code]
        kl = kl.at[:, site.code].set(probs * jnp.log(jnp.maximum(site.categories * probs, 1e-30)))
    for site in program.latents.sites:
        if isinstance(site, Direction):
            law: Any = q.of_site(site, {})
            log_area = site.size // site.dimension * math.log({2: 2 * math.pi, 3: 4 * math.pi}[site.dimension])
            kl = kl.at[:, site.code].set((law.log_prob(law.sample(key)) + log_area)[:, None] / site.size)
    if q.diagonal or q.root is None:
        return kl.sum(1)
    # Correlations, which the marginals leave out, are information too.
    return kl.sum(1) + jnp.log(sd).sum(1) - jnp.linalg.slogdet(q.root)[1]
