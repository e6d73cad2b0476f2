"""The geometry of the code: how sure a posterior is, and what the axes do to observations everywhere alike.

Three numbers describe an axis beside how much it varies:

- *sensitivity*: the norm of ∇_x of its posterior variance. 0 where the posterior is as wide for every observation, as
  in a linear-Gaussian model; large where some observations tell the axis and their neighbours do not.
- *coherence*: the mean cosine similarity, over pairs of observations, of the change of the sample that a unit step
  along the axis makes. 1 where the axis does the same to every observation (a linear decoder, brightness), about 0
  where it does something else to each (moving a small object). The paper does not define it: this is our definition.
- its *noisy variance*: the posterior variance left at a given noise level.
"""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
from matplotlib.figure import Figure
import numpy as np
import xarray as xr

from sami_ppl import plots
from sami_ppl._util.chunks import by_chunks, chunk_of, padded_chunks
from sami_ppl._util.keys import check_key
from sami_ppl.analyses.codes import CHUNK, CODE_UNITS, axis_dataset
from sami_ppl.decoders.guidance import check_guided
from sami_ppl.diffusion.sampler import AbstractSampler
from sami_ppl.encoders.encoder import gaussian
from sami_ppl.fitting.gauge import posterior_roots
from sami_ppl.posteriors.generate import decode
from sami_ppl.program.program import Program

DRAWS = 4096
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
NEGLIGIBLE = 1e-4
"""Changes of a sample below this share of its root mean square are rounding errors of reverse diffusion."""


def posterior_covariance_spectrum(
    program: Program, x: Float[Array | np.ndarray, "obs *event"], *, key: Key[Array, ""]
) -> xr.Dataset:
    """Eigenvalues and eigenvectors of the covariance of q(z | x), for every observation; for one image give `x[None]`.

    `eigenvalue` (obs, component), falling, in squared spreads of the prior; `eigenvector` (obs, component, axis) of
    length 1, its largest coordinate positive; `mean` (obs, axis). A Gaussian posterior has its covariance in closed
    form; of another it is that of 4,096 draws, as `attrs["from"]` says.
    """
    check_key(key)
    x = program.observed(x)
    means, closed = program.encode(x)[0], gaussian(program.encoder)
    if closed:
        root = by_chunks(partial(posterior_roots, program), chunk_of(CHUNK, program.event_shape), x)
        covariance = root @ np.swapaxes(root, 1, 2)
    else:
        covariance = _sampled_covariance(program, x, key)
    values, vectors = np.linalg.eigh(covariance.astype(np.float64))
    values, vectors = np.maximum(values[:, ::-1], 0), np.swapaxes(vectors, 1, 2)[:, ::-1]
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(2)[:, :, None], axis=2)
    origin = "closed form" if closed else f"{DRAWS} draws"
    return axis_dataset(
        program,
        {
            "eigenvalue": (("obs", "component"), values, f"squared {CODE_UNITS}", "posterior variance along component"),
            "eigenvector": (("obs", "component", "axis"), vectors * np.sign(largest), "1", "direction in the code"),
            "mean": (("obs", "axis"), means, CODE_UNITS, "posterior mean"),
        },
        {"component": np.arange(1, values.shape[1] + 1)},
        **{"from": origin},
    )


def _sampled_covariance(program: Program, x: np.ndarray, key: Array) -> Float[np.ndarray, "obs D D"]:
    return np.asarray(_covariances(program, jnp.asarray(x), jax.random.split(key, len(x))))


@eqx.filter_jit
def _covariances(program: Program, x: Array, keys: Array) -> Array:
    encoder = program.encoder

    def covariance(inputs: tuple[Array, Array]) -> Array:
        x, key = inputs
        q = encoder.law(x)
        draws = jax.vmap(q.sample)(jax.random.split(key, DRAWS))
        return jnp.cov(draws, rowvar=False).reshape(draws.shape[1], draws.shape[1])

    return jax.lax.map(covariance, (x, keys))


def plot_posterior_covariance_spectrum(spectrum: xr.Dataset) -> Figure:
    """Posterior standard deviations along the components: a thin line per observation, the median in bold."""
    figure = plots.Picture(figsize=(plots.WIDTH, 2.4), layout="constrained")
    panel = plots.style(figure.subplots())
    spread = np.sqrt(np.maximum(spectrum["eigenvalue"].values, 0))
    component = spectrum["component"].values
    panel.plot(component, spread[:256].T, color=plots.GRAY, lw=0.6, alpha=0.3 if len(spread) > 8 else 0.8)
    label = "median" if len(spread) > 1 else "this observation"
    panel.plot(component, np.median(spread, axis=0), color=plots.BLUE, lw=1.6, marker="o", ms=3.5, label=label)
    if spread.min() > 0 and spread.max() > 30 * spread.min():
        panel.set_yscale("log")
    else:
        panel.set_ylim(0, 1.15 * spread.max())
    panel.set_xticks(component)
    panel.legend(fontsize=plots.SMALL, frameon=False, loc="lower left", borderpad=0)
    panel.set_title("posterior spread, in spreads of the prior", fontsize=plots.NORMAL, loc="left", color=plots.INK)
    panel.set_xlabel("principal component of q(z | x)", fontsize=plots.SMALL)
    return figure


