"""Pictures that ArviZ does not have: images, traversals, axes against factors, noise levels, curves of a fit.

Every function takes arrays or plain records and returns a `matplotlib.figure.Figure` of its own, which notebooks show:
no style is changed, no figure is kept. Save one with `figure.savefig("name.png", dpi=200)`. Widths suit a phone as well
as a page. Images are (channel, row, column) with 1 or 3 channels; `limits` are the values drawn black and white,
values beyond them are clipped. In their place may be signals, (channel, length), which are drawn as curves between the
limits, and volumes, (channel, depth, row, column), of which the middle slice is drawn. What is missing, NaN, is a warm
grey. The colours are those of Okabe & Ito, told apart with every kind of colour vision.
"""

from collections.abc import Mapping, Sequence
from io import BytesIO
from textwrap import fill
from typing import Any

from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
import numpy as np

WIDTH = 4.2  # inches
BLUE, VERMILION, GREEN, GRAY, INK, LINE = "#0072B2", "#D55E00", "#009E73", "#767676", "#222222", "#D0D0D0"
COLOURS = (BLUE, VERMILION, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MISSING = (0.80, 0.77, 0.71)
SIGNAL = (96, 144, 600)
"""Height, least and largest width of the picture of a signal, in pixels."""
SMALL, NORMAL = 8.0, 9.0  # points

Limits = tuple[float, float]
Images = Float[np.ndarray, "n c *sides"]


class Picture(Figure):
    """A figure that notebooks show as it is returned: of those without pyplot they show the name only.

    A dollar in a label is a dollar: names are the user's, and `$x_{$` is no formula.
    """

    def draw(self, renderer: Any) -> None:
        """As Matplotlib draws; formulas are those that it has made itself, of powers on an axis."""
        for text in self.findobj(Text):
            if "$" in text.get_text() and "\\mathdefault" not in text.get_text():
                text.set_parse_math(False)
        super().draw(renderer)

    def _repr_png_(self) -> bytes:
        out = BytesIO()
        self.savefig(out, format="png", dpi=150)
        return out.getvalue()


def is_drawn(shape: Sequence[int]) -> bool:
    """Whether an observation of this shape can be drawn: an image or a volume of 1 or 3 channels, a signal of few."""
    if len(shape) == 2:
        return shape[0] <= len(COLOURS) and shape[1] > 1
    return len(shape) in (3, 4) and shape[0] in (1, 3)


def image_grid(
    images: Images, titles: Sequence[str] | None = None, *, columns: int = 8, limits: Limits = (-1.0, 1.0)
) -> Figure:
    """Images side by side, `columns` in a row, each with its title. Raises ValueError for arrays that are no images."""
    pictures = [_rgb(image, limits) for image in images]
    if titles is not None and len(titles) != len(pictures):
        raise ValueError(f"titles must give one title per image, expected {len(pictures)}, got {len(titles)}")
    starts = range(0, len(pictures), columns)
    return _sheet(
        [pictures[i : i + columns] for i in starts],
        titles=None if titles is None else [list(titles[i : i + columns]) for i in starts],
    )


def reconstructions(x: Images, samples: Float[np.ndarray, "n k c *sides"], *, limits: Limits = (-1.0, 1.0)) -> Figure:
    """Images in the top row, below each its k samples, then the mean absolute difference over channels and samples.

    The maps of differences share one scale, from white (none) to dark blue (the largest of all).
    """
    difference = np.abs(samples - x[:, None]).mean(axis=(1, 2))
    top = max(float(np.nanmax(difference)), 1e-9)
    rows = [[_rgb(image, limits) for image in x]]
    rows += [[_rgb(image, limits) for image in samples[:, k]] for k in range(samples.shape[1])]
    rows += [[_heat(d, top) for d in difference]]
    labels = ["image", *(f"sample {k + 1}" for k in range(samples.shape[1])), f"error\n0 to {top:.2g}"]
    return _sheet(rows, row_labels=labels)


def traversal(
    images: Float[np.ndarray, "axes steps c *sides"],
    values: Sequence[float],
    labels: Sequence[str],
    *,
    start: Float[np.ndarray, "c *sides"] | None = None,
    end: Float[np.ndarray, "c *sides"] | None = None,
    limits: Limits = (-1.0, 1.0),
) -> Figure:
    """One row per axis, one column per value of it; the first column is `start`, the image whose code is moved.

    `end`: an image that the rows lead to, in the last column.
    """
    first, last = ([] if image is None else [_rgb(image, limits)] for image in (start, end))
    rows = [first + [_rgb(image, limits) for image in row] + last for row in images]
    columns = [f"{value:.1f}".replace("-", "−") for value in values]
    return _sheet(rows, row_labels=list(labels), column_labels=["image"] * len(first) + columns + ["image"] * len(last))


def factor_grid(
    means: Float[np.ndarray, "n D"],
    factors: Float[np.ndarray, "n F"],
    correlation: Float[np.ndarray, "D F"],
    axes: Sequence[str],
    names: Sequence[str],
) -> Figure:
    """Posterior mean of each axis (rows) against each factor (columns), with their |correlation| over each panel.

    The axis that follows a factor best is drawn in blue.
    """
    size = np.abs(correlation)
    width = max(WIDTH, 0.6 + 1.1 * len(names))
    figure = Picture(figsize=(width, 0.5 + len(axes) * min(1.2, 0.3 + width / len(names) * 0.75)), layout="constrained")
    grid = figure.subplots(len(axes), len(names), sharex="col", sharey="row", squeeze=False)
    for i, axis in enumerate(axes):
        for j, name in enumerate(names):
            panel, value = style(grid[i, j]), size[i, j]
            best = np.isfinite(value) and value == np.nanmax(size[:, j])
            panel.scatter(factors[:, j], means[:, i], s=3, lw=0, alpha=0.5, color=BLUE if best else GRAY)
            title = f"|r| {value:.2f}" if np.isfinite(value) else "no spread"
            panel.set_title(title, fontsize=SMALL, pad=2, color=BLUE if best else GRAY, weight="bold" if best else None)
            if j == 0:
                panel.set_ylabel(axis, fontsize=NORMAL)
            if i == len(axes) - 1:
                panel.set_xlabel(fill(name.replace("_", " "), 15), fontsize=NORMAL)
    return figure


def curves(log: Sequence[Mapping[str, Any]]) -> Figure:
    """The records of a fit: for each stage the losses, and KL per axis where it has latents, against the step.

    Losses in nats per observation; where the first ones are far above all later ones, the panel starts below them and
    says so. Of more than seven axes the seven with most KL at the end are named. Raises ValueError for an empty log.
    """
    if not log:
        raise ValueError("log holds no records: give those of read_history(out / 'log.jsonl')")
    stages = {record["stage"]: [r for r in log if r["stage"] == record["stage"]] for record in log}
    panels = [(n, r, kind) for n, r in stages.items() for kind in ("loss", "kl") if kind == "loss" or r[-1].get("kl")]
    figure = Picture(figsize=(WIDTH, 1.8 * len(panels) + 0.2), layout="constrained")
    for (name, records, kind), panel in zip(panels, figure.subplots(len(panels), squeeze=False)[:, 0], strict=True):
        style(panel)
        steps = [record["step"] for record in records]
        if kind == "loss":
            lines = {"training loss": "train_loss", "bound, β = 1": "bound", "held-out loss": "loss"}
            series = {k: [_number(r.get(v)) for r in records] for k, v in lines.items() if v in records[-1]}
            if not records[-1].get("kl"):
                series.pop("held-out loss", None)  # without latents it is the bound
            _lines(panel, steps, series, [GRAY, VERMILION, BLUE])
            _cut_start(panel, series)
        else:
            series = _kl_series(records)
            order = sorted(series, key=lambda axis: -np.nan_to_num(series[axis][-1]))
            shown = [axis for axis in series if axis in order[: len(COLOURS)]]
            for axis in order[len(COLOURS) :]:
                panel.plot(steps, series[axis], color=LINE, lw=1)
            _lines(panel, steps, {axis: series[axis] for axis in shown}, COLOURS)
            panel.set_ylim(bottom=0)
        label_ends(panel)
        what = "loss" if kind == "loss" else "KL per axis"
        panel.set_title(f"{name}: {what}, nats per observation", fontsize=NORMAL, loc="left", color=INK)
        panel.set_xlabel("step", fontsize=SMALL)
    return figure


def noise_bands(errors: Mapping[str, Any]) -> Figure:
    """Denoising error per band of noise levels: without guidance, with own z, with another observation's z.

    `errors` has log_snr, unguided, own, shuffled, each one number per band in nats, as `diagnostics.NoiseErrors` and
    the log's records have; those that do not apply are None. The lower panel shows what the own z is worth per band.
    """
    centres = np.asarray(errors["log_snr"], float)
    keys = [key for key in ("unguided", "own", "shuffled") if errors.get(key) is not None]
    series = {key: np.asarray(errors[key], float) for key in keys}
    coded = "own" in keys
    figure = Picture(figsize=(WIDTH, 4.0 if coded else 2.2), layout="constrained")
    panels = [style(panel) for panel in figure.subplots(1 + coded, squeeze=False, sharex=True)[:, 0]]
    names = {"unguided": "no z", "own": "own z", "shuffled": "another's z"}
    colours = {"unguided": GRAY, "own": BLUE, "shuffled": VERMILION}
    _lines(panels[0], centres, {names[k]: v for k, v in series.items()}, [colours[k] for k in keys])
    positive = np.concatenate(list(series.values()))
    positive = positive[np.isfinite(positive)]
    if len(positive) and positive.min() > 0 and positive.max() > 20 * positive.min():
        panels[0].set_yscale("log")
    label_ends(panels[0])
    panels[0].set_title("denoising error per band, nats", fontsize=NORMAL, loc="left", color=INK)
    if coded:
        width = 0.36 * (centres[1] - centres[0] if len(centres) > 1 else 1.0)
        others = [k for k in ("shuffled", "unguided") if k in keys]
        bars = [(f"{names[k].removesuffix(' z').replace('no', 'none')} − own", series[k] - series["own"], colours[k])
                for k in others]  # fmt: skip
        for k, (name, value, colour) in enumerate(bars):
            label = f"{name}: {value.sum():.1f} in all".replace("-", "−")
            panels[1].bar(centres + (k - 0.5) * width, value, width * 0.92, color=colour, label=label)
        panels[1].axhline(0, color=INK, lw=0.8)
        panels[1].margins(y=0.25)
        panels[1].legend(fontsize=SMALL, frameon=False, loc="upper left", borderpad=0)
        panels[1].set_title("error saved by the own z, nats", fontsize=NORMAL, loc="left", color=INK)
    panels[-1].set_xticks(centres, [f"{c:.3g}".replace("-", "−") for c in centres])
    panels[-1].set_xlabel("log-SNR: mostly noise on the left, clean on the right", fontsize=SMALL)
    return figure


def spectrum(information: Any) -> Figure:
    """Rate of information of the whole code, and of each axis, against the noise level, and each axis's integral; nats.

    `information`: what `diagnostics.information_spectrum` returns. The dashed line is how much the guidance lowers the
    denoising error: it lies on the total where the noisy posterior is the true one. Of more than eight axes all after
    the seventh are grey.
    """
    log_snr, last = np.asarray(information["log_snr"], float), float(np.asarray(information["information"])[-1])
    figure = Picture(figsize=(WIDTH, 5.6), layout="constrained")
    total, rate, integral = panels = figure.subplots(3, 1, sharex=True)
    energy, gain = (0.5 * np.asarray(information[name], float) for name in ("energy", "gain"))
    total.plot(log_snr, energy, color=INK, lw=1.6, label=f"all axes, {last:.1f} nats in all".replace("-", "−"))
    total.plot(log_snr, gain, color=INK, lw=1.0, ls="--", label="error saved")
    for axis, colour, label in line_colours(information["axis"].values):
        own = information.sel(axis=axis)
        rate.plot(log_snr, 0.5 * own["axis_energy"], color=colour, lw=1.4, label=label)
        integral.plot(log_snr, own["axis_information"], color=colour, lw=1.4)
    titles = (
        "information rate, nats per unit of log-SNR",
        "the same of each axis",
        "information of each axis so far, nats",
    )
    for panel, title in zip(panels, titles, strict=True):
        style(panel).set_title(title, fontsize=NORMAL, loc="left", color=INK)
        panel.set_ylim(bottom=min(0.0, panel.get_ylim()[0]))
    integral.set_xlabel("log-SNR: mostly noise on the left, clean on the right", fontsize=SMALL)
    columns = 1 + (len(rate.get_legend_handles_labels()[1]) > 4)
    for panel in (total, rate):
        panel.legend(fontsize=SMALL, frameon=False, loc="upper left", borderpad=0, ncol=columns if panel is rate else 1)
    return figure


def line_colours(axes: Sequence[Any] | np.ndarray) -> list[tuple[Any, str, str]]:
    """Of every axis: itself, the colour of its line, and the line's name; all after the seventh are one grey."""
    rest = [LINE] * len(axes)
    after = ["others"] if len(axes) > len(COLOURS) + 1 else [str(axis) for axis in axes[len(COLOURS) :]]
    names = [str(axis) for axis in axes[: len(COLOURS)]] + after + ["_"] * len(axes)
    return list(zip(axes, (*COLOURS, *rest), names, strict=False))


def kl_bars(kl: Mapping[str, float], *, largest: int = 24) -> Figure:
    """KL from posterior to prior of each axis, in nats; of many axes the `largest`."""
    order = sorted(kl, key=lambda axis: -np.nan_to_num(_number(kl[axis])))[:largest]
    shown = [axis for axis in kl if axis in order]
    values = np.nan_to_num([_number(kl[axis]) for axis in shown])
    figure = Picture(figsize=(WIDTH, 0.6 + 0.24 * len(shown)), layout="constrained")
    panel = style(figure.subplots())
    bars = panel.barh(range(len(shown)), values, height=0.7, color=BLUE)
    panel.bar_label(bars, [f"{value:.2f}" for value in values], fontsize=SMALL, padding=3, color=INK)
    panel.set_yticks(range(len(shown)), shown, fontsize=NORMAL)
    panel.invert_yaxis()
    panel.set_xlim(0, max(1.0, 1.15 * values.max(initial=0)))
    panel.set_xlabel("nats per observation", fontsize=SMALL)
    return figure


def _sheet(
    rows: Sequence[Sequence[np.ndarray]],
    *,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    titles: Sequence[Sequence[str]] | None = None,
) -> Figure:
    """Pictures (h, w, 3) on one panel in units of their width: cheaper than a panel each, and evenly spaced."""
    columns, height = max(map(len, rows)), rows[0][0].shape[0] / rows[0][0].shape[1]
    left = 0.2 + 0.075 * max((len(line) for label in row_labels for line in label.split("\n")), default=0)
    size = min(1.0, (WIDTH - left) / columns)
    room = 0.17 / size if titles else 0.0
    lines = max((label.count("\n") + 1 for label in row_labels), default=1)
    pitch = max(1.06 * height + room, 0.15 * lines / size)
    extent = size * pitch * len(rows) + 0.1 + 0.2 * bool(column_labels)
    figure = Picture(figsize=(left + size * columns, extent), layout="constrained")
    panel = figure.subplots()
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            at = i * pitch + room
            panel.imshow(picture, extent=(j, j + 0.94, at + 0.94 * height, at), interpolation="nearest")
            if titles:
                panel.text(j + 0.47, at - 0.04, titles[i][j], fontsize=SMALL, ha="center", va="bottom", color=INK)
    panel.set(xlim=(0, columns - 0.06), ylim=(len(rows) * pitch - 0.12 * height, 0), frame_on=False)
    panel.set_anchor("E")  # what width is left over goes to the labels
    panel.xaxis.tick_top()
    panel.set_xticks([j + 0.47 for j in range(len(column_labels))], column_labels, fontsize=SMALL, color=INK)
    centres = [i * pitch + room + 0.47 * height for i in range(len(row_labels))]
    panel.set_yticks(centres, row_labels, fontsize=SMALL, color=INK)
    panel.tick_params(length=0, pad=2)
    return figure


def _rgb(image: np.ndarray, limits: Limits) -> np.ndarray:
    """The picture (h, w, 3) of one observation."""
    image = np.asarray(image, float)
    if not is_drawn(image.shape):
        raise ValueError(
            "an image must have shape (channel, row, column) with 1 or 3 channels, a signal (channel, length) with "
            f"up to {len(COLOURS)}, got {image.shape}"
        )
    unit = np.clip((image - limits[0]) / (limits[1] - limits[0]), 0.0, 1.0)
    if image.ndim == 2:
        return _curves(unit)
    unit = unit if image.ndim == 3 else unit[:, unit.shape[1] // 2]
    picture = np.broadcast_to(np.nan_to_num(unit).transpose(1, 2, 0), (*unit.shape[1:], 3)).copy()
    picture[np.isnan(unit).any(0)] = MISSING
    return picture


def _heat(values: np.ndarray, top: float) -> np.ndarray:
    """The picture of one map from 0 to `top`, without channels, in blue; of a signal its curve."""
    if values.ndim == 1:
        return _curves(values[None] / top)
    values = values if values.ndim == 2 else values[len(values) // 2]
    picture = colormaps["Blues"](np.nan_to_num(values) / top)[..., :3]
    picture[np.isnan(values)] = MISSING
    return picture


def _curves(unit: Float[np.ndarray, "c t"]) -> np.ndarray:
    """The picture of a signal with values from 0 to 1: a curve for each channel."""
    height, least, most = SIGNAL
    places = np.linspace(0, unit.shape[1] - 1, min(max(least, unit.shape[1]), most))
    picture, rows = np.full((height, len(places), 3), 0.96), np.arange(height)[:, None]
    for values, colour in zip(unit, COLOURS, strict=False):
        at = (1 - np.interp(places, np.arange(len(values)), values)) * (height - 1)
        after = np.append(at[1:], at[-1])
        picture[(rows >= np.minimum(at, after) - 1) & (rows <= np.maximum(at, after) + 1)] = to_rgb(colour)
        picture[:, np.isnan(at)] = MISSING
    return picture


def style(panel: Axes) -> Axes:
    """The look of every panel with axes; returns the panel."""
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(GRAY)
    panel.tick_params(labelsize=SMALL, color=GRAY, labelcolor=INK, length=2.5)
    return panel


def _lines(panel: Axes, x: Sequence[float] | np.ndarray, series: Mapping[str, Any], colours: Sequence[str]) -> None:
    for (name, values), colour in zip(series.items(), colours, strict=False):
        panel.plot(x, values, color=colour, lw=1.4, marker="o", ms=2.5, label=name)


def label_ends(panel: Axes) -> None:
    """Names at the right ends of the labelled lines, pushed apart where they would overlap; fixes the y range."""
    panel.set_ylim(panel.get_ylim())
    lines = [line for line in panel.get_lines() if not str(line.get_label()).startswith("_")]
    ends = np.array([np.asarray(line.get_ydata(), float)[-1] for line in lines])
    to_panel = panel.transScale + panel.transLimits
    heights = np.array([to_panel.transform((0.0, end))[1] if np.isfinite(end) else 1.0 for end in ends]).clip(0, 1)
    order, gap = np.argsort(heights), 0.1
    placed = heights[order]
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + gap)
    for i in range(len(placed) - 1, -1, -1):
        placed[i] = min(placed[i], 1.0 - gap * (len(placed) - 1 - i))
    for line, height in zip(np.array(lines)[order], placed, strict=True):
        panel.plot([1.015, 1.045], [height] * 2, transform=panel.transAxes, clip_on=False, color=line.get_color(), lw=2)
        panel.text(1.06, height, line.get_label(), transform=panel.transAxes, fontsize=SMALL, va="center", color=INK)


def _cut_start(panel: Axes, series: Mapping[str, Sequence[float]]) -> None:
    """Where the first tenth of the records lies far above the rest, show the rest and say where the lines start."""
    values = np.array(list(series.values()), float)
    first = max(1, values.shape[1] // 10)
    if values.shape[1] < 4 or not np.isfinite(values).all():
        return
    low, high = values[:, first:].min(), values[:, first:].max()
    if values.max() > high + 2 * (high - low):
        panel.set_ylim(low - 0.05 * (high - low), high + 0.15 * (high - low))
        text = f"first value {values.max():.4g}, above the panel"
        panel.text(0.98, 0.98, text, transform=panel.transAxes, fontsize=SMALL, ha="right", va="top", color=GRAY)


def _kl_series(records: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    series: dict[str, list[float]] = {}
    for record in records:
        for site, kl in record["kl"].items():
            values = np.asarray(kl, float)
            names = record.get("axes", {}).get(site, ())
            if len(names) != values.size:
                names = [f"{site}[{','.join(map(str, i))}]" if i else site for i in np.ndindex(values.shape)]
            for name, value in zip(names, values.ravel().tolist(), strict=True):
                series.setdefault(name, []).append(value)
    return series


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)
