"""The panel: one table of codes and samples on data sets of many kinds, `python -m benchmarks.panel --out FOLDER`.

A default of the library is a choice for all data, so it is judged on all of them at once: disks of 16 and 32 pixels,
bars and scenes in colour, whose factors are known; digits, Fashion-MNIST, patches of photographs and faces, real
images; temperatures of the open sea and heartbeats; vectors and spectra of known factors; and whatever `--data
NAME=FILE` gives. Every row is a fit with default settings, `sp.autoencoder` and `sp.fit`, of each method asked for
(`METHODS`: decoders, and starts of the encoder), beside principal components of as many numbers, on the same
observations.

Rows are kept in FOLDER/panel.json as they come, and not made again. What is reported, on held-out observations:

- codes: accuracy of 5 nearest neighbours and of a logistic regression where there are classes; linear and forest R²,
  and DCI disentanglement, where there are factors; how many axes are active;
- samples: squared error per number, to the observation that gave the code, of the mean of 16 samples (of principal
  components: of the reconstruction) and of single ones, beside that of the mean observation; Fréchet distance from
  held-out observations on random features, of samples given the codes of such, of samples of prior draws and of samples
  without a code, beside that of as many training observations;
- the bound on −log p(x) and its KL, in nats, of 8-bit images in bits per dimension too; seconds of the fit;
- the gauge: what filling the prior took off the KL and the bound, and the DCI before and after.
"""

import argparse
from collections.abc import Callable
import json
from pathlib import Path
import time
from typing import Any, NamedTuple
import warnings

import jax
import numpy as np
from numpyro import distributions as dist
import xarray as xr

import sami_ppl as sp
from sami_ppl._util.tables import table
from sami_ppl.analyses.evaluate import probes
from sami_ppl.data import bars, digits, disks, load_data, scenes, split, train_test
from sami_ppl.data.factors import factor_names, read_factors
from sami_ppl.data.readers.idx import read_idx
from sami_ppl.encoders.affine import AffineEncoder
from sami_ppl.metrics import dci, forest_r2, frechet, linear_r2, random_features
from sami_ppl.priors.read import Prior
from sami_ppl.saving.files import find, load_file

