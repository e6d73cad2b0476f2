"""Codes against known factors: posterior means over a grid of factors, and which axis is which factor."""

from collections.abc import Sequence

import jax
from jaxtyping import Array, Float, Key
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
import numpy as np
from scipy.optimize import linear_sum_assignment
import xarray as xr

from sami_ppl import plots
from sami_ppl._util.keys import check_key
from sami_ppl.analyses.codes import (
    ACTIVE_VARIANCE,
    CODE_UNITS,
    axis_dataset,
    posterior_means,
)
from sami_ppl.data.factors import read_factors
from sami_ppl.diagnostics.gain import draw_codes
from sami_ppl.metrics import normalised_information
from sami_ppl.program.program import Program

KNOTS = 8
DIVERGING = LinearSegmentedColormap.from_list("codes", [plots.BLUE, "#FFFFFF", plots.VERMILION])


def factor_grid(program: Program, data: xr.Dataset, factors: Sequence[str], *, bins: int = 8) -> xr.Dataset:
    """Posterior means of every axis over a grid of the named factors, averaged over all that the others do.

    `data` has x and the factors on `obs`. Dims: one per factor, under its name, and `axis`. `mean`: mean over the
    observations of a cell of the posterior mean, NaN in an empty one; `spread`: its standard deviation in the cell,
    what other factors (and the width of the cell) make of it; `count` of observations. Cells are equal-width bins over
    the range of the factor, labelled by their centres, or its values where it has no more than `bins`. A factor that
    goes round stays an angle here.

    Raises ValueError for factors that the data do not have or that do not vary, and for fewer than 2 observations.
    """
    if isinstance(factors, str) or not len(factors):
        raise ValueError(f'factors must be a list of names, such as ["centre_x", "centre_y"], got {factors!r}')
    read_factors(data, factors)  # its errors; the values are taken as they are
    x = program.observed(data["x"].values, at_least=2, why="a grid of factors")
    means = program.encode(x)[0].astype(np.float64)
    cells = [_cells(np.asarray(data[name].values, float), name, bins) for name in factors]
    shape = tuple(len(centres) for _, centres in cells)
    flat = np.ravel_multi_index(tuple(which for which, _ in cells), shape)
    count = np.bincount(flat, minlength=int(np.prod(shape)))
    with np.errstate(invalid="ignore", divide="ignore"):
        first, second = (
            np.stack([np.bincount(flat, column**power, minlength=len(count)) for column in means.T], axis=1)
            / count[:, None]
            for power in (1, 2)
        )
    spread, dims = np.sqrt(np.maximum(second - first**2, 0)), tuple(factors)
    size = (*shape, means.shape[1])
    found = axis_dataset(
        program,
        {
            "mean": ((*dims, "axis"), first.reshape(size), CODE_UNITS, "posterior mean"),
            "spread": ((*dims, "axis"), spread.reshape(size), CODE_UNITS, "standard deviation inside the cell"),
            "count": (dims, count.reshape(shape), "observations", "observations of the cell"),
        },
        {name: centres for name, (_, centres) in zip(factors, cells, strict=True)},
        observations=len(x),
    )
    for name in factors:
        found[name].attrs.update({"units": str(data[name].attrs.get("units", f"units of {name}"))})
    return found


