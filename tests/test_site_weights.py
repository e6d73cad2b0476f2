"""Weights of single sites: β, free bits and capacity, set in one place and felt by model and guide alike."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
from numpyro.infer import Trace_ELBO, TraceMeanField_ELBO
import pytest

from sami_ppl import fit
from sami_ppl.fitting.objective import ScoreELBO
from sami_ppl.fitting.stage import Stage
from sami_ppl.fitting.step import Fit
from sami_ppl.runs.settings import configure
from sami_ppl.saving.files import UserError

pytestmark = pytest.mark.slow  # all stand on a fitted program


KEY = jax.random.key(0)
BETA = {"place": 0.5, "light": 3.0}


def prior():
    numpyro.sample("place", dist.Normal(0, 1).expand([2]).to_event(1))
    numpyro.sample("light", dist.Normal(0, 1))


@pytest.fixture
def case(tiny_program, fill):
    program = tiny_program(prior)
    program = program.replace(encoder=fill(program.encoder))
    return program, jax.random.normal(jax.random.key(1), (6, 4))


def parts(program, x, objective=None, **options):
    terms = (objective or ScoreELBO()).terms(KEY, program.params(), program.model, program.guide, x, **options)
    return {name: float(jnp.sum(term)) for name, term in terms.items()}


@pytest.mark.slow
def test_each_site_has_its_own_beta(case):
    program, x = case
    plain, weighted = parts(program, x), parts(program, x, beta=BETA)
    assert weighted["x"] == pytest.approx(plain["x"], rel=1e-6)
    for name, beta in BETA.items():
        assert weighted[name] == pytest.approx(beta * plain[name], rel=1e-5)
    one = parts(program, x, beta={"light": 3.0})
    assert one["place"] == pytest.approx(plain["place"], rel=1e-6), "sites not named keep weight 1"


@pytest.mark.slow
@pytest.mark.parametrize("objective", [Trace_ELBO, TraceMeanField_ELBO])
def test_model_and_guide_agree_on_it(case, objective):
    """Under both of NumPyro's own objectives the loss is the sum of the weighted parts; Trace_ELBO in the mean."""
    program, x = case
    loss = jax.jit(lambda key: objective().loss(key, program.params(), program.model, program.guide, x, beta=BETA) / 6)
    expected = jax.jit(lambda key: ScoreELBO().loss(key, program.params(), program.model, program.guide, x, beta=BETA))
    keys = jax.random.split(KEY, 300)
    difference = np.array([float(loss(key)) - float(expected(key)) for key in keys])
    assert abs(difference.mean()) < 5 * difference.std() / len(keys) ** 0.5 + 1e-3


def test_free_bits_and_capacity_of_single_sites(case):
    program, x = case
    plain = parts(program, x)
    floored = parts(program, x, ScoreELBO({"light": 50.0}))
    assert floored["light"] == pytest.approx(50.0)
    assert floored["place"] == pytest.approx(plain["place"])
    for capacity in (0.1, 40.0):
        drawn = parts(program, x, ScoreELBO(capacity={"place": capacity}), beta={"place": 2.0})
        assert drawn["place"] == pytest.approx(2 * abs(plain["place"] - capacity), rel=1e-4)
        assert drawn["light"] == pytest.approx(plain["light"], rel=1e-6)


def test_schedules_of_a_stage():
    stage = Stage(beta=0.4, site_beta={"light": 0.5}, capacity={"place": 6.0}, capacity_steps=4)
    weights = stage.weights_at(0, ["place", "light"])
    assert float(weights["place"]) == pytest.approx(0.4)
    assert float(weights["light"]) == pytest.approx(0.2)
    assert [float(stage.capacity_at(step)["place"]) for step in (0, 1, 3, 9)] == pytest.approx([1.5, 3.0, 6.0, 6.0])
    assert Stage(beta=0.4).weights_at(0, ["place"]) == pytest.approx(0.4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::sami_ppl.diagnostics.CollapseWarning")
def test_a_fit_feels_them(tiny_program):
    """A capacity of 3 nats holds a site's KL there, beside one without: 1.5 to 4.5 nats after 400 steps."""
    x = np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32)
    kl = {}
    for name, extra in (("free", {}), ("held", {"capacity": {"place": 3.0}, "site_beta": {"place": 20.0}})):
        stage = Stage(
            steps=400, batch=32, beta=1.0, learning_rate=1e-2, validate_every=400, train=("encoder",), **extra
        )
        _, history = fit(tiny_program(prior), x, stage, key=KEY, progress=False)
        kl[name] = float(np.sum(history.records[-1]["kl"]["place"]))
    assert 1.5 < kl["held"] < 4.5
    assert abs(kl["free"] - 3.0) > abs(kl["held"] - 3.0)


def test_wrong_names_are_refused(tiny_program):
    for extra in ({"site_beta": {"lihgt": 1.0}}, {"capacity": {"lihgt": 1.0}}, {"free_bits": {"lihgt": 1.0}}):
        with pytest.raises(ValueError, match="name lihgt, but the prior's sites are place, light"):
            Fit(tiny_program(prior), Stage(train=("encoder",), **extra), steps=3)


@dataclass(frozen=True)
class Settings:
    encoder: Stage = Stage()


def test_they_can_be_set_on_the_command_line():
    settings = {"encoder.site_beta": "{'light': 2}", "encoder.free_bits": "{'place': 0.5}"}
    found = configure(settings, {"model": Settings()})["model"].encoder
    assert found.site_beta == {"light": 2}
    assert found.free_bits == {"place": 0.5}
    with pytest.raises(UserError, match="expected dict"):
        configure({"encoder.site_beta": "2.0"}, {"model": Settings()})
