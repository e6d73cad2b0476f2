"""The words and tables of a report: what was fitted, the verdict, the measures."""

import ast
from collections.abc import Mapping, Sequence
from html import escape
from itertools import product
from pathlib import Path
import sys
from typing import Any

import equinox as eqx
import jax
import numpy as np
from numpyro.distributions.transforms import Transform
import xarray as xr

from sami_ppl.diagnostics.verdict import verdict as diagnosed
from sami_ppl.distributions.supports import elementwise_transform, is_unbounded
from sami_ppl.nn.diffusers.autoencoder import AutoencoderKL
from sami_ppl.program.program import Program
from sami_ppl.runs.report import page
from sami_ppl.runs.report.graph import draw_graph, read_graph
from sami_ppl.runs.report.page import table, text

SAMPLES = {
    "sampler": "sampler",
    "evaluations": "evaluations of the denoiser",
    "mse_own": "error to the own image",
    "mse_own_median": "the same, median",
    "mse_other": "to another image",
    "mse_mean_image": "of the mean image",
    "mse_two_images": "between two images",
    "reencoded_corr": "code of the sample, correlation",
    "reencoded_factor_corr": "factor in the sample, correlation",
    "rms_conditional": "distance to the nearest true image (rms), given codes",
    "rms_unconditional": "the same, without codes",
}
"""Measures of `evaluation` in words."""


def identity(program: Program, config: Any, out: Path) -> tuple[str, str]:
    """The program's name and one sentence about it, from the file that built it, else the one that has its prior."""
    origin, file = program.origin, None
    if origin is not None:
        file, doc = origin.file, ast.get_docstring(ast.parse(origin.source))
    elif program.prior.__module__.partition(".")[0] != "sami_ppl":  # whose modules say nothing of the user's factors
        module = sys.modules.get(program.prior.__module__)
        file, doc = getattr(module, "__file__", None), getattr(module, "__doc__", None)
    else:
        doc = None
    doc = (doc or "").strip().split("\n")[0]
    model = config.get("model") if isinstance(config, dict) else None
    name = Path(model if isinstance(model, str) else file or out.resolve()).stem
    shape = "×".join(map(str, program.event_shape))
    return name, doc or f"{program.latents.size} latent axes behind observations of shape {shape}."


def fitted(program: Program, data: xr.Dataset, tree: xr.DataTree) -> list[str]:
    """Tables of the latent factors, networks and data; the graph of the program."""
    nodes = read_graph(program)
    families = {site.name: program.encoder.family_of(site.name) for site in program.latents.sites}
    kinds = {node.name: node.kind for node in nodes}
    sites = [
        (s.name, kinds[s.name], "×".join(map(str, s.event_shape)) or "scalar", _support(s.transform), families[s.name],
         ", ".join(s.axes))
        for s in program.latents.sites
    ]  # fmt: skip
    parts = [("denoiser", program.denoiser), ("encoder", program.encoder), ("sampler", program.sampler)]
    rows = [(name, type(part).__name__, _size(part)) for name, part in parts]
    schedule, posterior = program.denoiser.schedule, tree["posterior"].sizes
    dims = zip(program.event_shape, program.event_dims, strict=True)
    facts = [
        ("one observation", ", ".join(f"{size} {dim}{'s' * (size != 1)}" for size, dim in dims)),
        ("observations", f"{data.sizes['obs']:,}"),
        ("posterior", f"{posterior.get('obs', 0):,} observations, {posterior.get('draw', 0):,} draws each"),
        ("noise levels", f"log-SNR {text(schedule.log_snr_min)} to {text(schedule.log_snr_max)}"),
    ]
    return [
        draw_graph(program, nodes),
        table(
            ("site", "prior", "shape", "from unconstrained by", "posterior", "axes"),
            sites,
            "Latent factors of the prior",
        ),
        _global_values(program, tree),
        table(("part", "class", "parameters"), rows, "Parts of the program"),
        table((), facts, "Data"),
    ]


def left_out(program: Program) -> str:
    """A line on what the decoder does not allow to be examined."""
    if program.guided:
        return ""
    told = ["noisy posteriors, the information spectrum and the noisy end need a guided decoder"]
    if not program.denoiser.marginal:
        told.append("samples without a code a denoiser without one")
    return f"<p>Left out, the decoder being a {escape(type(program.denoiser).__name__)}: {escape('; '.join(told))}.</p>"


def _global_values(program: Program, tree: xr.DataTree) -> str:
    """Global sites of a hierarchical prior: their posterior, one row per element."""
    rows = []
    for site in program.latents.global_sites:
        draws = tree["posterior"][site.name].stack(sample=("chain", "draw")).transpose("sample", ...).values
        labels = [site.coords.get(dim, range(size)) for dim, size in zip(site.dims, site.event_shape, strict=True)]
        for index, names in zip(np.ndindex(site.event_shape), product(*labels), strict=True):
            label = f"{site.name}[{','.join(map(str, names))}]" if index else site.name
            values = draws[(slice(None), *index)]
            rows.append((label, float(values.mean()), float(values.std())))
    return table(("global site", "mean", "standard deviation"), rows, "Shared by all observations") if rows else ""


def _support(transform: Transform) -> str:
    single = elementwise_transform(transform)
    return "no transform" if is_unbounded(transform) else type(transform if single is None else single).__name__


