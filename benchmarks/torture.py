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

from benchmarks.torture_trials import Tally
from sami_ppl._util.tables import table


def kinds(quick: bool) -> dict[str, Callable[[int, Path], list[Tally]]]:
    """Name → trials; each takes a seed and a folder to work in."""
    from benchmarks.torture_kills import kills

    return {
        "kill": lambda seed, out: [kills(2 if quick else 100, seed, out)],
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
    parser.add_argument("--only", default="", help="kinds, separated by commas: " + ", ".join(kinds(True)))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/torture"))
    arguments = parser.parse_args()
    chosen, known = [name for name in arguments.only.split(",") if name], kinds(arguments.quick)
    if unknown := set(chosen) - set(known):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    tallies: list[Tally] = []
    for name in chosen or known:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="torture") as folder:
            tallies += known[name](arguments.seed, Path(folder))
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
