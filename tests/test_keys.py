"""Random keys: whatever takes one says how to make it."""

import jax
import numpy as np
import pytest

import sami_ppl as sp
from sami_ppl._util.keys import check_key

CALLS = {
    "autoencoder": lambda key: sp.autoencoder(None, None, key=key),
    "encoder_for": lambda key: sp.encoder_for(None, None, None, (4,), key=key),
    "fit": lambda key: sp.fit(None, None, key=key),
    "warm_start": lambda key: sp.warm_start(None, None, key=key),
    "posterior": lambda key: sp.posterior(None, None, key=key),
    "generate": lambda key: sp.generate(None, key=key, size=1),
    "intervene": lambda key: sp.intervene(None, {}, key=key, size=1),
    "counterfactual": lambda key: sp.counterfactual(None, None, {}, key=key),
    "evidence_bound": lambda key: sp.evidence_bound(None, None, key=key),
    "importance_weighted_bound": lambda key: sp.importance_weighted_bound(None, None, key=key),
    "flow_log_prob": lambda key: sp.flow_log_prob(None, None, key=key),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_number_is_no_key(name):
    with pytest.raises(TypeError, match=r"got 3: write key=jax\.random\.key\(3\)"):
        CALLS[name](3)


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
