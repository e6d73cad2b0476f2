"""Runs a program file under an inference file: data, program, inference, posterior, figures, report, in one folder.

The folder:

    out/config.json     the command's settings, seed and versions        out/posterior.nc    the DataTree
    out/model/          the fitted program                                 out/metrics.json    the figures
    out/checkpoints/    states to resume from, out/log.jsonl               out/report.html, out/figures/
    out/latents.nc      of latent diffusion, what the program sees
"""

from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
import json
import os
from pathlib import Path
import sys
from tempfile import TemporaryDirectory, TemporaryFile
import time
from types import ModuleType
from typing import Any, NamedTuple, cast

import jax
import numpy as np
import xarray as xr

from sami_ppl._util.chunks import chunk_of
from sami_ppl._util.errors import UserError, mistakes
from sami_ppl._util.history import read_history
from sami_ppl._util.parallel import data_parallel, is_first_process
from sami_ppl._util.progress import phase, say, telling
from sami_ppl._util.tables import readable
from sami_ppl._util.versions import versions
from sami_ppl.analyses.evaluate import evaluate
from sami_ppl.data import check_shape, train_test
from sami_ppl.data.stream import Stream, StreamError, at_hand
from sami_ppl.fitting.checkpoint import CheckpointError
from sami_ppl.fitting.loop import NonFiniteLoss
from sami_ppl.posteriors import save_tree
from sami_ppl.posteriors.tree import check_labels
from sami_ppl.program.program import Program
from sami_ppl.runs.claim import check_writable, claimed, write_json
from sami_ppl.runs.reading import decoding_autoencoder, keep_latents, named_autoencoder, run_data
from sami_ppl.runs.report import write_report
from sami_ppl.runs.settings import default_configs, seed_key
from sami_ppl.saving import files as programs
from sami_ppl.saving.save import LoadError, load, save

INFERENCES = {"conditioned": "joint", "gaussian": "vae"}
"""Inferences of programs whose decoder takes the code, which two stages cannot fit."""
PREDICTIVE = 4
"""Observations drawn for each one whose posterior is kept, fewer of large ones."""
MEASURED = 180.0
"""Seconds for the figures of `metrics.json`, about: then they are of fewer observations."""


def run(
    model: str,
    inference: str | None = None,
    *,
    data: Path | None = None,
    resize: int | None = None,
    skip_unreadable: bool = False,
    stream: bool = False,
    autoencoder: str | Path | None = None,
    settings: dict[str, str] | None = None,
    seed: int = 0,
    out: Path,
    resume: bool = False,
    upgraded: bool = False,
    progress: bool = True,
    devices: int | None = None,
    split_above: int | None = None,
) -> xr.DataTree:
    """Fit a program file under an inference file and write everything to `out`; returns the DataTree.

    `inference`: by default the one that suits the setting `decoder` (`INFERENCES`), where the program has it, else
    two_stage. `resize`, `skip_unreadable`: as `data.load_data` has them. `stream`: batches are read from `data` while
    the fit goes on (`data.open_stream`); figures are of up to 10,000 observations. `autoencoder`: folder or repository
    as for `diffusion.autoencoder_from_diffusers`: its latents take the place of images before the program is built, and
    pictures of the report are in pixels; default that which the inference brings, if any. `resume`: go on with the run
    in `out`; the last stage of a finished one may be given more steps. `upgraded`: also where it was begun with other
    versions of the libraries. `progress`: say on stderr what is done.
    `devices`: over how many batches are split; None leaves them whole. `split_above`: arrays of parameters, optimiser
    and average of more numbers than that are split too, over all devices unless said otherwise. Of several processes,
    which make the same call and use all devices, the first writes.

    Raises UserError for unknown names or settings, data that do not fit, an `out` that holds another run, or this one
    without `resume`, and for a loss that is not finite.
    """
    options = {"resize": resize, "skip_unreadable": skip_unreadable, "stream": stream}
    reading = {name: option for name, option in options.items() if option is not None and option is not False}
    if data is None and reading:
        raise UserError(
            "resize=, skip_unreadable= and stream= say how data= is read: give data= too, or leave them out"
        )
    with telling(progress and is_first_process()):
        return _run(
            model, inference, data=data, reading=reading, autoencoder=autoencoder, settings=settings or {}, seed=seed,
            out=Path(out), resume=resume, upgraded=upgraded, progress=progress, devices=devices,
            split_above=split_above,
        )  # fmt: skip


