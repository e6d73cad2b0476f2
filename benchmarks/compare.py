"""Ours against PyTorch's times: `python -m benchmarks.compare runs/bench/steps.json runs/bench/pytorch.json`.

Ratios below 1: ours is faster. The two were timed in processes of their own, one after the other: run them on a
machine that does nothing else, on the same number of cores. Refuses files of another configuration or machine.
"""

import argparse
import json
from pathlib import Path
from typing import Any


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """A Markdown table: each of PyTorch's variants of each step, and ours over it."""
    rows = {found["case"]: found["steps"] for found in ours["cases"]}
    if theirs["case"] not in rows:
        raise ValueError(f"no configuration {theirs['case']!r} in ours: it holds {', '.join(rows)}")
    for name in ("processor", "cores"):
        if ours["machine"][name] != theirs["machine"][name]:
            raise ValueError(f"{name} differ: {ours['machine'][name]} and {theirs['machine'][name]}")
    if theirs["threads"] != ours["machine"]["cores"]:
        raise ValueError(f"PyTorch ran on {theirs['threads']} threads, ours on {ours['machine']['cores']} cores")
    lines = [f"**{theirs['case']}**; torch {theirs['torch']}, jax {ours['jax']}, {theirs['threads']} threads", ""]
    lines += ["| step | PyTorch, ms | ours, ms | ours / PyTorch |", "|---|---|---|---|"]
    for variant, taken in theirs["steps"].items():
        own = rows[theirs["case"]][variant.split(",")[0]]["seconds"]["median"]
        cells = (variant, f"{1e3 * taken['median']:.1f}", f"{1e3 * own:.1f}", f"{own / taken['median']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ours", type=Path)
    parser.add_argument("theirs", type=Path)
    arguments = parser.parse_args()
    print(compare(*(json.loads(file.read_text()) for file in (arguments.ours, arguments.theirs))))


if __name__ == "__main__":
    main()
