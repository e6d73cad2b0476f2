"""The short form of `python -m benchmarks.torture`: a few trials of each kind, none of which may fail."""

import numpy as np
import pytest

from benchmarks import torture, torture_files, torture_inputs, torture_kills, torture_markup, torture_words
from benchmarks.torture_trials import Refused, Tally, Wrong


def without_failures(tally, least):
    assert not tally.failures, tally.failures[:3]
    assert tally.trials >= least
    assert tally.refused


@pytest.mark.parametrize(("kind", "trials"), [("datasets", 60), ("settings", 150)])
def test_inputs(kind, trials, tmp_path):
    make = {"datasets": torture_inputs.datasets, "settings": torture_words.settings}[kind]
    tally = make(trials, 1, tmp_path)
    without_failures(tally, trials)
    assert tally.right


@pytest.mark.slow
def test_inputs_that_take_longer(tmp_path):
    for make, trials in ((torture_inputs.arrays, 150), (torture_words.commands, 40)):
        without_failures(make(trials, 1, tmp_path / make.__name__), trials)


@pytest.mark.slow
def test_damaged_files_of_all_kinds(tmp_path):
    tallies = torture_files.damaged_files(300, 2, tmp_path)
    assert all(tally.trials >= 2 for tally in tallies)
    assert not [failure for tally in tallies for failure in tally.failures]


@pytest.mark.slow
def test_no_code_in_files(tmp_path):
    without_failures(torture_markup.pickles(0, tmp_path), 20)


@pytest.mark.slow
@pytest.mark.release
def test_a_killed_run_is_resumed_to_the_same_results(tmp_path):
    tally = torture_kills.kills(2, 0, tmp_path)
    assert not tally.failures, tally.failures
    assert tally.right == 2


def other_error():
    raise KeyError("x is wrong")


def from_elsewhere():
    np.zeros(3).reshape(2, 2)


def raises(error):
    def call():
        raise error

    return call


@pytest.mark.parametrize(
    ("call", "ends"),
    [
        (lambda: None, "right"),
        (lambda: torture.torture_inputs.check_data(3), "refused"),
        (raises(Refused("one message")), "refused"),
        (raises(Wrong("another number")), "failed"),
        (other_error, "failed"),
        (from_elsewhere, "failed"),
    ],
)
def test_a_trial_is_told_from_its_end(call, ends):
    """A control: what is no clear error of the library counts as a failure."""
    tally = Tally("controls")
    tally.take("one", call, ("data", "x"))
    assert {"right": tally.right, "refused": tally.refused, "failed": len(tally.failures)}[ends] == tally.trials == 1


@pytest.mark.parametrize(
    ("page", "bad"),
    [
        ("<p>&lt;script&gt;</p><img src='data:image/png;base64,AA'>", False),
        ("<p><script>alert(1)</script></p>", True),
        ("<img src='x' onerror='alert(1)'>", True),
        ("<a href='javascript:alert(1)'>a</a>", True),
    ],
)
def test_a_page_with_code_is_found(page, bad):
    assert (torture_markup.unsafe(page) is not None) == bad
