"""Whether the posterior may be believed: what `sami calibrate` and `sami refine` have left in the folder of the run."""

from collections.abc import Mapping
import json
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from sami_ppl.runs.report import page
from sami_ppl.runs.report.page import figure_file, table

FIGURES = {
    "coverage": (
        "Coverage",
        "How often intervals of each content hold the truth: on the diagonal if calibrated; the band is where the "
        "curve of a calibrated posterior lies.",
    ),
    "ecdf_pit": (
        "Ranks",
        "Distribution of the ranks of simulated codes, less a uniform one: inside the band if calibrated.",
    ),
    "predictive_pit": (
        "Observations among samples of their code",
        "Distribution of the ranks of statistics of held-out observations among those of samples of their code, less a "
        "uniform one: inside the band if the program is right about the data.",
    ),
    "recovery": (
        "Recovery of simulated codes",
        "Posterior means ± 2 standard deviations against the codes that the images were drawn with.",
    ),
    "factors": (
        "Recovery of true factors",
        "Through a regression from the code, whose own error the bars leave out.",
    ),
}
"""Pictures that a calibration leaves, with what to look for."""


def trust(out: Path, metrics: Mapping[str, Any], tree: xr.DataTree) -> tuple[list[str], list[str]]:
    """Tables and figures. Without a calibration they say what to run, and what is known without it."""
    tables, figures = _calibration(out / "calibration")
    tables += _refinement(out / "refinement", figures)
    cheap = _cheap(metrics, tree)
    if cheap:
        caption = "Known without simulation" if tables else "Known without simulation: necessary, not sufficient"
        tables.append(table((), cheap, caption))
    if not (out / "calibration" / "calibration.json").exists():
        command = f"sami calibrate {out.as_posix()}"
        tables.insert(0, page.note("Not calibrated yet. Whether the posterior may be believed is told by", command))
    return tables, figures


def _calibration(folder: Path) -> tuple[list[str], list[str]]:
    file = folder / "calibration.json"
    if not file.exists():
        return [], []
    found = json.loads(file.read_text())
    told = found["calibration"]
    levels = ", ".join(f"{100 * level:g}" for level in told["level"])
    columns = ("axis", "coverage", "factor", "shift", "verdict")
    rows = [
        (axis, ", ".join(f"{100 * c:.0f}" for c in covered), factor, shift, verdict)
        for axis, covered, factor, shift, verdict in zip(*(told[name] for name in columns), strict=True)
    ]
    good = all(verdict == "calibrated" for verdict in told["verdict"])
    parts = [
        page.verdict(
            "Calibrated" if good else "Not calibrated",
            f"against images that the program draws itself: {told['simulations']} simulations, {told['draws']} draws "
            f"each, false alarms {100 * told['false_alarm']:g} % over all lines.",
            good=good,
        ),
        table(
            ("axis", f"coverage of {levels} %", "too narrow by", "shift", "verdict"), rows,
            "Simulation-based calibration; joint: the code as a whole. Factor and shift in posterior standard "
            "deviations",
        ),
    ]  # fmt: skip
    if "consistency" in found:
        agreed = found["consistency"]
        columns = ("log_snr", "gap", "gap_se", "spread", "flagged")
        rows = [
            (f"{level:.1f}".replace("-", "−"), {"mean": gap, "se": se}, max(spread), "yes" if flagged else "")
            for level, gap, se, spread, flagged in zip(*(agreed[name] for name in columns), strict=True)
        ]
        parts.append(
            table(
                ("log SNR", "gap, nats", "widest spread", "disagree"), rows,
                "Noisy posteriors beside the guide: gap 0 and spread 1 where E[q(z | x) | x_λ] = q(z | x_λ, λ)",
            )
        )  # fmt: skip
    if "predictive" in found:
        checked = found["predictive"]
        columns = ("check", "observed", "drawn", "units", "verdict")
        parts.append(
            table(
                columns, list(zip(*(checked[name] for name in columns), strict=True)),
                f"{checked['observations']} held-out observations beside draws of the program, {checked['samples']} "
                f"samples of the code of each, and the prior of codes; false alarms {100 * checked['false_alarm']:g} % "
                "over all lines",
            )
        )  # fmt: skip
    if "observations" in found:
        odd = found["observations"]
        rows = [("observations", odd["observations"]), ("among the 1 % most unusual bounds", len(odd["odd"]))]
        if "pareto_k_median" in odd:
            rows += [("Pareto k̂, median", odd["pareto_k_median"]), ("above .7, share", odd["pareto_k_above_07"])]
        parts.append(table((), rows, "Real observations, beside the training part"))
    figures = []
    for name, (title, sentence) in FIGURES.items():
        if (folder / f"{name}.png").exists():
            figures.append(figure_file(title, sentence, folder / f"{name}.png", dpi=150))
    return parts, figures


def _refinement(folder: Path, figures: list[str]) -> list[str]:
    parts = []
    for file in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        found = json.loads(file.read_text())
        rows = []
        for obs, shifts, ratios, gain, se in zip(
            *(found[name] for name in ("obs", "mean_shift", "sd_ratio", "gain", "gain_se")), strict=True
        ):
            each = (f"{shift:+.2f} ×{ratio:.2f}".replace("-", "−") for shift, ratio in zip(shifts, ratios, strict=True))
            rows.append((f"{obs}", *each, {"mean": gain, "se": se}))
        caption = f"Refined by {file.stem} beside the amortised posterior: shift of the mean, ratio of deviations"
        parts.append(table(("obs", *found["axis"], "gain, nats"), rows, caption))
        if file.with_suffix(".png").exists():
            sentence = "Means ± 1 standard deviation, in amortised standard deviations; the band is the amortised one."
            figures.append(figure_file(f"Refined by {file.stem}", sentence, file.with_suffix(".png"), dpi=150))
    return parts


def _cheap(metrics: Mapping[str, Any], tree: xr.DataTree) -> list[tuple[str, Any]]:
    """What needs no simulation: the tails of importance weights where the tree has them, and the noisy end."""
    rows: list[tuple[str, Any]] = []
    stats = tree["sample_stats"].to_dataset() if "sample_stats" in tree.children else {}
    if "pareto_k" in stats:
        k = stats["pareto_k"].values
        k = k[np.isfinite(k)]
        if len(k):
            rows += [("Pareto k̂ of the importance weights, median", float(np.median(k))),
                     ("above .7, share of observations", float((k > 0.7).mean()))]  # fmt: skip
    for site, kl in (metrics.get("noise_end_kl") or {}).items():
        rows.append((f"KL of q({site} | x at λmin) from the prior, nats", kl))
    return rows
