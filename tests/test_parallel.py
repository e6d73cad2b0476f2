"""Data parallelism: the same fit on any number of devices and processes."""

import os
from pathlib import Path
import socket
import subprocess
import sys
from types import SimpleNamespace

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
        "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(sp.__file__).parents[1]), **environment,
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
@pytest.mark.parametrize(("devices", "others"), [(2, 1), (8, 2)])
def test_same_loss_with_parameters_in_parts(devices, others, plain, tmp_path):
    """Arrays of more than 15 numbers on two and eight devices, batches in two parts. Each holds little more than its
    share of the state, and a fit that was stopped goes on with another number of devices.
    """
    settings = {"virtual": 8, "SPLIT": "15", "ACCUMULATE": "2"}
    target, folder = tmp_path / "split.npz", tmp_path / "run"
    finish(start(target, devices, **settings, folder=folder, STOP="1"))
    assert not target.exists()
    finish(start(target, others, **settings, folder=folder))
    whole = tmp_path / "whole.npz"
    finish(start(whole, devices, **settings))
    for found in (np.load(target), np.load(whole)):
        np.testing.assert_allclose(found["train_loss"], plain["train_loss"], rtol=1e-5)
        np.testing.assert_allclose(found["bound"], plain["bound"], rtol=1e-4)
        assert same(found, plain, 1e-4)
    assert 1 / devices < float(np.load(whole)["share"][0]) < 1 / devices + 0.15
    assert float(plain["share"][0]) == 1.0


def test_large_arrays_lie_in_parts_along_their_longest_axis_that_divides():
    """Others are whole: small ones, those of which no axis divides, and all of them unless asked for."""
    mesh = jax.sharding.AbstractMesh((8,), ("obs",))
    wanted = {(64, 3, 16): (0,), (24, 64): (1,), (100, 16): (1,), (7, 99): (), (8, 8): (), (512,): (0,), (): ()}
    for shape, axes in wanted.items():
        leaf = jax.ShapeDtypeStruct(shape, np.float32)
        spec = parallel.Devices(mesh, 100).by_size(leaf).spec
        assert tuple(i for i, name in enumerate(spec) if name == "obs") == axes, shape
        assert parallel.Devices(mesh).by_size(leaf).is_fully_replicated


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
@pytest.mark.parametrize("chunk", [1, 4])
def test_two_processes_read_their_shares_of_a_stream(chunk, plain, tmp_path):
    """Of rows stored singly each reads its half of the batches of one process; else chunks that the other does not."""
    pytest.importorskip("grain", reason="needs grain: pip install 'sami_ppl[streams]'")
    targets = [tmp_path / "first.npz", tmp_path / "second.npz"]
    finish(*processes(None, targets, STREAMED=str(chunk)))
    first, second = map(np.load, targets)
    assert same(second, first, 0.0)
    assert same(first, plain, 1e-4) == (chunk == 1)
    if chunk == 1:
        assert all(len(found["asked"]) < STEPS * 16 for found in (first, second))
    else:
        shares = [{*(found["asked"] // chunk)} for found in (first, second)]
        assert len(shares[0] & shares[1]) < 10, "those that are looked at to begin with"
        assert min(map(len, shares)) > 20


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
    with pytest.raises(ValueError, match="split_above=-1: must be at least 0 numbers"):
        sp.data_parallel(1, split_above=-1).__enter__()


def test_several_processes_do_not_share_out_the_state(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(process_index=i, platform="cpu") for i in range(2)])
    with pytest.raises(ValueError, match="split_above= takes the devices of one process"):
        sp.data_parallel(split_above=10).__enter__()


@pytest.mark.slow
def test_a_batch_must_divide(tiny_program, monkeypatch):
    class Devices:
        size = 3

    monkeypatch.setattr(parallel, "current_devices", Devices)
    with pytest.raises(ValueError, match=r"a batch of 8 cannot be split evenly over 3 devices: set batch=9"):
        sp.fit(tiny_program(), np.zeros((50, 4), np.float32), sp.Stage(steps=2, batch=8), key=jax.random.key(0))


def test_half_a_cluster_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    monkeypatch.delenv("JAX_NUM_PROCESSES", raising=False)
    with pytest.raises(ValueError, match="lacks JAX_NUM_PROCESSES, JAX_PROCESS_ID"):
        join_processes()
