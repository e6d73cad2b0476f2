"""The command line, `sami COMMAND`: ls, show, cp, run, report, evidence, compare, calibrate, refine, straightness.

What computes is imported by the command that does it: `sami --help`, `sami ls` and `sami show` wait for no JAX.
"""

from functools import partial
import json
import os
from pathlib import Path
import signal
import sys
from typing import Annotated
import warnings

import cyclopts
from cyclopts import Parameter

from sami_ppl._util.progress import phase, telling
from sami_ppl.runs.words import answer, show_warning
from sami_ppl.saving import files as programs

app = cyclopts.App(
    name="sami",
    help="Score-based autoencoders as probabilistic programs: fit a program to data, inspect its posterior.",
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,
)


@app.command(name="ls")
def ls() -> None:
    """List the programs (models) and the inferences, with one line on each."""
    for kind in programs.KINDS:
        print(f"{kind}/")
        listed = programs.list_files(kind)
        width = max(map(len, listed), default=0)
        for name, (_, description) in listed.items():
            print(f"  {name.ljust(width)}  {description}")


@app.command(name="show")
def show(name: str, /) -> None:
    """Show all settings of a program or inference NAME, or of a file of your own: type, default, meaning."""
    from sami_ppl.runs.show import settings_table

    print(settings_table(name))


@app.command(name="cp")
def cp(name: str, file: Path, /) -> None:
    """Copy a program or inference file NAME to FILE, to be edited. Never overwrites."""
    copied = programs.copy(name, file)
    use = f"MODEL --with {copied}" if Path(name).stem in programs.list_files("inference") else copied
    print(f"{copied}: edit it, then `sami run {use} --out DIR`")