FASHION = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist has its files."""
FEW, REPEATS = 256, 16
"""Observations that are sampled, and samples of each whose mean is scored."""
DRAWN = 1000
"""Samples of each kind, and observations, between which Fréchet distances are."""


class Case(NamedTuple):
    """A data set, with its parts in `split`, and the size of the code."""

    load: Callable[[jax.Array], xr.Dataset]
    latents: int


def fashion(key: jax.Array) -> xr.Dataset:
    """60,000 images for training, 10,000 held out."""
    return read_idx(FASHION)


def vectors(key: jax.Array) -> xr.Dataset:
    """Sixteen features of three Normal factors, by two layers of tanh, with noise of a tenth of their deviation."""
    rng = np.random.default_rng(int(jax.random.randint(key, (), 0, 2**31 - 1)))
    factors = rng.standard_normal((5000, 3))
    h = factors
    for size in (16, 16):
        h = np.tanh(h @ rng.standard_normal((h.shape[1], size)) * np.sqrt(1.5 / h.shape[1]))
    x = h + 0.1 * h.std() * rng.standard_normal(h.shape)
    known = {f"factor_{i}": ("obs", factors[:, i]) for i in range(3)}
    return split(xr.Dataset({"x": (("obs", "feature"), x.astype(np.float32)), **known}), test=0.2, key=key)


def spectra(key: jax.Array) -> xr.Dataset:
    """128 channels: a sloping continuum with two lines, of which one moves and one has a width of its own; noise."""
    rng = np.random.default_rng(int(jax.random.randint(key, (), 0, 2**31 - 1)))
    slope, place, width = rng.uniform(-1, 1, 6000), rng.uniform(0.2, 0.5, 6000), rng.uniform(0.02, 0.06, 6000)
    at = np.linspace(0, 1, 128)
    line = lambda centre, width: np.exp(-0.5 * ((at - centre[:, None]) / width[:, None]) ** 2)  # noqa: E731
    clean = slope[:, None] * (at - 0.5) + line(place, np.full(6000, 0.03)) - line(np.full(6000, 0.75), width)
    x = clean + 0.05 * rng.standard_normal(clean.shape)
    known = {"slope": ("obs", slope), "place": ("obs", place), "width": ("obs", width)}
    return split(xr.Dataset({"x": (("obs", "channel"), x.astype(np.float32)), **known}), test=0.2, key=key)


def carried(program: str, **settings: Any) -> Callable[[jax.Array], xr.Dataset]:
    """Data that a program of `models/` carries."""

    def load(key: jax.Array) -> xr.Dataset:
        module = load_file(find(program, "models"))
        return module.load(module.Config(**settings), key=key)

    return load


def whole(data: Callable[[], xr.Dataset]) -> Callable[[jax.Array], xr.Dataset]:
    """A fixed data set, a fifth of it held out."""
    return lambda key: split(data(), test=0.2, key=key)


def drawn(data: Callable[..., xr.Dataset], count: int, **settings: Any) -> Callable[[jax.Array], xr.Dataset]:
    """A data set that is drawn, a fifth of it held out."""
    return lambda key: split(data(key, count, **settings), test=0.2, key=jax.random.fold_in(key, 1))


CASES = {
    "disks 16": Case(drawn(disks, 10_000), 6),
    "disks 32": Case(drawn(disks, 10_000, resolution=32), 6),
    "bars": Case(drawn(bars, 10_000), 4),
    "scenes": Case(drawn(scenes, 10_000, resolution=32), 8),
    "digits": Case(whole(digits), 8),
    "fashion": Case(fashion, 16),
    "patches": Case(carried("images", source="patches"), 16),
    "faces": Case(carried("images", source="faces"), 8),
    "vectors": Case(vectors, 6),
    "spectra": Case(spectra, 6),
    "sea": Case(carried("fields", step=3, least=1.0), 6),
    "heartbeats": Case(carried("signals"), 4),
}

METHODS: dict[str, tuple[dict[str, Any], Any]] = {
    "guided": ({}, None),
    "guided, start=gaussian": ({}, sp.TwoStage(start="gaussian")),
    "conditioned": ({"decoder": "conditioned"}, None),
    "gaussian": ({"decoder": "gaussian"}, None),
}
"""What is fitted: options of `sp.autoencoder`, and the plan, None for the default."""


def prior_of(latents: int) -> Prior:
    """Independent standard normal factors: what makes no use of what is known of the data."""
    return sp.factors(z=dist.Normal(0, 1).expand([latents]), dims={"z": "axis"})


def scores(codes: tuple[np.ndarray, np.ndarray], data: tuple[xr.Dataset, xr.Dataset]) -> dict[str, Any]:
    """What codes tell of known classes and factors: (training, held-out) of each."""
    found: dict[str, Any] = {}
    for name in factor_names(data[0], "class"):
        own = probes(codes, codes, tuple(part[name].values for part in data))
        found[f"knn {name}"], found[f"linear {name}"] = own["knn_sami"], own["linear_sami"]
    if real := [name for name in factor_names(data[0], "real") if name not in ("split",)]:
        train, test = (read_factors(part, real)[0] for part in data)
        found["linear R²"] = linear_r2(codes[0], train, codes[1], test).tolist()
        found["forest R²"] = forest_r2(codes[0][:3000], train[:3000], codes[1], test, seed=0).tolist()
        found["DCI"] = dci(codes[0][:3000], train[:3000], codes[1], test, seed=0).disentanglement
    return found


def components(data: tuple[xr.Dataset, xr.Dataset], latents: int) -> dict[str, Any]:
    """The row of principal components."""
    from sklearn.decomposition import PCA

    start = time.perf_counter()
    train, test = (floats(part).reshape(part.sizes["obs"], -1) for part in data)
    pca = PCA(min(latents, *train.shape), random_state=0).fit(train)
    codes = pca.transform(train), pca.transform(test)
    some = test[:FEW]
    found = {
        "seconds": time.perf_counter() - start,
        "error of mean": float(np.mean((pca.inverse_transform(codes[1][:FEW]) - some) ** 2)),
        "error of mean observation": float(np.mean((train.mean(0) - some) ** 2)),
    }
    return found | scores(codes, data)


def fitted(data: xr.Dataset, latents: int, method: str, seed: int, *, progress: bool) -> dict[str, Any]:
    """The row of a program with default settings."""
    keys = jax.random.split(jax.random.key(seed), 6)
    train, test = train_test(data)
    start = time.perf_counter()
    options, plan = METHODS[method]
    program = sp.autoencoder(prior_of(latents), train, progress=progress, key=keys[0], **options)
    program, _ = sp.fit(program, train, plan, progress=progress, key=keys[1])
    found: dict[str, Any] = {"seconds": time.perf_counter() - start}
    codes = program.encode(train)[0], program.encode(test)[0]
    x = floats(test.isel(obs=slice(FEW)))
    bound = sp.evidence_bound(program, test.isel(obs=slice(DRAWN)), key=keys[2])
    samples = np.stack([sp.generate(program, x=x, key=key) for key in jax.random.split(keys[3], REPEATS)])
    found |= {
        "active axes": int((codes[1].var(0) > 0.05).sum()),
        "variance of codes": float(codes[1].var(0).max()),
        "bound": float(bound["bound"].mean()),
        "KL": float(bound["kl"].sum("site").mean()),
        "error of mean": float(np.mean((samples.mean(0) - x) ** 2)),
        "error of one": float(np.mean((samples[0] - x) ** 2)),
    }
    found |= distances(program, (train, test), keys[4])
    if test["x"].dtype == np.uint8:
        held_out, told = test.isel(obs=slice(DRAWN)), {"": None, ", denoised": train.isel(obs=slice(DRAWN))}
        for name, part in told.items():
            found[f"bits{name}"] = sp.bits_per_dim(program, held_out, key=keys[5], train=part)["mean"]
    found |= scores(codes, (train, test))
    if isinstance(program.encoder, AffineEncoder):
        before = program.replace(encoder=program.encoder.base)
        fitted = sp.evidence_bound(before, test.isel(obs=slice(DRAWN)), key=keys[2])
        found["gauge: bound"] = found["bound"] - float(fitted["bound"].mean())
        if "DCI" in found:
            own = scores((before.encode(train)[0], before.encode(test)[0]), (train, test))
            found["gauge: DCI"] = found["DCI"] - own["DCI"]
    return found


def distances(program: sp.Program, data: tuple[xr.Dataset, xr.Dataset], key: jax.Array) -> dict[str, Any]:
    """Fréchet distances from held-out observations: of three kinds of samples, with standard errors, and of data."""
    keys = jax.random.split(key, 3)
    reference, other = (floats(part.isel(obs=slice(DRAWN))) for part in reversed(data))
    features = random_features()
    seen = features(reference)
    kinds = {
        "own codes": lambda: sp.generate(program, x=reference, key=keys[0]),
        "prior": lambda: sp.generate(program, size=len(reference), key=keys[1]),
        "no code": lambda: sp.generate(program, size=len(reference), guided=False, key=keys[2]),
    }
    if not program.denoiser.marginal:
        del kinds["no code"]
    found: dict[str, Any] = {
        f"Fréchet, {kind}": list(frechet(features(draw()), seen, bootstrap=20)) for kind, draw in kinds.items()
    }
    return found | {"Fréchet, data": frechet(features(other), seen, bootstrap=0).value}


def floats(data: xr.Dataset) -> np.ndarray:
    """Observations as programs take them."""
    x = data["x"].values
    return sp.data.scale_bytes(x, 255) if x.dtype == np.uint8 else x.astype(np.float32)


def shown(rows: dict[str, dict[str, Any]]) -> str:
    """The rows as a table: data set, method, seed, then what was found."""
    head = ("data", "method", "seed", "s", "active", "KL", "bound", "bits", "codes", "error: mean, one",
            "Fréchet: own codes, prior, no code (data)", "gauge: bound, DCI")  # fmt: skip
    lines: list[tuple[str, ...]] = [head]
    for name, row in rows.items():
        number = lambda key, form, row=row: format(row[key], form) if key in row else "–"  # noqa: E731
        told = [f"{k} {v:.3f}" for k, v in row.items() if k.startswith(("knn", "linear ", "DCI")) and "R²" not in k]
        told += [f"{k} {' '.join(f'{v:.2f}' for v in row[k])}" for k in ("linear R²", "forest R²") if k in row]
        away = [
            "{:.3g} ± {:.1g}".format(*row[key]) if (key := f"Fréchet, {kind}") in row else "–"
            for kind in ("own codes", "prior", "no code")
        ]
        lines.append((
            *name.split("/"), number("seconds", ".0f"), number("active axes", "d"), number("KL", ".1f"),
            number("bound", ".1f"), number("bits", ".3f"), ", ".join(told),
            f"{number('error of mean', '.4f')}, {number('error of one', '.4f')}",
            f"{', '.join(away)} ({number('Fréchet, data', '.3g')})",
            f"{number('gauge: bound', '+.1f')}, {number('gauge: DCI', '+.2f')}",
        ))  # fmt: skip
    return table(lines)


def main(arguments: list[str] | None = None) -> None:
    """Fill in the rows that are not there yet, and print all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of panel.json")
    parser.add_argument("--only", nargs="*", default=list(CASES), help=f"data sets, of {', '.join(CASES)}")
    parser.add_argument("--data", nargs="*", default=[], metavar="NAME=FILE", help="further data sets, of 16 latents")
    parser.add_argument("--methods", nargs="*", default=["guided"], help=f"what is fitted, of {', '.join(METHODS)}")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--most", type=int, help="observations for training, at most")
    parser.add_argument("--progress", action="store_true", help="show the fits as they go")
    options = parser.parse_args(arguments)
    cases = {name: CASES[name] for name in options.only}
    for name, _, file in (item.partition("=") for item in options.data):
        cases[name] = Case(lambda key, file=file: split(load_data(file), test=0.2, key=key), 16)
    options.out.mkdir(parents=True, exist_ok=True)
    kept = options.out / "panel.json"
    rows = json.loads(kept.read_text()) if kept.exists() else {}
    for seed in options.seeds:
        for name, case in cases.items():
            try:
                data = case.load(jax.random.key(seed))
            except (FileNotFoundError, ValueError) as error:
                print(f"{name}: left out, {error}")
                continue
            parts = train_test(data)
            if options.most:
                data = xr.concat([parts[0].isel(obs=slice(options.most)), parts[1]], "obs")
                parts = train_test(data)
            for method in ("components", *options.methods):
                label = f"{name}/{method}/{seed}"
                if label in rows:
                    continue
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    rows[label] = (
                        components(parts, case.latents) if method == "components"
                        else fitted(data, case.latents, method, seed, progress=options.progress)
                    )  # fmt: skip
                kept.write_text(json.dumps(rows, indent=1))
                print(shown({label: rows[label]}).split("\n")[1], flush=True)
    print(shown(rows))


if __name__ == "__main__":
    main()
