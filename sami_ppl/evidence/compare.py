"""Fits against each other on held-out observations: what `sami compare` prints and writes.

What is compared is the evidence bound of each observation, β = 1, with the same noise for all fits. It is a lower bound
on log p(x): a difference may lie in the models or in how tight their posteriors make it.
"""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Float, Key
import numpy as np
import pandas as pd
import xarray as xr

from sami_ppl._util.keys import check_key
from sami_ppl.evidence import evidence_bound
from sami_ppl.program.program import Program


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
    check_key(key)
    from arviz_stats.utils import ELPDDataLOO

    bound = -evidence_bound(program, data, key=key, levels=levels, proposal="fitted")["bound"]
    values = bound.values
    return ELPDDataLOO(
        elpd=float(values.sum()), se=float(values.std(ddof=1) * len(values) ** 0.5), p=np.nan,
        n_samples=levels, n_data_points=len(values), scale="log", warning=False, good_k=0.7, elpd_i=bound,
        pareto_k=xr.zeros_like(bound),
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
    check_key(key)
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
