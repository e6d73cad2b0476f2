"""Fits a program by stochastic variational inference: the loop around NumPyro's `SVI`.

`Fit` is one stage: which of the program's NumPyro models is fitted, which networks are trained, with which optimiser.
`fit_stage` runs it: mini-batches, validation, progress, checkpoints, early stopping. Every step is a function of the
state and of the step's number alone, so that an interrupted run continues bit for bit.
"""

from collections.abc import Callable
from copy import copy
from functools import partial
import math
from pathlib import Path
import time
from typing import Any, Literal, NamedTuple, get_args
import warnings

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpy as np
from numpyro import handlers
from numpyro.infer import SVI
import optax
import xarray as xr

from sami_ppl._util import parallel
from sami_ppl._util.history import History, progress_bar, summary_line
from sami_ppl.data.checks import training_part
from sami_ppl.diagnostics.collapse import CollapseWarning, collapse_warning
from sami_ppl.diagnostics.gain import NoiseErrors, noise_errors
from sami_ppl.fitting.checkpoint import Checkpoints
from sami_ppl.fitting.objective import ScoreELBO
from sami_ppl.fitting.signature import signature
from sami_ppl.fitting.stage import Stage, batches
from sami_ppl.nn.unet import outside_loops
from sami_ppl.priors.read import Given
from sami_ppl.program.program import NETWORKS, Program

Target = Literal["marginal", "joint"]
PARTS = (*NETWORKS, "prior")
"""What `train` may name. The parameters of the prior are trained with the encoder, or by themselves."""
BLOCK = 50
"""Steps between two looks at the losses: the host does not wait for the device within a block."""
VALIDATED = 512
"""Held-out observations that are looked at, at most."""
JUDGED = 8
"""Held-out observations from which a collapse is told, at least: a shuffled z must be another's."""


class Batch(NamedTuple):
    """Observations, and the variables that the prior takes."""

    x: Any
    given: Given

    def take(self, rows: Any) -> "Batch":
        """Single observations."""
        return jax.tree.map(lambda leaf: leaf[rows], self)


class State(NamedTuple):
    """Everything that a run continues from; arrays only. `average` and `best` are parameters as SVI gives them."""

    svi: Any
    average: dict[str, Any]
    best: dict[str, Any]
    best_loss: Array
    waited: Array
    step: Array


class NonFiniteLoss(FloatingPointError):
    """The loss became NaN or infinite. `program` holds the best state before it."""

    def __init__(self, message: str, program: Program):
        super().__init__(message)
        self.program = program


def check_stage(
    program: Program,
    stage: Stage,
    observations: int | None,
    *,
    target: Target = "joint",
    train: tuple[str, ...] = NETWORKS,
) -> None:
    """Raise ValueError where a stage cannot be run on so many observations. Cheap: call it before long stages."""
    if target not in get_args(Target):
        raise ValueError(f"target must be 'joint' or 'marginal', got {target!r}")
    if not train or set(train) - set(PARTS):
        raise ValueError(f"train must name one or more of {PARTS}, got {tuple(train)}")
    if tuple(train) == ("prior",) and (target != "joint" or not program.prior_params):
        raise ValueError(
            "train=('prior',) needs target='joint' and a prior with parameters: make them in it by numpyro.param or "
            "eqx_module"
        )
    if target == "marginal" and "denoiser" not in train:
        raise ValueError(
            f"target='marginal' fits the denoiser alone, got train={tuple(train)}: leave train out, or target"
        )
    stage.check_sites(program.latents)
    if observations is None:
        if shared := ", ".join(sorted(site.name for site in program.latents.shared)):
            raise ValueError(
                f"observations must be given with global sites ({shared}): their KL counts once for all of them"
            )
    elif observations < stage.batch:
        raise ValueError(
            f"a batch of {stage.batch} needs at least as many observations for training, got {observations}: give more "
            f"data or set batch={observations}"
        )
    mesh = parallel.current_mesh()
    if mesh is not None and stage.batch % mesh.size:
        raise ValueError(
            f"a batch of {stage.batch} cannot be split evenly over {mesh.size} devices: set "
            f"batch={-(-stage.batch // mesh.size) * mesh.size}"
        )


