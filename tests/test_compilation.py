"""What compiles, compiles once: the training step of a stage, and, with the cache on disk, the second run of all.

And as what: the precision of products, and what a step holds in memory.
"""

from dataclasses import replace
import os
import re
import subprocess
import sys
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sami_ppl import DiagonalEncoder, PreconditionedDenoiser, fit
from sami_ppl.decoders.training import Objective
from sami_ppl.diffusion.schedule import NoiseProposal
from sami_ppl.evidence.elbo import _passes
from sami_ppl.evidence.flow import _solve
from sami_ppl.evidence.iwae import _log_weights
from sami_ppl.fitting.objective import ScoreELBO
from sami_ppl.fitting.stage import Stage
from sami_ppl.fitting.step import Batch, Fit, Recipe
from sami_ppl.nn import ResidualMLP
from sami_ppl.runs import run as running

pytestmark = pytest.mark.slow

STAGE = Stage(steps=130, batch=8, warmup=2, validate_every=60, beta_start=0.0, beta_steps=100, train=("encoder",))
KEY = jax.random.key(3)


@pytest.fixture
def traced(monkeypatch, counted):
    """Counts the traces of a training step; validations cost nothing."""
    found = {"bound": 0.0, "loss": 1.0, "kl": {"z": [1.0]}, "unguided": [0.0], "own": [0.0], "shuffled": [9.0]}
    step = counted(Recipe.update)
    monkeypatch.setattr(Recipe, "update", lambda self, *arguments: step(self, *arguments))
    monkeypatch.setattr(Fit, "record", lambda self, params, x, key: dict(found))
    jax.clear_caches()
    return step


def train(program, stage=STAGE, **options):
    x = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    fit(program, x, stage, key=KEY, progress=False, **options)


def test_a_stage_traces_its_step_once(tiny_program, traced):
    """Blocks of 50, 10, 50, 10 and 10 steps, β from 0 to its end, two validations between."""
    train(tiny_program())
    assert traced.calls == 1


def test_a_resumed_stage_traces_its_step_once(tiny_program, traced, tmp_path):
    def stop(record):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tiny_program(), replace(STAGE, validate_every=120), out=tmp_path, callback=stop)
    train(tiny_program(), replace(STAGE, validate_every=120), out=tmp_path, resume=True)
    assert traced.calls == 1, "in the first of the two runs"


def test_what_would_trace_it_again_is_seen(tiny_program, traced):
    """The controls: a number of the state that changes its type, and a batch of another size."""
    run = Fit(tiny_program(), STAGE, steps=130)
    x, rows = jnp.ones((8, 4)), np.zeros((3, 8), np.int32)
    x = Batch(x, {})
    state = run.init(KEY, x)
    state, _ = run.run_block(state._replace(best_loss=jnp.asarray(jnp.inf)), x.steps(rows))
    state, _ = run.run_block(state._replace(best_loss=jnp.asarray(1.0, jnp.float32)), x.steps(rows))
    assert traced.calls == 2
    run.run_block(state, x.steps(rows[:, :4]))
    assert traced.calls == 3


# The cache on disk


