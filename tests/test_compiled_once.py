"""Second calls of public functions, with arrays of the same shapes, compile nothing: other data, keys and weights."""

import logging

import jax
import numpy as np
import pytest

import sami_ppl as sp
from sami_ppl import analyses
from sami_ppl.diagnostics import information_spectrum

KEY = jax.random.key(0)
CALLS = {
    "encode": lambda program, x, key: program.encode(x),
    "posterior": lambda program, x, key: program.posterior(x, key=key, draws=4, predictive=2),
    "posterior by draws": lambda program, x, key: program.posterior(x, key=key, draws=2, predictive=0, levels=2),
    "evidence_bound": lambda program, x, key: sp.evidence_bound(program, x, key=key, levels=4, proposal="fitted"),
    "importance": lambda program, x, key: sp.importance_weighted_bound(program, x, key=key, draws=32, levels=2),
    "held_out_evidence": lambda program, x, key: sp.held_out_evidence(program, x, key=key, levels=4),
    "generate from the prior": lambda program, x, key: sp.generate(program, key=key, size=5),
    "generate from images": lambda program, x, key: sp.generate(program, key=key, x=x),
    "generate without codes": lambda program, x, key: sp.generate(program, key=key, size=5, guided=False),
    "align": lambda program, x, key: sp.align(program, x),
    "intervene": lambda program, x, key: sp.intervene(program, {"z": np.zeros(2)}, key=key, size=4),
    "warm_start": lambda program, x, key: sp.warm_start(program, x, key=key, steps=3, batch=4, progress=False),
    "nuts": lambda program, x, key: sp.refinement.nuts(program, x[:1], key=key, draws=4, warmup=3, chains=2, levels=4),
    "svi": lambda program, x, key: sp.refinement.svi(program, x[:1], key=key, draws=4, steps=3, levels=4),
    "information_spectrum": lambda program, x, key: information_spectrum(program, x, key=key, levels=3),
    "sensitivity": lambda program, x, key: analyses.sensitivity(program, x),
    "spectrum": lambda program, x, key: analyses.posterior_covariance_spectrum(program, x, key=key),
    "traverse": lambda program, x, key: analyses.traverse(program, x[0], "z[0]", key=key),
    "calibration": lambda program, x, key: sp.simulation_based_calibration(program, key=key, simulations=4, draws=5),
}  # fmt: skip


X = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)


@pytest.fixture
def compiled(caplog):
    """What a call compiles."""

    def run(name, program, x, key):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            CALLS[name](program, x, key)
        return [line for line in caplog.messages if line.startswith("Compiling ")]

    return run


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLS)
def test_a_second_call_compiles_nothing(name, tiny_program, fill, compiled):
    first, second = (fill(tiny_program(), scale) for scale in (0.5, 0.4))
    compiled(name, first, X, KEY)
    assert compiled(name, second, 1 - X, jax.random.key(1)) == []


@pytest.mark.slow
def test_other_shapes_are_compiled(tiny_program, compiled):
    """The control: it would be seen."""
    assert compiled("encode", tiny_program(), X[:3], KEY)
    assert compiled("encode", tiny_program(), X[:4], KEY)
