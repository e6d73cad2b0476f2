"""The fit loop: what is trained, and what is kept."""

from dataclasses import replace
from functools import partial

from discrete_priors import X, two
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from scripted_fits import ALONE, KEY, STAGE, leaves, same, scripted
import xarray as xr

from sami_ppl import Matern, Program, encoder_for, fit, over_time
from sami_ppl._util import chunks
from sami_ppl.decoders.training import Objective
from sami_ppl.diagnostics import CollapseWarning
from sami_ppl.fitting.loop import NonFiniteLoss
from sami_ppl.fitting.objective import ScoreELBO
from sami_ppl.fitting.stage import Stage, batches
from sami_ppl.fitting.step import Batch, Fit


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)


# Bad input


def test_unknown_networks_are_refused():
    for train in (("decoder",), (), "encoder"):
        with pytest.raises(ValueError, match="train must name"):
            Stage(train=train)


def test_misspelt_options_are_refused():
    """None of them would have been missed: another loss or nothing at all was trained."""
    with pytest.raises(ValueError, match=r"denoiser_loss must be one of .*'none'.*, got 'frozen'"):
        Stage(denoiser_loss="frozen")
    with pytest.raises(ValueError, match="target must be 'joint' or 'marginal', got 'Marginal'"):
        Stage(target="Marginal", train=("denoiser",))
    for train in (("encoder",), ("encoder", "prior")):
        with pytest.raises(ValueError, match="target='marginal' fits the denoiser alone"):
            Stage(target="marginal", train=train)


def test_what_is_trained_is_said_by_the_stage_alone(tiny_program, x):
    """Neither program nor fit take it; the message shows the form that does."""
    for name, value in (("denoiser_loss", "own"), ("discount", 0.5)):
        form = rf"does not take {name}: .* sp.fit\(program, data, sp.Stage\({name}=...\), key=key\)"
        with pytest.raises(TypeError, match=r"Program\(\) " + form):
            tiny_program(**{name: value})
        with pytest.raises(TypeError, match=r"replace\(\) " + form):
            tiny_program().replace(**{name: value})
    for name, value in (("target", "marginal"), ("train", ("encoder",))):
        with pytest.raises(TypeError, match=rf"fit\(\) does not take {name}: .*sp.Stage\({name}=...\)"):
            fit(tiny_program(), x, STAGE, key=KEY, **{name: value})
    with pytest.raises(TypeError, match=r"fit\(\) does not take held$"):
        fit(tiny_program(), x, STAGE, key=KEY, held=x)


def test_fewer_observations_than_a_batch_are_refused(tiny_program, x):
    with pytest.raises(ValueError, match=r"batch of 8 .* got 7.*batch=7"):
        fit(tiny_program(), x[:7], STAGE, key=KEY, held_out=x[:3])
    with pytest.raises(
        ValueError, match="data hold 1 observation for training, and one of them is held out: give more"
    ):
        fit(tiny_program(), x[:1], replace(STAGE, batch=1), key=KEY)


@pytest.mark.slow
def test_a_stage_of_one_step_takes_it(tiny_program, x, monkeypatch):
    scripted(monkeypatch, [3.0])
    program, stage = tiny_program(), replace(ALONE, steps=1)
    fitted, _ = fit(program, x, stage, key=KEY, progress=False)
    assert not same(fitted.denoiser, program.denoiser)


@pytest.mark.slow
def test_the_test_part_of_split_data_is_left_alone(tiny_program, x, monkeypatch):
    """It is infinite here: neither trained on nor validated with. Data of one part only are used as they are."""
    seen = []

    def record(self, params, data, key):
        seen.append(np.asarray(data.x))
        return {"bound": 0.0, "loss": 1.0, "kl": {}, "unguided": [0.0], "own": None, "shuffled": None}

    monkeypatch.setattr(Fit, "record", record)
    part = np.where(np.arange(50) % 5 == 2, "test", "train")
    data = xr.Dataset({"x": (("obs", "feature"), np.where(part[:, None] == "test", np.inf, x)), "split": ("obs", part)})
    arguments = {"key": KEY, "progress": False}
    fitted, _ = fit(tiny_program(), data, ALONE, **arguments)
    train = data.isel(obs=part == "train")
    alone, _ = fit(tiny_program(), train.x.values, ALONE, **arguments)
    again, _ = fit(tiny_program(), train.set_coords("split"), ALONE, **arguments)
    assert same(fitted.denoiser, alone.denoiser)
    assert same(again.denoiser, alone.denoiser)
    assert all(np.array_equal(found, train.x.values[-4:]) for found in seen)


