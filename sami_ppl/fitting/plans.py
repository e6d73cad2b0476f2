"""Plans of a fit: which parts are trained in which order, by stages whose settings follow from program and data.

`fit` runs a plan, or a single `Stage`. A plan sets what its stages train: `target`, `train`, `denoiser_loss`. A stage
that it is not given has sizes by the data (`fitting.sizes`).
"""

import abc
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import jax
from jaxtyping import Array, Float, Key
import numpy as np
import xarray as xr

from sami_ppl._util.history import History
from sami_ppl._util.keys import check_key
from sami_ppl._util.locks import held
from sami_ppl._util.maps import forget_if_many
from sami_ppl._util.parallel import is_first_process
from sami_ppl._util.progress import phase, say, telling
from sami_ppl.data.splitting import training_part
from sami_ppl.data.stream import Source, at_hand
from sami_ppl.decoders.training import refuse
from sami_ppl.diagnostics.fitted import not_fitted
from sami_ppl.fitting.beside import Start, beside_gaussian, check_start
from sami_ppl.fitting.checkpoint import check_extension
from sami_ppl.fitting.gauge import align, why_axes_stay
from sami_ppl.fitting.header import header, stage_line
from sami_ppl.fitting.loop import fit_stage
from sami_ppl.fitting.parts import count_of, parted, rows_of
from sami_ppl.fitting.sizes import (
    Extent,
    Sized,
    denoiser_stage,
    encoder_stage,
    gaussian_stage,
    joint_stage,
    prior_stage,
    taken,
)
from sami_ppl.fitting.stage import Stage
from sami_ppl.fitting.start import check_clusters, told, warm_start
from sami_ppl.fitting.stopping import carries
from sami_ppl.program.build import as_data
from sami_ppl.program.program import Program


class Run(NamedTuple):
    """What the stages of a plan share: the data, and where they write and report to."""

    train: Any
    held_out: Any
    count: int
    options: dict[str, Any]

    @property
    def progress(self) -> bool:
        """Whether to say what is done."""
        return self.options["progress"]

    def stage(self, program: Program, stage: Stage, name: str, *, key: Key[Array, ""]) -> tuple[Program, History]:
        """One stage."""
        say(stage_line(name, stage, stage.count(self.count)))
        return fit_stage(program, self.train, stage, key=key, held_out=self.held_out, name=name, **self.options)


class AbstractPlan(abc.ABC):
    """The stages of a fit. Subclasses are frozen dataclasses of `Stage`s, or of `Sized` ones, which suit the data.

    `guided`: whether it is for guided decoders only, since it fits a denoiser without codes, or needs one.
    """

    guided: ClassVar[bool] = False

    @abc.abstractmethod
    def settled(self, program: Program, extent: Extent) -> "AbstractPlan":
        """The plan with every stage as it is taken, for a program and such observations."""

    @abc.abstractmethod
    def check(self, program: Program, count: int) -> None:
        """Raise ValueError where a later stage could not be run; cheap, it is called before the first."""

    @property
    def stages(self) -> dict[str, Stage]:
        """The stages of a settled plan by name, in the order in which they are taken."""
        found = {field.name: getattr(self, field.name) for field in fields(cast(Any, self))}
        return {name: stage for name, stage in found.items() if isinstance(stage, Stage)}

    @abc.abstractmethod
    def run(self, program: Program, run: Run, *, key: Key[Array, ""]) -> tuple[Program, list[History]]:
        """Take the stages, all given, one after another."""


