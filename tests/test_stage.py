"""The numbers of a stage: batches, epochs, weights, and what is refused."""

from dataclasses import replace
import re

import numpy as np
import pytest

from sami_ppl.fitting.stage import Stage, batches

STAGE = Stage(steps=6, batch=8)


def test_batches_cover_every_observation_once_an_epoch():
    epoch = batches(5, 48, 8, 0, 6)
    assert sorted(epoch.ravel()) == list(range(48))
    later = batches(5, 48, 8, 6, 6)
    assert sorted(later.ravel()) == list(range(48))
    assert not np.array_equal(epoch, later)


def test_batches_that_do_not_divide_the_data_run_on_into_the_next_epoch():
    stream = batches(5, 10, 4, 0, 10).ravel()
    assert all(sorted(stream[i : i + 10]) == list(range(10)) for i in range(0, 40, 10))


def test_batches_are_a_function_of_the_step_alone():
    whole = batches(5, 10, 4, 0, 9)
    for first, count in ((0, 3), (3, 1), (4, 5)):
        assert np.array_equal(batches(5, 10, 4, first, count), whole[first : first + count])
    assert not np.array_equal(batches(6, 10, 4, 0, 9), whole)


@pytest.mark.parametrize(
    ("epochs", "observations", "steps"), [(1, 64, 8), (3, 64, 24), (1, 65, 9), (2, 3, 1), (None, 64, 6)]
)
def test_epochs_set_the_number_of_steps(epochs, observations, steps):
    assert replace(STAGE, epochs=epochs).count(observations) == steps


def test_beta_goes_linearly_to_its_final_value():
    stage = Stage(beta=1.0, beta_start=0.2, beta_steps=4)
    assert np.allclose([stage.beta_at(i) for i in range(6)], [0.4, 0.6, 0.8, 1.0, 1.0, 1.0])
    assert np.allclose([Stage(beta=0.7).beta_at(i) for i in (0, 5)], 0.7)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0), ("batch", -1), ("learning_rate", 0.0), ("clip", -1.0), ("ema", 1.0), ("patience", 0),
        ("epochs", 0), ("free_bits", -1.0), ("free_bits", {"z": -0.5}),
    ],
)  # fmt: skip
def test_a_stage_names_the_number_that_is_wrong(name, value):
    with pytest.raises(ValueError, match=f"{name} must .*{re.escape(str(value))}"):
        Stage(**{name: value})
