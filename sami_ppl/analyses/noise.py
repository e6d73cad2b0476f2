"""What noise leaves of the code, and what the code gives to the denoiser, noise level by noise level."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
from matplotlib.figure import Figure
import numpy as np
import xarray as xr

from sami_ppl import plots
from sami_ppl._util.chunks import chunk_of, padded_chunks
from sami_ppl._util.keys import check_key
from sami_ppl.analyses.codes import CHUNK, CODE_UNITS, axis_dataset
from sami_ppl.decoders.guidance import check_guided
from sami_ppl.diagnostics.gain import draw_codes
from sami_ppl.program.program import Program

NOISE_LABEL = "log-SNR: mostly noise on the left, clean on the right"


def noise_levels(program: Program, levels: int) -> Float[Array, " levels"]:
    """`levels` noise levels from λmin to λmax, both included. Raises ValueError for fewer than 2."""
    if levels < 2:
        raise ValueError(f"levels must be at least 2, the two ends of the noise range, got {levels}")
    schedule = program.denoiser.schedule
    return jnp.linspace(schedule.log_snr_min, schedule.log_snr_max, levels)


def _by_level(
    function: Callable[..., tuple[Array, ...]], key: Array, chunk: int | None, *values: np.ndarray
) -> list[Float[np.ndarray, "levels obs *rest"]]:
    """What `function(key, *batch)` gives at every noise level, chunk by chunk of observations, in double precision."""
    parts, chunk = [], chunk_of(CHUNK, values[0].shape[1:]) if chunk is None else chunk
    for i, (rows, count) in enumerate(padded_chunks(len(values[0]), chunk)):
        found = jax.device_get(function(jax.random.fold_in(key, i), *(jnp.asarray(value[rows]) for value in values)))
        parts.append([leaf[:, :count] for leaf in found])
    return [np.concatenate(part, axis=1).astype(np.float64) for part in zip(*parts, strict=True)]


@eqx.filter_jit
def _posteriors(program: Program, x: Array, key: Array, levels: Array) -> tuple[Array, Array]:
    """Mean and variance (levels, obs, D) of q(z | x_λ, λ), with the same noise at all levels."""
    eps = jax.random.normal(key, x.shape, x.dtype)

    def at(log_snr: Array) -> tuple[Array, Array]:
        x_noisy = program.denoiser.schedule.add_noise(x, log_snr, eps)
        loc, scale = jax.vmap(program.encoder, in_axes=(0, None))(x_noisy, log_snr)
        return loc, scale**2

    return jax.lax.map(at, levels)


def posterior_by_noise(
    program: Program,
    x: Float[Array | np.ndarray, "obs *event"],
    *,
    key: Key[Array, ""],
    levels: int = 25,
    chunk: int | None = None,
) -> xr.Dataset:
    """Which axes survive how much noise: the noisy posterior q(z | x_λ, λ) of every axis against λ.

    Dims `log_snr` (λmin to λmax) and `axis`:

    - `mean_variance`: variance over observations and noise of the posterior mean, in squared spreads of the prior;
    - `posterior_variance`: mean over them of the posterior variance. For a true posterior the two sum to the variance
      of z, 1 under a standard normal prior, at every level;
    - `explained`: mean_variance / (mean_variance + posterior_variance), the share of the axis that x_λ still tells;
      `explained_se`, its standard error over observations (delta method).

    Axes come in the order of `explained` at λmin, the one that survives most noise first; the coordinate `rank` says
    so, from 1. One noise ε per observation, the same at all levels. Raises ValueError for fewer than 2 observations,
    and unless the decoder is guided: others leave the noisy posteriors untrained.
    """
    check_key(key)
    check_guided(program.denoiser, "posterior_by_noise")
    x = program.observed(x, at_least=2, why="a variance over observations")
    lam = noise_levels(program, levels)
    loc, variance = _by_level(lambda key, x: _posteriors(program, x, key, lam), key, chunk, x)
    across, within = loc.var(axis=1, ddof=1), variance.mean(axis=1)
    total = np.maximum(across + within, 1e-30)
    explained, dims = across / total, ("log_snr", "axis")
    # What each observation adds to the two variances, and through them to the share.
    influence = (1 - explained)[:, None] * (loc - loc.mean(axis=1, keepdims=True)) ** 2 - explained[:, None] * variance
    se = influence.std(axis=1, ddof=1) / total / np.sqrt(len(x))
    order = np.argsort(-explained[0], kind="stable")
    rank = np.empty(len(order), int)
    rank[order] = np.arange(1, len(order) + 1)
    squared = f"squared {CODE_UNITS}"
    data = axis_dataset(
        program,
        {
            "mean_variance": (dims, across, squared, "variance of the posterior mean over observations"),
            "posterior_variance": (dims, within, squared, "mean posterior variance"),
            "explained": (dims, explained, "1", "share of the axis that the noisy observation tells"),
            "explained_se": (dims, se, "1", "its standard error"),
        },
        {"log_snr": ("log_snr", np.asarray(lam), {"units": "nats"}), "rank": ("axis", rank)},
        observations=len(x),
    )
    return data.isel(axis=order)


def plot_posterior_by_noise(found: xr.Dataset) -> Figure:
    """Above, how much the posterior means vary, below, the mean posterior variance, against the noise level.

    Axes are named in the order of their ranks; of more than seven the others are grey.
    """
    figure = plots.Picture(figsize=(plots.WIDTH, 4.0), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    series = [("mean_variance", "variance of the posterior means"), ("posterior_variance", "mean posterior variance")]
    for (name, title), panel in zip(series, panels, strict=True):
        plots.style(panel)
        for axis, colour, label in plots.line_colours(found["axis"].values):
            own = found[name].sel(axis=axis)
            label = label if label in ("_", "others") else f"{label}, rank {int(own['rank'])}"
            panel.plot(found["log_snr"], own, color=colour, lw=1.4, label=label)
        panel.set_ylim(bottom=0)
        panel.set_title(f"{title}, squared spreads of the prior", fontsize=plots.NORMAL, loc="left", color=plots.INK)
    panels[0].legend(fontsize=plots.SMALL, frameon=False, loc="upper left", borderpad=0)
    panels[1].set_xlabel(NOISE_LABEL, fontsize=plots.SMALL)
    return figure


@eqx.filter_jit
def _errors(program: Program, x: Array, own: Array, other: Array, key: Array, levels: Array) -> tuple[Array, ...]:
    """‖x − x̂‖² (levels, obs): without z, with the own z, with another's."""
    schedule = program.denoiser.schedule
    eps = jax.random.normal(key, x.shape, x.dtype)

    def one(x: Array, own: Array, other: Array, eps: Array, log_snr: Array) -> tuple[Array, ...]:
        x, seen = program.denoiser.fill_missing(x)
        x_noisy = schedule.add_noise(x, log_snr, eps)
        steered = jax.vmap(lambda z: program.decoder(z).x_hat(x_noisy, log_snr))(jnp.stack([own, other]))
        hats = program.denoiser.x_hat(x_noisy, log_snr), *steered
        return tuple(jnp.sum(jnp.where(seen > 0, x - hat, 0) ** 2) for hat in hats)

    def at(log_snr: Array) -> tuple[Array, ...]:
        return jax.vmap(one, in_axes=(0, 0, 0, 0, None))(x, own, other, eps, log_snr)

    return jax.lax.map(at, levels)


