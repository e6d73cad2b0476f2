"""Checkpoints and the log of a fit, as files."""

import gc
import importlib.util
import json
import resource
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sami_ppl._util.history import History, read_history
from sami_ppl.fitting.checkpoint import CheckpointError, Checkpoints


def tree(value):
    return {"a": jnp.full((3,), float(value)), "key": jax.random.key(value)}


# A read that fails half way leaves coroutines of orbax's unawaited: collect them where their warnings are let be.
half_read = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning"
)


def test_latest_and_best_checkpoint_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", {"seed": 1})
    for step, loss in ((1, 5.0), (2, 1.0), (3, 4.0), (4, 3.0)):
        checkpoints.save(step, tree(step), loss)
    assert sorted(checkpoints.manager.all_steps()) == [2, 4]
    restored = checkpoints.restore(tree(0))
    assert np.array_equal(restored["a"], tree(4)["a"])
    assert np.array_equal(jax.random.key_data(restored["key"]), jax.random.key_data(tree(4)["key"]))
    checkpoints.close()


def test_no_checkpoint_yet(tmp_path):
    assert Checkpoints(tmp_path / "c", {}).restore(tree(0)) is None


@half_read
@pytest.mark.parametrize("part", ["state", "signature"])
def test_damaged_checkpoint_says_what_to_do(tmp_path, part):
    checkpoints = Checkpoints(tmp_path / "c", {"seed": 1})
    checkpoints.save(1, tree(1), 0.0)
    checkpoints.close()
    for file in (tmp_path / "c" / "1" / part).rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=r"(?s)step 1.*truncated or damaged: remove that folder") as caught:
        Checkpoints(tmp_path / "c", {"seed": 1}, resume=True).restore(tree(0))
    assert str(tmp_path / "c") in str(caught.value)
    del caught
    gc.collect()


def test_a_full_disk_is_one_error_and_no_traces(tmp_path, monkeypatch, capfd):
    """Files may have 4 kB, as on a full disk; with room again the run goes on."""
    checkpoints = Checkpoints(tmp_path / "c", {})
    state = {"a": np.random.default_rng(0).normal(size=10_000), "b": jnp.zeros(3)}
    before, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        with pytest.raises(CheckpointError, match=r"step 1 cannot be written to .*: make room") as caught:
            checkpoints.save(1, state, 0.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "File too large" in str(caught.value)
    checkpoints.close()
    assert capfd.readouterr().err == ""
    again = Checkpoints(tmp_path / "c", {}, resume=True)
    assert again.restore(state) is None
    again.save(1, state, 0.0)
    assert np.array_equal(again.restore(state)["a"], state["a"].astype(np.float32))


def test_damaged_losses_are_refused(tmp_path):
    """Orbax reads them when the folder is opened."""
    checkpoints = Checkpoints(tmp_path / "c", {})
    checkpoints.save(1, tree(1), 0.0)
    checkpoints.close()
    (tmp_path / "c" / "1" / "metrics" / "metrics").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"the checkpoint in .*c cannot be read \(.*remove that folder to"):
        Checkpoints(tmp_path / "c", {}, resume=True)


@half_read
def test_checkpoint_of_another_structure_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", {})
    checkpoints.save(1, tree(1), 0.0)
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoints.restore({"a": jnp.zeros(4), "key": jax.random.key(0)})
    gc.collect()


def test_log_is_cut_at_the_step_that_the_run_goes_on_from(tmp_path):
    file = tmp_path / "log.jsonl"
    first = History(file, stage="denoiser")
    first.add({"step": 2, "loss": np.float32(1.5), "kl": {"z": np.ones(2)}, "own": None})
    second = History(file, stage="encoder")
    for step in (2, 4, 6):
        second.add({"step": step, "loss": float(step)})
    file.write_text(file.read_text() + '{"stage": "encoder", "step": 8, "lo')
    third = History(file, keep=4, stage="encoder")
    third.add({"step": 6, "loss": 60.0})
    found = [(r["stage"], r["step"], r["loss"]) for r in map(json.loads, file.read_text().splitlines())]
    assert found == [("denoiser", 2, 1.5), ("encoder", 2, 2.0), ("encoder", 4, 4.0), ("encoder", 6, 60.0)]
    assert read_history(file)[0]["kl"] == {"z": [1.0, 1.0]}
    assert [r["step"] for r in third.stage_records()] == [2, 4, 6]


@pytest.mark.skipif(importlib.util.find_spec("tensorboardX") is None, reason="needs tensorboardX")
def test_every_number_goes_to_tensorboard(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    history = History(tmp_path / "log.jsonl", stage="encoder")
    for step in (2, 4, 6):
        history.add({"step": step, "loss": float(step), "kl": {"z": np.arange(2.0)}, "own": None})
    found = []
    for file in (tmp_path / "tensorboard" / "encoder").iterdir():
        data, at = file.read_bytes(), 0
        while at < len(data):
            # A record: length (8 bytes), checksum (4), payload, checksum (4).
            size = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + size])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            at += size + 16
    expected = [(tag, step, v) for step in (2, 4, 6) for tag, v in (("loss", step), ("kl/z/0", 0), ("kl/z/1", 1))]
    assert sorted(found) == sorted(expected)


def test_log_is_written_without_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    History(tmp_path / "log.jsonl").add({"step": 1, "loss": 2.0})
    assert [p.name for p in tmp_path.iterdir()] == ["log.jsonl"]
