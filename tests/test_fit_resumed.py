"""The fit loop: what an interruption leaves behind, and what may go on from it."""

from dataclasses import replace
import os
import signal
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
import pytest
from scripted_fits import ALONE, KEY, same, scripted

from sami_ppl import Interrupted, TwoStage, VariancePreserving, fit
from sami_ppl._util.history import read_history
from sami_ppl.fitting import loop, plans, signature
from sami_ppl.fitting.checkpoint import CheckpointError
from sami_ppl.fitting.loop import fit_stage
from sami_ppl.fitting.stage import Stage
from sami_ppl.fitting.step import Fit


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)


# Interruption, in process


class Stop(Exception):
    pass


def stop_at(step):
    def callback(record):
        if record["step"] >= step:
            raise Stop

    return callback


@pytest.mark.slow
def test_resumed_run_is_bit_identical(tiny_program, x, monkeypatch, tmp_path):
    scripted(monkeypatch, [3.0, 1.0, 2.0] * 3)
    arguments = {"key": KEY, "progress": False}
    whole, history = fit(tiny_program(), x, ALONE, out=tmp_path / "whole", **arguments)
    with pytest.raises(Stop):
        fit(tiny_program(), x, ALONE, out=tmp_path / "cut", callback=stop_at(4), **arguments)
    resumed, again = fit(tiny_program(), x, ALONE, out=tmp_path / "cut", resume=True, **arguments)
    assert same(whole, resumed)
    keep = ("step", "train_loss", "beta")
    assert [[r[k] for k in keep] for r in again.records] == [[r[k] for k in keep] for r in history.records]
    logged = read_history(tmp_path / "cut" / "log.jsonl")
    assert [r["step"] for r in logged] == [2, 4, 6]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_between_validations_loses_no_step(tiny_program, x, monkeypatch, tmp_path, number):
    """It comes within step 3: that step is finished and kept, and the log of the resumed run is that of the whole."""
    arguments = {"key": KEY, "progress": False}
    scripted(monkeypatch, [3.0, 1.0] * 3)
    stage = replace(ALONE, validate_every=4)
    whole, history = fit(tiny_program(), x, stage, out=tmp_path / "whole", **arguments)
    step, before = Fit.run_block, [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]

    def signalled(self, state, *more):
        if int(state.step) == 2:
            os.kill(os.getpid(), number)
        return step(self, state, *more)

    monkeypatch.setattr(loop, "BLOCK", 1)
    monkeypatch.setattr(Fit, "run_block", signalled)
    with pytest.raises(KeyboardInterrupt, match=r"stopped at step 3 of 6; resume=True goes on") as stopped:
        fit(tiny_program(), x, stage, out=tmp_path / "cut", **arguments)
    monkeypatch.setattr(Fit, "run_block", step)
    assert stopped.value.signal == number
    assert not same(stopped.value.program, tiny_program()), "the steps so far"
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    assert [p.name for p in (tmp_path / "cut" / "checkpoints").iterdir()] == ["fit"], "the lock is gone"
    assert [p.name for p in (tmp_path / "cut" / "checkpoints" / "fit").iterdir()] == ["3"]
    resumed, again = fit(tiny_program(), x, stage, out=tmp_path / "cut", resume=True, **arguments)
    assert same(whole, resumed)
    assert [(r["step"], r["train_loss"]) for r in again.records] == [
        (r["step"], r["train_loss"]) for r in history.records
    ]


@pytest.mark.slow
def test_checkpoints_are_written_by_time_too(tiny_program, x, monkeypatch, tmp_path):
    scripted(monkeypatch, [3.0])
    monkeypatch.setattr(loop, "KEPT_EVERY", -1.0)
    monkeypatch.setattr(loop, "BLOCK", 2)
    kept, save = [], loop.Checkpoints.save
    monkeypatch.setattr(
        loop.Checkpoints, "save", lambda self, step, *more: (kept.append(step), save(self, step, *more))
    )
    fit(tiny_program(), x, replace(ALONE, validate_every=6), key=KEY, progress=False, out=tmp_path)
    assert kept == [1, 3, 5, 6]


