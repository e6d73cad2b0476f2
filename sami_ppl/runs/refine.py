"""Posteriors of single observations of a finished run, refined: what `sami refine` writes and prints."""

from pathlib import Path
from typing import Any

import arviz as az
import xarray as xr

from sami_ppl._util.errors import UserError
from sami_ppl._util.progress import phase, telling
from sami_ppl.calibration import pictures
from sami_ppl.data import train_test
from sami_ppl.posteriors import save_tree
from sami_ppl.refinement import nuts, svi
from sami_ppl.runs.reading import read_as, read_data
from sami_ppl.runs.run import check_at_least, open_run, write_json
from sami_ppl.runs.settings import seed_key

METHODS = {"nuts": nuts, "svi": svi}


def refine_run(
    out: Path,
    obs: str = "0,1,2,3",
    method: str = "nuts",
    *,
    data: Path | None = None,
    draws: int = 500,
    levels: int = 64,
    seed: int = 0,
    progress: bool = False,
) -> str:
    """Refine the posteriors of observations of a finished run; writes `refinement/` in its folder, returns a table.

    `obs`: positions among the run's test part, or among `data`, separated by commas. `refinement/<method>.nc` is the
    tree of `refinement.nuts` or `refinement.svi`, beside it its agreement with the amortised posterior as JSON and as a
    picture.

    Raises UserError for an unknown method, positions that are not there, data or a program that cannot be refined, and
    where the folder holds no finished run.
    """
    if method not in METHODS:
        raise UserError(f"method={method}: refinement is by {' or '.join(METHODS)}")
    check_at_least(2, draws=draws, levels=levels)
    with telling(progress), phase(f"opening {out}"):
        run = open_run(Path(out), data=None if data is None else read_data(data, **read_as(out)))
    part = train_test(run.data)[1] if "split" in run.data.coords and data is None else run.data
    chosen = _positions(obs, part.sizes["obs"])
    part = part.isel(obs=chosen).assign_coords(obs=chosen)
    tree = METHODS[method](run.program, part, key=seed_key(seed), draws=draws, levels=levels, progress=progress)
    found = tree["agreement"].to_dataset()
    folder = Path(out) / "refinement"
    folder.mkdir(exist_ok=True)
    save_tree(tree, folder / f"{method}.nc")
    plain = {str(name): v.values.tolist() for name, v in {**found.coords, **found.data_vars}.items()}
    write_json(folder / f"{method}.json", {"levels": levels, "seed": seed, **plain})
    axes, labels = ([str(value) for value in found[name].values] for name in ("axis", "obs"))
    figure = pictures.agreement(found["mean_shift"].values, found["sd_ratio"].values, axes, labels)
    figure.savefig(folder / f"{method}.png", dpi=150)
    return f"{describe(tree, method)}\nfigures: {folder}"


def _positions(obs: str, count: int) -> list[int]:
    try:
        chosen = [int(part) for part in obs.split(",")]
    except ValueError as error:
        raise UserError(f"obs={obs}: write positions separated by commas, for instance obs=0,1,2") from error
    if wrong := [one for one in chosen if not 0 <= one < count]:
        raise UserError(f"obs={obs}: there are {count} observations, 0 to {count - 1}, but no {wrong[0]}")
    if len(set(chosen)) < len(chosen):
        raise UserError(f"obs={obs}: an observation is named twice")
    return chosen


def describe(tree: xr.DataTree, method: str) -> str:
    """The agreement of refined and amortised posteriors as text, a line for each observation."""
    found = tree["agreement"].to_dataset()
    columns = "".join(f"{axis!s:>16}" for axis in found["axis"].values)
    lines = [
        f"{method} beside the amortised posterior, {tree.attrs['noise_levels']} noise levels: shift of the mean in "
        "amortised standard deviations, ratio of standard deviations",
        f"  {'obs':<6}{columns}{'gain, nats':>18}",
    ]
    for name in found["obs"].values:
        row: Any = found.sel(obs=name)
        pairs = zip(row["mean_shift"].values, row["sd_ratio"].values, strict=True)
        told = "".join(f"{f'{shift:+.2f} ×{ratio:.2f}':>16}" for shift, ratio in pairs)
        gain = f"{float(row['gain']):+.2f} ± {float(row['gain_se']):.2f}"
        lines.append(f"  {name:<6}{told}{gain:>18}".replace("-", "−"))
    if "sample_stats" in tree.children:
        stats = tree["sample_stats"].to_dataset()
        rhat = float(az.rhat(tree, group="unconstrained_posterior")["code"].max())
        lines.append(
            f"divergences {int(stats['diverging'].sum())} of {stats['diverging'].size}; "
            f"{float(stats['n_steps'].mean()):.1f} steps a draw; r̂ {rhat:.3f} at most"
        )
    return "\n".join(lines)
