"""Priors that are written alike are one, so that nothing is compiled for the second; those that differ are two."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
import pytest

from sami_ppl.priors.alike import LARGEST, first_alike

SCALE = 1.0


def scaled(scale=1.0, table=(0.0, 1.0), size=2):
    def helper():
        return SCALE * scale

    shifts = jnp.asarray(table)

    def prior(shift=0.0):
        numpyro.sample("z", dist.Normal(shifts + shift, helper()).expand([size]).to_event(1))

    return prior


def test_a_prior_that_is_defined_again_is_the_first():
    first = first_alike(scaled())
    assert first_alike(first) is first
    assert first_alike(scaled()) is first
    assert first_alike(scaled(table=[0.0, 1.0])) is first


OTHERS = {
    "a number": lambda: scaled(scale=2.0),
    "a number of another type": lambda: scaled(scale=1),
    "an array": lambda: scaled(table=(0.0, 2.0)),
    "a size": lambda: scaled(size=3),
    "code": lambda: lambda shift=0.0: numpyro.sample("z", dist.Normal(shift, 1.0)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_differs_stays_apart(name):
    first, other = first_alike(scaled()), OTHERS[name]()
    assert first_alike(other) is other
    assert other is not first


def test_a_global_that_changes_makes_another_prior(monkeypatch):
    first = first_alike(scaled())
    monkeypatch.setattr(f"{__name__}.SCALE", 3.0)
    other = scaled()
    assert first_alike(other) is other
    monkeypatch.undo()
    assert first_alike(scaled()) is first


def test_a_variable_that_changes_behind_a_prior_is_seen():
    """The first one of a loop is no longer what it was: its variable is that of the last."""

    def loop():
        made = []
        for scale in (5.0, 6.0):

            def prior():
                numpyro.sample("z", dist.Normal(0, scale))  # noqa: B023

            made.append(first_alike(prior))
        return made

    first, second = loop()
    again = loop()
    assert first is not second
    assert again[0] is not first, "it would have the scale 6"


def test_large_arrays_and_other_objects_are_like_themselves_alone():
    large = np.zeros(LARGEST + 1, np.uint8)

    def reading(values):
        return lambda: numpyro.sample("z", dist.Normal(values[0], 1.0))

    first = first_alike(reading(large))
    assert first_alike(reading(large)) is first
    assert first_alike(reading(large.copy())) is not first
    assert first_alike(reading({1: object()})) is not first_alike(reading({1: object()}))
    assert first_alike(len) is len


@pytest.mark.slow
def test_programs_of_priors_written_alike_have_one_structure(tiny_program):
    programs = [tiny_program(scaled(scale=0.5, table=(0.0, 0.0))) for _ in range(2)]
    assert jax.tree.structure(programs[0]) == jax.tree.structure(programs[1])
    assert programs[0].latents is programs[1].latents
    assert jax.tree.structure(programs[0]) != jax.tree.structure(tiny_program(scaled(scale=0.25, table=(0.0, 0.0))))
