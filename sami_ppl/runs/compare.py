"""Finished runs against each other: what `sami compare` prints and writes."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import xarray as xr

from sami_ppl._util.errors import UserError
from sami_ppl._util.progress import phase, telling
from sami_ppl.data import train_test
from sami_ppl.evidence import first
from sami_ppl.evidence.compare import compare
from sami_ppl.runs.reading import read_as, read_data
from sami_ppl.runs.run import open_run
from sami_ppl.runs.settings import seed_key


def compare_runs(
    folders: list[Path],
    *,
    data: Path | None = None,
    limit: int = 1000,
    levels: int = 64,
    seed: int = 0,
    out: Path | None = None,
    progress: bool = False,
) -> str:
    """Compare finished runs on held-out observations of theirs, or on `data`; returns the table as text.

    With `out`, also writes `comparison.json` and `comparison.png` there. `progress`: say on stderr what is done.

    Raises UserError for fewer than two runs, names that repeat, or runs on other data.
    """
    if len(folders) < 2:
        raise UserError("give at least two folders of finished runs")
    names = [str(folder).rstrip("/") for folder in folders]
    if len(set(names)) < len(names):
        raise UserError(f"a folder is named twice: {', '.join(names)}")
    given = None if data is None else read_data(data, **read_as(folders[0]))
    runs = {name: open_run(Path(name), data=given) for name in names}
    parts = {name: _observations(run.data, limit, whole=data is not None) for name, run in runs.items()}
    held_out = parts[names[0]]
    for name, part in parts.items():
        if not np.array_equal(part["x"].values, held_out["x"].values, equal_nan=True):
            raise UserError(
                f"{name} was fitted to other data than {names[0]}, whose held-out observations it may have been "
                "trained on: give observations that none has seen, data=FILE"
            )
    with telling(progress), phase(f"bounds of {held_out.sizes['obs']:,} observations under {len(runs)} programs"):
        table = compare({n: r.program for n, r in runs.items()}, parts, key=seed_key(seed), levels=levels)
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        (Path(out) / "comparison.json").write_text(table.to_json(orient="index", indent=1) or "")
        _picture(table, Path(out) / "comparison.png")
    return _text(table, held_out.sizes["obs"], levels)


def _observations(data: xr.Dataset, limit: int, *, whole: bool) -> xr.Dataset:
    return first(data if whole or "split" not in data.coords else train_test(data)[1], limit)


def _text(table: pd.DataFrame, count: int, levels: int) -> str:
    width = max(map(len, map(str, table.index)))
    lines = [f"elpd, log p(x) ≥ elpd, nats per observation: {count} held-out observations, {levels} noise levels each"]
    for name, row in table.iterrows():
        behind, error = (abs(cast(float, row[column])) / count for column in ("elpd_diff", "dse"))
        gap = f"   {behind:.3f} ± {error:.3f} below the best" if name != table.index[0] else ""
        lines.append(f"  {name!s:<{width}}  {row['elpd'] / count:>10.3f}{gap}")
    return "\n".join(lines)


def _picture(table: pd.DataFrame, file: Path) -> None:
    import arviz as az
    import matplotlib.pyplot as plt

    plot: Any = az.plot_compare(table, backend="matplotlib")
    figure = plot.viz["figure"].item()
    figure.axes[0].set(
        title="Evidence bound of held-out observations", xlabel="nats below the best, summed (higher is better)"
    )
    figure.savefig(file, dpi=150, bbox_inches="tight")
    plt.close(figure)
