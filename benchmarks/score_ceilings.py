"""What DCI and MIG a perfect code of disks has, and one with noise: `python -m benchmarks.score_ceilings`.

Codes are the true factors, standardised, plus independent Gaussian noise, beside three idle axes; 5,000 images to fit
the forests and 2,500 to score, as in every run. They say how much of what a fit misses is noise rather than rotation.
"""

import argparse

import jax
import numpy as np

from sami_ppl.data import disks
from sami_ppl.metrics.disentanglement import dci, mig

FACTORS = ("centre_x", "centre_y", "background")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noise", type=float, nargs="+", default=[0.0, 0.03, 0.1, 0.14])
    asked = parser.parse_args()
    data = disks(jax.random.key(0), 7500, resolution=4)
    factors = np.stack([data[name].values for name in FACTORS], 1)
    standard = (factors - factors.mean(0)) / factors.std(0)
    rng = np.random.default_rng(0)
    print("| noise, standard deviations | correlation | DCI | MIG |\n|---|---|---|---|")
    for noise in asked.noise:
        code = np.hstack([standard + noise * rng.normal(size=standard.shape), 0.05 * rng.normal(size=standard.shape)])
        found = dci(code[:5000], factors[:5000], code[5000:], factors[5000:], seed=0).disentanglement
        corr = 1 / (1 + noise**2) ** 0.5
        print(f"| {noise:g} | {corr:.3f} | {found:.3f} | {mig(code[5000:], factors[5000:]):.2f} |", flush=True)


if __name__ == "__main__":
    main()
