"""The figures of docs/analyses.md for a fit of disks: `python benchmarks/analysis_figures.py runs/disks`.

Runs the page's own blocks. The first one, a small program, is replaced by the fitted program, 4,000 new disks and 200
clips; after each other block its figure is saved as the image that follows it, and what it shows is printed.
"""

from pathlib import Path
import re
import sys

import jax
import numpy as np
import xarray as xr

import sami_ppl as sp
from sami_ppl import analyses
from sami_ppl.data import disks, moving_disks
from sami_ppl.diagnostics import information_spectrum

DOCS = Path(__file__).parents[1] / "docs"


def blocks() -> list[tuple[str, str]]:
    """Every block of code after the first, with the file of the image right below it, "" where there is none."""
    text = (DOCS / "analyses.md").read_text()
    found = re.findall(r"```python\n(.*?)```(?:\n\n!\[[^]]*\]\(([^)]+)\))?", text, flags=re.DOTALL)
    return found[1:]


def main(folder: str, names: list[str]) -> None:
    """All figures, or those whose image has one of `names` in its name."""
    keys = jax.random.split(jax.random.key(0), 12)
    data = disks(keys[3], 4000)
    scope = {
        "np": np, "analyses": analyses, "sp": sp, "information_spectrum": information_spectrum, "keys": keys,
        "program": sp.load(Path(folder) / "model"), "data": data, "x": data.x.values, "several": slice(None),
        "clips": moving_disks(keys[5], 200),
    }  # fmt: skip
    wanted = ""
    for code, image in blocks():
        wanted = image or wanted  # a block without an image goes with the one before
        if names and not any(name in wanted for name in names):
            continue
        before = {name: value for name, value in scope.items() if isinstance(value, xr.Dataset)}
        exec(code, scope)
        if not image:
            continue
        scope["figure"].savefig(DOCS / image, dpi=170)
        print("\n", image, f"{(DOCS / image).stat().st_size / 1000:.0f} kB")
        for name, value in scope.items():
            if isinstance(value, xr.Dataset) and value is not before.get(name) and len(value.dims) < 3:
                print(value.to_dataframe().to_string(max_rows=12))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
