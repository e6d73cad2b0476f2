"""What amortisation costs: the bound under the encoder's posterior against one fitted to each observation."""

from jaxtyping import Array, Float, Key
from matplotlib.figure import Figure
import numpy as np
import xarray as xr

from sami_ppl import plots
from sami_ppl.posteriors.tree import obs_labels
from sami_ppl.program.program import Program
from sami_ppl.refinement import svi

DRAWS = 1000
"""By which the refined Gaussian is known: its own error costs about D (D + 3) / (4 · DRAWS) nats."""


def amortisation_gap(
    program: Program,
    data: xr.Dataset | Float[Array | np.ndarray, "obs *event"],
    *,
    key: Key[Array, ""],
    steps: int = 300,
    levels: int = 64,
) -> xr.Dataset:
    """How many nats the bound on −log p(x) of each observation falls by a posterior of its own (Cremer et al., 2018).

    Variables on `obs`, in nats: `amortised` and `refined`, the bounds under the encoder's posterior and under the full
    Gaussian of the code that `refinement.svi` fits in `steps`; `gap`, their difference, and `gap_se`, its Monte-Carlo
    standard error. Both are judged on one noise set of `levels` noise levels that neither has seen. Its noise, a nat or
    so, is in both bounds and not in their difference. A refinement that follows its own noise set may lose a little, so
    that the gap of an exact encoder lies at or just below 0.

    Where the encoder's posterior is diagonal, the gap includes what that costs. It is the encoder's share of the
    distance to log p(x), not the whole: the decoder's bound and posteriors that are no Gaussian have theirs. Raises
    what `refinement.svi` raises.
    """
    found = svi(program, data, key=key, draws=DRAWS, steps=steps, levels=levels)["agreement"].to_dataset()
    told = {
        "amortised": (found["bound"], "upper bound on −log p(x) under the amortised posterior"),
        "refined": (found["bound"] - found["gain"], "upper bound on −log p(x) under a posterior of its own"),
        "gap": (found["gain"], "amortisation gap"),
        "gap_se": (found["gain_se"], "its Monte-Carlo standard error"),
    }
    variables = {
        name: ("obs", values.values, {"units": "nats", "long_name": long_name})
        for name, (values, long_name) in told.items()
    }
    coords = {"obs": obs_labels(data, found.sizes["obs"])}
    return xr.Dataset(variables, coords=coords, attrs={"levels": levels, "steps": steps})


def plot_amortisation_gap(found: xr.Dataset) -> Figure:
    """The gap of every observation with bars of ±2 standard errors, the largest on top, and the mean of all.

    Of more than 40 observations the largest 40 are drawn; the mean is that of all.
    """
    ordered = found.isel(obs=np.argsort(-found["gap"].values, kind="stable"))
    shown = ordered.isel(obs=slice(40))
    places, mean = np.arange(shown.sizes["obs"]), float(found["gap"].mean())
    figure = plots.Picture(figsize=(plots.WIDTH, 0.9 + 0.14 * len(places)), layout="constrained")
    panel = plots.style(figure.subplots())
    panel.axvline(0, color=plots.GRAY, lw=0.8)
    panel.axvline(mean, color=plots.VERMILION, lw=1.2, label=f"mean {mean:.2f}".replace("-", "−"))
    panel.errorbar(shown["gap"], places, xerr=2 * shown["gap_se"], fmt="o", ms=3, lw=1, color=plots.BLUE)
    panel.set_yticks(places, [str(label) for label in shown["obs"].values], fontsize=6)
    panel.set_ylim(len(places) - 0.5, -0.5)
    panel.set_ylabel("observation", fontsize=plots.SMALL)
    panel.set_xlabel("amortised − refined bound on −log p(x), nats", fontsize=plots.SMALL)
    # Above the axes: inside them there are bars wherever a legend could be.
    panel.legend(fontsize=plots.SMALL, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.1)
    return figure