class Fit:
    """One stage: a program, its NumPyro model and guide, the networks trained, SVI and its compiled steps.

    `target="joint"` fits the program itself, `target="marginal"` its denoiser alone as a model of x. Raises what
    `check_stage` raises.
    """

    def __init__(
        self,
        program: Program,
        stage: Stage,
        *,
        target: Target,
        train: tuple[str, ...],
        steps: int,
        observations: int | None = None,
    ):
        check_stage(program, stage, observations, target=target, train=train)
        if target == "joint" and "denoiser" not in train:
            program = program.replace(denoiser_loss="none")
        self.program, self.stage, self.target, self.steps = program, stage, target, steps
        # Only the KL of global sites, once for all observations, depends on how many a batch stands for.
        self.total = observations if program.latents.shared else None
        trained = program.replace(discount=stage.discount)
        self.model, self.guide = self._sides(trained)
        if tuple(train) == ("prior",):
            # p(x | z) does not depend on them: the KL is all there is, and the denoiser is not called.
            self.model = handlers.block(self.model, hide=["x"])
        self.sites = [site.name for site in (*program.latents.sites, *program.latents.shared)]
        self.svi = SVI(self.model, self.guide, self._optimiser(train), self.objective_at(0))
        self.mesh = parallel.current_mesh()

    def objective_at(self, step: Array | int) -> ScoreELBO:
        """The objective of a step."""
        return ScoreELBO(self.stage.free_bits, self.stage.capacity_at(step), self.stage.label_weight)

    def _sides(self, program: Program) -> tuple[Callable, Callable]:
        if self.target == "marginal":
            return program.marginal_model, program.no_guide
        return program.model, program.guide

    def _optimiser(self, train: tuple[str, ...]) -> optax.GradientTransformation:
        stage = self.stage
        warmup = max(1, min(stage.warmup, self.steps // 2))
        first = stage.learning_rate if self.steps == 1 else 0.0
        rate = optax.warmup_cosine_decay_schedule(first, stage.learning_rate, warmup, max(self.steps, warmup + 1))
        adam = optax.chain(optax.clip_by_global_norm(stage.clip), optax.adam(rate, b2=0.99))
        return optax.multi_transform(
            {"train": adam, "freeze": optax.set_to_zero()},
            lambda params: {n: "train" if {*part_of(n)} & {*train} else "freeze" for n in params},
        )

    def init(self, key: Key[Array, ""], data: Batch) -> State:
        """The state before the first step."""
        first = data.take(slice(1))
        beta = jnp.asarray(self.stage.beta)
        svi = self.svi.init(key, first.x, beta=beta, total=self.total, given=first.given)
        params = self.svi.get_params(svi)
        # Of the types that later states have, to the letter: the step would be compiled again for a weak type.
        zero = jnp.zeros((), jnp.int32)
        return State(svi, params, params, jnp.full((), jnp.inf, jnp.float32), zero, zero)

    def update(self, state: State, batch: Batch) -> tuple[State, Array]:
        """One step of SVI and of the running average of the weights."""
        svi = copy(self.svi)
        svi.loss = self.objective_at(state.step)
        beta = self.stage.weights_at(state.step, self.sites)
        after, loss = svi.update(state.svi, batch.x, beta=beta, total=self.total, given=batch.given)
        # The average forgets its start faster than later weights, so that short runs are not held back by it.
        decay = jnp.minimum(self.stage.ema, (1.0 + state.step) / (10.0 + state.step))
        average = jax.tree.map(
            lambda old, new: old + (1 - decay) * (new - old), state.average, self.svi.get_params(after)
        )
        return state._replace(svi=after, average=average, step=state.step + 1), loss

    @partial(jax.jit, static_argnums=0, donate_argnums=1)
    def step(self, state: State, data: Batch, rows: Array) -> tuple[State, Array]:
        """The step on single observations, compiled once; `state` is given away. Returns the loss too."""
        with outside_loops():
            batch = jax.tree.map(lambda leaf: parallel.split_rows(leaf, self.mesh), data.take(rows))
            return parallel.keep_whole(self.update(state, batch), self.mesh)

    def run_block(self, state: State, data: Batch, rows: np.ndarray) -> tuple[State, np.ndarray]:
        """Steps on the observations rows[0], rows[1], …, and their losses; `state` stays whole.

        The host runs ahead of the device and waits for it once, at the end.
        """
        losses, state = [], jax.tree.map(jnp.copy, state)
        for batch in rows:
            state, loss = self.step(state, data, batch)
            losses.append(loss)
        return state, np.stack(jax.device_get(losses))

    @partial(jax.jit, static_argnums=0)
    def validate(self, params: dict, data: Batch, key: Key[Array, ""]) -> tuple[dict[str, Array], NoiseErrors]:
        """Terms of the bound itself (β = 1, w = 1) and denoising errors, on held-out data with fixed noise."""
        term_key, error_key = jax.random.split(key)
        model, guide = self._sides(self.program)
        arguments: dict[str, Any] = {"total": self.total, "given": data.given}
        terms = ScoreELBO().terms(term_key, params, partial(model, levels=4), guide, data.x, **arguments)
        program = self.program.with_params(params)
        errors = noise_errors(program, data.x, error_key, guided=self.target == "joint", given=data.given)
        return parallel.keep_whole((terms, errors), self.mesh)

    @partial(jax.jit, static_argnums=0)
    def remember_best(self, state: State, loss: Array) -> State:
        """The state after a validation that found this loss."""
        better = loss < state.best_loss
        after = state._replace(
            best=jax.tree.map(partial(jnp.where, better), state.average, state.best),
            best_loss=jnp.where(better, loss, state.best_loss),
            waited=jnp.where(better, 0, state.waited + 1),
        )
        return parallel.keep_whole(after, self.mesh)

    def record(self, params: dict, data: Batch, key: Key[Array, ""]) -> dict[str, Any]:
        """What a validation finds, in nats per observation: `bound` is at β = 1, `loss` at the stage's final β."""
        terms, errors = jax.device_get(self.validate(params, data, key))
        kl = {name: term for name, term in terms.items() if name != "x"}
        total_kl = sum(float(np.sum(term)) for term in kl.values())
        weighed = sum(self.stage.beta * self.stage.site_beta.get(n, 1.0) * float(np.sum(v)) for n, v in kl.items())
        return {"bound": float(terms["x"]) + total_kl, "loss": float(terms["x"]) + weighed,
                "kl": kl, **errors._asdict()}  # fmt: skip

    def sites_not_finite(self, state: State, batch: Batch) -> str:
        """The sites whose terms are not finite in the step after `state`."""
        _, step_key = jax.random.split(state.svi.rng_key)
        beta = self.stage.weights_at(state.step, self.sites)
        params = self.svi.get_params(state.svi)
        if not all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(params)):
            return "none (the terms of the step before were finite, their gradient was not)"
        arguments: dict[str, Any] = {"beta": beta, "total": self.total, "given": batch.given}
        return not_finite(
            self.objective_at(state.step).terms(step_key, params, self.model, self.guide, batch.x, **arguments)
        )


def part_of(parameter: str) -> tuple[str, ...]:
    """The parts that a parameter is trained with; those of the prior are trained with the encoder too."""
    name = parameter.removesuffix("$params")
    return (name,) if name in NETWORKS else ("encoder", "prior")


def not_finite(terms: dict[str, Any]) -> str:
    """The names of the terms that are NaN or infinite."""
    return ", ".join(repr(name) for name, term in terms.items() if not np.all(np.isfinite(term)))


def fit_stage(
    program: Program,
    data: xr.Dataset | Float[Array | np.ndarray, "obs *event"],
    stage: Stage,
    *,
    key: Key[Array, ""],
    held_out: xr.Dataset | Float[Array | np.ndarray, "obs *event"] | None = None,
    target: Target = "joint",
    train: tuple[str, ...] = NETWORKS,
    name: str = "fit",
    out: Path | None = None,
    resume: bool = False,
    progress: bool = True,
    callback: Callable[[dict[str, Any]], None] | None = None,
) -> tuple[Program, History]:
    """Run one stage of a fit: the program with its averaged weights, and the log. For users: `sami_ppl.fit`.

    `data`: observations x, as an array or a Dataset, which holds the variables that the prior takes too; of one whose
    `split` has both parts, the test part is left alone. `held_out`: observations for validation (default: the last
    tenth of what is left, which is then not trained on). `train`: the parts that are trained; `("prior",)` fits the
    prior's parameters to the posteriors at hand, by their KL alone. With `out`, checkpoints go to
    `out/checkpoints/name` and the log to `out/log.jsonl`; with `resume`, the run continues from the latest checkpoint,
    which must be of the same stage, data, noise levels and prior. One of an earlier version does not say of which, and
    is refused. `callback` receives every record of the log. In the context `data_parallel` batches are split over
    devices; of several processes, the first writes.

    Raises what `check_stage` raises, ValueError for a single observation without `held_out`, CheckpointError for a
    checkpoint of another run or, without `resume`, for any, and NonFiniteLoss, which names the site and carries the
    best program so far.
    """
    observed = Batch(*program.observations(training_part(data)))
    cut = max(1, len(observed.x) // 10)
    tested = observed.take(slice(-cut, None)) if held_out is None else Batch(*program.observations(held_out))
    observed = observed.take(slice(None, -cut)) if held_out is None else observed
    count = len(observed.x)
    if count == 0:
        raise ValueError("data holds 1 observation, which is held out: give more of them, or held_out for validation")
    # A batch stands for the observations trained on, which are no fewer where global sites count once for all.
    tested = tested.take(slice(min(VALIDATED, count) if program.latents.shared else VALIDATED))
    steps = stage.count(count)
    run = Fit(program, stage, target=target, train=train, steps=steps, observations=count)
    if not parallel.is_first_process():
        out, progress = None, False
    init_key, data_key, validation_key = jax.random.split(key, 3)
    seed = int(jax.random.randint(data_key, (), 0, 2**31 - 1))
    state = run.init(init_key, jax.tree.map(jnp.asarray, observed.take(slice(1))))

    checkpoints = None
    if out is not None:
        owner = signature(
            program, stage, observed, tested,
            name=name, target=target, train=list(train), steps=steps, observations=count, seed=seed,
        )  # fmt: skip
        checkpoints = Checkpoints(Path(out) / "checkpoints" / name, owner, resume=resume)
        state = checkpoints.restore(state) or state
    state = parallel.replicate(parallel.from_first_process(state), run.mesh)
    observed, tested = parallel.replicate(jax.tree.map(jnp.asarray, (observed, tested)), run.mesh)
    file = None if out is None else Path(out) / "log.jsonl"
    labelled = {site.name: site.axes for site in program.latents.sites if site.coords}
    history = History(file, keep=int(state.step), stage=name, axes=labelled)

    began, losses = time.perf_counter(), []
    with progress_bar(steps, int(state.step), name, show=progress) as bar:
        while (step := int(state.step)) < steps and (stage.patience is None or int(state.waited) < stage.patience):
            block_steps = min(BLOCK, steps - step, stage.validate_every - step % stage.validate_every)
            rows = batches(seed, count, stage.batch, step, block_steps)
            before = state
            state, block = run.run_block(before, observed, rows)
            losses.append(float(block.mean()))
            bar.update(block_steps)
            if not np.all(np.isfinite(block)):
                failed, sites = _first_not_finite(run, before, observed, rows)
                raise _non_finite(
                    f"the loss is not finite at step {step + failed}; sites not finite: {sites}", program, state
                )
            if int(state.step) % stage.validate_every == 0 or int(state.step) == steps:
                record = run.record(state.average, tested, validation_key)
                if not math.isfinite(record["loss"]):
                    sites = not_finite(record["kl"]) or "'x'"
                    where = f"at step {int(state.step)}; sites not finite: {sites}"
                    raise _non_finite(f"the loss of the held-out data is not finite {where}", program, state)
                state = run.remember_best(state, record["loss"])
                record = {"step": int(state.step), "train_loss": float(np.mean(losses)),
                          "beta": float(stage.beta_at(state.step)),
                          "seconds": time.perf_counter() - began, **record}  # fmt: skip
                losses = []
                history.add(record)
                bar.set_postfix_str(summary_line(history.records[-1]))
                if callback is not None:
                    callback(history.records[-1])
                if checkpoints is not None:
                    checkpoints.save(int(state.step), state, record["loss"])
    if checkpoints is not None:
        checkpoints.close()
    judged = target == "joint" and tuple(train) != ("prior",) and len(tested.x) >= JUDGED
    if judged and history.stage_records():
        _warn_if_collapsed(history.stage_records()[-1])
    # With early stopping the best state is the result; else the last, whose learning rate has come down to zero.
    params = state.average if stage.patience is None else state.best
    return program.with_params(parallel.gather(params, run.mesh)), history


def _warn_if_collapsed(record: dict[str, Any]) -> None:
    kl = [float(v) for terms in record["kl"].values() for v in np.atleast_1d(terms)]
    message = collapse_warning(kl, sum(record["shuffled"]) - sum(record["own"]))
    if message is not None:
        warnings.warn(message, CollapseWarning, stacklevel=3)


def _first_not_finite(run: Fit, state: State, data: Batch, rows: np.ndarray) -> tuple[int, str]:
    """Replay a block, one step at a time, to the step that failed: its number from 1, and its sites not finite."""
    for i, row in enumerate(rows, start=1):
        after, loss = run.run_block(state, data, row[None])
        if not np.isfinite(loss[0]):
            return i, run.sites_not_finite(state, data.take(row))
        state = after
    raise AssertionError("a replayed block must repeat its losses")


def _non_finite(message: str, program: Program, state: State) -> NonFiniteLoss:
    advice = "The best state before it is kept. Lower learning_rate or clip, or look for extreme values in the data"
    return NonFiniteLoss(f"{message}. {advice}", program.with_params(state.best))
