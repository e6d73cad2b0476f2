"""What encoders start from, on every data set of the panel: `python -m benchmarks.starts [--seeds 0 1 2]`.

For each data set: how many axes carry a component of blurred observations, the blur's width in units of the image's
side, and the share of held-out variance that nearest neighbours of the codes tell, of these and of components of as
many axes without blur. No network is fitted; it takes a minute.
"""

import argparse

import jax
import numpy as np

from benchmarks.panel import CASES, floats
from sami_ppl._util.tables import table
from sami_ppl.data import train_test
from sami_ppl.fitting.components import SOME, low_pass_codes, predicted, start_codes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--only", nargs="*", default=list(CASES), help=f"data sets, of {', '.join(CASES)}")
    options = parser.parse_args()
    rows = [("data", "axes", "seed", "carry a component", "blur", "told", "told without blur, all axes")]
    for name in options.only:
        for seed in options.seeds:
            try:
                train = train_test(CASES[name].load(jax.random.key(seed)))[0]
            except (FileNotFoundError, ValueError) as error:
                print(f"{name}: left out, {error}")
                break
            x, latents = floats(train), CASES[name].latents
            codes, count, width = start_codes(x, latents, seed=seed)
            some = np.random.default_rng(seed).permutation(len(x))[:SOME]
            flat = x[some].reshape(len(some), -1)
            told = predicted(codes[some, :count], flat)
            sharp = predicted(low_pass_codes(x[some], latents, width=0.0), flat)
            rows.append((name, str(latents), str(seed), str(count), f"{width:g}", f"{told:.3f}", f"{sharp:.3f}"))
    print(table(rows))


if __name__ == "__main__":
    main()
