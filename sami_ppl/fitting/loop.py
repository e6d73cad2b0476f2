"""The loop around the steps of one stage: mini-batches, validation, progress, checkpoints, early stopping.

Every step is a function of the state and of the step's number alone, so that an interrupted run continues bit for bit.
"""

from collections.abc import Callable
import math
from pathlib import Path
import signal
import time
from typing import Any
import warnings

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpy as np
import xarray as xr

from sami_ppl._util import parallel
from sami_ppl._util.history import History, summary_line
from sami_ppl._util.progress import progress_bar
from sami_ppl.data.splitting import training_part
from sami_ppl.data.stream import Source, Stream, StreamError, at_hand
from sami_ppl.diagnostics.collapse import CollapseWarning, collapse_warning
from sami_ppl.fitting.checkpoint import Checkpoints
from sami_ppl.fitting.feed import InMemory, Streamed
from sami_ppl.fitting.parts import count_of, parted
from sami_ppl.fitting.signature import signature
from sami_ppl.fitting.stage import Stage
from sami_ppl.fitting.step import Batch, Fit, State, not_finite, remember_best
from sami_ppl.fitting.stopping import Interrupted, stop_requests
from sami_ppl.program.build import as_data
from sami_ppl.program.program import Program

BLOCK, BLOCK_SECONDS = 50, 5.0
"""Most steps, and about most seconds, between two looks at the losses: the host does not wait for the device within
a block, and a fit is stopped at the end of one. No value depends on where blocks end."""
KEPT_EVERY = 120.0
"""Seconds after which a checkpoint is written between two validations."""
VALIDATED = 512
"""Held-out observations that are looked at, at most."""
JUDGED = 8
"""Held-out observations from which a collapse is told, at least: a shuffled z must be another's."""

Callback = Callable[[dict[str, Any]], None]


class NonFiniteLoss(FloatingPointError):
    """The loss became NaN or infinite. `program` holds the best state before it."""

    def __init__(self, message: str, program: Program):
        super().__init__(message)
        self.program = program


def fit_stage(
    program: Program,
    data: xr.Dataset | Float[Array | np.ndarray, "obs *event"] | Source,
    stage: Stage,
    *,
    key: Key[Array, ""],
    held_out: xr.Dataset | Float[Array | np.ndarray, "obs *event"] | Source | None = None,
    name: str = "fit",
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    callback: Callback | None = None,
) -> tuple[Program, History]:
    """Run one stage of a fit: the program with its averaged weights, and the log. For users: `sami_ppl.fit`.

    `data`: observations x, as an array or a Dataset, which holds the variables that the prior takes too; of one whose
    `split` has both parts, the test part is left alone. `held_out`: observations for validation (default: the last
    tenth of what is left, which is then not trained on). With `out`, checkpoints go to `out/checkpoints/name` and the
    log to `out/log.jsonl`; with `resume`, the run continues from the latest checkpoint, which must be of the same
    stage, data, noise levels and prior. Checkpoints are written at validations, every two minutes between them, and
    when Ctrl-C or SIGTERM stops the fit. `callback` receives every record of the log. In the context `data_parallel`
    batches are split over devices; of several processes, the first writes.

    Raises what `Stage.check` raises, ValueError for a single observation without `held_out`, CheckpointError for a
    checkpoint of another run or, without `resume`, for any, NonFiniteLoss, which names the site, and Interrupted; these
    two carry the best program so far. StreamError for rows that cannot be read, after a checkpoint.
    """
    if not parallel.is_first_process():
        out, progress = None, False
    loop = Loop(program, stage, *_parts(data, held_out), key=key, name=name, callback=callback)
    with progress_bar(loop.steps, name, show=progress, unit="step") as bar:
        state = loop.init(None if out is None else Path(out), resume=resume)
        bar.initial = bar.n = int(state.step)
        if not loop.goes_on(state):
            bar.set_postfix_str("done before")
        with stop_requests() as stopped:
            try:
                while loop.goes_on(state) and not stopped:
                    before = state
                    state = loop.run_block(before)
                    bar.update(int(state.step) - int(before.step))
                    if loop.is_validated(state):
                        if not loop.history.stage_records():
                            bar.set_postfix_str("compiling what looks at held-out observations")
                        state = loop.validate(state)
                        bar.set_postfix_str(summary_line(loop.history.records[-1]))
                    elif time.monotonic() - loop.kept > KEPT_EVERY:
                        loop.keep(state)
            except KeyboardInterrupt:  # a second signal, or one that the caller handles
                stopped.append(signal.SIGINT)
            except StreamError as error:
                loop.keep(state)
                raise loop.unreadable(state, error) from error
            finally:
                loop.feed.close()
    if stopped:
        loop.keep(state)
        raise loop.interrupted(state, stopped[0])
    return loop.close(state)


