"""Data parallelism: the same fit on any number of devices and processes."""

import os
from pathlib import Path
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

import sami_ppl as sp
from sami_ppl._util import parallel
from sami_ppl._util.parallel import join_processes

SCRIPT = Path(__file__).with_name("parallel_fit.py")
STEPS = 30


def start(target, devices, *, virtual=1, steps=STEPS, folder=None, **environment):
    """The script in a process that sees `virtual` CPU devices."""
    settings = {
        **os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={virtual}",
        "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(SCRIPT.parent), **environment,
    }  # fmt: skip
    command = [sys.executable, SCRIPT, target, str(devices), str(steps), *([folder] if folder else [])]
    return subprocess.Popen(command, env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(*processes):
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output[-3000:]


def processes(folder, targets, **options):
    """The script as several processes on loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        start(
            target, "processes", folder=folder, JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}",
            JAX_NUM_PROCESSES=str(len(targets)), JAX_PROCESS_ID=str(i), **options,
        )
        for i, target in enumerate(targets)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The fit without any mesh."""
    target = tmp_path_factory.mktemp("plain") / "plain.npz"
    finish(start(target, 0))
    return np.load(target)


def same(found, expected, tolerance):
    arrays = [name for name in expected.files if name.startswith("arr_")]
    assert len(arrays) > 4
    return all(np.allclose(found[name], expected[name], rtol=tolerance, atol=tolerance) for name in arrays)


@pytest.mark.slow
@pytest.mark.release
@pytest.mark.parametrize("devices", [1, 2, 8])
def test_same_loss_on_any_number_of_devices(devices, plain, tmp_path):
    """Losses, validation bounds and parameters after 30 steps agree to 1e-4 in float32."""
    target = tmp_path / "split.npz"
    finish(start(target, devices, virtual=8))
    found = np.load(target)
    np.testing.assert_allclose(found["train_loss"], plain["train_loss"], rtol=1e-5)
    np.testing.assert_allclose(found["bound"], plain["bound"], rtol=1e-4)
    assert same(found, plain, 1e-4)


@pytest.mark.slow
@pytest.mark.release
def test_two_processes_fit_what_one_does(plain, tmp_path):
    """Both hold the parameters of a single process; the first alone writes; a run goes on from its checkpoint."""
    targets = [tmp_path / "first.npz", tmp_path / "second.npz"]
    folder = tmp_path / "run"
    finish(*processes(folder, targets, steps=STEPS))
    first, second = map(np.load, targets)
    assert first["processes"] == second["processes"] == 2
    assert bool(first["first"])
    assert not bool(second["first"])
    assert same(first, plain, 1e-4)
    assert same(second, first, 0.0)
    assert len((folder / "log.jsonl").read_text().splitlines()) == STEPS // 10
    np.testing.assert_allclose(first["bound"], plain["bound"], rtol=1e-4)

    again = [tmp_path / "again.npz", tmp_path / "too.npz"]
    finish(*processes(folder, again, steps=STEPS))
    resumed = [np.load(file) for file in again]
    assert all(same(found, first, 0.0) for found in resumed), "the end of the run comes back in both processes"


@pytest.mark.slow
@pytest.mark.release
def test_the_comparison_can_fail(tmp_path):
    """Negative control: another number of steps gives other parameters."""
    target = tmp_path / "short.npz"
    finish(start(target, 2, virtual=2, steps=10))
    longer = tmp_path / "long.npz"
    finish(start(longer, 2, virtual=2, steps=20))
    assert not same(np.load(target), np.load(longer), 1e-4)


def test_wrong_numbers_of_devices_name_the_remedy(tiny_program):
    with pytest.raises(ValueError, match=r"devices must lie between 1 and \d+.*xla_force_host_platform_device_count"):
        sp.data_parallel(1000).__enter__()
    with pytest.raises(ValueError, match="devices must lie between"), sp.data_parallel(0):
        pass


@pytest.mark.slow
def test_a_batch_must_divide(tiny_program, monkeypatch):
    class Mesh:
        size = 3

    monkeypatch.setattr(parallel, "current_mesh", Mesh)
    with pytest.raises(ValueError, match=r"a batch of 8 cannot be split evenly over 3 devices: set batch=9"):
        sp.fit(tiny_program(), np.zeros((50, 4), np.float32), sp.Stage(steps=2, batch=8), key=jax.random.key(0))


def test_half_a_cluster_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    monkeypatch.delenv("JAX_NUM_PROCESSES", raising=False)
    with pytest.raises(ValueError, match="lacks JAX_NUM_PROCESSES, JAX_PROCESS_ID"):
        join_processes()