@dataclass(frozen=True)
class TwoStage(AbstractPlan):
    """The denoiser as a model of the observations alone, then the encoder against the frozen denoiser (default).

    The denoiser cannot absorb what the encoder gets wrong.

    Args:
        denoiser: stage of the denoiser; what a `Sized` one leaves open suits program and data.
        encoder: the same of the encoder.
        start: what the encoder starts from, see `EncoderOnly`.
        gaussian: stage of the encoder beside a Gaussian decoder, where it starts from there.
        warm_steps: steps of the encoder's warm start (`warm_start`); 0 leaves it out.
        warm_clusters: start discrete sites from clusters.
        align: fix the gauge at the end (`align`) where the prior has the symmetry.
    """

    guided: ClassVar[bool] = True
    denoiser: Stage | Sized = Sized()
    encoder: Stage | Sized = Sized()
    start: Start = "components"
    gaussian: Stage | Sized = Sized()
    warm_steps: int = 500
    warm_clusters: bool = False
    align: bool = True

    def settled(self, program: Program, extent: Extent) -> "TwoStage":
        return replace(
            self,
            denoiser=taken(self, self.denoiser, denoiser_stage, program, extent, target="marginal"),
            **self._second.settings(program, extent, plan=self),
        )

    def check(self, program: Program, count: int) -> None:
        _given(self.denoiser).check(program, count)
        self._second.check(program, count, fitted=True)

    @property
    def _second(self) -> "EncoderOnly":
        own = {field.name: getattr(self, field.name) for field in fields(EncoderOnly)}
        return EncoderOnly(**own)

    def run(self, program: Program, run: Run, *, key: Key[Array, ""]) -> tuple[Program, list[History]]:
        denoiser_key, *keys = jax.random.split(key, 3)
        program, first = run.stage(program, _given(self.denoiser), "denoiser", key=denoiser_key)
        program, rest = self._second.encode(program, run, *keys)
        return program, [first, *rest]


@dataclass(frozen=True)
class EncoderOnly(AbstractPlan):
    """The encoder against a denoiser that is fitted already: after `with_prior`, or with a loaded denoiser.

    Args:
        encoder: stage of the encoder; what a `Sized` one leaves open suits program and data.
        start: from "components" of blurred observations; or "gaussian", with the guide of a variational autoencoder,
            a Gaussian decoder with this prior and encoder that is fitted first: it is kept, and guidance fitted to it.
        gaussian: stage of that autoencoder.
        warm_steps: steps of the warm start; 0 leaves it out.
        warm_clusters: start discrete sites from clusters.
        align: fix the gauge at the end where the prior has the symmetry.
    """

    guided: ClassVar[bool] = True
    encoder: Stage | Sized = Sized()
    start: Start = "components"
    gaussian: Stage | Sized = Sized()
    warm_steps: int = 500
    warm_clusters: bool = False
    align: bool = True

    def settled(self, program: Program, extent: Extent) -> "EncoderOnly":
        return replace(self, **self.settings(program, extent, plan=self))

    def settings(self, program: Program, extent: Extent, *, plan: AbstractPlan) -> dict[str, Any]:
        """What is settled, for a `plan` that has these settings."""
        check_start(program, self.start, clusters=self.warm_clusters, steps=self.warm_steps)
        gaussian = self.gaussian
        if self.start == "gaussian":
            gaussian = taken(plan, gaussian, gaussian_stage, program, extent)
        return {
            "gaussian": gaussian,
            "encoder": taken(plan, self.encoder, encoder_stage, program, extent, train=("encoder",)),
        }

    def check(self, program: Program, count: int, *, fitted: bool = False) -> None:
        if self.warm_steps < 0:
            raise ValueError(f"warm_steps must be at least 0, got {self.warm_steps}")
        if not fitted and "denoiser" in not_fitted(program):
            raise ValueError(
                "EncoderOnly needs a fitted denoiser, and this one has never been: write sp.fit(program, data, "
                "sp.TwoStage(), key=key), which fits both"
            )
        _given(self.encoder).check(program, count)
        if self.warm_steps and self.warm_clusters:
            check_clusters(program)

    def run(self, program: Program, run: Run, *, key: Key[Array, ""]) -> tuple[Program, list[History]]:
        return self.encode(program, run, *jax.random.split(key))

    def encode(self, program: Program, run: Run, warm_key: Array, encoder_key: Array) -> tuple[Program, list[History]]:
        """The warm start and the stage."""
        stage, histories = _given(self.encoder), []
        if self.start == "gaussian":
            key, warm_key = jax.random.split(warm_key)
            program, history = beside_gaussian(program, partial(run.stage, stage=_given(self.gaussian)), key=key)
            histories.append(history)
        if self.warm_steps:
            with carries(program):
                program = warm_start(
                    program, run.train, key=warm_key, clusters=self.warm_clusters, steps=self.warm_steps,
                    batch=stage.batch, source="guide" if histories else "components", progress=run.progress,
                )  # fmt: skip
        program, history = run.stage(program, stage, "encoder", key=encoder_key)
        return _aligned(program, run, stage) if self.align else program, [*histories, history]


