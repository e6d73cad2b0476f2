"""Which axes a fit uses: active, mixed and passive ones, by the posterior variances alone."""

from jaxtyping import Array, Float
from matplotlib.figure import Figure
import numpy as np
import xarray as xr

from sami_ppl import plots
from sami_ppl.analyses.codes import CODE_UNITS, axis_dataset
from sami_ppl.program.program import Program

TOLERANCE = 0.1


def axis_activity(program: Program, x: Float[Array | np.ndarray, "obs *event"]) -> xr.Dataset:
    """Active, mixed or passive, by how the posterior variance s² of each axis is distributed over observations.

    After Bonheme & Grzes (2023, JMLR 24:324), with their tolerance .1: *passive* where s² is 1, the prior's, for all
    (|mean − 1| ≤ .1, variance < .1); *active* where it is small for all (mean ≤ .1, variance < .1); else *mixed*: used
    for some observations, or always half. Passive axes make codes as drawn and posterior means disagree.

    On `axis`: `mean` and `variance` of s² over observations, `kind`. An axis of a direction (angle, unit vector) has no
    prior spread 1 and is never passive by this measure. Raises ValueError for fewer than 2 observations.
    """
    x = program.observed(x, at_least=2, why="a variance over observations")
    _, scale = program.encode(x)
    variance = scale.astype(np.float64) ** 2
    mean, spread = variance.mean(0), variance.var(0)
    steady = spread < TOLERANCE
    kind = np.where(
        steady & (np.abs(mean - 1) <= TOLERANCE), "passive", np.where(steady & (mean <= TOLERANCE), "active", "mixed")
    )
    return axis_dataset(
        program,
        {
            "mean": ("axis", mean, f"squared {CODE_UNITS}", "mean posterior variance"),
            "variance": ("axis", spread, f"{CODE_UNITS} to the fourth", "variance of the posterior variance"),
            "kind": ("axis", kind, "", "active, mixed or passive"),
        },
        observations=len(x),
    )


def plot_axis_activity(found: xr.Dataset) -> Figure:
    """Mean posterior variance of each axis, ±1 standard deviation over observations, coloured by kind; a log scale."""
    colours = {"active": plots.BLUE, "mixed": plots.VERMILION, "passive": plots.GRAY}
    count = found.sizes["axis"]
    figure = plots.Picture(figsize=(plots.WIDTH, 0.7 + 0.24 * count), layout="constrained")
    panel = plots.style(figure.subplots())
    for kind, colour in colours.items():
        rows = np.flatnonzero(found["kind"].values == kind)
        own = found.isel(axis=rows)
        spread = np.sqrt(own["variance"])
        panel.errorbar(
            own["mean"], rows, xerr=[np.minimum(spread, 0.9 * own["mean"]), spread], fmt="o", ms=4, lw=1.2,
            color=colour, label=f"{kind}: {len(rows)}",
        )  # fmt: skip
    panel.axvline(1.0, color=plots.GRAY, lw=0.8, ls="--")
    panel.set_yticks(range(count), found["axis"].values, fontsize=plots.NORMAL)
    panel.invert_yaxis()
    panel.margins(y=0.5 / count)
    panel.set_xscale("log")
    panel.set_xlim(right=max(1.6, 1.3 * float((found["mean"] + np.sqrt(found["variance"])).max())))
    panel.legend(fontsize=plots.SMALL, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), borderpad=0)
    panel.set_xlabel("posterior variance; the prior's is 1", fontsize=plots.SMALL)
    return figure
