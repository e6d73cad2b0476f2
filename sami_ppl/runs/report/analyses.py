"""What the code holds: the analyses that a report can afford, as pictures and one table of the axes.

Each on at most so many test observations that the whole takes seconds; the numbers stand in the sentences. The same
functions with more of them are in `sami_ppl.analyses` and `sami_ppl.diagnostics`.
"""

from pathlib import Path
from typing import NamedTuple

import jax
from jaxtyping import Array, Key
import numpy as np
import xarray as xr

from sami_ppl import plots
from sami_ppl._util.progress import phase
from sami_ppl.analyses import association, axis_activity, plot_association, plot_posterior_by_noise, posterior_by_noise
from sami_ppl.analyses.codes import ACTIVE_VARIANCE
from sami_ppl.diagnostics import information_spectrum
from sami_ppl.program.program import Program
from sami_ppl.runs.report.page import table
from sami_ppl.runs.report.pictures import AXES, Material, Picture

NOISY, LEVELS = 192, 13
"""Observations and noise levels of the noisy posteriors."""
SPOKEN, STEPS = 64, 12
"""Observations and noise levels of the information spectrum: its cost grows with the number of axes."""
LEAST, DRAWS, RESAMPLES = 40, 4, 100
"""Observations that an association takes, draws of the code and bootstrap samples."""


class Findings(NamedTuple):
    """Datasets of the analyses, None where one does not apply."""

    noise: xr.Dataset | None
    information: xr.Dataset | None
    activity: xr.Dataset | None
    association: xr.Dataset | None


def examine(program: Program, m: Material, *, key: Key[Array, ""], evidence: Path | None = None) -> Findings:
    """Run what applies: of noisy posteriors nothing unless the decoder is guided.

    `evidence`: an `evidence.nc` of `sami evidence`, whose information spectrum is then taken.
    """
    noise_key, information_key, association_key = jax.random.split(key, 3)
    if len(m.test) < 2:
        return Findings(None, None, None, None)
    with phase("report: which axis is which factor"):
        activity, matched = axis_activity(program, m.test), _association(program, m, association_key)
    if not program.guided:
        return Findings(None, None, activity, matched)
    with phase("report: posteriors as noise grows"):
        noise = posterior_by_noise(program, m.test[:NOISY], key=noise_key, levels=LEVELS)
    if evidence is not None and evidence.exists():
        with xr.open_datatree(evidence, engine="h5netcdf") as tree:
            information = tree["information"].to_dataset().load()
    else:
        with phase("report: information in the code by noise level"):
            information = information_spectrum(program, m.test[:SPOKEN], key=information_key, levels=STEPS)
    return Findings(noise, information, activity, matched)


def _association(program: Program, m: Material, key: Array) -> xr.Dataset | None:
    """Factors that are finite and vary; none where the code has collapsed or there are too few observations."""
    fit = np.isfinite(m.factors).all(0) & (np.ptp(m.factors, axis=0) > 0) if len(m.test) >= LEAST else np.array([])
    if not fit.any() or not (m.codes.var(0) > ACTIVE_VARIANCE).any():
        return None
    names = [name for name, good in zip(m.names, fit, strict=True) if good]
    known = {name: ("obs", column) for name, column in zip(names, m.factors[:, fit].T, strict=True)}
    data = xr.Dataset({"x": (("obs", *program.event_dims), m.test), **known})
    return association(program, data, key=key, draws=DRAWS, resamples=RESAMPLES)


def pictures(findings: Findings) -> list[Picture]:
    """The pictures of those analyses that apply."""
    drawn = []
    if findings.association is not None:
        most = findings.association["r2"].max("factor").argsort()[::-1][:AXES].sortby("axis")
        shown = findings.association.isel(axis=np.sort(most.values))
        drawn.append(Picture(
            "association", "Which axis is which factor",
            "Left, the share of a factor's variance that a spline of one axis predicts on held-out observations; "
            "right, mutual information, which few observations raise: near chance it lies above its interval. "
            "Intervals are of 90 %, over observations; framed pairs are the one-to-one matching of largest R². "
            f"{findings.association.attrs['observations']} observations.",
            plot_association(shown),
        ))  # fmt: skip
    if findings.noise is not None:
        drawn.append(Picture(
            "posterior_by_noise", "What survives noise",
            "Above, how much posterior means differ between observations, below, how wide posteriors are, as noise "
            "grows to the left. Axes in the order in which they survive the largest noise: rank 1 is the coarsest. "
            f"{findings.noise.attrs['observations']} observations.",
            plot_posterior_by_noise(findings.noise),
        ))  # fmt: skip
    if findings.information is not None:
        told = findings.information.attrs
        drawn.append(Picture(
            "information", "Information spectrum",
            f"At which noise level each axis speaks: {told['information']:.1f} nats by the energy of the guidance, "
            f"{told['kl']:.1f} by the KL. The dashed line, by how much guidance really lowers the denoising error, "
            f"lies on the total where the noisy posterior is right. {told['observations']} observations.",
            plots.spectrum(findings.information),
        ))  # fmt: skip
    return drawn


def axes_table(findings: Findings) -> str:
    """One row for each axis: how it is used, what is left of it at the largest noise, which factor it is matched to."""
    if findings.noise is None or findings.information is None or findings.activity is None:
        return ""
    matched = {} if findings.association is None else {
        str(axis): f"{factor} ({share:.0%})"
        for factor, axis, share in zip(
            *(findings.association[n].values for n in ("factor", "matched", "matched_share")), strict=True
        )
    }  # fmt: skip
    rows = []
    for axis in findings.activity["axis"].values:
        noisy, last = (
            findings.noise.sel(axis=axis).isel(log_snr=0),
            findings.information.sel(axis=axis).isel(log_snr=-1),
        )
        rows.append((
            axis, str(findings.activity["kind"].sel(axis=axis).item()), float(findings.activity["mean"].sel(axis=axis)),
            float(last["axis_information"]), int(noisy["rank"]),
            {"mean": 100 * float(noisy["explained"]), "se": 100 * float(noisy["explained_se"])},
            *([matched.get(str(axis), "–")] if matched else []),
        ))  # fmt: skip
    head = ("axis", "kind", "posterior variance", "nats", "rank in noise", "% told at λmin")
    return table(
        (*head, *["factor (agreement)"] * bool(matched)),
        rows,
        "Each axis. Passive: the posterior is the prior for all observations; mixed: for some, or always half. Nats by "
        "the information spectrum. Agreement: share of bootstrap samples with the same matching",
    )