@pytest.mark.slow
@pytest.mark.parametrize(("held_out", "warned"), [(1, False), (7, False), (8, True)])
def test_a_collapse_is_told_from_several_observations_only(tiny_program, x, monkeypatch, recwarn, held_out, warned):
    """The shuffled z of a single one is its own."""
    found = {"bound": 0.0, "loss": 1.0, "kl": {"z": [1.0, 1.0]}, "unguided": [9.0], "own": [2.0], "shuffled": [2.0]}
    monkeypatch.setattr(Fit, "record", lambda self, params, data, key: found)
    fit(tiny_program(), x, replace(STAGE, steps=1), key=KEY, held_out=x[:held_out], progress=False)
    assert any(issubclass(warning.category, CollapseWarning) for warning in recwarn) == warned


# One step


@pytest.mark.slow
def test_beta_schedule_compiles_once(tiny_program, x, counted):
    program = tiny_program()
    prior = counted(program.prior)
    program = program.replace(prior=prior)
    run = Fit(program, replace(STAGE, beta_start=0.0, beta_steps=5, train=("encoder",)), steps=6)
    x = Batch(x, {})
    state = run.init(KEY, x)
    rows = np.zeros((3, 8), np.int32)
    first, _ = run.run_block(state, x.steps(rows[:1]))
    traces = prior.calls
    second, _ = run.run_block(first, x.steps(rows))
    run.run_block(second, x.steps(rows[:2]))
    assert int(second.step) == 4
    assert prior.calls == traces