@dataclass(frozen=True)
class Joint(AbstractPlan):
    """Both networks by the bound, guided as in the paper, where the denoiser may absorb what the encoder gets wrong.

    The plan for decoders that take the code themselves.

    Args:
        both: the stage; what a `Sized` one leaves open suits program and data.
        align: fix the gauge at the end where the prior has the symmetry, and the decoder is guided.
    """

    both: Stage | Sized = Sized()
    align: bool = True

    def settled(self, program: Program, extent: Extent) -> "Joint":
        stage = taken(self, self.both, joint_stage, program, extent, denoiser_loss="guided")
        return replace(self, both=stage)

    def check(self, program: Program, count: int) -> None:
        _given(self.both).check(program, count)

    def run(self, program: Program, run: Run, *, key: Key[Array, ""]) -> tuple[Program, list[History]]:
        return _both(program, run, _given(self.both), align=self.align, key=key)


@dataclass(frozen=True)
class Decoupled(AbstractPlan):
    """Both networks at once, the denoiser by its own unguided loss, the encoder by the guided one.

    One pass of the denoiser serves both; it stays a model of the observations, as in two stages.

    Args:
        both: the stage; what a `Sized` one leaves open suits program and data.
        align: fix the gauge at the end where the prior has the symmetry.
    """

    guided: ClassVar[bool] = True

    both: Stage | Sized = Sized()
    align: bool = True

    def settled(self, program: Program, extent: Extent) -> "Decoupled":
        stage = taken(self, self.both, joint_stage, program, extent, denoiser_loss="own")
        return replace(self, both=stage)

    def check(self, program: Program, count: int) -> None:
        _given(self.both).check(program, count)

    def run(self, program: Program, run: Run, *, key: Key[Array, ""]) -> tuple[Program, list[History]]:
        return _both(program, run, _given(self.both), align=self.align, key=key)


@dataclass(frozen=True)
class PriorOnly(AbstractPlan):
    """The prior's parameters to the posteriors of a fitted program, by their KL alone; the denoiser is not called.

    Args:
        fit: the stage; what a `Sized` one leaves open suits program and data.
    """

    fit: Stage | Sized = Sized()

    def settled(self, program: Program, extent: Extent) -> "PriorOnly":
        return replace(self, fit=taken(self, self.fit, prior_stage, program, extent, train=("prior",)))

    def check(self, program: Program, count: int) -> None:
        _given(self.fit).check(program, count)

    def run(self, program: Program, run: Run, *, key: Key[Array, ""]) -> tuple[Program, list[History]]:
        (key,) = jax.random.split(key, 1)
        program, history = run.stage(program, _given(self.fit), "fit", key=key)
        return program, [history]


