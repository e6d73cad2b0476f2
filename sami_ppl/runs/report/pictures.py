"""What the pictures of a report are made of, and the pictures: one function each, None where it does not apply."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
from matplotlib.figure import Figure
import numpy as np
import xarray as xr

from sami_ppl import plots
from sami_ppl.analyses.codes import ACTIVE_VARIANCE
from sami_ppl.analyses.traversal import line_codes, own_limits
from sami_ppl.data import factor_names, unrolled, unrolled_names
from sami_ppl.diagnostics.gain import draw_code
from sami_ppl.diffusion.latents import to_images
from sami_ppl.metrics import correlation
from sami_ppl.nn.diffusers.autoencoder import AutoencoderKL
from sami_ppl.posteriors.generate import decode, generate
from sami_ppl.program.program import Program
from sami_ppl.runs.report.page import text

Distance = Callable[[Float[np.ndarray, "n *event"]], Float[np.ndarray, " n"]]
SHOWN, DRAWS, ALONE, AXES, CODED = 8, 4, 16, 8, 512
"""Test images shown, samples of each, samples without an image, axes shown, observations encoded: at most."""
STEPS = np.linspace(-2.0, 2.0, 7)


class Picture(NamedTuple):
    """A picture of the report: file name, title, the sentence that says what to look for, the figure."""

    name: str
    title: str
    sentence: str
    figure: Figure


@dataclass(frozen=True)
class Material:
    """What the pictures are made of. Samples are None where observations cannot be drawn as images.

    `test` (n, *event) are up to 512 test observations, `codes` (n, D) their posterior means, `factors` (n, F) their
    known factors. `x` (8, *image) are the first of them as they are drawn, where `latent`, in pixels; as are
    `conditional` (8, 4, *image), samples given draws from the posterior of x; `marginal`, `prior` (16, *image), samples
    of the denoiser alone and given draws from the prior; `moved` (axes, 7, *image), samples of x[0]'s code with one of
    the active axes moved, all with one noise, None where none is active.
    """

    program: Program
    log: list[dict[str, Any]]
    metrics: Mapping[str, Any]
    distance: Distance | None
    limits: tuple[float, float]
    latent: bool
    x: np.ndarray
    test: np.ndarray
    codes: np.ndarray
    factors: np.ndarray
    names: list[str]
    active: np.ndarray
    conditional: np.ndarray | None = None
    marginal: np.ndarray | None = None
    prior: np.ndarray | None = None
    moved: np.ndarray | None = None


def gather(
    program: Program,
    data: xr.Dataset,
    metrics: Mapping[str, Any],
    log: list[dict[str, Any]],
    *,
    key: Key[Array, ""],
    distance: Distance | None = None,
    autoencoder: AutoencoderKL | None = None,
) -> Material:
    """Codes and samples that the pictures need; each kind of sample is compiled once.

    `autoencoder`: of latents, the one whose decoder makes pixels of them. Where the metrics name one and it is not
    given, there are no samples: latents are no images, whatever their shape.
    """
    if "split" in data.variables and (data["split"] == "test").any():
        data = data.isel(obs=np.flatnonzero(data["split"].values == "test"))
    data = data.isel(obs=slice(CODED))
    x = np.asarray(data["x"].values, np.float32)
    codes = program.encode(x)[0]
    factors, names = _factors(data, metrics)
    variance = codes.var(0)
    active = np.sort(np.argsort(-variance)[:AXES])
    active = active[variance[active] > ACTIVE_VARIANCE]
    drawn = np.asarray if autoencoder is None else partial(to_images, autoencoder)
    latent, shown = metrics.get("autoencoder") is not None or autoencoder is not None, drawn(x[:SHOWN])
    limits = own_limits(x if autoencoder is None else shown)
    material = Material(program, log, metrics, distance, limits, latent, shown, x, codes, factors, names, active)
    if (latent and autoencoder is None) or not plots.is_drawn(shown.shape[1:]):
        return material

    code_key, prior_key, noise_key, alone_key = jax.random.split(key, 4)
    own = draw_code(program, jnp.repeat(x[: len(shown)], DRAWS, axis=0), code_key)
    prior = program.prior_codes(prior_key, ALONE)
    keys = jax.random.split(noise_key, len(own) + ALONE)
    first, second = np.split(decode(program, jnp.concatenate([own, prior]), keys), [len(own)])
    moved = None
    if len(active):
        lines = line_codes(program.latents, codes[0], np.eye(codes.shape[1])[active], STEPS.tolist(), origin="zero")
        lines = lines.reshape(-1, codes.shape[1])
        one = jnp.broadcast_to(noise_key, (len(lines),))
        moved = decode(program, lines, one, sampler=program.sampler.coupled)
        moved = drawn(moved.reshape(len(active), len(STEPS), *program.event_shape))
    marginal = generate(program, key=alone_key, size=ALONE, guided=False) if program.denoiser.marginal else None
    return replace(
        material,
        conditional=drawn(first.reshape(len(shown), DRAWS, *program.event_shape)),
        prior=drawn(second),
        moved=moved,
        marginal=None if marginal is None else drawn(marginal),
    )


def _factors(data: xr.Dataset, metrics: Mapping[str, Any]) -> tuple[np.ndarray, list[str]]:
    """Known factors (n, F): those that the metrics name, else every real-valued variable on obs (no class labels)."""
    named = (metrics.get("corr") or {}).get("factors") or list(metrics.get("linear_r2") or {})
    real = factor_names(data, "real")
    columns = [column for name in real for column in unrolled_names(data[name])]
    names = [column for column in columns if not named or column in named]
    table = unrolled(data, real)
    return np.array([table[n].values for n in names], float).reshape(len(names), data.sizes["obs"]).T, names


def _reconstructions(m: Material) -> Picture | None:
    if m.conditional is None:
        return None
    of = " of pixels" if m.latent else ""
    own, other = (float(np.nanmean(np.abs(m.conditional - x[:, None]))) for x in (m.x, np.roll(m.x, 1, axis=0)))
    sentence = (
        "Each column: a test image, then samples given draws from its posterior. What the code keeps stays the same "
        f"down the column, what it leaves out varies. Mean absolute difference{of}: {own:.3g} from the own image"
    )
    if len(m.x) > 1:
        sentence += f", {other:.3g} from another; if these were equal, samples would ignore the code"
    return Picture(
        "reconstructions",
        "Test images, and samples given their codes",
        f"{sentence}.{_how_drawn(m, m.conditional)}",
        plots.reconstructions(m.x, m.conditional, limits=m.limits),
    )


def _traversal(m: Material) -> Picture | None:
    if m.moved is None:
        return None
    labels = [f"{m.program.latents.axes[a]}\nown {text(m.codes[0, a])}" for a in m.active]
    return Picture(
        "traversal", "One axis moved at a time",
        "Each row should change one thing only: samples of the code of the image on the left, one active axis set to "
        "−2 … 2 spreads of its prior, the other axes and the noise held fixed (directions are "
        "brought back to length 1)." + _how_drawn(m, m.moved),
        plots.traversal(m.moved, STEPS.tolist(), labels, start=m.x[0], limits=m.limits),
    )  # fmt: skip


def _factor_grid(m: Material) -> Picture | None:
    axes = m.active if len(m.active) else np.arange(min(AXES, m.codes.shape[1]))
    if not m.names or len(m.codes) < 2:
        return None
    means, labels = m.codes[:, axes], [m.program.latents.axes[a] for a in axes]
    size = correlation(means, m.factors, constant=np.nan)
    return Picture(
        "factors", "Axes against known factors",
        "An aligned axis follows one factor, as a thin curve, and is flat in the others; posterior means of "
        f"{len(m.codes)} test observations.",
        plots.factor_grid(means, m.factors, size, labels, m.names),
    )  # fmt: skip


def _marginal(m: Material) -> Picture | None:
    if m.marginal is None:
        return None
    return Picture(
        "unconditional", "Samples without a code",
        "The denoiser alone: they should look like the data and be as varied; no code can make up for a poor denoiser."
        + _distances(m, m.marginal) + _how_drawn(m, m.marginal),
        plots.image_grid(m.marginal, _titles(m, m.marginal), limits=m.limits),
    )  # fmt: skip


def _prior(m: Material) -> Picture | None:
    if m.prior is None:
        return None
    return Picture(
        "prior", "Samples of the program",
        "Each from its own draw of the prior: worse than those without a code, they show that the codes of data do not "
        "fill the prior." + _distances(m, m.prior) + _how_drawn(m, m.prior),
        plots.image_grid(m.prior, _titles(m, m.prior), limits=m.limits),
    )  # fmt: skip


def _noise_bands(m: Material) -> Picture | None:
    errors = m.metrics.get("noise_errors") or next((r for r in reversed(m.log) if r.get("log_snr")), None)
    if errors is None:
        return None
    sentence = "Error of the denoiser at each noise level; no code was fitted."
    if errors.get("own") is not None:
        sentence = "Samples follow the code where the own z predicts the noise better than another's: bars far above 0."
    return Picture("noise", "What the code tells the denoiser", sentence + _of_latents(m), plots.noise_bands(errors))


def _kl_bars(m: Material) -> Picture | None:
    if not m.metrics.get("kl_nats"):
        return None
    sentence = "Axes near 0 are not used; a long bar says that an axis is used, not that it follows one factor."
    values = [value for value in m.metrics["kl_nats"].values() if value is not None]
    if len(values) > 1 and np.ptp(values) < 1e-6 * max(values):
        sentence = (
            "The posterior correlates the axes, as after a rotation: only the total means anything, shared evenly."
        )
    return Picture("kl", "Information per axis", sentence, plots.kl_bars(m.metrics["kl_nats"]))


def _curves(m: Material) -> Picture | None:
    if not m.log:
        return None
    sentence = "Held-out losses should be level at the end; a KL that sinks to 0 is an axis being given up."
    return Picture("curves", "Course of the fit", sentence + _of_latents(m), plots.curves(m.log))


PICTURES: dict[str, list[Callable[[Material], Picture | None]]] = {
    "samples": [_reconstructions, _traversal, _marginal, _prior],
    "code": [_factor_grid, _noise_bands, _kl_bars],
    "course": [_curves],
}
"""The pictures of each section of the page."""


def _of_latents(m: Material) -> str:
    return " Errors and losses are of latents, not of pixels." if m.latent else ""


def _titles(m: Material, images: np.ndarray) -> list[str] | None:
    return None if m.distance is None else [f"{d:.3f}" for d in np.asarray(m.distance(images))]


def _distances(m: Material, images: np.ndarray) -> str:
    if m.distance is None:
        return ""
    here, data = (float(np.median(m.distance(a))) for a in (images, m.x))
    return f" Over each: distance from the nearest true image; median {here:.3f}, of test images {data:.3f}."


def _how_drawn(m: Material, images: np.ndarray) -> str:
    """What a picture does not show: other slices of volumes, values far outside the data's range."""
    slices = " Of each volume the middle slice is drawn." if len(m.program.event_shape) == 4 else ""
    slack = 0.05 * (m.limits[1] - m.limits[0])
    share = np.mean((images < m.limits[0] - slack) | (images > m.limits[1] + slack))
    if share <= 1e-3:
        return slices
    return f"{slices} {share:.1%} of the values lie far outside the data's range and are drawn clipped."