def _cells(values: np.ndarray, name: str, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """The cell of each value, and the centres of the cells."""
    different = np.unique(values)
    if len(different) < 2:
        raise ValueError(f"factor {name!r} does not vary, so there is no grid of it: leave it out")
    if len(different) <= bins:
        return np.searchsorted(different, values), different
    edges = np.linspace(different[0], different[-1], bins + 1)
    return np.clip(np.searchsorted(edges, values, side="right") - 1, 0, bins - 1), (edges[:-1] + edges[1:]) / 2


def plot_factor_grid(found: xr.Dataset) -> Figure:
    """One panel per axis: a map over two factors, or a line with its spread over one. Averages over further ones.

    All maps share one scale, blue for negative and vermilion for positive codes; cells without observations are grey.
    """
    names = [str(name) for name in found["count"].dims]
    mean, spread = (found[name].mean(names[2:]) for name in ("mean", "spread"))
    axes = [str(axis) for axis in found["axis"].values]
    if len(names) == 1:
        figure = plots.Picture(figsize=(plots.WIDTH, 1.4 * len(axes) + 0.3), layout="constrained")
        for axis, panel in zip(axes, figure.subplots(len(axes), sharex=True, squeeze=False)[:, 0], strict=True):
            plots.style(panel)
            centre, value, width = (v.sel(axis=axis).values for v in (mean[names[0]] + 0 * mean, mean, spread))
            panel.fill_between(centre, value - width, value + width, color=plots.BLUE, alpha=0.2, lw=0)
            panel.plot(centre, value, color=plots.BLUE, lw=1.4, marker="o", ms=2.5)
            panel.set_ylabel(axis, fontsize=plots.NORMAL)
        panel.set_xlabel(names[0].replace("_", " "), fontsize=plots.SMALL)
        return figure
    columns = min(3, len(axes))
    rows = -(-len(axes) // columns)
    figure = plots.Picture(figsize=(0.7 + 1.6 * columns, 0.3 + 1.75 * rows), layout="constrained")
    grid, top = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True), float(np.nanmax(np.abs(mean)))
    for panel in grid.flat[len(axes) :]:
        panel.set_axis_off()
    image = None
    for axis, panel in zip(axes, grid.flat, strict=False):
        values = mean.sel(axis=axis).transpose(names[1], names[0])
        image = panel.pcolormesh(
            found[names[0]], found[names[1]], values, cmap=DIVERGING, vmin=-top, vmax=top, shading="nearest"
        )
        plots.style(panel).set_title(axis, fontsize=plots.NORMAL, color=plots.INK)
        panel.set_facecolor(plots.LINE)
        panel.set_aspect("auto")
    for panel in grid[-1]:
        panel.set_xlabel(names[0].replace("_", " "), fontsize=plots.SMALL)
    for panel in grid[:, 0]:
        panel.set_ylabel(names[1].replace("_", " "), fontsize=plots.SMALL)
    if image is not None:
        bar = figure.colorbar(image, ax=grid, aspect=30, pad=0.02)
        bar.ax.tick_params(labelsize=plots.SMALL, length=2)
        bar.set_label("mean code; grey: no observations", fontsize=plots.SMALL)
        bar.outline.set_visible(False)
    return figure


def association(
    program: Program,
    data: xr.Dataset,
    *,
    key: Key[Array, ""],
    factors: Sequence[str] | None = None,
    draws: int = 20,
    resamples: int = 200,
    level: float = 0.9,
) -> xr.Dataset:
    """Which axis is which factor, decided after the fact, and how sure that is.

    On `axis` and `factor`, from posterior means:

    - `r2`: share of the factor's variance that a cubic spline (8 knots) of this one axis predicts; fitted on one half
      of the observations, drawn at random, and scored on the other, so that it is about 0, or just below, by chance;
    - `information`: plug-in mutual information over the factor's entropy (`metrics.normalised_information`), on all of
      them, biased upward for few;
    - `r2_interval`, `information_interval` (source, axis, factor, end): central intervals of probability `level`. From
      the source "observations": `resamples` bootstrap samples of the (held-out) observations, by the basic bootstrap,
      2v − quantiles (Davison & Hinkley 1997, sec. 5.2), which takes the upward bias of plug-in information away: a
      value near chance lies above its interval. From "draws": all codes drawn from their posteriors, `draws` times,
      the spline fitted anew. Where posteriors are wide, drawn codes tell less than means, and this interval lies
      below the value.

    On `factor`: `matched`, the axis that the one-to-one matching of largest total R² gives it
    (`scipy.optimize.linear_sum_assignment`), "" for a factor left without one; `matched_share`, the share of bootstrap
    samples with the same axis.

    `factors`: names, default all real-valued ones. A factor that goes round counts as two, cosine and sine. Raises
    ValueError where there are none, for constant ones, if all axes have collapsed, and for fewer than 40 observations.
    """
    check_key(key)
    values, names = read_factors(data, factors)
    x = program.observed(data["x"].values, at_least=40, why="a fit and its score on the other half")
    if constant := [name for name, column in zip(names, values.T, strict=True) if np.ptp(column) == 0]:
        raise ValueError(f"factors {', '.join(constant)} do not vary, so that nothing follows them: leave them out")
    if draws < 1 or resamples < 1 or not 0 < level < 1:
        raise ValueError(
            f"draws and resamples must be at least 1 and level in (0, 1), got {draws}, {resamples}, {level}"
        )
    means = posterior_means(program, x)
    half_key, boot_key, draw_key = jax.random.split(key, 3)
    halves = np.array_split(np.asarray(jax.random.permutation(half_key, len(x))), 2)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(boot_key)))
    predicted, held_out = _spline_predictions(means, values, halves), values[halves[1]]

    boot_r2, boot_information = [], []
    for _ in range(resamples):
        rows = rng.integers(len(held_out), size=len(held_out))
        boot_r2.append(_r2(predicted[:, :, rows], held_out[rows]))
        rows = rng.integers(len(x), size=len(x))
        boot_information.append(normalised_information(means[rows], values[rows]))
    drawn_r2, drawn_information = [], []
    for k in jax.random.split(draw_key, draws):
        codes = draw_codes(program, x, k)
        drawn_r2.append(_r2(_spline_predictions(codes, values, halves), held_out))
        drawn_information.append(normalised_information(codes, values))

    r2, information = _r2(predicted, held_out), normalised_information(means, values)
    matched = _match(r2)
    again = np.stack([_match(one) for one in boot_r2])
    axes = np.array([*program.latents.axes, ""])
    ends = [(1 - level) / 2, (1 + level) / 2]
    tables, dims = ("axis", "factor"), ("source", "axis", "factor", "end")

    def intervals(value: np.ndarray, boot: list, drawn: list) -> np.ndarray:
        basic = 2 * value - np.quantile(boot, ends[::-1], axis=0)
        return np.moveaxis(np.stack([basic, np.quantile(drawn, ends, axis=0)]), 1, -1)

    r2_intervals = intervals(r2, boot_r2, drawn_r2)
    information_intervals = intervals(information, boot_information, drawn_information)
    return axis_dataset(
        program,
        {
            "r2": (tables, r2, "1", "held-out share of variance predicted by a spline of the axis"),
            "information": (tables, information, "1", "mutual information over entropy"),
            "r2_interval": (dims, r2_intervals, "1", f"central {level:.0%} interval"),
            "information_interval": (dims, information_intervals, "1", f"central {level:.0%} interval"),
            "matched": ("factor", axes[matched], "", "axis of the factor"),
            "matched_share": ("factor", (again == matched).mean(0), "1", "share of bootstrap samples that agree"),
        },
        {"factor": names, "source": ["observations", "draws"], "end": ["low", "high"]},
        observations=len(x), draws=draws, resamples=resamples, regressor=f"cubic spline of {KNOTS} knots",
    )  # fmt: skip


