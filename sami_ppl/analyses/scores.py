"""Scores of a code against known factors and classes, and of what else would find them.

Everything is fitted on the training part and scored on the test part.
"""

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
import numpy as np
import xarray as xr

from sami_ppl.diagnostics.clusters import clusters
from sami_ppl.encoders.affine import AffineEncoder
from sami_ppl.fitting.components import low_pass_codes, widest_blur
from sami_ppl.fitting.gauge import orthogonal_ica
from sami_ppl.metrics import circular_correlation, disentanglement_report, largest_jump, mean_correlation
from sami_ppl.priors.sites import Direction
from sami_ppl.program.program import Program


def circular_figures(program: Program, codes: Float[np.ndarray, "obs D"], data: xr.Dataset) -> dict[str, Any]:
    """Of every factor that goes round: its circular correlation with each angle of the prior, and how the code jumps.

    `circular_corr` is the absolute value. `largest_jump` is that of the code of each site, see `metrics.largest_jump`;
    none where the data do not go all the way round.
    """
    found: dict[str, dict] = {"circular_corr": {}, "largest_jump": {}}
    for name, factor in data.data_vars.items():
        if "period" not in factor.attrs or not np.isfinite(factor.values).all():
            continue
        turn = 2 * np.pi * factor.values / factor.attrs["period"]
        sites = {site.name: codes[:, site.code] for site in program.latents.sites}
        angles = {
            site.name: np.arctan2(*codes[:, site.code].T[::-1]) for site in program.latents.sites
            if isinstance(site, Direction) and site.manifold == "circle" and site.size == 2
        }  # fmt: skip
        found["circular_corr"][name] = {site: abs(circular_correlation(turn, a)) for site, a in angles.items()}
        bins = min(64, max(4, len(turn) // 20))
        try:
            jumps = {site: largest_jump(code, turn, bins=bins) for site, code in sites.items()}
        except ValueError:  # some angles have no observations
            jumps = {}
        found["largest_jump"][name] = jumps
    return found if found["circular_corr"] else {}


def factor_figures(program: Program, codes: tuple, factors: tuple, names: list[str]) -> dict[str, Any]:
    """Recovery of known factors; axis scores beside those of a rotated code and, after gauge fixing, before it."""

    def scores(codes: tuple) -> dict[str, Any]:
        found = disentanglement_report(codes[0], factors[0], codes[1], factors[1], names, seed=0)
        values = np.array([found["correlation"][name] for name in names]).T.tolist()
        return {
            "linear_r2": found["linear_r2"], "forest_r2": found["forest_r2"], "mig": found["mig"],
            "mean_correlation": mean_correlation(codes[1], factors[1]),
            "dci_disentanglement": found["dci"]["disentanglement"], "dci_regressor": found["dci"]["regressor"],
            "corr": {"axes": list(program.latents.axes), "factors": names, "values": values},
            "rotated_control": {"mig": found["rotated"]["mig"],
                                "dci_disentanglement": found["rotated"]["dci"]["disentanglement"]},
        }  # fmt: skip

    figures = scores(codes)
    if isinstance(program.encoder, AffineEncoder):
        back = np.linalg.inv(np.asarray(program.encoder.matrix)).T  # but for a shift, which no score sees
        before = scores(tuple(c @ back for c in codes))
        figures["raw"] = {name: before[name] for name in ("mig", "dci_disentanglement", "corr")}
    return figures


def baseline_figures(
    pixels: tuple[np.ndarray, np.ndarray], factors: tuple, names: list[str], components: int
) -> dict[str, Any]:
    """The same scores for what an encoder may have been started from: principal components of blurred observations.

    With as many components as there are active axes, rotated by the same ICA. Without them nobody could tell what the
    fit has found from what it was given.
    """
    size = max(1, components)
    x = np.concatenate(pixels)
    codes = low_pass_codes(x, size, width=widest_blur(x, size).width)
    if size > 1:
        codes = codes @ orthogonal_ica(codes, seed=0).T
    cut = len(pixels[0])
    found = disentanglement_report(codes[:cut], factors[0], codes[cut:], factors[1], names, seed=0)
    best = {name: float(np.abs(found["correlation"][name]).max()) for name in names}
    return {"linear_r2": found["linear_r2"], "forest_r2": found["forest_r2"], "best_corr": best,
            "dci_disentanglement": found["dci"]["disentanglement"]}  # fmt: skip


def cluster_figures(
    program: Program, data: xr.Dataset, pixels: tuple[np.ndarray, np.ndarray], names: list[str]
) -> dict[str, Any]:
    """Agreement (adjusted Rand index) of mixture components and discrete sites with known classes, held out.

    Beside it k-means and a Gaussian mixture, fitted with as many clusters to principal components, one per axis of z.
    """
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA
    from sklearn.metrics import adjusted_rand_score
    from sklearn.mixture import GaussianMixture

    train, test = (x.reshape(len(x), -1) for x in pixels)
    pca = PCA(min(program.latents.size, train.shape[1]), random_state=0).fit(train)
    found: dict[str, Any] = {}
    for site, own in clusters(program, data).items():
        count = next(s.clusters for s in program.latents.sites if s.name == site)
        others = {"k_means_pca": KMeans(count, random_state=0),
                  "gaussian_mixture_pca": GaussianMixture(count, n_init=5, random_state=0)}  # fmt: skip
        each = {f"sami[{site}]": own} | {
            name: model.fit(pca.transform(train)).predict(pca.transform(test)) for name, model in others.items()
        }
        for name in names:
            found.setdefault(name, {}).update({k: float(adjusted_rand_score(data[name], v)) for k, v in each.items()})
    return found


def probes(codes: tuple, pixels: tuple, labels: tuple) -> dict[str, float]:
    """Held-out accuracy of 5-nearest-neighbour and logistic classifiers on posterior means, beside PCA."""
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    size = min(codes[0].shape[1], pixels[0].reshape(len(pixels[0]), -1).shape[1])
    flat = tuple(p.reshape(len(p), -1) for p in pixels)
    pca = PCA(size, random_state=0).fit(flat[0])
    found = {}
    for name, features in (("sami", codes), ("pca", tuple(pca.transform(f) for f in flat))):
        for probe, model in (("knn", KNeighborsClassifier(5)), ("linear", LogisticRegression(max_iter=2000))):
            fitted = make_pipeline(StandardScaler(), model).fit(features[0], labels[0])
            found[f"{probe}_{name}"] = float(fitted.score(features[1], labels[1]))
    return found


def forest(codes: np.ndarray, factors: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Predictor of the factors (n, F) from codes (n, D): a random forest of 100 trees."""
    # scikit-learn takes and gives a single target as a vector.
    from sklearn.ensemble import RandomForestRegressor

    target = factors[:, 0] if factors.shape[1] == 1 else factors
    forest = RandomForestRegressor(100, random_state=0, n_jobs=-1).fit(codes, target)
    return lambda codes: forest.predict(codes).reshape(len(codes), -1)
