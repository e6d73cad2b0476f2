"""Pictures of what posteriors are worth: coverage, recovery, and refined posteriors beside amortised ones."""

from collections.abc import Mapping, Sequence
import itertools
from textwrap import fill

from jaxtyping import Float
from matplotlib.figure import Figure
import numpy as np

from sami_ppl.metrics.correlation import correlation
from sami_ppl.plots import BLUE, COLOURS, GRAY, INK, LINE, NORMAL, SMALL, WIDTH, Picture, style


def coverage(contents: Mapping[str, Float[np.ndarray, " n"]], *, probability: float = 0.99) -> Figure:
    """How often intervals of each content hold the truth, against what they say: the diagonal if calibrated.

    `contents`: for each axis, and for each of n truths, the content of the smallest interval that holds it. The grey
    band is where the curve of a calibrated posterior lies at a given content with `probability`.
    """
    from scipy.stats import binom

    figure = Picture(figsize=(WIDTH, WIDTH), layout="constrained")
    panel = style(figure.subplots())
    said, count = np.linspace(0, 1, 101), min(map(len, contents.values()))
    low, high = (binom.ppf(q, count, said) / count for q in (0.5 - probability / 2, 0.5 + probability / 2))
    panel.fill_between(said, low, high, color=LINE, lw=0)
    panel.plot([0, 1], [0, 1], color=GRAY, lw=0.8)
    for (name, values), colour in zip(contents.items(), itertools.cycle(COLOURS)):
        panel.plot(said, (np.asarray(values)[:, None] <= said).mean(0), color=colour, lw=1.4, label=name)
    panel.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    panel.set_xlabel("content that the posterior says", fontsize=SMALL)
    panel.set_title("share of truths inside", fontsize=NORMAL, loc="left", color=INK)
    panel.legend(fontsize=SMALL, frameon=False, loc="upper left")
    return figure


def recovery(
    truth: Float[np.ndarray, "n k"],
    mean: Float[np.ndarray, "n k"],
    sd: Float[np.ndarray, "n k"],
    names: Sequence[str],
    *,
    largest: int = 12,
) -> Figure:
    """Posterior means against the truth, with bars of two standard deviations, for the first `largest` names.

    Over each panel the correlation and the contraction, 1 − posterior / prior variance.
    """
    shown, agree = names[:largest], np.diag(correlation(mean, truth))
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = Picture(figsize=(max(WIDTH, 1.9 * columns), 2.1 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels[len(shown) :]:
        panel.set_axis_off()
    for j, (name, panel) in enumerate(zip(shown, panels, strict=False)):
        style(panel)
        panel.errorbar(truth[:, j], mean[:, j], 2 * sd[:, j], fmt="o", ms=2, lw=0.6, color=BLUE, alpha=0.6)
        ends = [truth[:, j].min(), truth[:, j].max()]
        panel.plot(ends, ends, color=INK, lw=0.8)
        contraction = 1 - (sd[:, j] ** 2).mean() / max(truth[:, j].var(), 1e-12)
        told = f"{fill(name.replace('_', ' '), 15)}\nr {agree[j]:.3f}"
        panel.set_title(f"{told}, contraction {contraction:.3f}".replace("-", "−"), fontsize=SMALL, color=INK)
        panel.set_xlabel("true", fontsize=SMALL)
        if j % columns == 0:
            panel.set_ylabel("posterior mean ± 2 sd", fontsize=SMALL)
    return figure


def agreement(
    mean_shift: Float[np.ndarray, "obs axes"],
    sd_ratio: Float[np.ndarray, "obs axes"],
    axes: Sequence[str],
    labels: Sequence[str],
    *,
    largest: int = 6,
) -> Figure:
    """Refined posteriors beside the amortised one, in its standard deviations: mean and ±1 sd of the first `largest`
    axes. The grey band is the amortised posterior's own.
    """
    axes = axes[:largest]
    size = (max(WIDTH, 0.6 + 1.5 * len(axes)), 0.8 + 0.26 * len(labels))
    figure = Picture(figsize=size, layout="constrained")
    places = np.arange(len(labels))
    for j, panel in enumerate(figure.subplots(1, len(axes), sharex=True, sharey=True, squeeze=False)[0]):
        style(panel).axvspan(-1, 1, color=LINE, lw=0)
        panel.axvline(0, color=GRAY, lw=0.8)
        panel.errorbar(mean_shift[:, j], places, xerr=sd_ratio[:, j], fmt="o", ms=3.5, lw=1.4, color=BLUE)
        panel.set_title(axes[j], fontsize=NORMAL, color=INK)
    panel.set_yticks(places, labels)
    panel.set_ylim(len(labels) - 0.5, -0.5)
    figure.supxlabel("refined mean ± sd, in amortised standard deviations", fontsize=SMALL)
    figure.supylabel("observation", fontsize=SMALL)
    return figure