def _run(
    model: str, inference: str | None, *, data: Path | None, reading: dict[str, Any], autoencoder: str | Path | None,
    settings: dict[str, str], seed: int, out: Path, resume: bool, upgraded: bool, progress: bool, devices: int | None,
    split_above: int | None,
) -> xr.DataTree:  # fmt: skip
    began = time.perf_counter()
    check_writable(out)
    model_file = programs.find(model, "models")
    model_module = programs.load_file(model_file)
    inference_file = programs.find(inference or _default_inference(model_module, settings), "inference")
    inference_module = programs.load_file(inference_file)
    configs = default_configs(model_module, inference_module, settings)
    data_key, build_key, run_key, figure_key, posterior_key = jax.random.split(seed_key(seed), 5)
    ending = configs["inference"]
    for name in ("posterior_obs", "draws"):
        if getattr(ending, name) < 1:
            raise UserError(f"setting {name}={getattr(ending, name)}: must be at least 1")
    if getattr(configs["model"], "observations", 1) < 1:
        raise UserError(f"setting observations={configs['model'].observations}: must be at least 1")
    if autoencoder is None and hasattr(inference_module, "autoencoder"):
        autoencoder = inference_module.autoencoder(ending)
    autoencoder = None if autoencoder is None else named_autoencoder(autoencoder)
    say(f"{model_file.stem}, by {inference_file.stem}, seed {seed}: everything is written to {out}")
    with mistakes(ValueError):  # what the program file has against the data, or the settings
        whole = run_data(
            model_module, configs["model"], data, reading,
            autoencoder=autoencoder, kept=out if resume else None, key=data_key,
        )  # fmt: skip
        observations = at_hand(whole)
        with phase("building the program"):
            program = programs.build_program(model_file, configs["model"], observations, key=build_key)
            observations = program.laid_out(observations)
            check_shape(observations, event_shape=program.event_shape)
            check_labels(observations)
    description = {
        "model": str(model_file), "inference": str(inference_file),
        "data": None if data is None else str(Path(data).resolve()),
        "seed": seed, "settings": {name: asdict(config) for name, config in configs.items()}, "versions": versions(),
        **({"reading": reading} if reading else {}),
        **({"autoencoder": autoencoder} if autoencoder else {}),
    }  # fmt: skip
    alone = devices is None and split_above is None and jax.process_count() == 1
    parallel = nullcontext() if alone else data_parallel(devices, split_above=split_above)
    fitted_to = whole if isinstance(whole, Stream) else observations
    fit = partial(inference_module.run, program, fitted_to, ending, key=run_key, resume=resume)
    shown = train_test(observations)[1].isel(obs=slice(ending.posterior_obs))
    draw = partial(_saved_posterior, data=shown, draws=ending.draws, key=posterior_key)
    if not is_first_process():
        with TemporaryDirectory() as aside, parallel:
            return draw(fit(out=Path(aside), progress=False), Path(aside))

    seconds = {"prepare": time.perf_counter() - began}
    with claimed(out, description, resume=resume, upgraded=upgraded), _timed(seconds, "fit"), parallel:
        if autoencoder is not None:
            keep_latents(whole, out)
        try:
            with mistakes(CheckpointError, StreamError):
                tree = draw(fit(out=out, progress=progress), out)
        except NonFiniteLoss as error:
            save(error.program, out / "model")
            raise UserError(str(error)) from error
    save_tree(tree, out / "posterior.nc")
    with _timed(seconds, "figures"):
        metrics = evaluate(
            load(out / "model"), observations, key=figure_key, seconds=MEASURED, progress=progress,
            distance=_distance(model_module, configs["model"], own_data=data is None and autoencoder is None),
        )  # fmt: skip
    metrics["seconds"] |= seconds | _stage_seconds(out / "log.jsonl")
    if autoencoder is not None:
        metrics["autoencoder"] = autoencoder
    write_json(out / "metrics.json", metrics)
    with _timed(seconds, "report"):
        report(out, data=observations, progress=progress)
    metrics["seconds"] |= {"report": seconds["report"], "total": time.perf_counter() - began}
    write_json(out / "metrics.json", metrics)
    return tree


def _default_inference(model: ModuleType, settings: dict[str, str]) -> str:
    decoder = getattr(model.Config(), "decoder", "guided")
    return INFERENCES.get(settings.get("model.decoder", settings.get("decoder", decoder)), "two_stage")