def _size(part: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(part, eqx.is_inexact_array)))


def verdict(metrics: Mapping[str, Any]) -> str:
    """The verdict in a sentence, and what the figures warn of; green only where the posteriors were checked too."""
    if "warnings" not in metrics:
        return page.verdict("Not checked", "for collapse.")
    if metrics["warnings"]:
        return page.verdict("Warning", "", map(str, metrics["warnings"]), good=False)
    checked = (metrics.get("calibration") or {}).get("calibrated") is not None
    title, _, sentence = diagnosed(metrics).partition(": ")
    return page.verdict(f"{title}:", sentence, good=True if checked else None)


def seconds(metrics: Mapping[str, Any], log: Sequence[Mapping[str, Any]]) -> str:
    """How long the parts of the run took."""
    found = metrics.get("seconds") or {r["stage"]: r["seconds"] for r in log if "seconds" in r}
    return table((), _flat(found), "Seconds") if found else ""


def pixels(metrics: Mapping[str, Any], autoencoder: AutoencoderKL | None) -> str:
    """Of latent diffusion, a line on how its pictures come to be, or why there are none."""
    named = f" {metrics['autoencoder']}" if metrics.get("autoencoder") else ""
    if autoencoder is not None:
        told = (
            f"In pixels, which the autoencoder{named} makes of latents, those of the test images too: what it loses of "
            "them is not seen. What is measured elsewhere on this page is measured on latents."
        )
    elif named:
        told = f"Not in pixels: the autoencoder{named} was not found when this page was written."
    else:
        return ""
    return f"<p>{escape(told)}</p>"


def measures(metrics: Mapping[str, Any], *, latent: bool = False) -> list[str]:
    """Tables of those measures that are there; `latent`: of latents, which their captions say."""
    whole = {
        "active axes": metrics.get("active_latents"),
        "cost of another's z for the own, nats": metrics.get("z_gain"),
        "bound on −log p(x), nats": metrics.get("bound_nats"),
        "the same, bits per dim": metrics.get("bits_per_dim"),
    }
    of, each = (", on latents of one autoencoder", "number of a latent") if latent else ("", "pixel")
    lists = {
        f"The whole program{of}; the lower the bound the better": {k: v for k, v in whole.items() if v is not None},
        f"Samples given codes, squared errors a {each}": _samples(metrics.get("samples") or {}),
        "Probes: accuracy": metrics.get("probes"),
    }
    found = [_factors(metrics), _axes(metrics), _scores(metrics)]
    return found + [table((), _flat(values), caption) for caption, values in lists.items() if values]


def _samples(found: Mapping[str, Any]) -> dict[str, Any]:
    """The measures of samples that are there, in words and in order."""
    return {name: found[key] for key, name in SAMPLES.items() if key in found}


def _flat(values: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    """Nested values as rows, the names joined; a mean with its standard error stays one cell."""
    rows = []
    for name, value in values.items():
        nested = isinstance(value, Mapping) and "mean" not in value
        label = f"{before}{name.replace('_', ' ')}"
        rows += _flat(value, f"{label}, ") if nested else [(label, value)]
    return rows


def _factors(metrics: Mapping[str, Any]) -> str:
    kinds = {"linear R²": metrics.get("linear_r2"), "forest R²": metrics.get("forest_r2")}
    kinds = {kind: values for kind, values in kinds.items() if values}
    rows = [(f, *(v.get(f) for v in kinds.values())) for f in dict.fromkeys(f for v in kinds.values() for f in v)]
    caption = "Each factor read off the whole code: 1 is perfect, 0 no better than its mean"
    return table(("factor", *kinds), rows, caption) if rows else ""


def _axes(metrics: Mapping[str, Any]) -> str:
    kl, corr = metrics.get("kl_nats") or {}, metrics.get("corr") or {}
    factors = list(corr.get("factors", []))
    by_axis = dict(zip(corr.get("axes", []), corr.get("values", []), strict=True))
    rows = []
    for axis in dict.fromkeys([*kl, *by_axis]):
        rows.append((axis, *([kl.get(axis)] if kl else []), *by_axis.get(axis, [None] * len(factors))))
    captions = ["information in nats"] * bool(kl) + ["correlation with each factor"] * bool(corr)
    head = ("axis", *["KL"] * bool(kl), *factors)
    return table(head, rows, f"Each axis: {', '.join(captions)}", shade=1 + bool(kl)) if rows else ""


def _scores(metrics: Mapping[str, Any]) -> str:
    control = metrics.get("rotated_control")
    kinds = {"fitted": metrics, "before rotation": metrics.get("raw"), "random rotation": control}
    kinds = {kind: values for kind, values in kinds.items() if values}
    scores = {"MIG": "mig", "DCI disentanglement": "dci_disentanglement", "DCI completeness": "dci_completeness"}
    rows = [(n, *(v.get(k) for v in kinds.values())) for n, k in scores.items() if any(k in v for v in kinds.values())]
    regressor = f"; DCI by {metrics['dci_regressor']}" if metrics.get("dci_regressor") else ""
    caption = f"One axis per factor? Only what lies well above a random rotation counts{regressor}"
    return table(("score", *kinds), rows, caption) if rows else ""
