"""Random keys: whatever takes one says how to make it."""

import inspect

import jax
import numpy as np
import pytest

import sami_ppl as sp
from sami_ppl import evidence, nn
from sami_ppl._util.keys import check_key


def public():
    """Functions, and classes by their constructors, that a folder of the library exports and that take a `key`.

    Not families, whose keys an encoder splits off its own.
    """
    folders = [
        sp,
        *(module for name in dir(sp) if inspect.ismodule(module := getattr(sp, name)) and name != "families"),
    ]
    named = {(folder.__name__, name): getattr(folder, name) for folder in folders for name in dir(folder)}
    for (folder, name), value in named.items():
        if name.startswith("_") or not callable(value) or not value.__module__.startswith("sami_ppl"):
            continue
        if isinstance(value, type) and issubclass(value, BaseException):
            continue
        parameters = inspect.signature(value).parameters
        if "key" in parameters and value not in EXCEPTIONS:
            yield pytest.param(value, parameters, id=f"{folder}.{name}")


EXCEPTIONS = {
    sp.ScoreDecoder,  # takes several
    nn.CodeEmbedding,  # parts of a network, whose key is split
    nn.NoiseEmbedding,
    evidence.importance_proposal,  # looks at the data first
}


@pytest.mark.parametrize(("function", "parameters"), list(public()))
def test_a_number_is_no_key(function, parameters):
    """Said before anything else is looked at: everything beside it is None."""
    needed = {name: None for name, p in parameters.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD}
    by_place = [needed.pop(n) for n, p in parameters.items() if p.kind is p.POSITIONAL_ONLY and n in needed]
    with pytest.raises(TypeError, match=r"got 3: write key=jax\.random\.key\(3\)"):
        function(*by_place, **(needed | {"key": 3}))


def test_a_key_is_no_seed():
    with pytest.raises(TypeError, match=r"whole number as seed.*write seed=0"):
        sp.align(None, None, seed=jax.random.key(0))


def test_keys_of_both_kinds_and_nothing_else():
    for key in (jax.random.key(0), jax.random.PRNGKey(0)):
        check_key(key)
        jax.jit(check_key)(key)
    with pytest.raises(TypeError, match=r"got \(2,\) of them: write key=keys\[0\]"):
        check_key(jax.random.split(jax.random.key(0)))
    for wrong in (None, np.zeros(2), "0", True):
        with pytest.raises(TypeError, match=r"write key=jax\.random\.key\(0\)"):
            check_key(wrong)


def test_a_part_by_itself_is_named_with_the_call_to_write():
    with pytest.raises(ValueError, match=r"got 'encoder': write train=\('encoder',\)"):
        sp.Stage(train="encoder")
