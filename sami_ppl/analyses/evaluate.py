"""How good a fitted program is: the figures of `metrics.json`.

Everything is fitted on the training part and scored on the test part. Nats are of the bound itself (β = 1, w = 1),
whatever was trained.
"""

from collections.abc import Callable
from functools import partial
import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpy as np
import numpyro
from numpyro import handlers
import xarray as xr

from sami_ppl._util.budget import Budget
from sami_ppl._util.chunks import by_chunks, chunk_of, padded_chunks
from sami_ppl._util.keys import check_key
from sami_ppl._util.maps import forget_if_many
from sami_ppl._util.progress import phase, say, telling
from sami_ppl._util.tables import few
from sami_ppl.analyses.codes import ACTIVE_VARIANCE
from sami_ppl.analyses.scores import baseline_figures, circular_figures, cluster_figures, factor_figures, forest, probes
from sami_ppl.calibration.quick import SIMULATIONS, quick_calibration
from sami_ppl.data import factor_names, real_factors, train_test, unrolled, unrolled_names
from sami_ppl.diagnostics.floor import floor_share
from sami_ppl.diagnostics.gain import draw_codes, noise_errors
from sami_ppl.diagnostics.noise_end import noise_end_kl
from sami_ppl.diagnostics.verdict import fit_warnings, verdict
from sami_ppl.distributions.gaussian import gaussian_root
from sami_ppl.distributions.supports import is_unbounded, unwrapped
from sami_ppl.evidence import evidence_bound, summarise
from sami_ppl.fitting.components import filled
from sami_ppl.metrics import correlation, frechet, random_features
from sami_ppl.posteriors.generate import decode, generate
from sami_ppl.priors.sites import LatentSite, Process
from sami_ppl.program.program import Program, compiled_moments

TRAIN, TEST, GAIN, END, SAMPLES = 5000, 2500, 1024, 256, 256
"""Observations, at most: of the training part, on which predictors are fitted; of the test part; and of those, for the
denoising errors, the noisiest posterior, and samples."""