def _saved_posterior(program: Program, out: Path, *, data: xr.Dataset, draws: int, key: jax.Array) -> xr.DataTree:
    if not isinstance(program, Program):
        raise UserError(
            f"run of the inference must return the fitted program, got {type(program).__name__}: write `program, _ = "
            "fit(...)` and `return program`; it is saved, and its posterior drawn, by whoever called"
        )
    save(program, out / "model")
    count = data.sizes["obs"]
    predictive = chunk_of(PREDICTIVE, program.event_shape, passes=max(1, count))
    with phase(f"posteriors of {count:,} test observations: {draws:,} draws of each, {predictive} samples"):
        return program.posterior(data, key=key, draws=draws, predictive=predictive)


@readable
class Finished(NamedTuple):
    """A finished run, opened again: its program, the program file as it was saved, its settings, data and key.

    `own_data`: whether it was fitted to the data that the program file makes. `autoencoder`: whose latents data are.
    """

    program: Program
    module: ModuleType
    config: Any
    data: xr.Dataset
    key: jax.Array
    own_data: bool
    autoencoder: str | None


def open_run(out: Path, *, data: xr.Dataset | None = None) -> Finished:
    """Open a finished run, with the data it was fitted to unless they are given.

    Raises UserError where the folder holds no finished run, or the data do not fit its program.
    """
    out = Path(out)
    missing = [n for n in ("config.json", "model", "posterior.nc", "metrics.json") if not (out / n).exists()]
    if missing:
        raise UserError(f"{out} is no finished run (no {', '.join(missing)}): give the folder that was the out= of one")
    with mistakes(ValueError, LoadError):
        description = json.loads((out / "config.json").read_text())
        autoencoder = description.get("autoencoder")
        program = load(out / "model")
        module = programs.load_file(out / "model" / "program.py")
        config = programs.make_config(module.Config, description["settings"]["model"])
        data_key, _, _, figure_key, _ = jax.random.split(jax.random.key(description["seed"]), 5)
        if data is None:
            source = None if description["data"] is None else Path(description["data"])
            loaded = run_data(
                module, config, source, description.get("reading", {}), autoencoder=autoencoder, kept=out, key=data_key
            )
            data = cast(xr.Dataset, at_hand(loaded))
        data = program.laid_out(data)
        check_shape(data, event_shape=program.event_shape)
    own_data = description["data"] is None and autoencoder is None
    return Finished(program, module, config, data, figure_key, own_data, autoencoder)


def check_at_least(least: int, **options: int) -> None:
    """Raise UserError for options below the least."""
    for name, value in options.items():
        if value < least:
            raise UserError(f"{name}={value}: must be at least {least}")


def report(out: Path, *, data: xr.Dataset | None = None, progress: bool = False) -> Path:
    """Write `report.html` and its figures from the results in a folder; returns the page.

    `progress`: say on stderr what is done.
    """
    with telling(progress):
        return _report(Path(out), data)


def _report(out: Path, data: xr.Dataset | None) -> Path:
    with phase("report: opening the run"):
        run = open_run(out, data=data)
    with xr.open_datatree(out / "posterior.nc", engine="h5netcdf") as opened:
        tree = opened.load()
    metrics = json.loads((out / "metrics.json").read_text())
    distance = _distance(run.module, run.config, own_data=run.own_data)
    program, single = run.program.single(run.data)
    autoencoder = decoding_autoencoder(run.autoencoder, program.event_shape)
    return write_report(out, program, single, tree, metrics, key=run.key, distance=distance, autoencoder=autoencoder)


