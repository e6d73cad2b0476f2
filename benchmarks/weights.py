"""What the weighting of noise levels does to what a code tells: `python -m benchmarks.weights --out FOLDER`.

For each data set one denoiser and one warm start; then encoders by w = exp(−c max(λ, 0)) at several c, all else equal
(β = .1). What is reported of held-out observations: the bound at w = 1 and its KL, in nats, and what classifiers or
regressions make of the code, beside principal components. Rows are kept in FOLDER/weights.json as they come, and not
made again; `--figure FILE` draws them.

Before that, what theory has to say: the gain of guidance, weighted and integrated over noise levels, that one direction
of variance v brings to a code which knows it, of a Gaussian, in nats (`worth`).
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
from scipy.integrate import quad

from benchmarks.panel import CASES, DRAWN, components, prior_of, scores
import sami_ppl as sp
from sami_ppl._util.tables import table
from sami_ppl.data import train_test

DISCOUNTS = (0.0, 0.5, 1.0, 2.0)
BETA = 0.1


def worth(variance: float, discount: float, end: float = 6.0) -> float:
    """∫ w(λ) ½ v e^λ / (1 + v e^λ) dλ over [−end, end]: as the information of x_λ on a Gaussian direction grows."""
    gain = lambda level: 0.5 * variance * np.exp(level) / (1 + variance * np.exp(level))  # noqa: E731
    return quad(lambda level: np.exp(-discount * max(level, 0)) * gain(level), -end, end, points=[0])[0]


def rows_of(name: str, seed: int, rows: dict[str, dict[str, Any]], kept: Path) -> None:
    """Fill in the rows of one data set and seed that are not there yet."""
    labels = {c: f"{name}/{seed}/{c:g}" for c in DISCOUNTS}
    if all(label in rows for label in labels.values()):
        return
    keys = jax.random.split(jax.random.key(seed), 5)
    parts = train_test(CASES[name].load(jax.random.key(seed)))
    train, test = parts
    latents = CASES[name].latents
    rows[f"{name}/{seed}/components"] = components(parts, latents)
    program = sp.autoencoder(prior_of(latents), train, progress=False, key=keys[0])
    # The denoiser alone is wanted: the encoder's own stage is a single step here.
    alone = sp.TwoStage(encoder=sp.Sized(steps=1), warm_steps=0, align=False)
    program, _ = sp.fit(program, train, alone, progress=False, key=keys[1])
    program = sp.warm_start(program, train, progress=False, key=keys[2])
    for discount, label in labels.items():
        plan = sp.EncoderOnly(sp.Sized(discount=discount, beta=BETA), warm_steps=0)
        fitted, _ = sp.fit(program, train, plan, progress=False, key=keys[3])
        bound = sp.evidence_bound(fitted, test.isel(obs=slice(DRAWN)), key=keys[4])
        rows[label] = {
            "bound": float(bound["bound"].mean()),
            "KL": float(bound["kl"].sum("site").mean()),
            **scores((fitted.encode(train)[0], fitted.encode(test)[0]), parts),
        }
        kept.write_text(json.dumps(rows, indent=1))
        print(label, rows[label], flush=True)


def told(row: dict[str, Any]) -> dict[str, float]:
    """The scores of a code by name, those of several factors averaged."""
    found = {"neighbours": [v for k, v in row.items() if k.startswith("knn")]}
    found["linear"] = [v for k, v in row.items() if k.startswith("linear ") and "R²" not in k]
    found |= {"forest R²": row.get("forest R²", []), "linear R²": row.get("linear R²", []), "DCI": [row.get("DCI")]}
    return {k: float(np.mean(v)) for k, v in found.items() if v and v[0] is not None}


def draw(rows: dict[str, dict[str, Any]], file: Path) -> None:
    """Scores and bound against the discount, a column for each data set; dots are seeds, lines their means."""
    names = list(dict.fromkeys(label.split("/")[0] for label in rows))
    fig, axes = plt.subplots(2, len(names), figsize=(2.9 * len(names), 4.6), sharex=True, squeeze=False)
    for column, name in enumerate(names):
        own = {label: row for label, row in rows.items() if label.split("/")[0] == name}
        of = lambda c, own=own: [row for label, row in own.items() if label.split("/")[2] == c]  # noqa: E731
        above, below = axes[:, column]
        for colour, score in zip(("tab:blue", "tab:orange", "tab:green"), told(of("0")[0]), strict=False):
            values = [[told(row)[score] for row in of(f"{c:g}")] for c in DISCOUNTS]
            above.plot(DISCOUNTS, [np.mean(v) for v in values], color=colour, label=score)
            for c, v in zip(DISCOUNTS, values, strict=True):
                above.plot([c] * len(v), v, ".", color=colour, ms=5)
            peer = [told(row)[score] for row in of("components")]
            above.axhline(np.mean(peer), color=colour, ls=":", lw=1)
        bounds = [[row["bound"] for row in of(f"{c:g}")] for c in DISCOUNTS]
        below.plot(DISCOUNTS, [np.mean(v) for v in bounds], color="black")
        for c, v in zip(DISCOUNTS, bounds, strict=True):
            below.plot([c] * len(v), v, ".", color="black", ms=5)
        above.set_title(name)
        above.legend(fontsize=7, frameon=False)
        below.set_xlabel("discount c")
    axes[0, 0].set_ylabel("score (dotted: components)")
    axes[1, 0].set_ylabel("bound on −log p(x), nats")
    fig.tight_layout()
    fig.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of weights.json")
    parser.add_argument("--only", nargs="*", default=["disks 16", "digits", "faces", "fashion"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--figure", type=Path, help="file of the figure")
    options = parser.parse_args()
    directions = (1.0, 0.1, 0.01, 0.001)
    worths = [(f"{c:g}", *(f"{worth(v, c):.3f}" for v in directions)) for c in DISCOUNTS]
    print(table([("c", *(f"v = {v:g}" for v in directions)), *worths]), "\n")
    options.out.mkdir(parents=True, exist_ok=True)
    kept = options.out / "weights.json"
    rows = json.loads(kept.read_text()) if kept.exists() else {}
    for name in options.only:
        for seed in options.seeds:
            try:
                rows_of(name, seed, rows, kept)
            except FileNotFoundError as error:
                print(f"{name}: left out, {error}")
    shown = [("data", "seed", "c", "bound", "KL", "scores")]
    for label, row in rows.items():
        number = lambda key, row=row: f"{row[key]:.1f}" if key in row else "–"  # noqa: E731
        scored = ", ".join(f"{k} {v:.3f}" for k, v in told(row).items())
        shown.append((*label.split("/"), number("bound"), number("KL"), scored))  # type: ignore[arg-type]
    print(table(shown))
    if options.figure:
        draw(rows, options.figure)


if __name__ == "__main__":
    main()
