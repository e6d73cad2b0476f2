"""The evidence of held-out observations under a finished run: what `sami evidence` writes and prints."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

from sami_ppl._util.errors import UserError
from sami_ppl._util.progress import phase, telling
from sami_ppl.data import train_test
from sami_ppl.diagnostics import information_spectrum
from sami_ppl.evidence import (
    evidence_bound,
    first,
    flow_log_prob,
    importance_proposal,
    importance_weighted_bound,
    mean_and_error,
    summarise,
)
from sami_ppl.posteriors import save_tree
from sami_ppl.runs.reading import read_as, read_data
from sami_ppl.runs.run import Finished, check_at_least, open_run, write_json
from sami_ppl.runs.settings import seed_key

JUDGED = 256
"""Observations on which the information spectrum is measured, at most."""


def evidence_run(
    out: Path,
    *,
    data: Path | None = None,
    limit: int = 1000,
    levels: int = 64,
    draws: int = 64,
    weighted: int = 64,
    flow: int = 0,
    seed: int = 0,
    progress: bool = False,
) -> str:
    """Estimate the evidence, write `evidence.json` and `evidence.nc` to the run's folder, and return the table.

    Of other `data` the files are named after theirs, `evidence_mine.nc` for `mine.npz`: the report shows the run's own.

    `evidence.nc` holds the bound of each observation, by its parts; where they were asked for, the importance-weighted
    bounds and the flow's densities of the first observations; and, of a guided decoder, the information spectrum.
    `progress`: say on stderr what is done.

    Raises UserError where the folder holds no finished run, an option is out of range, or the data do not fit the
    program.
    """
    check_at_least(2, limit=limit, levels=levels)
    check_at_least(0, weighted=weighted, flow=flow)
    if weighted and (draws < 32 or draws & (draws - 1)):
        raise UserError(f"draws={draws}: must be a power of two, at least 32")
    with telling(progress):
        with phase(f"opening {out}"):
            found = open_run(Path(out), data=None if data is None else read_data(data, **read_as(out)))
        part = train_test(found.data)[1] if "split" in found.data.coords and data is None else found.data
        figures, tree = evidence_figures(
            found, first(part, limit), key=seed_key(seed), levels=levels, draws=draws, weighted=weighted, flow=flow
        )
    name = "evidence" if data is None else f"evidence_{Path(data).stem}"
    write_json(Path(out) / f"{name}.json", figures)
    save_tree(tree, Path(out) / f"{name}.nc")
    return table(figures)


def evidence_figures(
    run: Finished, data: xr.Dataset, *, key: jax.Array, levels: int, draws: int, weighted: int, flow: int
) -> tuple[dict[str, Any], xr.DataTree]:
    """All estimates of the evidence of observations under a run's program: figures in nats, and labelled arrays.

    Of a program of sequences, the flow's density and the information are those of single frames, under N(0, I). Raises
    UserError for a flow where the decoder has no denoiser without a code.
    """
    program, (x, _) = run.program, run.program.observations(data)
    single, each = program.single(x)
    pilot_key, bound_key, weighted_key, flow_key, information_key = jax.random.split(key, 5)
    with phase("where to put the noise levels"):
        proposal = importance_proposal(program, data, key=pilot_key)
    with phase(f"bound of {len(x):,} observations, {levels} noise levels each"):
        bound = evidence_bound(program, data, key=bound_key, levels=levels, proposal=proposal)
    groups = {"bound": bound}
    figures: dict[str, Any] = {"observations": len(x), "levels": levels}
    figures |= summarise(bound, x)
    if weighted:
        with phase(f"importance-weighted bound of {min(weighted, len(x)):,} observations, {draws} draws each"):
            tight = importance_weighted_bound(
                program, first(data, weighted), key=weighted_key, draws=draws, levels=levels, proposal=proposal
            )
        groups["importance_weighted"] = tight
        last = tight["bound"].isel(particles=-1).values
        figures["importance_weighted"] = {
            "observations": len(last), "draws": draws, "bound": mean_and_error(last),
            "bound_one_draw": mean_and_error(tight["bound"].isel(particles=0).values),
            "pareto_k_above_07": float((tight["pareto_k"] > 0.7).mean()),
            "ess": float(tight["ess"].median()), "weight_noise": float(tight["weight_noise"].mean()),
        }  # fmt: skip
    if flow and not single.denoiser.marginal:
        raise UserError(
            f"flow={flow}: the density is that of a denoiser without a code, which a Gaussian decoder has not"
        )
    if flow:
        with phase(f"density of the probability flow at {min(flow, len(each)):,} observations"):
            density = flow_log_prob(single.denoiser, each[:flow], key=flow_key)
        groups["flow"] = xr.Dataset({"log_prob": ("obs", density)}, attrs={"units": "nats", "note": FLOW_NOTE})
        figures["flow"] = {"observations": len(density), "negative_log_density": mean_and_error(-density)}
    if program.guided:
        with phase(f"information in the code, by {min(JUDGED, len(each)):,} observations"):
            spectrum = information_spectrum(single, each[:JUDGED], key=information_key, levels=24)
        groups["information"] = spectrum
        figures["information"] = {name: spectrum.attrs[name] for name in ("information", "gain", "kl", "gap")}
    if run.own_data and hasattr(run.module, "exact"):
        truth = -np.asarray(jax.vmap(run.module.exact(run.config).log_prob)(jnp.asarray(x)))
        groups["exact"] = xr.Dataset({"negative_log_evidence": ("obs", truth)}, attrs={"units": "nats"})
        figures["exact"] = {
            "negative_log_evidence": mean_and_error(truth), "excess": mean_and_error(bound["bound"].values - truth),
        }  # fmt: skip
    return figures, xr.DataTree.from_dict(groups)


FLOW_NOTE = "density of the probability-flow ODE: another model than that of the bound"


def table(figures: dict[str, Any]) -> str:
    """The figures as text."""

    def line(label: str, value: dict[str, float], unit: str = "nats", digits: int = 2) -> str:
        return f"  {label:<34}{value['mean']:>12.{digits}f} ± {value['se']:.{digits}f} {unit}"

    lines = [
        f"bound on −log p(x), {figures['observations']} observations, {figures['levels']} noise levels each "
        "(± standard error over observations)",
        line("total", figures["bound"]),
        line("", figures["bits_per_dim"], "bits per dim", 4),
        *(line(name, figures[name]) for name in ("prior", "diffusion", "reconstruction")),
        *(line(f"KL {name[3:-1]}", value) for name, value in figures.items() if name.startswith("kl[")),
    ]
    if "exact" in figures:
        lines += [line("exact −log p(x)", figures["exact"]["negative_log_evidence"]),
                  line("bound − exact, paired", figures["exact"]["excess"], digits=3)]  # fmt: skip
    if (tight := figures.get("importance_weighted")) is not None:
        lines += [
            f"importance-weighted, the first {tight['observations']} observations",
            line("one draw of z", tight["bound_one_draw"]),
            line(f"{tight['draws']} draws of z", tight["bound"]),
            f"  effective draws {tight['ess']:.0f} of {tight['draws']} (median), Pareto k̂ above .7 for "
            f"{tight['pareto_k_above_07']:.0%} of observations",
            f"  variance of log weights owed to noise {tight['weight_noise']:.2f} nats² (about half of it is bias)",
        ]
    if (flow := figures.get("flow")) is not None:
        lines += [f"{FLOW_NOTE}, the first {flow['observations']} observations",
                  line("−log density", flow["negative_log_density"])]  # fmt: skip
    if (told := figures.get("information")) is None:
        lines.append("information in z by noise level: left out, it needs a guided decoder")
    else:
        lines.append(
            f"information in z: {told['information']:.2f} nats by the energy of the guidance, which lowers the "
            f"denoising error by {told['gain']:.2f}; KL of the code {told['kl']:.2f}"
        )
    return "\n".join(lines)
