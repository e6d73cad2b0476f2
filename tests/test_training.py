"""A small training run recovers information, and the same run with one mistake in the mathematics does not.

Data x = Wz + noise of two factors in six dimensions. The denoiser is fitted first, then the encoder against it. If all
is right, an observation's own z lowers the denoising error by what the KL costs: the two sides of the bound are paid
in one currency, nats, so that the bound stays about where the denoiser alone had it. The seeds are fixed.
"""

from dataclasses import replace

import jax
import numpy as np
import numpyro
from numpyro import distributions as dist
import pytest

from sami_ppl import DiagonalEncoder, PreconditionedDenoiser, Program, Stage, VariancePreserving, fit
from sami_ppl.nn import ResidualMLP
from sami_ppl.priors.latents import Latents

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::sami_ppl.diagnostics.CollapseWarning")]

KEY = jax.random.key(11)
SIZE = {"width": 32, "depth": 1}


def prior():
    numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    weights = np.linalg.qr(rng.normal(size=(6, 2)))[0] * 2.0
    x = rng.normal(size=(2500, 2)) @ weights.T + 0.4 * rng.normal(size=(2500, 6))
    return x[:2000].astype(np.float32), x[2000:].astype(np.float32)


@pytest.fixture(scope="module")
def first_stage(data):
    """The program with its denoiser fitted, and the bound of the denoiser alone in nats."""
    keys = jax.random.split(jax.random.key(0), 3)
    schedule = VariancePreserving(-5.0, 4.0)
    denoiser = PreconditionedDenoiser(ResidualMLP((6,), (6,), **SIZE, key=keys[0]), schedule, (6,))
    encoder = DiagonalEncoder(ResidualMLP((6,), (16,), **SIZE, key=keys[1]), schedule, (6,), 2, key=keys[2])
    stage = Stage(steps=1000, batch=128, learning_rate=3e-3, validate_every=1000, ema=0.99, target="marginal")
    program = Program(prior, denoiser, encoder)
    program, history = fit(program, data[0], stage, key=KEY, held_out=data[1], progress=False)
    return program, history.records[-1]["bound"]


def second_stage(first_stage, data):
    """Nats that the own z saves against no z and against another's; the bound above that of the denoiser alone."""
    program, marginal = first_stage
    stage = Stage(steps=400, batch=128, learning_rate=3e-3, validate_every=400, beta=0.3, ema=0.99)
    _, history = fit(program, data[0], replace(stage, train=("encoder",)), key=KEY, held_out=data[1], progress=False)
    last = history.records[-1]
    own, shuffled, unguided = (float(np.sum(last[name])) for name in ("own", "shuffled", "unguided"))
    return {"saved": unguided - own, "gain": shuffled - own, "excess": last["bound"] - marginal}


def informs(found):
    return found["saved"] > 1 and found["gain"] > 10 and found["excess"] < 2


def test_own_factors_lower_the_bound(first_stage, data):
    found = second_stage(first_stage, data)
    assert informs(found), found


def flipped(monkeypatch):
    """Guidance points away from z."""
    right = DiagonalEncoder.log_prob
    monkeypatch.setattr(DiagonalEncoder, "log_prob", lambda self, z, x, lam: -right(self, z, x, lam))


def no_alpha(monkeypatch):
    """x_λ = x + σ ε in place of αx + σ ε."""
    monkeypatch.setattr(VariancePreserving, "add_noise", lambda self, x, lam, eps: x + self.sigma(lam) * eps)


def detached(monkeypatch):
    """The encoder is not told through z what its codes are worth."""
    right = Latents.to_code
    monkeypatch.setattr(Latents, "to_code", lambda self, values: jax.lax.stop_gradient(right(self, values)))


@pytest.mark.parametrize("mistake", [flipped, no_alpha, detached])
def test_a_mistake_is_seen(first_stage, data, monkeypatch, mistake):
    mistake(monkeypatch)
    jax.clear_caches()  # the step that was compiled without it
    found = second_stage(first_stage, data)
    jax.clear_caches()
    assert not informs(found), found