@app.command(name="run")
def run(
    model: str,
    /,
    *,
    with_: Annotated[str | None, Parameter(name="--with")] = None,
    data: Path | None = None,
    resize: int | None = None,
    skip_unreadable: Annotated[bool, Parameter(negative=())] = False,
    stream: Annotated[bool, Parameter(negative=())] = False,
    autoencoder: str | None = None,
    set_: Annotated[list[str] | None, Parameter(name="--set", negative=())] = None,
    seed: int = 0,
    out: Path,
    resume: bool = False,
    upgraded: Annotated[bool, Parameter(negative=())] = False,
    quiet: bool = False,
    devices: int | None = None,
    split_above: int | None = None,
    distributed: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Fit a program, draw its posterior, measure it, and write a report.

    Parameters
    ----------
    model
        Name of a program (`sami ls`) or path of a program file.
    with_
        Name or path of an inference; default, two_stage, or what suits the program's setting decoder.
    data
        Your own data: a folder of images, a .npz, .nc or .zarr with a variable x, or a data set of the field, such as
        MNIST's files, dSprites, CelebA or parquet (docs/data.md); default, the program's own.
    resize
        Side of the images of --data: the shorter side is resized to it, the centre is cropped.
    skip_unreadable
        Leave out images of --data that cannot be read.
    stream
        Read batches from --data while the fit goes on, for data larger than memory (docs/data.md).
    autoencoder
        Folder of an AutoencoderKL of diffusers, or of a pipeline with one, whose latents take the place of images.
    set_
        A setting KEY=VALUE of the program or the inference, such as latents=6 or encoder.steps=2000; may be repeated.
        `sami show` lists them.
    seed
        Seed of everything random.
    out
        Folder for all results.
    resume
        Continue an interrupted run in the same folder, or a finished one whose last stage is given more steps.
    upgraded
        With --resume: although libraries have other versions than when the run was begun.
    quiet
        Nothing on stderr but errors and warnings.
    devices
        Split every batch over so many devices.
    split_above
        Of parameters and optimiser, arrays of more numbers than that are split over the devices too; default, none.
    distributed
        One of several processes, started with the same command on every host: all devices of all hosts are used. Who
        takes part is found out from the cluster (Slurm, Kubernetes, cloud TPUs) or read from JAX_COORDINATOR_ADDRESS,
        JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    """
    if distributed:
        from sami_ppl._util.parallel import join_processes

        join_processes()
    from sami_ppl._util.parallel import is_first_process
    from sami_ppl.runs.run import run as run_program
    from sami_ppl.runs.run import summary
    from sami_ppl.runs.settings import key_values

    run_program(model, with_, data=data, resize=resize, skip_unreadable=skip_unreadable, stream=stream,
                autoencoder=autoencoder, settings=key_values(set_ or []), seed=seed, out=out, resume=resume,
                upgraded=upgraded, progress=not quiet, devices=devices, split_above=split_above)  # fmt: skip
    if is_first_process():
        print(summary(json.loads((out / "metrics.json").read_text())))
        print(f"report: {out / 'report.html'}")


@app.command(name="report")
def report(folder: Path, /, *, quiet: bool = False) -> None:
    """Write the report of a finished run again, from what is in its folder.

    Parameters
    ----------
    folder
        The run's --out folder.
    quiet
        Nothing on stderr but errors and warnings.
    """
    from sami_ppl.runs.run import report as write

    print(write(folder, progress=not quiet))


@app.command(name="evidence")
def evidence(
    folder: Path,
    /,
    *,
    data: Path | None = None,
    limit: int = 1000,
    levels: int = 64,
    draws: int = 64,
    weighted: int = 64,
    flow: int = 0,
    seed: int = 0,
    quiet: bool = False,
) -> None:
    """Estimate the evidence of held-out observations under a finished run, in nats, with standard errors.

    Parameters
    ----------
    folder
        The run's --out folder; evidence.json and evidence.nc are written to it, with --data evidence_<its name>.
    data
        Observations, read as those of the run were; default, the run's own test part.
    limit
        At most so many observations, the first ones.
    levels
        Noise levels per observation.
    draws
        Draws of z per observation for the importance-weighted bound, a power of two, at least 32.
    weighted
        Number of observations for the importance-weighted bound; 0 leaves it out.
    flow
        Number of observations for the density of the probability flow, another model; 0 leaves it out.
    seed
        Seed of z, noise and noise levels.
    quiet
        Nothing on stderr but errors and warnings.
    """
    from sami_ppl.runs.evidence import evidence_run

    print(evidence_run(folder, data=data, limit=limit, levels=levels, draws=draws, weighted=weighted, flow=flow,
                       seed=seed, progress=not quiet))  # fmt: skip


# `sp.evaluate` is another thing, the figures of metrics.json.
app.command(evidence, name="evaluate", show=False)


@app.command(name="compare")
def compare(
    folders: list[Path],
    /,
    *,
    data: Path | None = None,
    limit: int = 1000,
    levels: int = 64,
    seed: int = 0,
    out: Path | None = None,
    quiet: bool = False,
) -> None:
    """Compare finished runs by their evidence bounds on held-out observations, with paired standard errors.

    Parameters
    ----------
    folders
        The --out folders of two or more runs.
    data
        Observations to compare on, read as those of the first run were; default, the runs' own test part, which must
        be the same.
    limit
        At most so many observations, the first ones.
    levels
        Noise levels per observation.
    seed
        Seed of z, noise and noise levels, the same for all runs.
    out
        Folder for comparison.json and comparison.png.
    quiet
        Nothing on stderr but errors and warnings.
    """
    from sami_ppl.runs.compare import compare_runs

    print(compare_runs(folders, data=data, limit=limit, levels=levels, seed=seed, out=out, progress=not quiet))


@app.command(name="calibrate")
def calibrate(
    folder: Path,
    /,
    *,
    data: Path | None = None,
    simulations: int = 512,
    draws: int = 200,
    limit: int = 500,
    weighted: int = 32,
    predictive: int = 64,
    seed: int = 0,
    quiet: bool = False,
) -> None:
    """Can a finished run be believed? Simulation-based calibration, predictive checks, true factors, odd observations.

    Parameters
    ----------
    folder
        The run's --out folder; calibration.json, calibration.nc and figures are written to its subfolder calibration.
    data
        Observations to be looked at beside the run's own, read as these were; default, the run's test part.
    simulations
        Codes drawn from the prior, each with an image by reverse diffusion.
    draws
        Draws from the posterior of each.
    limit
        At most so many observations, the first ones.
    weighted
        Number of observations for Pareto k, the tail of the importance weights; 0 leaves it out.
    predictive
        Number of observations held against draws of the program and samples of their codes, 19 each; 0 leaves it out.
    seed
        Seed of everything random.
    quiet
        Nothing on stderr but errors and warnings.
    """
    from sami_ppl.runs.calibrate import calibrate_run

    print(calibrate_run(folder, data=data, simulations=simulations, draws=draws, limit=limit, weighted=weighted,
                        predictive=predictive, seed=seed, progress=not quiet))  # fmt: skip


@app.command(name="refine")
def refine(
    folder: Path,
    /,
    *,
    obs: str = "0,1,2,3",
    with_: Annotated[str, Parameter(name="--with")] = "nuts",
    data: Path | None = None,
    draws: int = 500,
    levels: int = 64,
    seed: int = 0,
    quiet: bool = False,
) -> None:
    """Refine the posteriors of chosen observations of a finished run, and say how far the amortised ones were off.

    Parameters
    ----------
    folder
        The run's --out folder; results are written to its subfolder refinement.
    obs
        Positions of the observations, separated by commas, in the run's test part or in --data.
    with_
        nuts, the No-U-Turn sampler over the code, or svi, a Gaussian of its own for each observation.
    data
        Observations, read as those of the run were; default, the run's own test part.
    draws
        Draws of each posterior, in each chain.
    levels
        Noise levels of the fixed noise set under which the posterior is refined, each with two signs of the noise.
    seed
        Seed of everything random.
    quiet
        Nothing on stderr but errors and warnings.
    """
    from sami_ppl.runs.refine import refine_run

    print(refine_run(folder, obs, with_, data=data, draws=draws, levels=levels, seed=seed, progress=not quiet))


@app.command(name="straightness")
def straightness(
    folders: list[Path],
    /,
    *,
    video: Annotated[list[Path], Parameter(consume_multiple=True, negative=())],
    patches: int = 0,
    frames: int = 12,
    step: int = 1,
    change: float = 0.0,
    resamples: int = 2000,
    seed: int = 0,
    out: Path | None = None,
    quiet: bool = False,
) -> None:
    """How straight videos run in the codes of finished runs, beside pixels, components and nulls, in degrees.

    Parameters
    ----------
    folders
        The --out folders of one or more runs, fitted to stills, with codes of one size.
    video
        Videos that the runs have not seen; may be repeated.
    patches
        Patches of the runs' size cut out of each video, at random places and times; 0 takes whole frames, resized as
        the first run's own images were.
    frames
        Frames of each clip.
    step
        Take every so many-th frame.
    change
        Patches only in which a pixel changes by as much, of 255, from one frame taken to the next (root mean square):
        where nothing moves there is but noise.
    resamples
        Bootstrap samples, of videos and of clips within them, for 95 % intervals.
    seed
        Seed of places, times and nulls.
    out
        Folder for straightness.json, straightness.nc and straightness.png.
    quiet
        Nothing on stderr but errors and warnings.
    """
    from sami_ppl.runs.straightness import straightness_runs

    print(straightness_runs(folders, video, patches=patches, frames=frames, step=step, change=change,
                            resamples=resamples, seed=seed, out=out, progress=not quiet))  # fmt: skip


COMPUTING = (run, report, evidence, compare, calibrate, refine, straightness)


def main() -> None:
    """Entry point.

    A user's mistake is one message on stderr and exit code 2, without a stack trace; a bug is its trace and a line that
    says so, and exit code 1. With SAMI_TRACE=1 in the environment both are raised.
    """
    command, bound, _ = app.parse_args(sys.argv[1:])
    try:
        if command in COMPUTING:
            # Figures go into files. A notebook hands its commands a backend that may not be installed here.
            os.environ["MPLBACKEND"] = "agg"
            warnings.showwarning = partial(show_warning, COMPUTING)
            with telling(sys.stderr.isatty() and not bound.arguments.get("quiet")), phase("starting"):
                from sami_ppl.runs.run import use_compilation_cache

            use_compilation_cache()
        command(*bound.args, **bound.kwargs)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read along, as in `sami ls | head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None  # what shells give for it
    except KeyboardInterrupt as stopped:
        more = "; the same command with --resume continues" if command is run else ""
        print(f"sami: interrupted{more}", file=sys.stderr)
        raise SystemExit(128 + getattr(stopped, "signal", signal.SIGINT)) from None
    except Exception as error:
        if os.environ.get("SAMI_TRACE"):
            raise
        raise SystemExit(answer(error, COMPUTING)) from error