def _spline_predictions(
    codes: Float[np.ndarray, "n D"], factors: Float[np.ndarray, "n F"], halves: Sequence[np.ndarray]
) -> Float[np.ndarray, "D F m"]:
    """Every factor of the second half from each axis alone, fitted on the first; the mean from an axis without spread.

    Knots at quantiles; beyond them the spline is constant, so that no outlier is extrapolated.
    """
    from sklearn.linear_model import LinearRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import SplineTransformer

    train, test = halves
    out = np.empty((codes.shape[1], factors.shape[1], len(test)))
    for j, code in enumerate(codes.astype(np.float64).T):
        if code[train].var() <= ACTIVE_VARIANCE * 1e-6:
            out[j] = factors[train].mean(0)[:, None]
            continue
        spline = SplineTransformer(KNOTS, knots="quantile", extrapolation="constant", include_bias=False)
        fitted = make_pipeline(spline, LinearRegression()).fit(code[train, None], factors[train])
        out[j] = fitted.predict(code[test, None]).T
    return out


def _r2(predicted: Float[np.ndarray, "D F m"], factors: Float[np.ndarray, "m F"]) -> Float[np.ndarray, "D F"]:
    left = ((predicted - factors.T[None]) ** 2).mean(-1)
    return 1 - left / np.maximum(factors.var(0), 1e-30)


def _match(r2: Float[np.ndarray, "D F"]) -> np.ndarray:
    """Axis of every factor in the one-to-one matching of the largest total R²; −1 for none."""
    rows, columns = linear_sum_assignment(-r2)
    matched = np.full(r2.shape[1], -1)
    matched[columns] = rows
    return matched


def plot_association(found: xr.Dataset) -> Figure:
    """R² and information of every axis (rows) with every factor (columns); the matching is framed.

    Under each value its interval over observations.
    """
    axes, names = found["axis"].values, [str(name) for name in found["factor"].values]
    width = max(1.5 * plots.WIDTH, 1.2 + 1.5 * len(names))
    figure = plots.Picture(figsize=(width, 0.8 + 0.42 * len(axes)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    titles = {"r2": "R² of a spline", "information": "information / entropy"}
    for (name, title), panel in zip(titles.items(), panels, strict=True):
        _table(panel, found, name)
        panel.set_title(title, fontsize=plots.NORMAL, loc="left", color=plots.INK)
        panel.set_xticks(range(len(names)), [n.replace("_", " ") for n in names], fontsize=plots.SMALL)
    panels[0].set_yticks(range(len(axes)), axes, fontsize=plots.NORMAL)
    return figure


def _table(panel: Axes, found: xr.Dataset, name: str) -> None:
    values = found[name].values
    low, high = np.moveaxis(found[f"{name}_interval"].sel(source="observations").values, -1, 0)
    panel.imshow(np.clip(values, 0, 1), cmap=colormaps["Blues"], vmin=0, vmax=1.3, aspect="auto")
    axes = list(found["axis"].values)
    for (i, j), value in np.ndenumerate(values):
        ink = "white" if value > 0.75 else plots.INK
        text = f"{value:.2f}\n{low[i, j]:.2f} to {high[i, j]:.2f}".replace("-0.00", "0.00").replace("-", "−")
        panel.text(j, i, text, ha="center", va="center", fontsize=plots.SMALL, color=ink, linespacing=1.1)
        if axes[i] == found["matched"].values[j]:
            frame = Rectangle((j - 0.48, i - 0.46), 0.96, 0.92, fill=False, edgecolor=plots.VERMILION, lw=1.8)
            panel.add_patch(frame)
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0, labelcolor=plots.INK)