def test_running_average(tiny_program, x):
    """average ← average + (1 − d)(new − average) with d = min(ema, (1 + n)/(10 + n)) at step n."""
    run = Fit(tiny_program(), replace(ALONE, ema=0.2), steps=6)
    x = Batch(x, {})
    state = run.init(KEY, x)
    svi = run.recipe.svi(run.program, x)
    expected = leaves(state.average)
    for n in range(3):
        state, _ = run.run_block(state, x.steps(np.arange(8, dtype=np.int32)[None]))
        decay = min(0.2, (1 + n) / (10 + n))
        new = leaves(svi.get_params(state.svi))
        expected = [decay * old + (1 - decay) * leaf for old, leaf in zip(expected, new, strict=True)]
        assert n == 0 or not np.allclose(new[0], expected[0], rtol=0, atol=1e-5), "the first step has rate 0"
        for found, wanted in zip(leaves(state.average), expected, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_decoupled_step_is_right_for_discrete_sites_and_missing_frames(tiny_program, mlp, fill):
    """∇_θ is that of the marginal fit where draws of z are weighed by their kind, and where frames are missing."""

    def gradient(program, model, guide, x):
        terms = lambda params: jnp.sum(ScoreELBO().terms(KEY, params, model, guide, x)["x"])  # noqa: E731
        return leaves(jax.grad(terms)(program.params())["denoiser$params"])

    tiny = tiny_program()
    encoder = encoder_for(two, mlp(4, 8, key=KEY), tiny.denoiser.schedule, (4,), key=KEY)
    kinds = Program(two, fill(tiny.denoiser), fill(encoder))
    clips = over_time(tiny.replace(denoiser=fill(tiny.denoiser)), smooth)
    sides = lambda program: (partial(side, objective=Objective("own")) for side in (program.model, program.guide))  # noqa: E731
    frames = np.random.default_rng(1).normal(size=(5, 3, 4)).astype(np.float32)
    frames[1, 2] = frames[3, 0] = np.nan
    for program, x in ((kinds, X), (clips, frames)):
        own = gradient(program, *sides(program), x)
        alone = gradient(program, program.marginal_model, program.no_guide, x)
        assert max(np.abs(leaf).max() for leaf in alone) > 1e-2
        for a, b in zip(own, alone, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def smooth():
    numpyro.sample("z", Matern(np.arange(3.0), np.full(2, 3.0)))


@pytest.mark.slow
def test_denoiser_learns_in_decoupled_training_what_it_learns_alone(tiny_program, x):
    """On the same noise: ∇_θ of the decoupled loss is that of the marginal fit, ∇_θ of the encoder's loss is zero."""
    program = tiny_program()
    key = jax.random.key(0)

    def gradient(model, guide, **arguments):
        return jax.grad(lambda params: jnp.sum(ScoreELBO().terms(key, params, model, guide, x[:8], **arguments)["x"]))(
            program.params()
        )

    marginal = gradient(program.marginal_model, program.no_guide)
    own, guided, none = (
        gradient(program.model, program.guide, objective=Objective(kind)) for kind in ("own", "guided", "none")
    )
    assert all(np.all(leaf == 0) for leaf in leaves(none["denoiser$params"]))
    assert all(np.all(leaf == 0) for leaf in leaves(marginal["encoder$params"]))
    for a, b in zip(leaves(own["encoder$params"]), leaves(guided["encoder$params"]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    # The two models draw their noise from the same place, so that the gradients can be compared sample by sample.
    for a, b in zip(leaves(own["denoiser$params"]), leaves(marginal["denoiser$params"]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert not np.allclose(leaves(guided["denoiser$params"])[0], leaves(own["denoiser$params"])[0], rtol=1e-2)


# The loop, with validations that are scripted


@pytest.mark.parametrize(("patience", "kept"), [(2, 1), (None, 5)])
def test_early_stopping_returns_the_best_state(tiny_program, x, monkeypatch, patience, kept):
    seen = scripted(monkeypatch, [3.0, 1.0, 2.0, 1.5, 0.5, 0.1])
    stage = replace(ALONE, steps=12, patience=patience)
    found = []
    fitted, history = fit(tiny_program(), x, stage, key=KEY, progress=False, callback=found.append)
    assert found == history.records
    assert all(record["stage"] == "fit" and np.isfinite(record["train_loss"]) for record in found)
    assert [record["step"] for record in found] == ([2, 4, 6, 8] if patience else [2, 4, 6, 8, 10, 12])
    assert same(fitted.params()["denoiser$params"], seen[kept]["denoiser$params"])
    assert not same(seen[1], seen[3])


@pytest.mark.slow
def test_loss_not_finite_names_the_site_and_keeps_the_best_program(tiny_program, x, monkeypatch):
    scripted(monkeypatch, [3.0, 1.0, 2.0])
    bad = x.copy()
    bad[batches_seed_row(x)] = 1e30  # whose square 32 bits do not hold
    with (
        pytest.warns(UserWarning, match="another scale"),
        pytest.raises(NonFiniteLoss, match=r"step 4; sites not finite: 'x'") as caught,
    ):
        fit(tiny_program(), bad[:45], ALONE, key=KEY, progress=False, held_out=x[45:])
    assert all(np.all(np.isfinite(leaf)) for leaf in leaves(caught.value.program))
    assert not same(caught.value.program.denoiser, tiny_program().denoiser)


def batches_seed_row(x):
    """An observation that comes up in step 4 first."""
    data_key = jax.random.split(KEY, 3)[1]
    seed = int(jax.random.randint(data_key, (), 0, 2**31 - 1))
    return batches(seed, 45, STAGE.batch, 3, 1)[0, 0]


def test_loss_of_held_out_data_not_finite_is_an_error_too(tiny_program, x, monkeypatch):
    scripted(monkeypatch, [3.0, float("nan")])
    with pytest.raises(NonFiniteLoss, match=r"held-out data is not finite at step 4") as caught:
        fit(tiny_program(), x, ALONE, key=KEY, progress=False)
    assert all(np.all(np.isfinite(leaf)) for leaf in leaves(caught.value.program))


def test_gradient_not_finite_is_told_from_terms_not_finite(tiny_program, x):
    run = Fit(tiny_program(), ALONE, steps=6)
    x = Batch(x, {})
    state = run.init(KEY, x)
    assert run.sites_not_finite(state, Batch(jnp.full((8, 4), jnp.nan), {})) == "'x'"
    svi = state.svi._replace(optim_state=jax.tree.map(lambda a: a * jnp.nan, state.svi.optim_state))
    assert "gradient" in run.sites_not_finite(state._replace(svi=svi), x.take(slice(8)))


def test_large_observations_are_looked_at_in_chunks(tiny_program, x, monkeypatch):
    """The figures are the means of those of whole chunks; a chunk holds two at least, whose codes are exchanged."""
    run = Fit(tiny_program(), STAGE, steps=6)
    tested, keys = Batch(jnp.asarray(x[:11]), {}), [KEY, jax.random.fold_in(KEY, 1)]
    params = run.init(KEY, tested).average
    parts = [run.record(params, tested.take(slice(4 * i, 4 * i + 4)), key) for i, key in enumerate(keys)]
    monkeypatch.setattr(chunks, "NUMBERS", 4 * 5)
    whole = run.record(params, tested, KEY)
    for name in ("bound", "loss", "own", "shuffled", "unguided"):
        np.testing.assert_allclose(whole[name], np.mean([part[name] for part in parts], 0), rtol=1e-5)
    monkeypatch.setattr(chunks, "NUMBERS", 4)
    assert not np.array_equal(*(run.record(params, tested, KEY)[name] for name in ("own", "shuffled")))


# Whole fits


@pytest.mark.slow
def test_encoder_stage_leaves_the_denoiser_as_it_was(tiny_program, x):
    program = tiny_program()
    fitted, history = fit(program, x, replace(STAGE, train=("encoder",)), key=KEY, progress=False)
    assert same(program.denoiser, fitted.denoiser)
    assert not any(np.array_equal(a, b) for a, b in zip(leaves(program.encoder), leaves(fitted.encoder), strict=True))
    assert len(history.records[-1]["own"]) == len(history.records[-1]["shuffled"]) == 6


@pytest.mark.slow
def test_marginal_fit_leaves_the_encoder_as_it_was(tiny_program, x):
    program = tiny_program()
    fitted, history = fit(program, x, ALONE, key=KEY, progress=False)
    assert same(program.encoder, fitted.encoder)
    assert not any(np.array_equal(a, b) for a, b in zip(leaves(program.denoiser), leaves(fitted.denoiser), strict=True))
    assert history.records[-1]["own"] is None


@pytest.mark.slow
def test_validation_reports_the_bound_whatever_is_trained(tiny_program, x):
    """At β = 1 and without discount or free bits; `loss` at the stage's own β."""
    program = tiny_program()
    stage = replace(STAGE, beta=0.25, discount=2.0, free_bits=5.0, train=("encoder",))
    run = Fit(program, stage, steps=6)
    key = jax.random.key(1)
    record = run.record(program.params(), Batch(jnp.asarray(x), {}), key)
    term_key, _ = jax.random.split(key)

    def terms(**options):
        model = partial(program.model, levels=4, **options)
        return ScoreELBO().terms(term_key, program.params(), model, program.guide, x)

    expected = terms()
    kl = float(jnp.sum(expected["z"]))
    np.testing.assert_allclose(record["bound"], float(expected["x"]) + kl, rtol=1e-5)
    np.testing.assert_allclose(record["loss"], float(expected["x"]) + 0.25 * kl, rtol=1e-5)
    assert kl > 0.1
    assert abs(float(terms(objective=Objective(discount=2.0))["x"]) - float(expected["x"])) > 1