def test_a_program_is_not_lost_between_two_stages(tiny_program, x, monkeypatch):
    """Ctrl-C in the warm start: the fitted denoiser is there."""
    scripted(monkeypatch, [3.0, 2.0, 1.0])

    def stop(program, *more, **options):
        reached.append(program)
        raise KeyboardInterrupt

    reached = []
    monkeypatch.setattr(plans, "warm_start", stop)
    with pytest.raises(Interrupted) as stopped:
        fit(tiny_program(), x, TwoStage(ALONE, replace(ALONE, target="joint")), key=KEY, progress=False)
    assert same(stopped.value.program, reached[0])
    assert not same(reached[0], tiny_program())


def test_one_fit_at_a_time_in_a_folder(tiny_program, x, monkeypatch, tmp_path):
    scripted(monkeypatch, [3.0, 2.0, 1.0])
    arguments = {"key": KEY, "progress": False, "out": tmp_path}

    def beside(record):
        with pytest.raises(ValueError, match=r"is in use, another process is fitting into it"):
            fit(tiny_program(), x, ALONE, resume=True, **arguments)
        refused.append(record["step"])

    refused = []
    fit(tiny_program(), x, ALONE, callback=beside, **arguments)
    assert refused == [2, 4, 6]


@pytest.mark.slow
def test_finished_run_is_not_run_again(tiny_program, x, monkeypatch, tmp_path):
    seen = scripted(monkeypatch, [3.0, 1.0, 2.0])
    arguments = {"key": KEY, "progress": False, "out": tmp_path}
    first, _ = fit(tiny_program(), x, ALONE, **arguments)
    second, history = fit(tiny_program(), x, ALONE, resume=True, **arguments)
    assert len(seen) == 3
    assert same(first, second)
    assert len(history.records) == 3
    with pytest.raises(CheckpointError, match="holds checkpoints already"):
        fit(tiny_program(), x, ALONE, **arguments)
    assert len(read_history(tmp_path / "log.jsonl")) == 3

    for changed, difference in (
        ({"stage": replace(ALONE, warmup=1)}, "warmup: 2 there, 1 here"),
        ({"stage": replace(ALONE, beta=0.3)}, "beta: 0.1 there, 0.3 here"),
        ({"key": jax.random.key(4)}, "seed: "),
        ({"stage": replace(ALONE, target="joint")}, "target: 'marginal' there, 'joint' here"),
        ({"stage": replace(ALONE, denoiser_loss="own")}, "denoiser_loss: 'guided' there, 'own' here"),
        ({"x": np.concatenate([1 - x[:45], x[45:]])}, "data: {'x': "),
        ({"x": x[:45], "held_out": -x[45:]}, "held_out: {'x': "),
        ({"program": tiny_program(laplace(0.0))}, "sites: {'z': [{'kind': 'Normal'"),
        ({"program": with_schedule(tiny_program(), -1.0)}, "schedule: 'VariancePreserving(log_snr_min=-4.0, "),
    ):
        call = {"program": tiny_program(), "x": x, "stage": ALONE, "resume": True, **arguments, **changed}
        with pytest.raises(CheckpointError, match="belongs to another run") as caught:
            fit(call.pop("program"), call.pop("x"), call.pop("stage"), **call)
        lines = str(caught.value).splitlines()
        assert difference in lines[1]
        assert len(lines) == 3, "only what differs is named"

    with pytest.raises(CheckpointError, match=r"steps: 6 there, 4 here\n.*can be made longer, not shorter"):
        fit(tiny_program(), x, replace(ALONE, steps=4), resume=True, **arguments)