@pytest.fixture
def settings(monkeypatch, tmp_path):
    """JAX's settings as a user has them, put back afterwards."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_CACHE_HOME", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.delenv(name, raising=False)
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)  # JAX's own; that of the tests is 0
    yield jax.config
    for name, value in before.items():
        jax.config.update(name, value)


def test_compiled_steps_are_kept_in_the_users_cache_folder(settings, monkeypatch, tmp_path):
    running.use_compilation_cache()
    assert settings.jax_compilation_cache_dir == str(tmp_path / ".cache" / "sami_ppl" / "compiled")
    assert settings.jax_persistent_cache_min_compile_time_secs == 0, "the many small programs too"
    settings.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    running.use_compilation_cache()
    assert settings.jax_compilation_cache_dir == str(tmp_path / "elsewhere" / "sami_ppl" / "compiled")


def test_without_a_cache_folder_one_line_says_so(settings, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    running.use_compilation_cache()
    monkeypatch.delenv("XDG_CACHE_HOME")

    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(running.Path, "home", nobody)
    running.use_compilation_cache()
    assert settings.jax_compilation_cache_dir is None
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("what is compiled is not kept ([Errno 20] Not a directory")
    assert second.startswith("what is compiled is not kept (Could not determine home directory.): set XDG_CACHE_HOME")


def test_the_users_own_settings_stay(settings, tmp_path):
    settings.update("jax_compilation_cache_dir", str(tmp_path / "theirs"))
    settings.update("jax_persistent_cache_min_compile_time_secs", 0.25)
    running.use_compilation_cache()
    assert settings.jax_compilation_cache_dir == str(tmp_path / "theirs")
    assert settings.jax_persistent_cache_min_compile_time_secs == 0.25


def test_a_least_time_of_the_users_stays(settings, monkeypatch):
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "2.5")
    settings.update("jax_persistent_cache_min_compile_time_secs", 2.5)  # as JAX does when it is imported
    running.use_compilation_cache()
    assert settings.jax_persistent_cache_min_compile_time_secs == 2.5


CACHED = """
import jax
from sami_ppl.runs.run import use_compilation_cache
use_compilation_cache()
jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((3, 3)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("theirs", [False, True])
def test_what_is_compiled_is_found_there(tmp_path, theirs):
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "xdg")}
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        environment.pop(name, None)
    if theirs:
        environment["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "theirs")
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    found = subprocess.run([sys.executable, "-c", CACHED], env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    expected = tmp_path / "theirs" if theirs else tmp_path / "xdg" / "sami_ppl" / "compiled"
    assert any(expected.iterdir())
    assert (tmp_path / "xdg" / "sami_ppl").exists() != theirs


ONE = """
import jax
print(jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((3, 3)))[0, 0])
"""


def test_half_an_entry_of_the_cache_is_compiled_again(tmp_path):
    """A killed process leaves it, or another is still writing it: a warning, which no test takes for an error."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
    errors = []
    for _ in range(2):
        found = subprocess.run(
            [sys.executable, "-c", ONE], env=environment, capture_output=True, text=True, check=False
        )
        assert found.returncode == 0, found.stderr
        assert found.stdout == "4.0\n"
        errors.append(re.findall(r"UserWarning: (Error reading persistent compilation cache .*)", found.stderr))
        for entry in tmp_path.glob("*-cache"):
            entry.write_bytes(entry.read_bytes()[: entry.stat().st_size // 2])
    assert not errors[0]
    assert errors[1]
    warnings.warn(errors[1][0], UserWarning, stacklevel=1)


def test_products_of_the_evidence_are_of_full_precision_on_every_device(tiny_program):
    """GPUs multiply float32 in TF32 unless told otherwise, which moves the bound of fitted disks by .0013 nats."""
    program, x, key = tiny_program(), jnp.zeros((2, 4)), jax.random.key(0)
    proposal = NoiseProposal(program.denoiser.schedule)
    passes = (
        eqx.filter_make_jaxpr(_passes)(program, proposal, x, {}, key, 2),
        eqx.filter_make_jaxpr(_log_weights)(program, proposal, x, {}, key, 2, 2),
        eqx.filter_make_jaxpr(_solve)(program.denoiser, x, jax.random.split(key, 2), True, 1, 1e-3),
    )
    for jaxpr, *_ in passes:
        products, full = (str(jaxpr).count(text) for text in ("= dot_general[", "precision=(Precision.HIGHEST"))
        assert products == full > 0


def test_a_decoupled_step_does_not_hold_both_networks(tiny_program):
    """It needs less memory than one against a frozen denoiser, whose gradient is done before the encoder starts.

    Without the barrier of `own_noise` it takes 1.16 times as much, joint training 1.40 times; and the clean pass is
    taken again, not held.
    """
    tiny = tiny_program()
    size, schedule = {"width": 64, "depth": 6, "key": KEY}, tiny.denoiser.schedule
    denoiser = PreconditionedDenoiser(ResidualMLP((4,), (4,), **size), schedule, (4,))
    encoder = DiagonalEncoder(ResidualMLP((4,), (8,), **size), schedule, (4,), tiny.latents.size, key=KEY)
    program, x = tiny.replace(denoiser=denoiser, encoder=encoder), np.zeros((512, 4), np.float32)

    def held(kind):
        arguments = (program.model, program.guide, x)
        terms = lambda params: ScoreELBO().terms(KEY, params, *arguments, objective=Objective(kind))  # noqa: E731
        loss = lambda params: jnp.sum(terms(params)["x"])  # noqa: E731
        return jax.jit(jax.grad(loss)).lower(program.params()).compile().memory_analysis().temp_size_in_bytes

    assert held("own") < 0.85 * held("none")
    assert held("guided") > 1.2 * held("none")
