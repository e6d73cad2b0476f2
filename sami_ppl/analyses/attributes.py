"""How many axes a binary attribute takes: sparse linear probes."""

from collections.abc import Sequence

import jax
from jaxtyping import Array, Float, Key
from matplotlib.figure import Figure
import numpy as np
import xarray as xr

from sami_ppl import plots
from sami_ppl._util.keys import check_key
from sami_ppl.analyses.codes import ACTIVE_VARIANCE, axis_dataset, posterior_means
from sami_ppl.data.factors import factor_names
from sami_ppl.program.program import Program

STRENGTHS = tuple(np.geomspace(1e-3, 1e2, 26).tolist())
"""C of scikit-learn's LogisticRegression: from no weight at all to hardly any penalty."""
TOLERANCE = 0.99


def hoyer_sparsity(weights: Float[np.ndarray, " n"]) -> float:
    """(√n − ‖w‖₁/‖w‖₂)/(√n − 1): 1 for one weight alone, 0 for equal ones (Hoyer 2004, sec. 3.1).

    NaN for a single weight, and for none other than 0.
    """
    weights, n = np.asarray(weights, float), np.size(weights)
    norm = float(np.sqrt((weights**2).sum()))
    if n < 2 or norm == 0:
        return float("nan")
    return float((np.sqrt(n) - np.abs(weights).sum() / norm) / (np.sqrt(n) - 1))


def attribute_sparsity(
    program: Program,
    data: xr.Dataset,
    attributes: Sequence[str] | None = None,
    *,
    key: Key[Array, ""],
    test: float = 0.5,
    strengths: Sequence[float] = STRENGTHS,
) -> xr.Dataset:
    """L1-penalised logistic probes of binary attributes on standardised posterior means, over a path of penalties.

    Fitted on a part of the observations drawn at random and scored on the rest, a share `test`. On `attribute`:

    - `auroc`: the best held-out area under the ROC curve on the path, and `chance`, that of the same probe of the
      shuffled attribute, the best on the path too: what choosing the best of many gives by luck;
    - `weights_needed`: the fewest weights other than 0 with at least 99 % of that best area;
    - `hoyer`: Hoyer sparsity of the weights at the best area, over the axes that are not collapsed;
    - `weight` (attribute, axis): these weights, per standard deviation of the posterior mean.

    `attributes`: names of variables on obs with two values each; default, all such. Axes that have collapsed
    (means that vary by less than .05) are not probed and have weight 0. Raises ValueError where there is no such
    attribute, for one that has not exactly two values in both parts, and if all axes have collapsed.
    """
    check_key(key)
    from sklearn.preprocessing import StandardScaler

    names = _binary(data, attributes)
    x = program.observed(data["x"].values, at_least=20, why="a probe and its score")
    means = posterior_means(program, x)
    active = np.flatnonzero(means.var(0) > ACTIVE_VARIANCE)
    split_key, shuffle_key = jax.random.split(key)
    order, cut = np.asarray(jax.random.permutation(split_key, len(x))), round(test * len(x))
    if not 0 < cut < len(x):
        raise ValueError(f"test must be a share in (0, 1) that fills both parts of {len(x)} observations, got {test}")
    fitted, scored = parts = order[cut:], order[:cut]
    scale = StandardScaler().fit(means[np.ix_(fitted, active)]).transform
    codes = np.asarray(scale(means[np.ix_(fitted, active)])), np.asarray(scale(means[np.ix_(scored, active)]))
    shuffled = np.asarray(jax.random.permutation(shuffle_key, len(x)))

    found = {name: [] for name in ("auroc", "chance", "weights_needed", "hoyer", "weight")}
    for name in names:
        label = _labels(data[name].values, name, parts)
        areas, weights = _path(codes, (label[fitted], label[scored]), strengths)
        best, used = int(np.argmax(areas)), (weights != 0).sum(1)
        weight = np.zeros(means.shape[1])
        weight[active] = weights[best]
        found["auroc"].append(areas[best])
        luck, _ = _path(codes, (label[shuffled][fitted], label[shuffled][scored]), strengths)
        found["chance"].append(luck.max())
        found["weights_needed"].append(used[areas >= TOLERANCE * areas[best]].min())
        found["hoyer"].append(hoyer_sparsity(weights[best]))
        found["weight"].append(weight)
    return axis_dataset(
        program,
        {
            "auroc": ("attribute", found["auroc"], "1", "held-out area under the ROC curve"),
            "chance": ("attribute", found["chance"], "1", "the same for the shuffled attribute"),
            "weights_needed": ("attribute", found["weights_needed"], "axes", "weights for 99 % of the area"),
            "hoyer": ("attribute", found["hoyer"], "1", "Hoyer sparsity of the weights"),
            "weight": (("attribute", "axis"), found["weight"], "logits per standard deviation", "weight of the probe"),
        },
        {"attribute": names},
        train=len(parts[0]), test=len(parts[1]), axes_probed=len(active),
    )  # fmt: skip