def evaluate(
    program: Program,
    data: xr.Dataset,
    *,
    key: Key[Array, ""],
    distance: Callable[[np.ndarray], np.ndarray] | None = None,
    factors: list[str] | None = None,
    samples: int = SAMPLES,
    seconds: float | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """All figures of a fitted program on a data set with train and test parts, as plain numbers.

    Each is of at most so many observations (`TRAIN`, `TEST`, `GAIN`, `END`, `samples`), a chunk of them at a time, so
    that memory stays bounded, and of fewer where time is short; `observations` among the figures says of how many.

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
        samples: test observations of which samples are drawn, at most.
        seconds: time in all, about; where it is short, estimates take fewer observations, and comparisons with other
            methods are left out, as `skipped` among the figures says. Default as long as it takes: the figures are
            then the same on any machine, but for `seconds`, what the calibration took.
        progress: say what is done on stderr.

    Returns:
        The figures by name, nested, as JSON takes them.

    Raises:
        ValueError: a name in `factors` that is not there.
    """
    check_key(key)
    forget_if_many()
    with telling(progress):
        single, frames = program.single(data)
        if single is program:
            return _figures(program, data, Budget(seconds, PARTS), key, distance, factors, samples)
        some = train_test(data)[1].isel(obs=slice(TEST // 10))
        with phase(f"bound of {some.sizes['obs']:,} whole sequences"):
            sequences = bound_figures(program, some, key=key)
        figures = _figures(single, frames, Budget(seconds, PARTS), key, distance, factors, samples)
    figures["observations"]["sequences"] = some.sizes["obs"]
    return figures | {"sequences": {name: sequences[name] for name in ("bound_nats", "kl_total_nats")}}


PARTS = 7
"""Estimates that share the time: codes of both parts, the bound, denoising errors, samples, simulations, the rest."""


def _figures(
    program: Program, data: xr.Dataset, budget: Budget, key: Array, distance: Callable | None,
    factors: list[str] | None, samples: int,
) -> dict[str, Any]:  # fmt: skip
    """The figures of a program of single observations."""
    train, test = (part.isel(obs=slice(n)) for part, n in zip(train_test(data), (TRAIN, TEST), strict=True))
    with phase(f"codes of {train.sizes['obs']:,} training and {test.sizes['obs']:,} test observations"):
        codes = tuple(_codes(program, part, budget) for part in (train, test))
    train, test = (part.isel(obs=slice(len(z))) for part, z in zip((train, test), codes, strict=True))
    x_train, x_test = (np.asarray(part["x"].values, np.float32) for part in (train, test))
    whole = filled(x_train), filled(x_test)  # for methods that know of nothing missing
    bound_key, gain_key, sample_key = jax.random.split(key, 3)
    end_key = jax.random.fold_in(key, 3)

    counts = {"train": len(x_train), "test": len(x_test)}
    with phase(f"bound of {len(x_test):,} test observations"):
        metrics: dict[str, Any] = bound_figures(program, test, key=bound_key, seconds=budget.share())
        metrics["kl_nats"] |= marginal_kl(program, x_test)
    counts["bound"] = metrics.pop("observations")
    variance = codes[1].var(0)
    metrics["active_latents"] = int((variance > ACTIVE_VARIANCE).sum())
    metrics["mean_variance"] = dict(zip(program.latents.axes, variance.tolist(), strict=True))
    with phase("denoising errors, with the right code and with another"):
        gain = gain_figures(program, x_test[:GAIN], key=gain_key, seconds=budget.share())
    counts["z_gain"] = gain.pop("observations")
    metrics |= gain

    if program.guided:
        with phase("posteriors at the noisiest level"):
            metrics["noise_end_kl"] = noise_end_kl(program, test.isel(obs=slice(END)), key=end_key)
        counts["noise_end_kl"] = min(END, len(x_test))

    skipped = []

    def compared(what: str) -> bool:
        """Whether there is time for a comparison."""
        if budget.spent:
            skipped.append(what)
            say(f"left out, for want of time: {what}")
        return not budget.spent

    names = {kind: factor_names(data, kind, factors) for kind in ("real", "class")}
    names["real"] = real_factors(*(part[["x", *names["real"]]] for part in (train, test)))
    taken = program.latents.arguments
    names["class"] = [n for n in names["class"] if n not in taken and len(np.unique(train[n].values)) > 1]
    if any(site.clusters > 1 for site in program.latents.sites) and compared("clusters"):
        with phase("clusters, beside k-means and Gaussian mixtures"):
            metrics["clusters"] = cluster_figures(program, test, whole, names["class"])
    known = None
    if names["real"]:
        train, test = (unrolled(part, names["real"]) for part in (train, test))
        names["real"] = [n for name in names["real"] for n in unrolled_names(data[name])]
        known = tuple(np.stack([part[n].values for n in names["real"]], -1) for part in (train, test))
        with phase(f"scores of the code against {few(names['real'], 6)}"):
            metrics |= factor_figures(program, codes, known, names["real"])
            metrics |= circular_figures(program, codes[1], test)
        if compared("low_pass_pca"):
            with phase("the same scores of principal components of blurred observations"):
                metrics["low_pass_pca"] = baseline_figures(whole, known, names["real"], metrics["active_latents"])
    for name in names["class"]:
        if compared(f"probes of {name}"):
            with phase(f"classifiers of {name} on the code, and on principal components"):
                labels = train[name].values, test[name].values
                metrics.setdefault("probes", {})[name] = probes(codes, whole, labels)
    with phase(f"samples of {min(samples, len(x_test)):,} test observations"):
        metrics["samples"] = sample_figures(
            program, x_test[:samples], key=sample_key, distance=distance, mean_image=whole[0].mean(0),
            predict=None if known is None else forest(codes[0], known[0]),
            factors=None if known is None else known[1][:samples], names=names["real"], budget=budget,
        )  # fmt: skip
    counts["samples"] = metrics["samples"].pop("observations")
    metrics["at_floor"] = floor_share(program, x_test)
    began = time.perf_counter()
    with phase(f"calibration, by {SIMULATIONS:,} simulations"):
        metrics["calibration"], drawn = quick_calibration(
            program, key=jax.random.fold_in(key, 4), simulations=SIMULATIONS, seconds=budget.share()
        )
    metrics["seconds"] = {"calibration": time.perf_counter() - began}
    metrics["prior_draws"] = prior_draw_figures(drawn, x_test, x_train)
    sites = {site.name: program.latents.axes[site.code] for site in program.latents.sites}
    metrics["warnings"] = fit_warnings(metrics, sites)
    metrics["verdict"] = verdict(metrics)
    return metrics | {"observations": counts} | ({"skipped": skipped} if skipped else {})


def prior_draw_figures(
    drawn: Float[np.ndarray, "n *event"], test: Float[np.ndarray, "m *event"], other: Float[np.ndarray, "k *event"]
) -> dict[str, Any] | None:
    """Fréchet distance on random features of draws of the prior from test observations, beside that of other data.

    Of equal numbers of all three; None of fewer than 32, or where something is not finite, or missing.
    """
    count = min(len(drawn), len(test), len(other))
    if count < 32 or not all(np.isfinite(part).all() for part in (drawn, test, other)):
        return None
    features = random_features()
    seen, made, beside = (features(part[:count]) for part in (test, drawn, other))
    return {
        "observations": count,
        "frechet": frechet(made, seen, bootstrap=0).value,
        "frechet_data": frechet(beside, seen, bootstrap=0).value,
    }


def _codes(program: Program, part: xr.Dataset, budget: Budget) -> Float[np.ndarray, "obs D"]:
    """Posterior means of the observations of a part, or of the first of them."""
    x, size = program.observed(part), chunk_of(1024, program.event_shape)
    return by_chunks(partial(compiled_moments, program), size, x, {}, seconds=budget.share())[0]


LEAST = 8
"""Observations of a chunk, at least, in which a shuffled z is another's."""
_noise_errors = eqx.filter_jit(noise_errors)


def gain_figures(
    program: Program, x: Float[np.ndarray, "obs *event"], *, key: Key[Array, ""], seconds: float | None = None
) -> dict[str, Any]:
    """Denoising errors by band of noise levels, what the own z gains over a shuffled one, and guidance over none; nats.

    `seconds`: after so many no further chunk of observations is begun.
    """
    size, parts = min(len(x), max(LEAST, chunk_of(GAIN, program.event_shape))), []
    for i, (rows, _) in enumerate(padded_chunks(len(x) // size * size, size, seconds=seconds)):
        parts.append(jax.device_get(_noise_errors(program, jnp.asarray(x[rows]), jax.random.fold_in(key, i))))
    errors: Any = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *parts)
    found = {"z_gain": float(np.sum(errors.gain))}
    if errors.unguided is not None:
        found["guidance_gain"] = float(np.sum(errors.unguided - errors.own))
    return found | {
        "noise_errors": {name: None if value is None else value.tolist() for name, value in errors._asdict().items()},
        "observations": size * len(parts),
    }


def bound_figures(
    program: Program, data: xr.Dataset, *, key: Key[Array, ""], levels: int = 16, seconds: float | None = None
) -> dict[str, Any]:
    """The bound on −log p(x) in nats and bits per dim, with standard errors over observations, and the KL per axis.

    `seconds`: as for `evidence_bound`; `observations` says of how many the figures are.
    """
    found = evidence_bound(program, data, key=key, levels=levels, seconds=seconds)
    count = found.sizes["obs"]
    figures = summarise(found, program.observed(data)[:count])
    kl = found["kl_axis"].mean("obs")
    return {
        "bound_nats": figures["bound"],
        "bits_per_dim": figures["bits_per_dim"],
        "kl_nats": dict(zip(program.latents.axes, kl.values.tolist(), strict=True)),
        "kl_total_nats": float(kl.sum()),
        "observations": count,
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
    budget: Budget | None = None,
) -> dict[str, Any]:
    """How well samples follow the latent: scale 1, the program's own sampler.

    Mean squared errors per pixel, of those that are seen, of samples given z ~ q(z | x): to x itself, to another image,
    beside two images drawn at random and the mean image; correlation of re-encoded codes with those given, and of the
    factors predicted from them with the true ones; distance to the nearest possible observation, conditional and
    unconditional. Of `x` the first are taken where the time of the `budget` is short; `observations` says how many.
    """
    code_key, given_key, free_key = jax.random.split(key, 3)
    z, keys = draw_codes(program, x, code_key), jax.random.split(given_key, len(x))

    conditional = decode(program, z, keys, seconds=None if budget is None else budget.share())
    x, z = x[: len(conditional)], z[: len(conditional)]
    again = program.encode(conditional)[0]
    other = np.roll(x, 1, axis=0)
    figures: dict[str, Any] = {
        "observations": len(x),
        "evaluations": program.sampler.evaluations,
        "sampler": type(program.sampler).__name__,
        "mse_own": float(np.nanmean((conditional - x) ** 2)),
        "mse_own_median": float(np.median(np.nanmean((conditional - x) ** 2, axis=tuple(range(1, x.ndim))))),
        "mse_other": float(np.nanmean((conditional - other) ** 2)),
        "mse_two_images": float(np.nanmean((x - other) ** 2)),
        "mse_mean_image": float(np.nanmean((x - mean_image) ** 2)),
        "reencoded_corr": dict(zip(program.latents.axes, np.diag(correlation(again, z)).tolist(), strict=True)),
    }
    if predict is not None and factors is not None:
        truth = factors[: len(x)]
        figures["reencoded_factor_corr"] = dict(
            zip(names or [], _column_correlation(predict(again), truth), strict=True)
        )
    if distance is not None:
        drawn = {"conditional": conditional}
        if program.denoiser.marginal:
            drawn["unconditional"] = generate(program, key=free_key, size=len(x), guided=False)
        for name, images in drawn.items():
            rms = distance(images)
            figures[f"rms_{name}"] = {"median": float(np.median(rms)), "p90": float(np.quantile(rms, 0.9))}
    return figures


def _column_correlation(a: np.ndarray, b: np.ndarray) -> list[float]:
    return np.diag(correlation(a, b)).tolist()
