"""Fits against each other on held-out observations: what `sami compare` prints and writes.

What is compared is the evidence bound of each observation, β = 1, with the same noise for all fits. It is a lower bound
on log p(x): a difference may lie in the models or in how tight their posteriors make it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import jax
from jaxtyping import Array, Float, Key
import numpy as np
import pandas as pd
import xarray as xr

from sami_ppl.data import check_data, load_data, train_test
from sami_ppl.evidence import evidence_bound, first, importance_proposal
from sami_ppl.program import Program
from sami_ppl.programs import UserError
from sami_ppl.running import open_run

PILOT = 256


def held_out_evidence(
    program: Program,
    data: xr.Dataset | Float[Array | np.ndarray, "obs *event"],
    *,
    key: Key[Array, ""],
    levels: int = 64,
) -> Any:
    """The bound on log p(x) of every observation in nats, as the `ELPDDataLOO` of arviz_stats, which `az.compare` and
    `az.plot_compare` take.
    """
    from arviz_stats.utils import ELPDDataLOO

    pilot_key, bound_key = jax.random.split(key)
    proposal = importance_proposal(program, first(data, PILOT), key=pilot_key)
    each = -evidence_bound(program, data, key=bound_key, levels=levels, proposal=proposal)["bound"]
    values = each.values
    return ELPDDataLOO(
        elpd=float(values.sum()), se=float(values.std(ddof=1) * len(values) ** 0.5), p=np.nan,
        n_samples=levels, n_data_points=len(values), scale="log", warning=False, good_k=0.7, elpd_i=each,
        pareto_k=xr.zeros_like(each),
    )  # fmt: skip


def compare(
    programs: Mapping[str, Program],
    data: xr.Dataset | Array | np.ndarray | dict[str, xr.Dataset],
    *,
    key: Array,
    levels: int = 64,
) -> pd.DataFrame:
    """`az.compare` of programs by their bounds on held-out observations, the best first; differences are paired.

    `data`: the observations, or, where programs take different variables beside them, a dict with a Dataset for each.
    Columns: `elpd`, the bound summed over observations in nats; `elpd_diff` from the best, and `dse`, its standard
    error over observations. Raises ValueError for fewer than two programs, or observations of another shape or that
    are not the same for all.
    """
    import arviz as az

    if len(programs) < 2:
        raise ValueError(f"compare takes at least two programs, got {len(programs)}")
    own = data if isinstance(data, dict) else dict.fromkeys(programs, data)
    seen = {name: program.observations(own[name])[0] for name, program in programs.items()}
    one, *others = seen.values()
    if any(not np.array_equal(one, other, equal_nan=True) for other in others):
        raise ValueError(f"{', '.join(seen)} are compared on one set of observations, but x is not the same for all")
    found = {name: held_out_evidence(p, own[name], key=key, levels=levels) for name, p in programs.items()}
    # Stacking weights exponentiate single observations, whose bounds may lie thousands of nats apart.
    return az.compare(found, method="pseudo-BMA", round_to="none")


def compare_runs(
    folders: list[Path],
    *,
    data: Path | None = None,
    limit: int = 1000,
    levels: int = 64,
    seed: int = 0,
    out: Path | None = None,
) -> str:
    """Compare finished runs on held-out observations of theirs, or on `data`; returns the table as text.

    With `out`, also writes `comparison.json` and `comparison.png` there. Raises UserError for fewer than two runs,
    names that repeat, or runs on other data.
    """
    if len(folders) < 2:
        raise UserError("give at least two folders of finished runs: sami compare runs/a runs/b")
    names = [str(folder).rstrip("/") for folder in folders]
    if len(set(names)) < len(names):
        raise UserError(f"a folder is named twice: {', '.join(names)}")
    given = None if data is None else check_data(load_data(data))
    runs = {name: open_run(Path(name), data=given) for name in names}
    parts = {name: _observations(run.data, limit, whole=data is not None) for name, run in runs.items()}
    held_out = parts[names[0]]
    for name, part in parts.items():
        if not np.array_equal(part["x"].values, held_out["x"].values, equal_nan=True):
            raise UserError(
                f"{name} was fitted to other data than {names[0]}, whose held-out observations it may have been "
                "trained on: give observations that none has seen, --data FILE"
            )
    table = compare({n: r.program for n, r in runs.items()}, parts, key=jax.random.key(seed), levels=levels)
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        (Path(out) / "comparison.json").write_text(table.to_json(orient="index", indent=1) or "")
        _picture(table, Path(out) / "comparison.png")
    return _text(table, held_out.sizes["obs"], levels)


def _observations(data: xr.Dataset, limit: int, *, whole: bool) -> xr.Dataset:
    return first(data if whole or "split" not in data.coords else train_test(data)[1], limit)


def _text(table: pd.DataFrame, count: int, levels: int) -> str:
    width = max(map(len, map(str, table.index)))
    lines = [f"bound on log p(x), nats per observation: {count} held-out observations, {levels} noise levels each"]
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