def _binary(data: xr.Dataset, attributes: Sequence[str] | None) -> list[str]:
    binary = factor_names(data, "binary", attributes)  # raises for names that are not there
    names = binary if attributes is None else list(attributes)
    if not names:
        raise ValueError(
            "data holds no attribute with two values on obs: make one, "
            'data.assign(bright=("obs", data.background.values > 0))'
        )
    return names


def _labels(values: np.ndarray, name: str, parts: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    kinds, labels = np.unique(values, return_inverse=True)
    if len(kinds) != 2:
        raise ValueError(f"attribute {name!r} must have exactly two values, got {len(kinds)}")
    if any(len(np.unique(labels[rows])) < 2 for rows in parts):
        raise ValueError(f"attribute {name!r} has one value only in a part of the observations: give more of them")
    return labels


def _path(
    codes: tuple[np.ndarray, np.ndarray], labels: tuple[np.ndarray, np.ndarray], strengths: Sequence[float]
) -> tuple[Float[np.ndarray, " path"], Float[np.ndarray, "path D"]]:
    """Held-out areas and weights along the path."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    areas, weights = [], []
    for strength in strengths:
        probe = LogisticRegression(l1_ratio=1.0, solver="liblinear", C=strength, max_iter=1000, random_state=0)
        probe.fit(codes[0], labels[0])
        areas.append(roc_auc_score(labels[1], probe.decision_function(codes[1])))
        weights.append(probe.coef_[0])
    return np.array(areas), np.array(weights)


def plot_attribute_sparsity(found: xr.Dataset) -> Figure:
    """The weights of each attribute's probe, with its area under the curve and the number of weights that suffice."""
    weights = found["weight"].values
    names = [str(name).replace("_", " ") for name in found["attribute"].values]
    labels = [
        f"{name}\nAUROC {area:.2f}, {int(n)} of {weights.shape[1]}"
        for name, area, n in zip(names, found["auroc"].values, found["weights_needed"].values, strict=True)
    ]
    figure = plots.Picture(figsize=(plots.WIDTH, 0.6 + 0.42 * len(names)), layout="constrained")
    panel = figure.subplots()
    share = np.abs(weights) / np.maximum(np.abs(weights).max(1, keepdims=True), 1e-30)
    panel.imshow(share, cmap="Blues", vmin=0, vmax=1.3, aspect="auto")
    for (i, j), value in np.ndenumerate(weights):
        ink = "white" if share[i, j] > 0.75 else plots.INK
        text = f"{value:.1f}".replace("-", "−") if value else "0"
        panel.text(j, i, text, ha="center", va="center", fontsize=plots.SMALL, color=ink)
    panel.set_yticks(range(len(names)), labels, fontsize=plots.SMALL, color=plots.INK)
    panel.set_xticks(range(weights.shape[1]), found["axis"].values, fontsize=plots.NORMAL, color=plots.INK)
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    panel.set_title("weights of sparse probes, logits per spread", fontsize=plots.NORMAL, loc="left", color=plots.INK)
    return figure
