"""The evidence bound of every observation, in nats, by its parts, with the noise of its estimate."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpy as np
import xarray as xr

from sami_ppl._util.chunks import chunk_of, padded_chunks
from sami_ppl._util.keys import check_key
from sami_ppl._util.tables import readable
from sami_ppl.decoders.bound import bound, prior_loss, reconstruction_loss
from sami_ppl.diffusion.schedule import NoiseProposal
from sami_ppl.priors.read import Given
from sami_ppl.program.kl import site_kl, traces
from sami_ppl.program.program import Program

PILOT = 256
"""Observations to which a density of noise levels is fitted, at most."""


@readable
class LatentDraw(NamedTuple):
    """One draw of the factors of each observation from the guide.

    `values`: the factors, `z`: their codes (obs, D). `kl`: KL(q ‖ p) in nats per axis of z, in closed form where there
    is one, else at the draw; a site whose axes depend on each other shares its KL evenly among them. `log_q`, and
    `log_p` by site: densities of the draw under guide and prior, on the factors' own supports, in nats.
    """

    values: dict[str, Array]
    z: Float[Array, "obs D"]
    kl: Float[Array, "obs D"]
    log_q: Float[Array, " obs"]
    log_p: dict[str, Float[Array, " obs"]]


def draw_latents(
    program: Program,
    x: Float[Array, "obs *event"],
    key: Key[Array, ""],
    given: Given | None = None,
    global_values: Mapping[str, Array] | None = None,
) -> LatentDraw:
    """Draw the factors from the guide, and score the draw, at the variables that the prior takes.

    `global_values`: values of global sites, else drawn too.
    """
    params = program.params() | dict(global_values or {})
    model, guide = traces(key, params, program.model, program.guide, x, given=given)
    values, kls, log_q, log_p = {}, [], jnp.zeros(len(x)), {}
    for site in program.latents.sites:
        value, q, p = guide[site.name]["value"], guide[site.name]["fn"], model[site.name]["fn"]
        kl = site_kl(q, p, value)
        kls.append(kl if kl.shape[1] == site.size else jnp.repeat(kl / site.size, site.size, axis=1))
        log_q, log_p[site.name], values[site.name] = log_q + q.log_prob(value), p.log_prob(value), value
    return LatentDraw(values, program.latents.to_code(values), jnp.concatenate(kls, axis=1), log_q, log_p)


class _Pass(NamedTuple):
    diffusion: Array
    kl: Array


@eqx.filter_jit
@jax.default_matmul_precision("highest")  # on a GPU products are of TF32 otherwise: three digits
def _passes(program: Program, proposal: NoiseProposal, x: Array, given: Given, key: Array, levels: int) -> _Pass:
    """Diffusion terms (levels, obs) and KL (levels, obs, D): an observation's levels are strata of the proposal."""
    offset_key, pass_key = jax.random.split(key)
    offset = jax.random.uniform(offset_key, (len(x),))

    def one(inputs: tuple[Array, Array]) -> _Pass:
        stratum, key = inputs
        latent_key, noise_key = jax.random.split(key)
        latent = draw_latents(program, x, latent_key, given)
        level = proposal.at((stratum + offset) / levels)
        eps = jax.random.normal(noise_key, x.shape, x.dtype)
        parts = jax.vmap(lambda *inputs: bound(program.denoiser, program.encoder, *inputs))(x, latent.z, *level, eps)
        return _Pass(parts.diffusion, latent.kl)

    return jax.lax.map(one, (jnp.arange(levels), jax.random.split(pass_key, levels)))


def evidence_bound(
    program: Program,
    data: xr.Dataset | Float[Array | np.ndarray, "obs *event"],
    *,
    key: Key[Array, ""],
    levels: int = 32,
    proposal: NoiseProposal | Literal["fitted"] | None = None,
    chunk: int | None = None,
    seconds: float | None = None,
) -> xr.Dataset:
    """Unbiased estimates of the bound on −log p(x), in nats, for each observation (β = 1, w = 1).

    Variables on `obs`: `bound` and its parts `prior`, `diffusion`, `reconstruction` and `kl` (obs, site), which sum to
    it; `kl_axis` (obs, axis); `monte_carlo_se`, the standard error of `bound` from its `levels` noise levels taken as
    independent, which is an upper end, since they are stratified. The KL of global sites, shared by all observations,
    is not part of an observation's bound; its own sites are scored at draws of the global ones.

    Args:
        program: the program.
        data: observations x, an array (obs, *event) or a Dataset, which holds the variables that the prior takes too.
        key: random key.
        levels: noise levels for each observation.
        proposal: density of the noise levels, or "fitted", that of `importance_proposal` for these observations;
            default the uniform one.
        chunk: observations at a time; default 256, fewer of large ones.
        seconds: after so many no further chunk is begun: the estimates are those of the first observations.

    Returns:
        The estimates.

    Raises:
        ValueError: observations of another shape, fewer than two levels, another word than "fitted".
    """
    check_key(key)
    x, given = program.observations(data)
    if levels < 2:
        raise ValueError(f"levels must be at least 2, so that the estimate has a standard error, got {levels}")
    proposal, key = chosen_proposal(program, x, given, proposal, key)
    chunk, parts = chunk_of(256, program.event_shape) if chunk is None else chunk, []
    for i, (rows, count) in enumerate(padded_chunks(len(x), chunk, seconds=seconds)):
        part = {name: jnp.asarray(value[rows]) for name, value in given.items()}
        part_key = jax.random.fold_in(key, i)
        found = jax.device_get(_passes(program, proposal, jnp.asarray(x[rows]), part, part_key, levels))
        parts.append((found.diffusion[:, :count], found.kl[:, :count]))
    diffusion, kl = (np.concatenate(part, axis=1) for part in zip(*parts, strict=True))
    schedule, x = program.denoiser.schedule, x[: diffusion.shape[1]]
    start_loss, end_loss = (
        np.asarray(jax.vmap(lambda x, loss=loss: loss(schedule, x))(jnp.asarray(x)))
        for loss in (prior_loss, reconstruction_loss)
    )
    kl_axis = kl.mean(0)
    kl_site = np.stack([kl_axis[:, site.code].sum(1) for site in program.latents.sites], axis=1)
    noise = diffusion + kl.sum(-1)
    variables = {
        "prior": ("obs", start_loss),
        "diffusion": ("obs", diffusion.mean(0)),
        "reconstruction": ("obs", end_loss),
        "kl": (("obs", "site"), kl_site),
        "kl_axis": (("obs", "axis"), kl_axis),
        "bound": ("obs", start_loss + end_loss + noise.mean(0)),
        "monte_carlo_se": ("obs", noise.std(0, ddof=1) / np.sqrt(levels)),
    }
    coords = {"site": [site.name for site in program.latents.sites], "axis": list(program.latents.axes)}
    attrs = {"units": "nats", "levels": levels, "long_name": "upper bound on −log p(x)"}
    return xr.Dataset(variables, coords=coords, attrs=attrs)


