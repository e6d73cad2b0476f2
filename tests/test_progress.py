"""What people see while they wait: phases with their times, bars, and nothing where nobody asked."""

import os

import jax
import pytest

from sami_ppl._util import progress
from sami_ppl._util.progress import advance, duration, phase, progress_bar, say, telling
from sami_ppl.fitting.header import header


@pytest.fixture
def clock(monkeypatch):
    """`clock[0]` is the time in seconds."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_phase_is_one_line_with_its_time(capsys, clock):
    with telling(True), phase("reading data"):
        assert capsys.readouterr().err == "reading data … ", "before it is waited for"
        clock[0] += 12.4
    assert capsys.readouterr().err == "12 s\n"


def test_lines_do_not_run_into_each_other(capsys, clock):
    """What is said within a phase has lines of its own, and then so has the time."""
    with telling(True), phase("outer"):
        say("a remark")
        with phase("inner"):
            clock[0] += 1
    assert capsys.readouterr().err == "outer … \na remark\ninner … 1.0 s\nouter: 1.0 s\n"
    with telling(True), pytest.raises(ValueError, match="wrong"), phase("failing"):
        raise ValueError("wrong")
    with telling(True), phase("with a bar"), progress_bar(2, "bar") as bar:
        bar.update(2)
    assert capsys.readouterr().err.startswith("failing … \nwith a bar … \n")


def test_nobody_asked(capsys):
    with telling(True), telling(False), phase("reading"), progress_bar(3, "fit") as bar:
        say("a remark")
        advance(1, 3)
        bar.update()
    with phase("reading"), progress_bar(3, "fit"):
        say("outside of what is told")
    assert capsys.readouterr() == ("", "")


def test_a_long_phase_says_how_far_it_is(capsys, clock):
    with telling(True), phase("bound"):
        for done in range(1, 5):
            clock[0] += 6
            advance(done, 4)
        clock[0] += 20
        advance(1, 4)
    assert capsys.readouterr().err == "bound … 50% 44 s\n", "what another loop has done is no share of the phase"


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.6, "1 min 0 s"), (226, "3 min 46 s")]
)
def test_times_in_words(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize(("notebook", "seconds"), [(True, 1.0), (False, 20.0)])
def test_bars_of_notebooks_move_in_place(monkeypatch, notebook, seconds):
    """Files get a line every twenty seconds."""
    monkeypatch.setattr(progress, "in_notebook", lambda: notebook)
    with progress_bar(3, "fit", show=True) as bar:
        assert bar.mininterval == seconds


def test_a_bar_says_that_it_compiles_until_it_moves(capsys):
    with telling(True), progress_bar(3, "fit", unit="step") as bar:
        assert "0/3" in (said := capsys.readouterr().err)
        assert "compiling" in said
        bar.update(2)
        bar.refresh()
        assert "2/3" in (said := capsys.readouterr().err)
        assert "compiling" not in said


def test_a_fit_begins_with_what_is_fitted_to_what(tiny_program):
    """And with what is written, or that nothing is."""
    program = tiny_program()
    lines = header(
        program, {"denoiser": 2500, "encoder": 6}, observations=14_400, held_out=5, out="runs/a"
    ).splitlines()
    assert lines[0] == f"device: CPU ({os.cpu_count()} cores)"
    assert lines[1] == "data: 14,400 observations to fit, 5 held out, of feature 4"
    weights = {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in program.params().items()}
    denoiser, encoder = (f"{name} {weights[f'{name}$params']:,}" for name in ("denoiser", "encoder"))
    assert {*lines[2].removeprefix("parameters: ").split(", ")} == {denoiser, encoder}
    assert lines[3] == "stages: denoiser (2,500 steps), encoder (6 steps)"
    assert lines[4].startswith("checkpoints and log: runs/a/checkpoints, ".replace("/", os.sep))
    nowhere = header(program, {"fit": 1}, observations=2, held_out=1, out=None)
    assert nowhere.endswith("nothing is written: give out= to go on after an interruption")
