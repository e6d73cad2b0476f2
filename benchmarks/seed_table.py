"""Tables of several runs, as Markdown: `python benchmarks/seed_table.py runs/disks_*`.

One row a run, from its metrics.json; failures stay in the table.
"""

import json
from pathlib import Path
import sys

import numpy as np


def row(folder: Path) -> list[str]:
    metrics = json.loads((folder / "metrics.json").read_text())
    factors = list(metrics["forest_r2"])
    corr = np.abs(np.array(metrics["corr"]["values"]))
    best = corr.argmax(0)
    off = max(np.delete(corr[axis], j).max() for j, axis in enumerate(best))
    samples = metrics["samples"]
    raw = metrics.get("raw", {}).get("dci_disentanglement")
    cells = [
        folder.name,
        " ".join(f"{metrics['forest_r2'][f]:.3f}" for f in factors),
        " ".join(f"{metrics['linear_r2'][f]:.3f}" for f in factors),
        " ".join(f"{corr[best[j], j]:.3f}" for j in range(len(factors))) + f" ({off:.2f})",
        f"{metrics['dci_disentanglement']:.3f} ({'–' if raw is None else f'{raw:.2f}'}, "
        f"{metrics['rotated_control']['dci_disentanglement']:.2f})",
        f"{metrics['mig']:.2f}",
        str(metrics["active_latents"]),
        " ".join(f"{v:.2f}" for v in metrics["kl_nats"].values()),
        f"{samples['mse_own']:.4f} / {samples['mse_mean_image']:.3f} / {samples['mse_other']:.3f}",
        " ".join(f"{v:.3f}" for v in samples.get("reencoded_factor_corr", {}).values()),
        " / ".join(f"{samples[f'rms_{kind}']['median']:.3f}" for kind in ("conditional", "unconditional")),
        f"{metrics['bound_nats']['mean']:.1f} ± {metrics['bound_nats']['se']:.1f}",
        f"{metrics['seconds']['total']:.0f}",
    ]
    return cells


HEADER = [
    "run", "forest R²", "linear R²", "own-axis corr (largest other)", "DCI (before gauge, rotated)", "MIG", "active",
    "KL per axis", "squared error of samples: own / mean image / another", "re-encoded factors corr",
    "rms to nearest disk: given z / free", "bound (nats)", "seconds",
]  # fmt: skip


def main(folders: list[str]) -> None:
    print("| " + " | ".join(HEADER) + " |")
    print("|" + "---|" * len(HEADER))
    for folder in folders:
        print("| " + " | ".join(row(Path(folder))) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