def importance_proposal(
    program: Program,
    data: xr.Dataset | Float[Array | np.ndarray, "obs *event"],
    *,
    key: Key[Array, ""],
    pilot: int = PILOT,
    bins: int = 24,
    floor: float = 0.1,
) -> NoiseProposal:
    """The density of noise levels under which the bound of observations like the first `pilot` ones is least noisy.

    An observation's levels are stratified, so a bin is given its share of the standard deviation, over z, ε and λ in
    it, of one observation's error (Neyman allocation), measured on two levels in every bin; a share `floor` is spread
    evenly, which keeps the weights bounded. Estimates stay unbiased whatever is measured.
    """
    check_key(key)
    x, given = program.observations(first(data, pilot))
    return _fitted(program, x, given, key, bins, floor)


def chosen_proposal(
    program: Program,
    x: Float[np.ndarray, "obs *event"],
    given: Given,
    proposal: NoiseProposal | Literal["fitted"] | None,
    key: Key[Array, ""],
) -> tuple[NoiseProposal, Key[Array, ""]]:
    """The density of noise levels that an estimator is asked for, and the key that is left for the estimate.

    Raises ValueError for another word than "fitted".
    """
    if isinstance(proposal, NoiseProposal):
        return proposal, key
    if proposal is None:
        return NoiseProposal(program.denoiser.schedule), key
    if proposal != "fitted":
        raise ValueError(f"proposal must be a NoiseProposal, 'fitted' or None for a uniform one, got {proposal!r}")
    pilot_key, key = jax.random.split(key)
    return _fitted(program, x[:PILOT], {name: value[:PILOT] for name, value in given.items()}, pilot_key), key


def _fitted(
    program: Program, x: np.ndarray, given: Given, key: Array, bins: int = 24, floor: float = 0.1
) -> NoiseProposal:
    uniform = NoiseProposal(program.denoiser.schedule)
    given = {name: jnp.asarray(value) for name, value in given.items()}
    errors = _passes(program, uniform, jnp.asarray(x), given, key, 2 * bins).diffusion.reshape(bins, 2, len(x))
    spread = jnp.sqrt(jnp.mean((errors[:, 0] - errors[:, 1]) ** 2, axis=1))
    return NoiseProposal(program.denoiser.schedule, (1 - floor) * spread / spread.sum() + floor / bins)


def first(data: Any, count: int) -> Any:
    """The first observations of an array or a Dataset."""
    return data.isel(obs=slice(count)) if isinstance(data, xr.Dataset) else data[:count]


def summarise(estimates: xr.Dataset, x: Float[np.ndarray, "obs *event"]) -> dict[str, dict[str, float]]:
    """Means over observations with standard errors, in nats, of the bound, its parts and the KL of each site.

    `bits_per_dim` = bound / (d · ln 2), where d is the number of values of an observation x, pixels times channels; of
    sequences with missing frames, the mean number of those that were seen. The standard errors are over observations,
    noise of the estimates included.
    """
    dimensions = np.count_nonzero(~np.isnan(x)) / len(x)
    found = {name: mean_and_error(estimates[name].values) for name in ("bound", "prior", "diffusion", "reconstruction")}
    found |= {f"kl[{site}]": mean_and_error(estimates["kl"].sel(site=site).values) for site in estimates["site"].values}
    bits = found["bound"]
    return {**found, "bits_per_dim": {name: value / (dimensions * np.log(2)) for name, value in bits.items()}}


def mean_and_error(values: Float[np.ndarray, " obs"]) -> dict[str, float]:
    """Mean over observations and its standard error; NaN for a single one."""
    se = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
    return {"mean": float(values.mean()), "se": se}
