"""The steps of a stage: what is compiled is shared, what is fitted can be forgotten, what decays; noise proposals."""

from dataclasses import replace
import gc
import logging
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
import pytest
from scripted_fits import ALONE, KEY, STAGE

from sami_ppl import ScoreDecoder, VariancePreserving, fit
from sami_ppl.decoders.training import Objective
from sami_ppl.diffusion.schedule import NoiseLevels, NoiseProposal
from sami_ppl.fitting.step import Batch, Fit

X = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)


@pytest.mark.slow
def test_a_second_fit_compiles_nothing(tiny_program, fill, caplog):
    """Other weights, data and key of the same structure, sizes and stage; the control is another stage."""

    def compiled(program, x, stage, key):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            fit(program, x, stage, key=key, progress=False)
        return sum(record.getMessage().startswith("Compiling ") for record in caplog.records)

    first, other = tiny_program(), tiny_program()
    other = other.replace(denoiser=fill(other.denoiser))
    assert compiled(first, X, ALONE, KEY) > 0
    assert compiled(other, 1 - X, replace(ALONE), jax.random.key(5)) == 0
    assert compiled(other, X, replace(ALONE, discount=0.5), KEY) > 0


@pytest.mark.slow
def test_what_is_compiled_holds_no_weights(tiny_program):
    """A fit and the arrays of its program are forgotten, while the compiled step stays."""
    program, data = tiny_program(), Batch(jnp.asarray(X), {})
    run = Fit(program, ALONE, steps=6)
    state = run.init(KEY, data)
    state, _ = run.run_block(state, data.steps(np.zeros((2, 8), np.int32)))
    run.record(state.average, data, KEY)
    recipe, held = run.recipe, [weakref.ref(run), weakref.ref(program.denoiser.network.inner)]
    del program, run, state
    gc.collect()
    assert [ref() for ref in held] == [None, None]
    assert Fit(tiny_program(), replace(ALONE), steps=6).recipe is recipe
    assert Fit(tiny_program(), ALONE, steps=7).recipe is not recipe, "control"


@pytest.mark.slow
def test_weight_decay_is_of_matrices_of_networks(tiny_program):
    """One step of rate r: matrices lose r · decay of themselves beside the step of Adam; all else loses nothing."""

    def learned():
        numpyro.sample("z", dist.Normal(numpyro.param("centre", jnp.ones((1, 2)))[0], 1.0).to_event(1))

    program, data = tiny_program(prior=learned), Batch(jnp.asarray(X), {})
    after = []
    for decay in (0.0, 0.1):
        run = Fit(program, replace(STAGE, weight_decay=decay, ema=0.0, train=("encoder",)), steps=1)
        state, _ = run.run_block(run.init(KEY, data), data.steps(np.arange(8, dtype=np.int32)[None]))
        after.append(run.recipe.svi(program, data).get_params(state.svi))
    matrices = 0
    before = program.params()
    for name in ("encoder$params", "denoiser$params", "centre"):
        for start, plain, decayed in zip(*map(jax.tree.leaves, (before[name], *(a[name] for a in after))), strict=True):
            lost = start.ndim > 1 and name == "encoder$params"
            matrices += lost
            expected = plain - lost * STAGE.learning_rate * 0.1 * start
            np.testing.assert_allclose(decayed, expected, rtol=0, atol=1e-6)
    assert matrices > 2


# Noise proposals


class Unweighted(Objective):
    """Negative control: levels from the proposal, weighted as if they were uniform."""

    def noise_levels(self, schedule, key, n):
        log_snr, weight = super().noise_levels(schedule, key, n)
        return NoiseLevels(log_snr, jnp.full_like(weight, schedule.span))


