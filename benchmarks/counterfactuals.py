"""Counterfactuals of causal disks against the true ones: `python benchmarks/counterfactuals.py runs/causal_*`.

Each of 64 held-out images is asked what it would be if one of its factors had the value that it has in the next image.
The renderer and the mechanisms are known, so is the answer. One row a run and factor; `--figure FILE` draws the first.
"""

import argparse
import json
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np

from sami_ppl import counterfactual, evidence_bound, load
from sami_ppl.data import fit_disks, render, train_test
from sami_ppl.data.causal_disks import NOISE, mechanisms
from sami_ppl.evidence.elbo import mean_and_error
from sami_ppl.saving import files as programs

SETS = ("centre_x", "centre_y", "background")
OBSERVATIONS, BOUND_OBSERVATIONS = 64, 500
WRONG = 0.2  # root mean square over pixels from which an image counts as another one


def opened(folder: Path):
    """Program file, program and held-out data of a run."""
    description = json.loads((folder / "config.json").read_text())
    module = programs.load_file(folder / "model" / "program.py")
    config = programs.make_config(module.Config, description["settings"]["model"])
    data_key = jax.random.split(jax.random.key(description["seed"]), 4)[0]
    return module, load(folder / "model"), train_test(module.load(config, key=data_key))[1]


def true_counterfactual(data, do):
    """Factors and images with the noises of the data held."""
    noise, value = {}, {name: data[name].values for name in SETS}
    rest = mechanisms(dict.fromkeys(SETS, 0.0), value)
    assert all(np.array_equal(rest[name], value[name]) for name in SETS)
    for name in SETS:
        others = {n: v for n, v in value.items() if n != name}
        noise[name] = (value[name] - mechanisms(dict.fromkeys(SETS, 0.0), others)[name]) / NOISE[name]
    factors = mechanisms(noise, do)
    return factors, np.asarray(render(**factors))


def rms(images, others):
    return np.sqrt(np.mean((images - others) ** 2, axis=(-3, -2, -1)))


def answers(program, data, name):
    """For do(name = its value in the next image): the true images, ours, and their factors."""
    do = {name: np.roll(data[name].values, -1)}
    factors, truth = true_counterfactual(data, do)
    tree = counterfactual(program, data, do, key=jax.random.key(1), draws=1)
    return factors, truth, tree["counterfactual"]["x"].values[0]


def figure(program, data, file, columns=8):
    """Rows: input; do(centre_x), ours and the truth; do(centre_y), ours and the truth."""
    data = data.isel(obs=slice(columns))
    rows = [("input", data["x"].values)]
    for name in ("centre_x", "centre_y"):
        _, truth, ours = answers(program, data, name)
        rows += [(f"do({name})", ours), ("true", truth)]
    fig, axes = plt.subplots(len(rows), columns, figsize=(columns * 0.8 + 1, len(rows) * 0.82), layout="constrained")
    for line, (label, images) in zip(axes, rows, strict=True):
        for ax, image in zip(line, images, strict=True):
            ax.imshow(image[0], vmin=-1, vmax=1, cmap="gray")
            ax.set(xticks=[], yticks=[])
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    fig.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    print("| run | correlation with own factor (largest other) | bound (nats) | weights | given back, rms |")
    print("| run | do | rms to the truth: median, mean | wrong | unchanged | error of centre x, centre y, background |")
    for folder in arguments.folders:
        module, program, test = opened(folder)
        if arguments.figure:
            figure(program, test, arguments.figure)
            return
        corr = np.abs(np.corrcoef(program.encode(test["x"].values)[0].T, [test[n].values for n in SETS])[:3, 3:])
        own, other = corr.max(0), np.sort(corr, 0)[1]
        found = evidence_bound(program, test.isel(obs=slice(BOUND_OBSERVATIONS)), key=jax.random.key(0), levels=8)
        total = "{mean:.1f} ± {se:.1f}".format(**mean_and_error(found["bound"].values))
        weights = {k: round(v, 3) for k, v in module.weights(program).items()} if "causal" in folder.name else "–"
        few = test.isel(obs=slice(OBSERVATIONS))
        print(f"| {folder.name} | {np.round(own, 3)} ({other.max():.2f}), diagonal {np.round(np.diag(corr), 3)} | "
              f"{total} | {weights} |", flush=True)  # fmt: skip
        if program.latents.size != len(program.latents.sites):
            continue
        same = counterfactual(program, few, {}, key=jax.random.key(1), draws=1)["counterfactual"]["x"].values[0]
        back = rms(same, few["x"].values)
        print(f"| {folder.name} | nothing | {np.median(back):.4f}, {back.mean():.4f} |")
        for name in SETS:
            factors, truth, ours = answers(program, few, name)
            error, still = rms(ours, truth), rms(few["x"].values, truth)
            seen = np.asarray(fit_disks(ours)[0])
            off = np.round([np.abs(seen[:, j] - factors[n]).mean() for j, n in enumerate(SETS)], 3)
            print(f"| {folder.name} | {name} | {np.median(error):.3f}, {error.mean():.3f} | "
                  f"{np.mean(error > WRONG):.2f} | {np.median(still):.3f} | {off} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
