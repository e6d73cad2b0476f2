"""Proof by force: `python -m benchmarks.torture [--quick] [--only kill,fuzz,...] [--seed N] [--out DIR]`.

What users do to a library without wanting to: processes killed at any moment, inputs and files of every damaged kind,
disks that fill up, folders that cannot be written to, text that looks like code. A trial ends with the right result,
with an error that says what is wrong, or it fails. The table counts them; `failures.json` holds how to repeat each
failure: the same seed makes the same trial.

Seconds with --quick, hours without; the compiled steps are kept as JAX_COMPILATION_CACHE_DIR says.
"""

import argparse
from collections.abc import Callable
import json
from pathlib import Path
import tempfile
import time

from benchmarks import (
    torture_files,
    torture_inputs,
    torture_kills,
    torture_markup,
    torture_places,
    torture_priors,
    torture_words,
)
from benchmarks.torture_trials import Tally
from sami_ppl._util.tables import table

Trials = Callable[[int, Path], list[Tally]]
SHARES = {"arrays": 0.3, "datasets": 0.25, "settings": 0.17, "commands": 0.08, "files": 0.18, "priors": 0.02}
"""Of the fuzzed inputs: a prior takes as long as five hundred arrays."""


def kinds(quick: bool) -> dict[str, Trials]:
    """Name → trials; each takes a seed and a folder to work in."""
    count = 2_000 if quick else 20_000
    fuzz = {
        "arrays": torture_inputs.arrays,
        "datasets": torture_inputs.datasets,
        "settings": torture_words.settings,
        "commands": torture_words.commands,
        "priors": torture_priors.priors,
    }
    found: dict[str, Trials] = {
        name: lambda seed, out, make=make, name=name: [make(round(SHARES[name] * count), seed, out)]
        for name, make in fuzz.items()
    }
    return found | {
        "files": lambda seed, out: torture_files.damaged_files(round(SHARES["files"] * count), seed, out),
        "pickles": lambda seed, out: [torture_markup.pickles(seed, out)],
        "pages": lambda seed, out: [torture_markup.pages(seed, out)],
        "places": lambda seed, out: torture_places.places(quick, seed, out),
        "kill": lambda seed, out: [torture_kills.kills(3 if quick else 100, seed, out)],
    }


def printed(tallies: list[Tally]) -> str:
    """One line for each kind."""
    rows = [("kind", "trials", "right", "clear errors", "failures")]
    rows += [
        (t.kind, f"{t.trials:,}", f"{t.right:,}", f"{t.refused:,}", f"{len(t.failures):,}") for t in tallies
    ]  # fmt: skip
    return table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few trials of each kind")
    parser.add_argument(
        "--only", default="", help="kinds, separated by commas: " + ", ".join(kinds(True)) + "; fuzz for the first"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/torture"))
    arguments = parser.parse_args()
    known = kinds(arguments.quick)
    chosen = [name for name in arguments.only.replace("fuzz", ",".join(SHARES)).split(",") if name]
    if unknown := set(chosen) - set(known):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    tallies: list[Tally] = []
    for name in chosen or known:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="torture") as folder:
            tallies += known[name](arguments.seed, Path(folder).resolve())
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
        for file, content in (("torture", [t.as_dict() for t in tallies]), ("failures", _failures(tallies))):
            (arguments.out / f"{file}.json").write_text(json.dumps(content, indent=1, default=str))
    print(printed(tallies))
    if failed := _failures(tallies):
        raise SystemExit(f"{len(failed)} failures: {arguments.out / 'failures.json'}")


def _failures(tallies: list[Tally]) -> list[dict]:
    return [{"kind": t.kind, **failure} for t in tallies for failure in t.failures]


if __name__ == "__main__":
    main()