@eqx.filter_jit
def _variance_gradients(program: Program, x: Array) -> Array:
    def variance(x: Array) -> Array:
        return program.encoder.posterior(x)[1] ** 2

    def norms(x: Array) -> Array:
        gradient = jax.jacrev(variance)(x)
        return jnp.sqrt(jnp.sum(gradient.reshape(len(gradient), -1) ** 2, axis=1))

    return jax.vmap(norms)(x)


def sensitivity(
    program: Program, x: Float[Array | np.ndarray, "obs *event"], *, chunk: int | None = None
) -> xr.Dataset:
    """`sensitivity` (obs, axis): ‖∇_x Var_q(z_j | x)‖, in squared spreads of the prior per unit of x."""
    x = program.observed(x)
    chunk = chunk_of(CHUNK, program.event_shape) if chunk is None else chunk
    parts = [
        np.asarray(_variance_gradients(program, jnp.asarray(x[rows])))[:n] for rows, n in padded_chunks(len(x), chunk)
    ]
    units, name = f"squared {CODE_UNITS} per unit of x", "norm of the gradient of the posterior variance"
    return axis_dataset(program, {"sensitivity": (("obs", "axis"), np.concatenate(parts), units, name)})


def coherence(
    program: Program,
    x: Float[Array | np.ndarray, "obs *event"],
    *,
    key: Key[Array, ""],
    step: float = 1.0,
    sampler: AbstractSampler | None = None,
) -> xr.Dataset:
    """Does an axis do the same to every observation? (Our definition, see the module.)

    The code of each observation, its posterior mean, is moved by `step` spreads of the prior along each axis; both ends
    are sampled with the same noise, one per observation. On `axis`: `coherence`, the mean cosine similarity of the
    changes over pairs of observations, `coherence_se`, its standard error (jackknife of the U-statistic, Hoeffding
    1948), and `change`, the root mean square of the change over observations and pixels. NaN for an axis that
    changes fewer than two observations. Takes (D + 1) samples per observation.

    Raises ValueError for fewer than 2 observations, and where no axis changes any.
    """
    check_key(key)
    x = program.observed(x, at_least=2, why="a mean over pairs of observations")
    means, size = program.encode(x)[0], program.latents.size
    codes = means[:, None] + step * np.concatenate([np.zeros((1, size)), np.eye(size)])[None]
    codes = np.asarray(program.latents.onto_support(jnp.asarray(codes, jnp.float32)))
    keys = jnp.repeat(jax.random.split(key, len(x)), size + 1)
    sampler = program.sampler.coupled if sampler is None else sampler
    samples = decode(program, codes.reshape(-1, size), keys, sampler=sampler)
    samples = samples.reshape(len(x), size + 1, -1).astype(np.float64)
    changes = samples[:, 1:] - samples[:, :1]
    cosines = [_mean_cosine(changes[:, j], NEGLIGIBLE * np.linalg.norm(samples[:, 0], axis=1)) for j in range(size)]
    value, se = np.array(cosines).T
    if np.isnan(value).all():
        raise ValueError(
            "all axes have collapsed: a step along none of them changes the samples; see diagnostics.collapse.ADVICE"
        )
    variables = {
        "coherence": ("axis", value, "1", "mean cosine similarity of the change over pairs of observations"),
        "coherence_se": ("axis", se, "1", "standard error of the coherence"),
        "change": ("axis", np.sqrt((changes**2).mean((0, 2))), "units of x", "root mean square change"),
    }
    return axis_dataset(program, variables, step=step, observations=len(x))


def _mean_cosine(changes: Float[np.ndarray, "n p"], floor: Float[np.ndarray, " n"]) -> tuple[float, float]:
    """Mean cosine over pairs of the vectors longer than `floor`, and its standard error; NaN for fewer than two."""
    norms = np.linalg.norm(changes, axis=1)
    unit = changes[norms > floor] / norms[norms > floor, None]
    n = len(unit)
    if n < 2:
        return np.nan, np.nan
    with_others = (unit @ unit.sum(0) - 1) / (n - 1)
    return float(with_others.mean()), float(2 * with_others.std(ddof=1) / np.sqrt(n))