@pytest.mark.slow
def test_a_finished_stage_is_made_longer(tiny_program, x, monkeypatch, tmp_path):
    """From where it ended, its learning rate once more up and down; stopped in between it goes on to the same end."""
    scripted(monkeypatch, [3.0] * 20)
    longer, arguments = replace(ALONE, steps=12), {"key": KEY, "progress": False}
    whole, cut = ({"out": tmp_path / name, **arguments} for name in ("whole", "cut"))
    short, _ = fit(tiny_program(), x, ALONE, **whole)
    fit(tiny_program(), x, ALONE, **cut)
    once, history = fit(tiny_program(), x, longer, resume=True, **whole)
    with pytest.raises(Stop):
        fit(tiny_program(), x, longer, resume=True, callback=stop_at(8), **cut)
    with pytest.raises(CheckpointError, match="steps: 12 there, 6 here"):
        fit(tiny_program(), x, ALONE, resume=True, **cut)
    with pytest.raises(CheckpointError, match=r"steps: 12 there, 14 here\n.*come to its end.*at step 8"):
        fit(tiny_program(), x, replace(ALONE, steps=14), resume=True, **cut)
    twice, _ = fit(tiny_program(), x, longer, resume=True, **cut)
    assert same(once, twice)
    assert not same(once, short)
    assert [r["step"] for r in history.records] == [2, 4, 6, 8, 10, 12]


def test_the_learning_rate_rises_once_more(tiny_program):
    """Over the steps that are added as over the first: Adam's steps for a constant gradient are the learning rate."""
    optimiser = Fit(tiny_program(), ALONE, steps=(6, 12)).recipe.optimiser()
    ones = {"denoiser$params": jnp.ones(1)}
    state, moved = optimiser.init(ones), []
    for _ in range(12):
        step, state = optimiser.update(ones, state, ones)
        moved.append(-float(step["denoiser$params"][0]))
    assert np.allclose(moved[:6], moved[6:], rtol=1e-3)
    assert np.allclose(moved[:3], [0, ALONE.learning_rate / 2, ALONE.learning_rate], rtol=1e-3)


@pytest.mark.slow
def test_a_stage_that_others_were_built_on_is_not_made_longer(tiny_program, x, tmp_path):
    """It is said before anything is done; the last one is made longer."""
    arguments = {"key": KEY, "progress": False, "out": tmp_path}
    plan = TwoStage(ALONE, replace(ALONE, target="joint", train=("encoder",)), warm_steps=0)
    fit(tiny_program(), x, plan, **arguments)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match="denoiser cannot be made longer, encoder has been fitted to it"):
        fit(tiny_program(), x, replace(plan, denoiser=replace(ALONE, steps=8)), resume=True, **arguments)
    assert sorted(tmp_path.rglob("*")) == before
    encoder = replace(plan.encoder, steps=8)
    _, history = fit(tiny_program(), x, replace(plan, encoder=encoder), resume=True, **arguments)
    assert history.records[-1]["step"] == 8


def laplace(centre):
    def prior():
        numpyro.sample("z", dist.Laplace(centre, 1.0).expand([2]).to_event(1))

    return prior


def with_schedule(program, low):
    schedule = VariancePreserving(low, 4.0)
    parts = (eqx.tree_at(lambda part: part.schedule, part, schedule) for part in (program.denoiser, program.encoder))
    denoiser, encoder = parts
    return program.replace(denoiser=denoiser, encoder=encoder)


@pytest.mark.slow
def test_a_prior_is_told_by_its_parameters_too(tiny_program):
    """And the same one, made again, is the same; a learned one is told as it begins, wherever it is by now."""
    given = Stage(steps=1, batch=8), (np.zeros((8, 4)), {}), (np.zeros((8, 4)), {})
    told = lambda program: signature.signature(program, *given)["sites"]  # noqa: E731
    laws = [told(tiny_program(laplace(centre))) for centre in (0.0, 3.0, 0.0)]
    assert laws[0] == laws[2] != laws[1]
    assert "Laplace" in str(laws[0])

    def learned():
        numpyro.sample("z", dist.Normal(numpyro.param("centre", jnp.zeros(2)), 1.0).to_event(1))

    program = tiny_program(learned)
    moved = program.replace(prior_params={"centre": jnp.ones(2)})
    assert told(moved) == told(program)


def test_data_are_told_by_every_value(x):
    whole = signature.digests(x, {"u": np.arange(50)})
    assert whole == signature.digests(x.copy(), {"u": np.arange(50)})
    other = x.copy()
    other[30, 2] = np.nextafter(other[30, 2], 1)
    assert signature.digests(other, {"u": np.arange(50)}) == whole | {"x": signature.digests(other, {})["x"]} != whole
    assert signature.digests(x, {"u": np.arange(50)[::-1]})["u"] != whole["u"]


