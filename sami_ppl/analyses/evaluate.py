"""How good a fitted program is: the figures of `metrics.json`.

Everything is fitted on the training part and scored on the test part. Nats are of the bound itself (β = 1, w = 1),
whatever was trained.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpy as np
import numpyro
from numpyro import handlers
import xarray as xr

from sami_ppl._util.keys import check_key
from sami_ppl._util.maps import forget_if_many
from sami_ppl.analyses.codes import ACTIVE_VARIANCE
from sami_ppl.data import factor_names, real_factors, train_test, unrolled, unrolled_names
from sami_ppl.diagnostics.clusters import clusters
from sami_ppl.diagnostics.collapse import collapse_warning
from sami_ppl.diagnostics.gain import draw_code, noise_errors
from sami_ppl.diagnostics.noise_end import noise_end_kl
from sami_ppl.distributions.gaussian import gaussian_root
from sami_ppl.distributions.supports import is_unbounded, unwrapped
from sami_ppl.encoders.encoder import RotatedEncoder
from sami_ppl.evidence import evidence_bound, summarise
from sami_ppl.fitting.gauge import orthogonal_ica
from sami_ppl.fitting.start import low_pass_codes
from sami_ppl.metrics import circular_correlation, correlation, disentanglement_report, largest_jump, mean_correlation
from sami_ppl.posteriors.generate import decode, generate
from sami_ppl.priors.sites import Direction, LatentSite, Process
from sami_ppl.program.program import Program

TRAIN, TEST = 5000, 2500


def evaluate(
    program: Program,
    data: xr.Dataset,
    *,
    key: Key[Array, ""],
    distance: Callable[[np.ndarray], np.ndarray] | None = None,
    factors: list[str] | None = None,
    samples: int = 256,
) -> dict[str, Any]:
    """All figures of a fitted program on a data set with train and test parts, as plain numbers.

    Of a program of sequences the figures are those of its single frames, under their prior N(0, I), and `sequences`,
    the bound of whole ones. What a decoder does not have is left out: `noise_end_kl` unless it is guided, and what is
    measured without a code where it has no denoiser without one.

    Args:
        program: the program.
        data: observations x with a `split`, and with true factors, the real-valued variables on `obs`, and classes,
            the integer ones, where they are known.
        key: random key.
        distance: root-mean-square distance of images to the nearest possible observation, where that is known.
        factors: names of the true factors; default all real-valued variables on `obs`.
        samples: test observations of which samples are drawn.

    Returns:
        The figures by name, nested, as JSON takes them.

    Raises:
        ValueError: a name in `factors` that is not there.
    """
    check_key(key)
    forget_if_many()
    single, frames = program.single(data)
    if single is not program:
        sequences = bound_figures(program, train_test(data)[1].isel(obs=slice(TEST // 10)), key=key)
        figures = evaluate(single, frames, key=key, distance=distance, factors=factors, samples=samples)
        return figures | {"sequences": {name: sequences[name] for name in ("bound_nats", "kl_total_nats")}}
    train, test = (part.isel(obs=slice(n)) for part, n in zip(train_test(data), (TRAIN, TEST), strict=True))
    x_train, x_test = (np.asarray(part["x"].values, np.float32) for part in (train, test))
    codes = program.encode(x_train)[0], program.encode(x_test)[0]
    bound_key, gain_key, sample_key = jax.random.split(key, 3)
    end_key = jax.random.fold_in(key, 3)

    metrics: dict[str, Any] = bound_figures(program, test, key=bound_key)
    metrics["kl_nats"] |= marginal_kl(program, x_test)
    variance = codes[1].var(0)
    metrics["active_latents"] = int((variance > ACTIVE_VARIANCE).sum())
    metrics["mean_variance"] = dict(zip(program.latents.axes, variance.tolist(), strict=True))
    errors: Any = eqx.filter_jit(noise_errors)(program, jnp.asarray(x_test[:1024]), gain_key)
    metrics["z_gain"] = float(jnp.sum(errors.gain))
    if errors.unguided is not None:
        metrics["guidance_gain"] = float(jnp.sum(errors.unguided - errors.own))
    metrics["noise_errors"] = {n: None if v is None else np.asarray(v).tolist() for n, v in errors._asdict().items()}
    if program.guided:
        metrics["noise_end_kl"] = noise_end_kl(program, test.isel(obs=slice(256)), key=end_key)

    names = {kind: factor_names(data, kind, factors) for kind in ("real", "class")}
    names["real"] = real_factors(*(part[["x", *names["real"]]] for part in (train, test)))
    taken = program.latents.arguments
    names["class"] = [n for n in names["class"] if n not in taken and len(np.unique(train[n].values)) > 1]
    if any(site.clusters > 1 for site in program.latents.sites):
        metrics["clusters"] = cluster_figures(program, test, (x_train, x_test), names["class"])
    known = None
    if names["real"]:
        train, test = (unrolled(part, names["real"]) for part in (train, test))
        names["real"] = [n for name in names["real"] for n in unrolled_names(data[name])]
        known = tuple(np.stack([part[n].values for n in names["real"]], -1) for part in (train, test))
        metrics |= factor_figures(program, codes, known, names["real"])
        metrics |= circular_figures(program, codes[1], test)
        metrics["low_pass_pca"] = baseline_figures((x_train, x_test), known, names["real"], metrics["active_latents"])
    for name in names["class"]:
        metrics.setdefault("probes", {})[name] = probes(
            codes, (x_train, x_test), (train[name].values, test[name].values)
        )
    metrics["samples"] = sample_figures(
        program, x_test[:samples], key=sample_key, distance=distance, mean_image=x_train.mean(0),
        predict=None if known is None else _forest(codes[0], known[0]),
        factors=None if known is None else known[1][:samples], names=names["real"],
    )  # fmt: skip
    warning = collapse_warning(list(metrics["kl_nats"].values()), metrics["z_gain"])
    metrics["warnings"] = [] if warning is None else [warning]
    return metrics


def circular_figures(program: Program, codes: Float[np.ndarray, "obs D"], data: xr.Dataset) -> dict[str, Any]:
    """Of every factor that goes round: its circular correlation with each angle of the prior, and how the code jumps.

    `circular_corr` is the absolute value. `largest_jump` is that of the code of each site, see `metrics.largest_jump`;
    none where the data do not go all the way round.
    """
    figures: dict[str, dict] = {"circular_corr": {}, "largest_jump": {}}
    for name, factor in data.data_vars.items():
        if "period" not in factor.attrs or not np.isfinite(factor.values).all():
            continue
        turn = 2 * np.pi * factor.values / factor.attrs["period"]
        sites = {site.name: codes[:, site.code] for site in program.latents.sites}
        angles = {
            site.name: np.arctan2(*codes[:, site.code].T[::-1]) for site in program.latents.sites
            if isinstance(site, Direction) and site.manifold == "circle" and site.size == 2
        }  # fmt: skip
        figures["circular_corr"][name] = {site: abs(circular_correlation(turn, a)) for site, a in angles.items()}
        bins = min(64, max(4, len(turn) // 20))
        try:
            jumps = {site: largest_jump(code, turn, bins=bins) for site, code in sites.items()}
        except ValueError:  # some angles have no observations
            jumps = {}
        figures["largest_jump"][name] = jumps
    return figures if figures["circular_corr"] else {}


def factor_figures(program: Program, codes: tuple, factors: tuple, names: list[str]) -> dict[str, Any]:
    """Recovery of known factors; axis scores beside those of a rotated code and, after gauge fixing, before it."""

    def scores(codes: tuple) -> dict[str, Any]:
        report = disentanglement_report(codes[0], factors[0], codes[1], factors[1], names, seed=0)
        values = np.array([report["correlation"][name] for name in names]).T.tolist()
        return {
            "linear_r2": report["linear_r2"], "forest_r2": report["forest_r2"], "mig": report["mig"],
            "mean_correlation": mean_correlation(codes[1], factors[1]),
            "dci_disentanglement": report["dci"]["disentanglement"], "dci_regressor": report["dci"]["regressor"],
            "corr": {"axes": list(program.latents.axes), "factors": names, "values": values},
            "rotated_control": {"mig": report["rotated"]["mig"],
                                "dci_disentanglement": report["rotated"]["dci"]["disentanglement"]},
        }  # fmt: skip

    figures = scores(codes)
    if isinstance(program.encoder, RotatedEncoder):
        rotation = np.asarray(program.encoder.rotation)
        before = scores(tuple(c @ rotation for c in codes))
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
    codes = low_pass_codes(np.concatenate(pixels), size, size)
    if size > 1:
        codes = codes @ orthogonal_ica(codes, seed=0).T
    cut = len(pixels[0])
    report = disentanglement_report(codes[:cut], factors[0], codes[cut:], factors[1], names, seed=0)
    best = {name: float(np.abs(report["correlation"][name]).max()) for name in names}
    return {"linear_r2": report["linear_r2"], "forest_r2": report["forest_r2"], "best_corr": best,
            "dci_disentanglement": report["dci"]["disentanglement"]}  # fmt: skip


def bound_figures(program: Program, data: xr.Dataset, *, key: Key[Array, ""], levels: int = 16) -> dict[str, Any]:
    """The bound on −log p(x) in nats and bits per dim, with standard errors over observations, and the KL per axis."""
    bound = evidence_bound(program, data, key=key, levels=levels)
    figures = summarise(bound, program.observed(data))
    kl = bound["kl_axis"].mean("obs")
    return {
        "bound_nats": figures["bound"],
        "bits_per_dim": figures["bits_per_dim"],
        "kl_nats": dict(zip(program.latents.axes, kl.values.tolist(), strict=True)),
        "kl_total_nats": float(kl.sum()),
    }


def marginal_kl(program: Program, x: Float[np.ndarray, "obs *event"]) -> dict[str, float]:
    """KL of each axis's marginal posterior from its prior in nats, where posterior and prior have such marginals.

    These are axes with a Gaussian posterior and a prior that is the same for all observations, independent between axes
    and unbounded: in closed form where it is a fixed Normal, else by quadrature. Where the posterior is diagonal these
    are the terms of the bound; where a rotation has correlated the axes, their sum is less than the KL in the bound.
    """
    loc, scale = program.encode(x)
    kl_by_axis: dict[str, float] = {}
    for site in gaussian_sites(program):
        mean, spread = loc[:, site.code], scale[:, site.code]
        if site.standard:
            kl = 0.5 * (mean**2 + spread**2 - 1) - np.log(spread)
        elif (law := _independent_prior(program, site)) is not None:
            nodes, weights = np.polynomial.hermite_e.hermegauss(32)
            z = mean + spread * nodes[:, None, None]
            log_p = law.log_prob(jnp.asarray(site.shift + site.scale * z)) + np.log(site.scale)
            cross = np.einsum("n,noj->oj", weights / weights.sum(), np.asarray(log_p, float))
            kl = -0.5 * np.log(2 * np.pi * np.e) - np.log(spread) - cross
        else:
            continue
        kl_by_axis |= dict(zip(site.axes, kl.mean(0).tolist(), strict=True))
    return kl_by_axis


def gaussian_sites(program: Program) -> list[LatentSite]:
    """Sites whose posterior is Gaussian, and the same whatever the values of others."""
    gaussian: list[LatentSite] = []

    def look(x: Array, key: Array) -> None:
        q, codes = program.code_law(x), {}
        for site in program.latents.sites:
            law: Any = q.of_site(site, codes)
            codes[site.name] = law.sample(key)
            if gaussian_root(law) is not None and not site.kinds:
                gaussian.append(site)

    jax.eval_shape(look, jnp.zeros((1, *program.event_shape)), jax.random.key(0))
    return gaussian


def _independent_prior(program: Program, site: LatentSite) -> Any:
    """Law of the elements of a vector site, at fitted parameters; None where they have none of their own."""
    latents = program.latents
    if (
        latents.global_sites
        or latents.arguments
        or site.parents
        or isinstance(site, Process)
        or len(site.event_shape) != 1
    ):
        return None
    run = handlers.seed(program.sample_prior, jax.random.key(0))
    law = unwrapped(handlers.trace(run).get_trace(numpyro.plate("obs", 1), 1)[site.name]["fn"])
    elementwise = law.event_shape == () and law.batch_shape[-1:] == site.event_shape
    return law if elementwise and is_unbounded(site.transform) else None


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
    agreement: dict[str, Any] = {}
    for site, components in clusters(program, data).items():
        count = next(s.clusters for s in program.latents.sites if s.name == site)
        others = {"k_means_pca": KMeans(count, random_state=0),
                  "gaussian_mixture_pca": GaussianMixture(count, n_init=5, random_state=0)}  # fmt: skip
        groupings = {f"sami[{site}]": components} | {
            name: model.fit(pca.transform(train)).predict(pca.transform(test)) for name, model in others.items()
        }
        for name in names:
            agreement.setdefault(name, {}).update(
                {k: float(adjusted_rand_score(data[name], v)) for k, v in groupings.items()}
            )
    return agreement


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
    accuracy = {}
    for name, features in (("sami", codes), ("pca", tuple(pca.transform(f) for f in flat))):
        for probe, model in (("knn", KNeighborsClassifier(5)), ("linear", LogisticRegression(max_iter=2000))):
            fitted = make_pipeline(StandardScaler(), model).fit(features[0], labels[0])
            accuracy[f"{probe}_{name}"] = float(fitted.score(features[1], labels[1]))
    return accuracy


def sample_figures(
    program: Program,
    x: Float[np.ndarray, "obs *event"],
    *,
    key: Key[Array, ""],
    mean_image: np.ndarray,
    distance: Callable | None = None,
    predict: Callable | None = None,
    factors: np.ndarray | None = None,
    names: list[str] | None = None,
) -> dict[str, Any]:
    """How well samples follow the latent: scale 1, the program's own sampler.

    Mean squared errors per pixel of samples given z ~ q(z | x): to x itself, to another image, beside two images drawn
    at random and the mean image; correlation of re-encoded codes with those given, and of the factors predicted from
    them with the true ones; distance to the nearest possible observation, conditional and unconditional.
    """
    code_key, given_key, free_key = jax.random.split(key, 3)
    z = draw_code(program, jnp.asarray(x), code_key)

    conditional = decode(program, z, jax.random.split(given_key, len(x)))
    drawn = {"conditional": conditional}
    if program.denoiser.marginal:
        drawn["unconditional"] = generate(program, key=free_key, size=len(x), guided=False)
    again = program.encode(conditional)[0]
    other = np.roll(x, 1, axis=0)
    figures: dict[str, Any] = {
        "evaluations": program.sampler.evaluations,
        "sampler": type(program.sampler).__name__,
        "mse_own": float(np.mean((conditional - x) ** 2)),
        "mse_own_median": float(np.median(np.mean((conditional - x) ** 2, axis=tuple(range(1, x.ndim))))),
        "mse_other": float(np.mean((conditional - other) ** 2)),
        "mse_two_images": float(np.mean((x - other) ** 2)),
        "mse_mean_image": float(np.mean((x - mean_image) ** 2)),
        "reencoded_corr": dict(
            zip(program.latents.axes, np.diag(correlation(again, np.asarray(z))).tolist(), strict=True)
        ),
    }
    if predict is not None and factors is not None:
        figures["reencoded_factor_corr"] = dict(
            zip(names or [], _column_correlation(predict(again), factors), strict=True)
        )
    if distance is not None:
        for name, images in drawn.items():
            rms = distance(images)
            figures[f"rms_{name}"] = {"median": float(np.median(rms)), "p90": float(np.quantile(rms, 0.9))}
    return figures


def _forest(codes: np.ndarray, factors: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    # scikit-learn takes and gives a single target as a vector.
    from sklearn.ensemble import RandomForestRegressor

    target = factors[:, 0] if factors.shape[1] == 1 else factors
    forest = RandomForestRegressor(100, random_state=0, n_jobs=-1).fit(codes, target)
    return lambda codes: forest.predict(codes).reshape(len(codes), -1)


def _column_correlation(a: np.ndarray, b: np.ndarray) -> list[float]:
    return np.diag(correlation(a, b)).tolist()