def axis_geometry(
    program: Program,
    x: Float[Array | np.ndarray, "obs *event"],
    *,
    key: Key[Array, ""],
    log_snr: float = 0.0,
    pairs_of: int = 64,
    sampler: AbstractSampler | None = None,
) -> xr.Dataset:
    """All that describes an axis, on `axis`, the most coherent first (the paper's figure 3F).

    `mean_variance`, how much the posterior mean varies over observations; `posterior_variance`, the mean posterior
    variance, and `noisy_variance`, that at noise level `log_snr`; `sensitivity`, its mean over observations;
    `coherence`, `coherence_se` and `change` from the first `pairs_of` observations. Raises what `coherence` raises, and
    ValueError unless the decoder is guided: others leave the noisy posteriors untrained.
    """
    check_key(key)
    check_guided(program.denoiser, "axis_geometry")
    x = program.observed(x, at_least=2, why="a variance over observations")
    noise_key, sample_key = jax.random.split(key)
    loc, scale = program.encode(x)
    noisy = _noisy_variance(program, x, noise_key, log_snr)
    squared = f"squared {CODE_UNITS}"
    variables: dict[str, Any] = {
        "mean_variance": ("axis", loc.var(0, ddof=1), squared, "variance of the posterior mean over observations"),
        "posterior_variance": ("axis", (scale**2).mean(0), squared, "mean posterior variance"),
        "noisy_variance": ("axis", noisy, squared, f"mean posterior variance at log-SNR {log_snr:g}"),
    }
    geometry = axis_dataset(program, variables, log_snr=log_snr, observations=len(x))
    geometry["sensitivity"] = sensitivity(program, x)["sensitivity"].mean("obs", keep_attrs=True)
    geometry = geometry.merge(coherence(program, x[:pairs_of], key=sample_key, sampler=sampler), combine_attrs="drop")
    geometry.attrs = {"log_snr": log_snr, "observations": len(x), "pairs_of": min(pairs_of, len(x))}
    return geometry.isel(axis=np.argsort(-geometry["coherence"].values, kind="stable"))  # NaN comes last


def _noisy_variance(program: Program, x: np.ndarray, key: Array, log_snr: float) -> Float[np.ndarray, " D"]:
    level = jnp.asarray(log_snr, jnp.float32)
    parts = [
        np.asarray(_noisy_variances(program, level, jnp.asarray(x[rows]), jax.random.fold_in(key, i)))[:count]
        for i, (rows, count) in enumerate(padded_chunks(len(x), chunk_of(CHUNK, program.event_shape)))
    ]
    return np.concatenate(parts).mean(0)


@eqx.filter_jit
def _noisy_variances(program: Program, level: Array, x: Array, key: Array) -> Array:
    x_noisy = program.denoiser.schedule.add_noise(x, level, jax.random.normal(key, x.shape, x.dtype))
    return jax.vmap(program.encoder, in_axes=(0, None))(x_noisy, level)[1] ** 2


def plot_axis_geometry(geometry: xr.Dataset) -> Figure:
    """One row per axis, the most coherent first: coherence with its ±2 standard errors, variances, sensitivity."""
    columns = [
        ("coherence", "coherence"),
        ("mean_variance", "variance\nof means"),
        ("noisy_variance", f"posterior variance\nat log-SNR {geometry.attrs['log_snr']:g}"),
        ("sensitivity", "sensitivity"),
    ]
    count = geometry.sizes["axis"]
    figure = plots.Picture(figsize=(1.4 * plots.WIDTH, 0.9 + 0.28 * count), layout="constrained")
    panels = figure.subplots(1, len(columns), sharey=True)
    for (name, title), panel in zip(columns, panels, strict=True):
        plots.style(panel)
        values = geometry[name].values
        power = int(np.floor(np.log10(max(float(np.nanmax(np.abs(values))), 1e-12))))
        if name != "coherence" and not -2 < power < 4:  # a common power of ten goes to the title
            values, title = values / 10.0**power, f"{title}, 10{str(power).translate(RAISED)}"
        panel.barh(range(count), np.nan_to_num(values), height=0.65, color=plots.BLUE)
        if name == "coherence":
            panel.errorbar(
                values, range(count), xerr=2 * geometry["coherence_se"].values, fmt="none", ecolor=plots.INK, lw=1
            )
            panel.set_xlim(min(0.0, 1.1 * float(np.nanmin(values))), 1.0)
        panel.set_title(title, fontsize=plots.SMALL, color=plots.INK)
        panel.axvline(0, color=plots.GRAY, lw=0.8)
        panel.locator_params(axis="x", nbins=3)
    panels[0].set_yticks(range(count), geometry["axis"].values, fontsize=plots.NORMAL)
    panels[0].invert_yaxis()
    return figure