def test_a_checkpoint_that_does_not_say_of_what_it_is_is_refused(tiny_program, x, monkeypatch, tmp_path):
    scripted(monkeypatch, [3.0, 1.0, 2.0])
    arguments = {"key": KEY, "progress": False, "out": tmp_path}
    with monkeypatch.context() as earlier:
        new = ("data", "held_out", "sites", "schedule")
        without = lambda *a, **k: {n: v for n, v in signature.signature(*a, **k).items() if n not in new}  # noqa: E731
        earlier.setitem(fit_stage.__globals__, "signature", without)
        fit(tiny_program(), x, ALONE, **arguments)
    with pytest.raises(CheckpointError, match=r"belongs to another run:\n  data: None there, \{'x': "):
        fit(tiny_program(), x, ALONE, resume=True, **arguments)


# Killed


TRAINING = """
import sys
from pathlib import Path
import jax, numpy as np
import numpyro
from numpyro import distributions as dist
from sami_ppl import DiagonalEncoder, PreconditionedDenoiser, Program, Stage, VariancePreserving, fit
from sami_ppl.data import Stream
from sami_ppl.nn import ResidualMLP

class Rows:
    def __len__(self):
        return len(x)
    def rows(self, i):
        return x[i]

def prior():
    numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))

out = Path(sys.argv[1])
keys = jax.random.split(jax.random.key(0), 3)
schedule = VariancePreserving(-4.0, 4.0)
size = {"width": 8, "depth": 1}
denoiser = PreconditionedDenoiser(ResidualMLP((4,), (4,), **size, key=keys[0]), schedule, (4,))
encoder = DiagonalEncoder(ResidualMLP((4,), (4,), **size, key=keys[1]), schedule, (4,), 2, key=keys[2])
x = np.random.default_rng(0).normal(size=(200, 4)).astype("float32")
stage = Stage(steps=int(sys.argv[2]), batch=16, validate_every=5, warmup=5)
data = {"memory": lambda: x, "stream": lambda: Stream(Rows(), chunks=10)}[sys.argv[3]]()
program, _ = fit(
    Program(prior, denoiser, encoder), data, stage, key=jax.random.key(1), out=out, resume=True, progress=False,
    callback=lambda record: print(record["step"], flush=True),
)
np.savez(out / "final.npz", *jax.tree.leaves(program.params()))
"""


@pytest.mark.slow
@pytest.mark.release
@pytest.mark.parametrize("source", ["memory", "stream"])
def test_killed_run_goes_on_bit_identically(source, tmp_path):
    if source == "stream":
        pytest.importorskip("grain", reason="needs grain: pip install 'sami_ppl[streams]'")
    steps = "100"
    script = tmp_path / "training.py"
    script.write_text(TRAINING)
    arguments = [sys.executable, str(script)]
    # What is killed may leave half an entry in the cache of compiled programs, for good: not in that of all tests.
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "compiled")

    def run(out):
        found = subprocess.run(
            [*arguments, str(out), steps, source], capture_output=True, text=True, cwd=tmp_path, env=environment
        )
        assert found.returncode == 0, found.stderr

    run(tmp_path / "whole")
    with subprocess.Popen(
        [*arguments, str(tmp_path / "cut"), steps, source], stdout=subprocess.PIPE, text=True, cwd=tmp_path,
        env=environment,
    ) as cut:  # fmt: skip
        for line in cut.stdout:
            if int(line) >= 20:
                os.kill(cut.pid, signal.SIGKILL)
                break
    assert cut.returncode == -signal.SIGKILL
    assert not (tmp_path / "cut" / "final.npz").exists(), "killed in mid-training"
    run(tmp_path / "cut")
    with np.load(tmp_path / "whole" / "final.npz") as whole, np.load(tmp_path / "cut" / "final.npz") as resumed:
        assert len(whole.files) > 10
        assert all(np.array_equal(whole[name], resumed[name]) for name in whole.files)
    logs = [[r["step"] for r in read_history(tmp_path / run / "log.jsonl")] for run in ("whole", "cut")]
    assert logs[0] == logs[1] == list(range(5, 101, 5))