def fit(
    program: Program,
    data: xr.Dataset | Float[Array | np.ndarray, "obs *event"] | Source,
    plan: AbstractPlan | Stage | None = None,
    *,
    key: Key[Array, ""],
    held_out: xr.Dataset | Float[Array | np.ndarray, "obs *event"] | Source | None = None,
    name: str = "fit",
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    callback: Callable[[dict[str, Any]], None] | None = None,
    **unknown: Any,
) -> tuple[Program, History]:
    """Fit a program to observations: a plan of several stages, or one stage.

        program, history = sp.fit(program, data, key=key)                                   # TwoStage()
        program, history = sp.fit(program, data, sp.TwoStage(align=True), key=key)
        program, history = sp.fit(program, data, sp.Stage(steps=500, train=("encoder",)), key=key)

    Args:
        program: the program; it is not changed.
        data: observations x, an array (obs, *event) or a Dataset, which holds the variables that the prior takes too.
            Of a Dataset whose `split` has both parts the test part is left alone. Or a stream of them, or its source
            (`data.Stream`): batches are read as they are needed, the warm start and the gauge take 10,000 observations.
        plan: `TwoStage` (default of guided decoders), `EncoderOnly`, `Joint` (default of others), `Decoupled` or
            `PriorOnly`; or a single `Stage`.
        key: random key of weights, batches and noise.
        held_out: observations for validation; default the last tenth of the training part, of a stream every tenth
            observation, not trained on then.
        name: of a single stage, in the log and for its checkpoints.
        out: folder for checkpoints, `out/checkpoints/<stage>`, and the log, `out/log.jsonl`; None writes nothing.
        resume: go on from the latest checkpoints in `out`, of the same settings, data and prior. A stage that has come
            to its end, and that no later one was built on, may be given more steps: its learning rate rises once more.
        progress: say on stderr what is fitted to what, and what is done, with progress bars.
        callback: receives every record of the log.
        **unknown: nothing else is taken; what is trained, `target` and `train`, is said by the `Stage`.

    Returns:
        The program with its averaged weights, and the log of all stages.

    Raises:
        TypeError: a plan that is none, a name given with a plan, other arguments.
        ValueError: what cannot be run, before the first step; a single observation without `held_out`.
        CheckpointError: checkpoints in `out` of another run, or any without `resume`.
        StreamError: a row cannot be read or used; it is named, and with `out` nothing is lost.
        UserError: another process is fitting into `out`.
        NonFiniteLoss: the loss is NaN or infinite; it names the site and carries the best program so far.
        Interrupted: Ctrl-C, or SIGTERM, stopped it; a KeyboardInterrupt whose `program` is the best so far. With `out`
            nothing is lost: `resume=True` goes on, to the same program bit for bit.
    """
    check_key(key)
    forget_if_many()
    refuse("fit", unknown)
    options: dict[str, Any] = {"out": out, "resume": resume, "progress": progress, "callback": callback}
    if plan is None:
        plan = TwoStage() if program.guided else Joint()
    if not isinstance(plan, AbstractPlan | Stage):
        raise TypeError(
            f"plan must be a plan, such as sp.TwoStage(), or a sp.Stage, got {type(plan).__name__}: write "
            "sp.fit(program, data, key=key) for the default"
        )
    if isinstance(plan, AbstractPlan) and plan.guided and not program.guided:
        raise ValueError(
            f"plan is {type(plan).__name__}, which needs a guided decoder, and this one, "
            f"{type(program.denoiser).__name__}, takes the code itself: write sp.fit(program, data, sp.Joint(), "
            "key=key)"
        )
    if name != "fit" and isinstance(plan, AbstractPlan):
        raise TypeError("name is of a single stage, a plan has its own: leave it out")
    part = training_part(as_data(data))
    part, held_out = parted(part) if held_out is None else (part, as_data(held_out))
    run = Run(part, held_out, count_of(part), options)
    # What cannot be run is said now, not after the first stage.
    for some in (part, held_out):
        program.observations(rows_of(at_hand(some, 1), slice(1)))
    if isinstance(plan, AbstractPlan):
        plan = plan.settled(program, Extent(run.count, told(program, part)))
    plan.check(program, run.count)
    alone = nullcontext() if out is None or not is_first_process() else held(Path(out) / "checkpoints")
    with alone, telling(progress and is_first_process()):
        stages = {name: plan} if isinstance(plan, Stage) else plan.stages
        counts = {name: stage.count(run.count) for name, stage in stages.items()}
        if resume and out is not None and is_first_process():
            check_extension(Path(out), counts)
        say(header(program, counts, observations=run.count, held_out=count_of(held_out), out=out))
        if isinstance(plan, Stage):
            return run.stage(program, plan, name, key=key)
        program, histories = plan.run(program, run, key=key)
    return program, History.joined(histories)


def _given(stage: Stage | Sized) -> Stage:
    assert isinstance(stage, Stage), "plans are settled before they are checked and run"
    return stage


def _both(
    program: Program, run: Run, stage: Stage, *, align: bool, key: Key[Array, ""]
) -> tuple[Program, list[History]]:
    (key,) = jax.random.split(key, 1)
    program, history = run.stage(program, stage, "both", key=key)
    return _aligned(program, run, stage) if align else program, [history]


def _aligned(program: Program, run: Run, stage: Stage) -> Program:
    if why := why_axes_stay(program, stage):
        say(f"gauge: the axes stay as they are, {why}")
        return program
    with carries(program), phase("gauge: turning the axes to where the posterior means are least Gaussian"):
        return align(program, program.observed(at_hand(run.train))).program