def variance_reduction(
    program: Program,
    x: Float[Array | np.ndarray, "obs *event"],
    *,
    key: Key[Array, ""],
    levels: int = 25,
    chunk: int | None = None,
) -> xr.Dataset:
    """How much of the denoiser's squared error knowing z removes, against the noise level (dim `log_snr`).

    With D(x_λ) the denoised mean, D(x_λ; z) the guided one, z ~ q(z | x) and squares summed over the event:

    - `error`: E‖x − D(x_λ)‖², `error_given_z`: E‖x − D(x_λ; z)‖², `error_given_other`: that with the z of the next
      observation, in squared units of x. The last is the largest where samples follow the code: a wrong one misleads;
    - `reduction`: 1 − error_given_z / error; 1 where z says all that the noise has hidden, 0 where it adds nothing;
      `reduction_se`, its standard error over observations.

    Raises ValueError for fewer than 2 observations, and with a Gaussian decoder, which has no denoiser without z.
    """
    check_key(key)
    x = program.observed(x, at_least=2, why="another observation's code")
    lam = noise_levels(program, levels)
    code_key, noise_key = jax.random.split(key)
    z = draw_codes(program, x, code_key, chunk=chunk)
    errors = lambda key, x, own, other: _errors(program, x, own, other, key, lam)  # noqa: E731
    plain, own, shuffled = _by_level(errors, noise_key, chunk, x, z, np.roll(z, 1, axis=0))
    base, ratio = plain.mean(1), own.mean(1) / plain.mean(1)
    # The error of a ratio of means, to first order.
    se = (own - ratio[:, None] * plain).std(1, ddof=1) / base / np.sqrt(len(x))
    square = "squared units of x, summed over the event"
    variables = {
        "error": ("log_snr", base, {"units": square}),
        "error_given_z": ("log_snr", own.mean(1), {"units": square}),
        "error_given_other": ("log_snr", shuffled.mean(1), {"units": square}),
        "reduction": ("log_snr", 1 - ratio, {"units": "1", "long_name": "share of the error that z removes"}),
        "reduction_se": ("log_snr", se, {"units": "1"}),
    }
    coords = {"log_snr": ("log_snr", np.asarray(lam), {"units": "nats"})}
    return xr.Dataset(variables, coords=coords, attrs={"observations": len(x)})


def plot_variance_reduction(found: xr.Dataset) -> Figure:
    """Above, the squared errors without z, with the own and with another's; below, the share that the own z removes.

    The band is ±2 standard errors.
    """
    figure = plots.Picture(figsize=(plots.WIDTH, 4.0), layout="constrained")
    errors, share = (plots.style(panel) for panel in figure.subplots(2, 1, sharex=True))
    lam, reduction, se = (found[name].values for name in ("log_snr", "reduction", "reduction_se"))
    lines = {"error_given_other": "another's z", "error": "no z", "error_given_z": "own z"}
    for (name, label), colour in zip(lines.items(), (plots.VERMILION, plots.GRAY, plots.BLUE), strict=True):
        errors.plot(lam, found[name], color=colour, lw=1.4, label=label)
    errors.set_yscale("log")
    errors.minorticks_off()
    errors.legend(fontsize=plots.SMALL, frameon=False, loc="lower left", borderpad=0)
    errors.set_title("squared error of the denoised mean", fontsize=plots.NORMAL, loc="left", color=plots.INK)
    share.fill_between(lam, reduction - 2 * se, reduction + 2 * se, color=plots.BLUE, alpha=0.25, lw=0)
    share.plot(lam, reduction, color=plots.BLUE, lw=1.4)
    share.axhline(0, color=plots.GRAY, lw=0.8)
    share.set_ylim(min(-0.05, 1.1 * float((reduction - 2 * se).min())), 1.0)
    share.set_title("share of it that the own z removes", fontsize=plots.NORMAL, loc="left", color=plots.INK)
    share.set_xlabel(NOISE_LABEL, fontsize=plots.SMALL)
    return figure
