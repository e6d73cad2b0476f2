"""Whether the posterior of a finished run can be believed: what `sami calibrate` writes and prints."""

import json
from pathlib import Path
from typing import Any

import arviz as az
import jax
from matplotlib.figure import Figure
import matplotlib.pyplot as plt
import numpy as np
import xarray as xr

from sami_ppl._util.errors import UserError, mistakes
from sami_ppl._util.progress import phase, telling
from sami_ppl.calibration import (
    calibration_table,
    describe,
    describe_checks,
    factor_recovery,
    pictures,
    predictive_checks,
    simulation_based_calibration,
    typicality,
)
from sami_ppl.data import real_factors, split, train_test
from sami_ppl.data.checks import check_shape
from sami_ppl.diagnostics import consistency
from sami_ppl.diagnostics.verdict import fit_warnings, verdict
from sami_ppl.evidence import first, importance_weighted_bound
from sami_ppl.plots import COLOURS
from sami_ppl.posteriors import save_tree
from sami_ppl.program.program import Program
from sami_ppl.runs.reading import read_as, read_data
from sami_ppl.runs.run import Finished, check_at_least, open_run, report, write_json
from sami_ppl.runs.settings import seed_key

TRAIN, REFERENCE, ODD = 5000, 1000, 0.01


def calibrate_run(
    out: Path,
    *,
    data: Path | None = None,
    simulations: int = 512,
    draws: int = 200,
    limit: int = 500,
    weighted: int = 32,
    predictive: int = 64,
    seed: int = 0,
    progress: bool = False,
) -> str:
    """Calibrate a finished run, write `calibration/` in its folder, and return the tables as text.

    `calibration.nc` holds the ranks and moments of the simulations, the table made of them, `consistency` of noisy
    posteriors, the recovery of true factors where there are any, and of each observation its bound, how typical that
    is, and Pareto k̂; `predictive.nc` the checks of the first `predictive` observations beside draws of the program.
    Observations are the run's test part, beside its training part; with `data`, those, beside the run's test part.

    Raises UserError where the folder holds no finished run, an option is out of range, or the data do not fit the
    program.
    """
    with telling(progress):
        return _calibrate(
            Path(out), data=data, simulations=simulations, draws=draws, limit=limit, weighted=weighted,
            predictive=predictive, seed=seed,
        )  # fmt: skip


def _calibrate(
    out: Path, *, data: Path | None, simulations: int, draws: int, limit: int, weighted: int, predictive: int, seed: int
) -> str:
    check_at_least(20, simulations=simulations)
    check_at_least(2, draws=draws, limit=limit)
    check_at_least(0, weighted=weighted, predictive=predictive)
    with phase(f"opening {out}"):
        run = open_run(out)
    program = run.program
    train, test = train_test(run.data if "split" in run.data.coords else split(run.data, key=run.key))
    observed, reference = test, train
    if data is not None:
        observed, reference = program.laid_out(read_data(data, **read_as(out))), test
        with mistakes(ValueError):
            check_shape(observed, event_shape=program.event_shape)
    rank_key, factor_key, typical_key, weight_key = jax.random.split(seed_key(seed), 4)
    consistency_key, predictive_key = jax.random.split(jax.random.fold_in(seed_key(seed), 1))

    tree = simulation_based_calibration(program, key=rank_key, simulations=simulations, draws=draws)
    found = calibration_table(tree)
    tree["table"] = xr.DataTree(found)
    lines = [describe(found)]
    figures: dict[str, Any] = {"calibration": _plain(found) | found.attrs}

    if program.guided:
        with phase("consistency of the noisy posteriors"):
            agreed = consistency(program, first(test, limit), key=consistency_key)
        tree["consistency"] = xr.DataTree(agreed)
        lines.append(_consistency_line(agreed))
        figures["consistency"] = _plain(agreed) | agreed.attrs

    cut = [part.isel(obs=slice(count)) for part, count in ((train, TRAIN), (test, limit))]
    if real_factors(*reversed(cut)):
        with phase("recovery of the true factors"):
            recovered = factor_recovery(program, *cut, key=factor_key)
        tree["factors"] = xr.DataTree(recovered)
        lines.append(_factor_lines(recovered))
        figures["factors"] = _plain(recovered.drop_dims("obs")) | recovered.attrs

    observed = first(observed, limit)
    with phase(f"how typical {observed.sizes['obs']:,} observations are"):
        each = typicality(program, observed, first(reference, REFERENCE), key=typical_key)
    if weighted:
        with phase(f"importance weights of {min(weighted, observed.sizes['obs']):,} observations"):
            weights = _weights(program, first(observed, weighted), key=weight_key)
        each = each.merge(weights.reindex(obs=range(observed.sizes["obs"])))
    tree["observations"] = xr.DataTree(each)
    figures["observations"] = _observation_figures(each)
    lines.append(_observation_lines(figures["observations"], "training" if data is None else "held-out"))

    folder = out / "calibration"
    folder.mkdir(exist_ok=True)
    checked = None
    if predictive:
        try:
            with phase(f"predictive checks of {min(predictive, observed.sizes['obs']):,} observations"):
                checked = predictive_checks(program, first(observed, predictive), key=predictive_key)
        except (
            UserError
        ) as error:  # too few observations, or samples that are not finite: the rest is told all the same
            lines.append(f"no predictive checks: {error}")
    if checked is not None:
        lines.append(describe_checks(checked))
        table = checked["checks"].to_dataset()
        figures["predictive"] = _plain(table) | table.attrs
        save_tree(checked, folder / "predictive.nc")
    write_json(folder / "calibration.json", figures)
    save_tree(tree, folder / "calibration.nc")
    with phase("drawing"):
        _pictures(tree, checked, folder)
    _bring_up_to_date(out, run, found)
    return "\n".join([*lines, f"figures: {folder}"])