def _parts(data: Any, held_out: Any) -> tuple[Any, Any]:
    """Observations to train on, and those for validation. Raises ValueError where none is left to train on."""
    data = training_part(as_data(data))
    if held_out is not None:
        return data, as_data(held_out)
    if count_of(data) == 1:
        raise ValueError("data holds 1 observation, which is held out: give more of them, or held_out for validation")
    return parted(data)


class Loop:
    """A stage under way: its data, its log, and where it is kept."""

    def __init__(
        self,
        program: Program,
        stage: Stage,
        data: Any,
        held_out: Any,
        *,
        key: Key[Array, ""],
        name: str,
        callback: Callback | None,
    ):
        self.program, self.stage, self.name, self.callback = program, stage, name, callback
        self.count = count_of(data)
        self.steps = stage.count(self.count)
        stage.check(program, self.count)
        self.init_key, data_key, self.validation_key = jax.random.split(key, 3)
        self.seed = int(jax.random.randint(data_key, (), 0, 2**31 - 1))
        # A batch stands for the observations trained on, which are no fewer where global sites count once for all.
        most = min(VALIDATED, self.count) if program.latents.global_sites else VALIDATED
        self.tested = Batch(*program.observations(at_hand(held_out, most))).take(slice(most))
        sizes = {"seed": self.seed, "batch": stage.batch}
        self.feed: InMemory | Streamed
        if isinstance(data, Stream):
            self.feed = Streamed(program, data, **sizes, total=self.steps)
        else:
            self.feed = InMemory(Batch(*program.observations(data)), **sizes)
        # Of the steps since the last validation, by their place after it: kept with the state, as they go into the log.
        self.losses = self._no_losses(self.steps)
        self.pace = math.inf

    def _no_losses(self, steps: int) -> np.ndarray:
        return np.full(min(self.stage.validate_every, steps), np.nan, np.float32)

    def init(self, out: Path | None, *, resume: bool) -> State:
        """The first state, or, with `resume`, the latest that is kept in `out`. Raises CheckpointError."""
        ends: tuple[int, ...] = (self.steps,)
        self.checkpoints = None
        if out is not None:
            owner = signature(
                self.program, self.stage, self.feed.digest(), self.tested,
                name=self.name, steps=self.steps, observations=self.count, seed=self.seed,
            )  # fmt: skip
            self.checkpoints = Checkpoints(out / "checkpoints" / self.name, owner, resume=resume)
            ends = self.checkpoints.ends
        self.fit = Fit(self.program, self.stage, steps=ends, observations=self.count)
        state = self.fit.init(self.init_key, jax.tree.map(jnp.asarray, self.feed.first))
        if self.checkpoints is not None:
            # At its earlier end a stage was validated: there were no losses since.
            losses = self._no_losses(self.checkpoints.ends[-2]) if self.checkpoints.extended else self.losses
            found = self.checkpoints.restore((state, losses))
            if found is not None:
                state = found[0]
                self.losses = self.losses if self.checkpoints.extended else np.array(found[1])
        devices = self.fit.devices
        state = parallel.place(parallel.from_first_process(state), devices)
        self.tested = parallel.replicate(jax.tree.map(jnp.asarray, self.tested), devices)
        self.feed.place(devices)
        log = None if out is None else out / "log.jsonl"
        labelled = {site.name: site.axes for site in self.program.latents.sites if site.coords}
        self.history = History(log, keep=int(state.step), stage=self.name, axes=labelled)
        self.began, self.kept = time.perf_counter(), time.monotonic()
        return state

    def goes_on(self, state: State) -> bool:
        """Whether there are steps left, and patience."""
        patience = self.stage.patience
        return int(state.step) < self.steps and (patience is None or int(state.waited) < patience)

    def run_block(self, state: State) -> State:
        """The steps up to the next look at the losses. Raises NonFiniteLoss."""
        step, every, began = int(state.step), self.stage.validate_every, time.monotonic()
        # The first block is a single step, which is compiled, so that the next ones know how long a step takes.
        count = min(BLOCK, self.steps - step, every - step % every, max(1, int(BLOCK_SECONDS / self.pace)))
        after, losses = self.fit.run_block(state, self.feed.steps(step, count))
        self.pace = max(time.monotonic() - began, 1e-9) / count
        self.losses[step % every :][:count] = losses
        if not np.all(np.isfinite(losses)):
            failed, sites = self._first_not_finite(state, count)
            raise self._non_finite(f"the loss is not finite at step {step + failed}; sites not finite: {sites}", after)
        return after

    def validate(self, state: State) -> State:
        """Look at the held-out observations: log what is found, remember the best state. Raises NonFiniteLoss."""
        step = int(state.step)
        record = self.fit.record(state.average, self.tested, self.validation_key)
        loss = record["loss"]
        if not math.isfinite(loss):
            sites = not_finite({**record["kl"], **record.get("penalties", {})}) or "'x'"
            where = f"at step {step}; sites not finite: {sites}"
            raise self._non_finite(f"the loss of the held-out data is not finite {where}", state)
        state = remember_best(self.fit.devices, state, loss)
        found = {"step": step, "train_loss": float(np.nanmean(self.losses)), "beta": float(self.stage.beta_at(step)),
                 "seconds": time.perf_counter() - self.began}  # fmt: skip
        self.losses[:] = np.nan
        self.history.add({**found, **record})
        self._save(state, loss)
        if self.callback is not None:
            self.callback(self.history.records[-1])
        return state

    def is_validated(self, state: State) -> bool:
        """Whether the held-out observations are looked at after this step."""
        return int(state.step) % self.stage.validate_every == 0 or int(state.step) == self.steps

    def keep(self, state: State) -> None:
        """A checkpoint between two validations, which write their own: a state before one would go on without it."""
        if not self.is_validated(state):
            self._save(state, None)

    def interrupted(self, state: State, number: int) -> Interrupted:
        """What a stopped fit raises."""
        if self.checkpoints is not None:
            self.checkpoints.close()
        params = state.best if math.isfinite(float(state.best_loss)) else state.average
        kept = "resume=True goes on from there" if self.checkpoints else "nothing is kept on disk without out="
        at = f"step {int(state.step):,} of {self.steps:,}"
        return Interrupted(
            f"{self.name}: stopped at {at}; {kept}; .program holds the best so far",
            self.program.with_params(parallel.gather(params, self.fit.devices)), number,
        )  # fmt: skip

    def unreadable(self, state: State, error: StreamError) -> StreamError:
        """What a fit raises whose data cannot be read further."""
        if self.checkpoints is not None:
            self.checkpoints.close()
        kept = "mended, resume=True goes on from there" if self.checkpoints else "nothing is kept on disk without out="
        return StreamError(f"{self.name}: stopped after step {int(state.step):,} of {self.steps:,}; {kept}. {error}")

    def _save(self, state: State, loss: float | None) -> None:
        if self.checkpoints is not None:
            self.checkpoints.save(int(state.step), (state, self.losses), loss)
        self.kept = time.monotonic()

    def close(self, state: State) -> tuple[Program, History]:
        """The fitted program and the log; warns where the encoder has collapsed."""
        if self.checkpoints is not None:
            self.checkpoints.close()
        records = self.history.stage_records()
        if self.stage.has_codes and len(self.tested.x) >= JUDGED and records:
            _warn_if_collapsed(records[-1])
        # With early stopping the best state is the result; else the last, whose learning rate has come down to zero.
        params = state.average if self.stage.patience is None else state.best
        return self.program.with_params(parallel.gather(params, self.fit.devices)), self.history

    def _first_not_finite(self, state: State, count: int) -> tuple[int, str]:
        """Replay a block, one step at a time, to the step that failed: its number from 1, and its sites not finite."""
        for i, (data, rows) in enumerate(self.feed.steps(int(state.step), count), start=1):
            after, loss = self.fit.run_block(state, [(data, rows)])
            if not np.isfinite(loss[0]):
                return i, self.fit.sites_not_finite(state, data if rows is None else data.take(rows))
            state = after
        raise AssertionError("a replayed block must repeat its losses")

    def _non_finite(self, message: str, state: State) -> NonFiniteLoss:
        advice = "The best state before it is kept. Lower learning_rate or clip, or look for extreme values in the data"
        return NonFiniteLoss(
            f"{message}. {advice}", self.program.with_params(parallel.gather(state.best, self.fit.devices))
        )


def _warn_if_collapsed(record: dict[str, Any]) -> None:
    kl = [float(v) for terms in record["kl"].values() for v in np.atleast_1d(terms)]
    message = collapse_warning(kl, sum(record["shuffled"]) - sum(record["own"]))
    if message is not None:
        warnings.warn(message, CollapseWarning, stacklevel=4)