def summary(metrics: dict[str, Any]) -> str:
    """The short table that a run prints."""
    lines = []
    if "forest_r2" in metrics:
        names = list(metrics["forest_r2"])
        best = np.abs(np.array(metrics["corr"]["values"])).argmax(0)
        lines.append(f"{'factor':<14}{'forest R²':>10}{'linear R²':>11}{'best axis':>12}{'|corr|':>8}")
        for j, name in enumerate(names):
            corr = abs(metrics["corr"]["values"][best[j]][j])
            lines.append(
                f"{name:<14}{metrics['forest_r2'][name]:>10.3f}{metrics['linear_r2'][name]:>11.3f}"
                f"{metrics['corr']['axes'][best[j]]:>12}{corr:>8.3f}"
            )
        raw = metrics.get("raw", {}).get("dci_disentanglement")
        lines.append(
            f"DCI-disentanglement {metrics['dci_disentanglement']:.2f}"
            + ("" if raw is None else f" (before gauge fixing {raw:.2f})")
            + f", randomly rotated {metrics['rotated_control']['dci_disentanglement']:.2f}; MIG {metrics['mig']:.2f}"
        )
    if (start := metrics.get("low_pass_pca")) is not None:
        scores = ", ".join(
            f"{name} {start['forest_r2'][name]:.3f}/{start['linear_r2'][name]:.3f}" for name in start["forest_r2"]
        )
        lines.append(
            f"for comparison, principal components of blurred images: forest/linear R² {scores}; "
            f"DCI {start['dci_disentanglement']:.2f}"
        )
    for name, angles in metrics.get("circular_corr", {}).items():
        scores = "; ".join(f"{site} {corr:.3f}" for site, corr in angles.items()) or "no angle in the prior"
        jumps = "; ".join(f"{site} {jump:.1f}" for site, jump in metrics["largest_jump"][name].items())
        steps = f"; largest step of the code, over the mean step: {jumps}" if jumps else ""
        lines.append(f"circular correlation of {name}: {scores}{steps}")
    for label, accuracies in metrics.get("probes", {}).items():
        lines.append(f"held-out accuracy for {label}: " + ", ".join(f"{k} {v:.3f}" for k, v in accuracies.items()))
    lines.append("KL per axis (nats): " + "  ".join(f"{a} {v:.2f}" for a, v in metrics["kl_nats"].items()))
    if (end := metrics.get("noise_end_kl")) is not None:
        by_site = "  ".join(f"{site} {kl:.2f}" for site, kl in end.items())
        lines.append(f"KL of q(z | x at the noisiest level) from the prior (nats): {by_site}")
    lines.append(
        f"active axes {metrics['active_latents']}; own z against shuffled z {metrics['z_gain']:.1f} nats; bound "
        f"{metrics['bound_nats']['mean']:.1f} ± {metrics['bound_nats']['se']:.1f} nats per observation"
    )
    samples = metrics["samples"]
    lines.append(
        f"samples ({samples['sampler']}, {samples['evaluations']} evaluations): squared error to the own image "
        f"{samples['mse_own']:.3f}, to another {samples['mse_other']:.3f}, "
        f"of the mean image {samples['mse_mean_image']:.3f}"
    )
    for kind in ("conditional", "unconditional"):
        if (rms := samples.get(f"rms_{kind}")) is not None:
            lines.append(
                f"{kind} samples to the nearest true image: median {rms['median']:.3f}, 90 % {rms['p90']:.3f} (rms)"
            )
    if (whole := metrics.get("sequences")) is not None:
        lines.append(
            f"whole sequences: bound {whole['bound_nats']['mean']:.1f} ± {whole['bound_nats']['se']:.1f} nats, KL from "
            f"the prior over time {whole['kl_total_nats']:.1f}"
        )
    if (autoencoder := metrics.get("autoencoder")) is not None:
        lines.append(f"errors and bounds are of latents, by {autoencoder}, not of pixels")
    lines += [f"WARNING: {text}" for text in metrics["warnings"]]
    if "verdict" in metrics:
        lines.append(f"verdict: {metrics['verdict']}")
    if (counts := metrics.get("observations")) is not None:
        lines.append("observations: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()))
    if metrics.get("skipped"):
        lines.append(f"left out, for want of time: {', '.join(metrics['skipped'])}")
    lines.append("seconds: " + ", ".join(f"{k} {v:.0f}" for k, v in metrics["seconds"].items()))
    return "\n".join(lines)


def use_compilation_cache() -> None:
    """Keep compiled steps in the user's cache folder, so that a second run starts at once.

    A folder that the user has set, in JAX_COMPILATION_CACHE_DIR or by `jax.config`, stays, and so does a least time set
    in JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS. Where there is no folder to write to, one line says so.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sami_ppl" / "compiled"
        cache.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=cache):  # a mode says nothing of read-only disks
            pass
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody's home is known
        print(
            f"what is compiled is not kept ({error}): set XDG_CACHE_HOME to a folder that can be written to",
            file=sys.stderr,
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(cache))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # Networks and data are made by many small programs, each below the second from which JAX keeps one.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _distance(module: ModuleType, config: Any, *, own_data: bool) -> Callable[[np.ndarray], np.ndarray] | None:
    """Of images to those that the program file would make: it says nothing about data from elsewhere."""
    return partial(module.distance, config=config) if own_data and hasattr(module, "distance") else None


def _stage_seconds(file: Path) -> dict[str, float]:
    return {r["stage"]: r["seconds"] for r in (read_history(file) if file.exists() else [])}


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Any:
    began = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - began