@pytest.mark.slow
@pytest.mark.parametrize("discount", [0.0, 0.7])
def test_a_proposal_leaves_the_expected_loss_as_it_is(tiny_program, discount):
    """Of 8 observations, 4,000 noise sets each: means within 5 standard errors (6e-7); without weights 10 beyond."""
    program, z = tiny_program(), jnp.zeros((8, 2))
    shares = (1.0, 2.0, 5.0, 3.0)

    def losses(objective, key):
        def one(key):
            decoder = ScoreDecoder(
                program.denoiser, program.encoder, z, sampler=program.sampler, key=key, objective=objective
            )
            return -decoder.log_prob(X[:8]).mean()

        return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(key, 4000)), float)

    keys = jax.random.split(KEY, 3)
    uniform, drawn = (losses(Objective("guided", discount, p), k) for p, k in zip((None, shares), keys, strict=False))
    error = np.hypot(uniform.std(), drawn.std()) / 4000**0.5
    assert abs(uniform.mean() - drawn.mean()) < 5 * error
    wrong = losses(Unweighted("guided", discount, shares), keys[2])
    assert abs(uniform.mean() - wrong.mean()) > 10 * error


def test_a_uniform_proposal_draws_the_levels_of_the_schedule():
    schedule = VariancePreserving(-4.0, 4.0)
    ours = Objective(proposal=(1.0, 1.0, 1.0)).noise_levels(schedule, KEY, 7)
    for one, other in zip(ours, schedule.stratified(KEY, 7), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_stage_takes_a_proposal(tiny_program):
    """In plain numbers, which checkpoints hold; training draws from it, validation does not."""
    proposal = NoiseProposal(VariancePreserving(-4.0, 4.0), jnp.asarray([1.0, 3.0]))
    stage = replace(ALONE, steps=2, validate_every=2, learning_rate=1e-9, proposal=proposal)
    assert stage.proposal == (0.25, 0.75)
    records = [
        fit(tiny_program(), X, one, key=KEY, progress=False)[1].records[-1]
        for one in (replace(stage, proposal=None), stage)
    ]
    assert records[0]["train_loss"] != records[1]["train_loss"]
    assert records[0]["bound"] == pytest.approx(records[1]["bound"], rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"proposal": (1.0, 0.0)}, "proposal must hold positive shares"),
        ({"proposal": ()}, "proposal must hold positive shares"),
        ({"discount": -1.0}, "discount must be at least 0, got -1.0"),
        ({"weighting": "sigmoid"}, "weighting must be one of"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0, got -1.0"),
    ],
)
def test_numbers_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        replace(STAGE, **settings)


def test_weights_of_noise_levels_in_closed_form():
    """The bound's are 1; simple ones those of a uniform time of the cosine schedule, λ = −2 log tan(πt/2), times 2π."""
    levels = jnp.linspace(-6.0, 6.0, 25)
    np.testing.assert_array_equal(Objective().weight(levels), np.ones(25))
    np.testing.assert_allclose(Objective(discount=0.7).weight(levels), np.exp(-0.7 * np.maximum(levels, 0)), rtol=1e-6)
    time = 2 / np.pi * np.arctan(np.exp(-np.asarray(levels, float) / 2))
    rate = np.abs(np.gradient(-2 * np.log(np.tan(np.pi * np.linspace(0.01, 0.99, 9801) / 2)), 1e-4))
    density = 1 / np.interp(time, np.linspace(0.01, 0.99, 9801), rate)
    inside = (time > 0.012) & (time < 0.988)
    assert inside.sum() > 15
    simple = Objective(weighting="simple")
    np.testing.assert_allclose(simple.weight(levels)[inside], 2 * np.pi * density[inside], rtol=1e-3)
    both = Objective(weighting="simple", discount=0.7)
    np.testing.assert_allclose(both.weight(levels), simple.weight(levels) * Objective(discount=0.7).weight(levels))


@pytest.mark.slow
def test_a_stage_of_simple_weighting_trains_by_it_and_reports_the_bound(tiny_program):
    """Another loss in training; what is reported is the bound, to the digit."""
    stage = replace(ALONE, steps=2, validate_every=2, learning_rate=1e-9)
    records = [
        fit(tiny_program(), X, one, key=KEY, progress=False)[1].records[-1]
        for one in (stage, replace(stage, weighting="simple"))
    ]
    assert records[0]["train_loss"] > records[1]["train_loss"], "the weight is at most 1"
    assert records[0]["bound"] == pytest.approx(records[1]["bound"], rel=1e-6)
