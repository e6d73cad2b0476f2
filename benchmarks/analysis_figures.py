"""The figures of docs/analyses.md, docs/digits.md and docs/posterior.md, of fits.

    python benchmarks/analysis_figures.py runs/disks
    python benchmarks/analysis_figures.py runs/digits --page digits
    python benchmarks/analysis_figures.py runs/disks forest pair ppc ecdf compare gap --page posterior --others runs/h10
    python benchmarks/analysis_figures.py runs/disks restarts --page posterior --others runs/disks runs/disks_1

Runs the page's own blocks. The first one, with small programs, is replaced by the fitted ones and more data: 4,000 new
disks and 200 clips, all digits; after each other block its figure is saved as the image that follows it, and what it
shows is printed.
"""

import argparse
from pathlib import Path
import re
import tempfile

import jax
import numpy as np
import xarray as xr

import sami_ppl as sp
from sami_ppl import analyses
from sami_ppl.data import digits, disks, moving_disks
from sami_ppl.diagnostics import information_spectrum
from sami_ppl.posteriors import save_tree

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page: str) -> list[tuple[str, str]]:
    """Every block of code after the first, with the file of the image right below it, "" where there is none."""
    text = (DOCS / f"{page}.md").read_text()
    found = re.findall(r"```python\n(.*?)```(?:\n\n!\[[^]]*\]\(([^)]+)\))?", text, flags=re.DOTALL)
    return found[1:]


def start(page: str, folder: str, others: list[str], aside: Path) -> dict:
    """What the first block of a page makes, of fitted programs."""
    keys = jax.random.split(jax.random.key(0), 12)
    scope = {
        "np": np, "analyses": analyses, "sp": sp, "information_spectrum": information_spectrum, "keys": keys,
        "program": sp.load(Path(folder) / "model"), "others": [sp.load(Path(other) / "model") for other in others],
    }  # fmt: skip
    if page == "analyses":
        data = disks(keys[3], 4000)
        return scope | {"data": data, "x": data.x.values, "several": slice(None), "clips": moving_disks(keys[5], 200)}
    if page == "digits":
        return scope | {"data": digits(), "several": slice(None)}
    data = disks(keys[0], 64)
    save_tree(scope["program"].posterior(data, key=keys[2]), aside / "posterior.nc")
    return scope | {"data": data, "few": slice(6), "simulations": 200, "folder": aside}


def main(page: str, folder: str, others: list[str], names: list[str]) -> None:
    """All figures, or those whose image has one of `names` in its name."""
    with tempfile.TemporaryDirectory() as aside:
        draw(page, start(page, folder, others, Path(aside)), names)


def draw(page: str, scope: dict, names: list[str]) -> None:
    """Run the blocks of a page and save their figures."""
    wanted = ""
    for code, image in blocks(page):
        wanted = image or wanted  # a block without an image goes with the one before
        if names and wanted and not any(name in wanted for name in names):
            continue
        before = {name: value for name, value in scope.items() if isinstance(value, xr.Dataset)}
        exec(code, scope)
        if not image:
            continue
        options = {"dpi": 170} if page != "posterior" else {"dpi": 100, "bbox_inches": "tight"}
        scope["figure"].savefig(DOCS / image, **options)
        print("\n", image, f"{(DOCS / image).stat().st_size / 1000:.0f} kB")
        for name, value in scope.items():
            if isinstance(value, xr.Dataset) and value is not before.get(name) and len(value.dims) < 3:
                print(value.to_dataframe().to_string(max_rows=12))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a finished run of disks or digits")
    parser.add_argument("names", nargs="*", help="parts of names of images; default, all")
    parser.add_argument("--page", choices=("analyses", "digits", "posterior"), default="analyses")
    parser.add_argument("--others", nargs="*", default=[], help="further runs, for the page posterior")
    arguments = parser.parse_args()
    main(arguments.page, arguments.folder, arguments.others, arguments.names)