def _bring_up_to_date(out: Path, run: Finished, found: xr.Dataset) -> None:
    """Verdict and report, with what more simulations say than those of the run."""
    metrics = json.loads((out / "metrics.json").read_text())
    verdicts = {str(axis): str(found["verdict"].sel(axis=axis).item()) for axis in found["axis"].values}
    metrics["calibration"] = {
        "simulations": int(found.attrs["simulations"]), "false_alarm": found.attrs["false_alarm"], "verdict": verdicts,
        "calibrated": set(verdicts.values()) == {"calibrated"},
    }  # fmt: skip
    program = run.program.single(run.data)[0]
    metrics["warnings"] = fit_warnings(metrics, {s.name: program.latents.axes[s.code] for s in program.latents.sites})
    metrics["verdict"] = verdict(metrics)
    write_json(out / "metrics.json", metrics)
    report(out, data=run.data)


def _weights(program: Program, data: xr.Dataset, *, key: jax.Array) -> xr.Dataset:
    weights = importance_weighted_bound(program, data, key=key, proposal="fitted")
    return weights[["pareto_k", "ess", "weight_noise"]].assign_coords(obs=range(data.sizes["obs"]))


def _observation_figures(judged: xr.Dataset) -> dict[str, Any]:
    level = max(ODD, 2 / (judged.attrs["reference"] + 1))  # no p-value is smaller
    odd = np.flatnonzero(judged["p_value"].values <= level)
    figures: dict[str, Any] = {
        "observations": judged.sizes["obs"], "reference": judged.attrs["reference"], "odd_level": level,
        "median_bound": float(judged["bound"].median()), "odd": odd[np.argsort(judged["p_value"].values[odd])].tolist(),
    }  # fmt: skip
    if "pareto_k" in judged:
        k = judged["pareto_k"].dropna("obs")
        figures |= {
            "weighted": len(k), "pareto_k_median": float(k.median()), "pareto_k_above_07": float((k > 0.7).mean()),
            "weight_noise": float(judged["weight_noise"].mean()),
        }  # fmt: skip
    return figures


