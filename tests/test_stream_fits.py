"""Fits from streams: the same as from memory, through every stage, and what is left when a row cannot be read."""

from dataclasses import replace

import jax
from jax.sharding import Mesh
import numpy as np
from numpyro import distributions as dist
import pytest
from scripted_fits import ALONE, KEY, same, scripted
import xarray as xr

import sami_ppl as sp
from sami_ppl._util.parallel import Devices
from sami_ppl.data import Stream, StreamError
from sami_ppl.fitting import loop
from sami_ppl.fitting.checkpoint import CheckpointError
from sami_ppl.fitting.feed import Reads, local_rows
from sami_ppl.fitting.parts import parted
from sami_ppl.fitting.start import told

pytest.importorskip("grain", reason="needs grain: pip install 'sami_ppl[streams]'")
X = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
HELD = X[:5]
ARGUMENTS = {"key": KEY, "progress": False, "held_out": HELD}


class Rows:
    """A source of rows, of which some may be damaged."""

    def __init__(self, x, damaged=()):
        self.x, self.damaged = x, {*damaged}

    def __len__(self):
        return len(self.x)

    def rows(self, i):
        if bad := self.damaged.intersection(i.tolist()):
            raise OSError(f"row {min(bad)} is damaged")
        return self.x[i]


@pytest.mark.slow
def test_a_stream_is_fitted_as_the_same_rows_in_memory_are(tiny_program, monkeypatch):
    """Losses and weights are equal, to the bit on this machine, for the same order; another order gives others."""
    scripted(monkeypatch, [3.0] * 9)
    inside, history = sp.fit(tiny_program(), X, ALONE, **ARGUMENTS)
    streamed, again = sp.fit(tiny_program(), Rows(X), ALONE, **ARGUMENTS)
    losses = [[record["train_loss"] for record in found.records] for found in (history, again)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)
    leaves = [jax.tree.leaves(program.params()) for program in (inside, streamed)]
    for one, other in zip(*leaves, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    other, _ = sp.fit(tiny_program(), Stream(Rows(X), chunks=5), ALONE, **ARGUMENTS)
    assert not same(streamed, other), "control"


@pytest.mark.slow
def test_a_row_that_cannot_be_read_loses_nothing(tiny_program, monkeypatch, tmp_path):
    """The fit keeps its state, names the row, and goes on to the same program once the row is mended."""
    scripted(monkeypatch, [3.0] * 9)
    monkeypatch.setattr(loop, "BLOCK", 1)
    source = Rows(X)
    whole, _ = sp.fit(tiny_program(), source, replace(ALONE, validate_every=6), **ARGUMENTS, out=tmp_path / "whole")
    stage = replace(ALONE, validate_every=6)
    damage = {}

    class Damaged(Rows):
        def rows(self, i):
            if len(i) == stage.batch and damage and damage["left"] == 0:
                raise OSError(f"row {i[3]} is damaged")
            if len(i) == stage.batch and damage:
                damage["left"] -= 1
            return self.x[i]

    damaged = Stream(Damaged(X), name="shards")
    monkeypatch.setattr("sami_ppl.fitting.feed.THREADS", 1)
    damage["left"] = 3
    with pytest.raises(StreamError, match=r"fit: stopped after step 3 of 6; mended, resume=True .* shards cannot"):
        sp.fit(tiny_program(), damaged, stage, **ARGUMENTS, out=tmp_path / "cut")
    assert [p.name for p in (tmp_path / "cut" / "checkpoints" / "fit").iterdir()] == ["3"]
    damage.clear()
    resumed, _ = sp.fit(tiny_program(), damaged, stage, **ARGUMENTS, out=tmp_path / "cut", resume=True)
    assert same(whole, resumed)


@pytest.mark.slow
def test_a_value_that_cannot_be_used_names_its_row(tiny_program, monkeypatch):
    scripted(monkeypatch, [3.0] * 9)
    x = X.copy()
    x[37, 2] = np.nan
    with pytest.raises(StreamError, match=r"row 37 of Rows cannot be used: x is NaN in it, index \(2,\)"):
        sp.fit(tiny_program(), Rows(x), replace(ALONE, steps=20), **ARGUMENTS)


@pytest.mark.slow
def test_a_run_goes_on_from_the_same_stream_alone(tiny_program, monkeypatch, tmp_path):
    scripted(monkeypatch, [3.0] * 20)
    sp.fit(tiny_program(), Stream(Rows(X)), ALONE, **ARGUMENTS, out=tmp_path)
    for other in (Stream(Rows(X + 1)), Stream(Rows(X), chunks=5), Stream(Rows(X[:-1])), X):
        with pytest.raises(CheckpointError, match="belongs to another run:\n  data"):
            sp.fit(tiny_program(), other, ALONE, **ARGUMENTS, out=tmp_path, resume=True)


def test_fewer_rows_than_a_batch_are_refused_before_the_first_step(tiny_program):
    with pytest.raises(ValueError, match="a batch of 64 needs at least as many observations for training, got 45"):
        sp.fit(tiny_program(), Rows(X), sp.Stage(batch=64), key=KEY, progress=False)
    with pytest.raises(ValueError, match=r"data hold 1 observation .*one of them is held out"):
        sp.fit(tiny_program(), Rows(X[:1]), sp.Stage(), key=KEY, progress=False)


def test_every_tenth_row_is_held_out(tiny_program):
    train, held = parted(Stream(Rows(X)))
    assert held.index.tolist() == [9, 19, 29, 39, 49]
    assert len(train) == 45


@pytest.mark.slow
def test_settings_that_suit_the_data_are_by_some_rows_of_a_stream(tiny_program, monkeypatch):
    """By all of few rows, as of the same in memory; of more no others are read."""
    x = np.random.default_rng(1).normal(size=(300, 4)).astype(np.float32)
    assert told(tiny_program(), Stream(Rows(x))) == told(tiny_program(), x)
    monkeypatch.setattr("sami_ppl.fitting.start.SOME", 30)
    asked = []

    class Asked(Rows):
        def rows(self, i):
            asked.extend(i.tolist())
            return self.x[i]

    assert told(tiny_program(), Stream(Asked(x))) == told(tiny_program(), x[np.unique(asked)])
    assert len(set(asked)) == 30
    assert max(asked) == 299, "from all over it"


@pytest.mark.slow
@pytest.mark.release
def test_two_stages_from_a_stream():
    """Construction, both stages, the warm start and the gauge, from a source and a prior of an array's program."""
    x = np.random.default_rng(1).normal(size=(300, 6)).astype(np.float32) @ np.diag([3, 1, 1, 0.2, 0.2, 0.2])
    prior = sp.factors(place=dist.Normal(0, 1).expand([2]))
    program = sp.autoencoder(prior, Rows(x), size={"width": 8, "depth": 1}, key=KEY, progress=False)
    plan = sp.TwoStage(sp.Sized(steps=20), sp.Sized(steps=20), warm_steps=10)
    fitted, history = sp.fit(
        program, Stream(Rows(x), chunks=25), plan, key=KEY, held_out=Rows(x[:30]), progress=False
    )  # fmt: skip
    assert {record["stage"] for record in history.records} == {"denoiser", "encoder"}
    assert not same(program, fitted)


@pytest.mark.parametrize("chunks", [1, 5])
def test_batches_of_several_processes_are_those_of_one(chunks):
    """Rows stored singly: each process reads its rows of the same batch. Rows stored together: those of its parts."""
    stream = Stream(Rows(X), chunks=chunks)
    settings = {"seed": 3, "names": (), "total": 4}
    whole = Reads(stream, np.arange(8), batch=8, **settings)
    if chunks == 1:
        parts = [Reads(stream, np.arange(8)[half], batch=8, **settings) for half in (slice(4), slice(4, 8))]
        for step in range(4):
            rows = [part[step][0] for part in parts]
            np.testing.assert_array_equal(np.concatenate(rows), whole[step][0])
        return
    shares = [Reads(stream.share(i, 2), np.arange(4), batch=4, **settings) for i in range(2)]
    read = [np.concatenate([share[step][0] for step in range(4)]) for share in shares]
    assert not {*(read[0] // 5)} & {*(read[1] // 5)}


def test_one_process_reads_all_rows_of_its_devices():
    np.testing.assert_array_equal(local_rows(8, Devices(Mesh(np.array(jax.devices()[:1]), ("obs",)))), np.arange(8))
    np.testing.assert_array_equal(local_rows(8, None), np.arange(8))


def test_variables_of_the_prior_come_with_their_rows(tiny_program):
    class Told(Rows):
        def rows(self, i):
            return xr.Dataset({"x": (("obs", "feature"), self.x[i]), "u": ("obs", self.x[i, 0]), "no": ("obs", i)})

    reads = Reads(Stream(Told(X)), np.arange(6), seed=0, batch=6, names=("u",), total=2)
    rows, read = reads[1]
    assert {*read} == {"x", "u"}
    np.testing.assert_array_equal(read["u"], X[rows, 0])