def _observation_lines(figures: dict[str, Any], beside: str) -> str:
    count, odd = figures["observations"], figures["odd"]
    shown = ", ".join(map(str, odd[:8])) + (", …" if len(odd) > 8 else "")
    lines = [
        f"{count} observations beside {figures['reference']} {beside} ones: the bounds of {len(odd)} are among the "
        f"{100 * figures['odd_level']:.2g}% most unusual; {figures['odd_level'] * count:.0f} would be by chance"
        + (f" (obs {shown})" if odd else "")
    ]
    if "weighted" in figures:
        lines.append(
            f"Pareto k̂ of the importance weights of {figures['weighted']} of them: median "
            f"{figures['pareto_k_median']:.2f}, above .7 for {figures['pareto_k_above_07']:.0%}; variance of log "
            f"weights owed to noise {figures['weight_noise']:.2f} nats²"
        )
    return "\n".join(lines)


def _consistency_line(agreed: xr.Dataset) -> str:
    worst = agreed.isel(log_snr=int(np.abs(agreed["gap"].values).argmax()))
    return (
        f"noisy posteriors beside the guide: they disagree at {int(agreed['flagged'].sum())} of "
        f"{agreed.sizes['log_snr']} noise levels (false alarms {100 * agreed.attrs['false_alarm']:g}%); the largest "
        f"gap is {float(worst['gap']):.2f} ± {float(worst['gap_se']):.2f} nats, at λ = {float(worst['log_snr']):.1f}"
    ).replace("-", "−")


def _factor_lines(recovery: xr.Dataset) -> str:
    levels = ", ".join(f"{level:.0%}" for level in recovery["level"].values)
    width = max(len(str(name)) for name in recovery["factor"].values)
    lines = [
        "true factors, by kernel ridge regression on the code; width and coverage are of posterior draws through that "
        "map, whose own error they leave out",
        f"  {'':<{width}}{'R²':>9}{'corr':>9}{'error':>9}{'width':>9}  coverage of {levels}",
    ]
    for name in recovery["factor"].values:
        row: Any = recovery.sel(factor=name)
        covered = ", ".join(f"{float(value):.0%}" for value in row["coverage"].values)
        lines.append(
            f"  {name:<{width}}{float(row['r2']):>9.4f}{float(row['correlation']):>9.4f}{float(row['error']):>9.4f}"
            f"{float(row['width']):>9.4f}  {covered}"
        )
    return "\n".join(lines)


def _plain(values: xr.Dataset) -> dict[str, Any]:
    """A data set as JSON: numbers that are not defined are null."""
    return {str(name): _null(v.values.tolist()) for name, v in {**values.coords, **values.data_vars}.items()}


def _null(value: Any) -> Any:
    if isinstance(value, list):
        return [_null(one) for one in value]
    return None if value != value else value


def _pictures(tree: xr.DataTree, checked: xr.DataTree | None, folder: Path) -> None:
    ranks, simulated = tree["prior_sbc"].to_dataset().isel(chain=0), tree["simulations"].to_dataset()
    axes = [str(axis) for axis in ranks["axis"].values]
    shown = axes[: len(COLOURS) - 1]
    contents = {axis: np.abs(2 * ranks["code"].sel(axis=axis).values - 1) for axis in shown}
    drawn = {"coverage": pictures.coverage(contents | {"joint": 1 - ranks["joint"].values})}
    codes = (simulated[name].values for name in ("z", "mean", "sd"))
    drawn["recovery"] = pictures.recovery(*codes, names=axes)
    if "factors" in tree.children:
        recovery = tree["factors"].to_dataset()
        factors = (recovery[name].values for name in ("truth", "predicted", "sd"))
        drawn["factors"] = pictures.recovery(*factors, names=[str(name) for name in recovery["factor"].values])
    for name, figure in drawn.items():
        figure.savefig(folder / f"{name}.png", dpi=150)
    plain: Any = {"visuals": {"p_value_text": False}, "backend": "matplotlib"}
    plots: dict[str, Any] = {"ecdf_pit": az.plot_ecdf_pit(tree, coords={"axis": shown}, **plain)}
    if checked is not None:
        plots["predictive_pit"] = az.plot_ecdf_pit(checked, group="pit", **plain)
    for name, plot in plots.items():
        figure: Figure = plot.viz["figure"].item()
        figure.savefig(folder / f"{name}.png", dpi=150, bbox_inches="tight")
        plt.close(figure)
