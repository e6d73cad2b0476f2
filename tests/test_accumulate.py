"""Batches taken in parts: loss, gradient and update are those of the whole batch, with the same noise and codes."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
import pytest
from scripted_fits import ALONE, KEY, STAGE

import sami_ppl as sp
from sami_ppl import fit
from sami_ppl._util import parallel
from sami_ppl.decoders.training import Objective
from sami_ppl.fitting import accumulate
from sami_ppl.fitting.sizes import Sized
from sami_ppl.fitting.step import Batch, Fit
from sami_ppl.runs.settings import configure
from sami_ppl.saving.files import find, load_file

X = np.random.default_rng(0).normal(size=(48, 4)).astype(np.float32)
ROWS = np.arange(8, dtype=np.int32)[None]


def gradient(program, stage, x=X, given=None, **options):
    """Loss of the first step of a stage and its gradient, by parameter, with networks that are not zero."""
    data = Batch(jnp.asarray(x), {} if given is None else given)
    run = Fit(program, stage, steps=6, **options)
    state, batch = run.init(KEY, data), data.take(ROWS[0])

    @jax.jit
    def of(params):
        svi = run.recipe.svi(program, batch, 3)
        arguments = run.recipe.arguments(batch, beta=run.recipe.weights_at(3))
        loss = lambda params: svi.loss.loss(KEY, params, svi.model, svi.guide, batch.x, **arguments)  # noqa: E731
        return jax.value_and_grad(loss)(params)

    return of(run.recipe.svi(program, data).get_params(state.svi))


def furthest(found, expected, trained=()):
    """The largest difference of two gradients over the largest entry."""
    pairs = [(found[name], expected[name]) for name in expected if not trained or name in trained]
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves([b for _, b in pairs]))
    assert scale > 1e-3
    apart = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), *zip(*pairs, strict=True))
    return max(jax.tree.leaves(apart)) / scale


def positive():
    numpyro.sample("z", dist.Normal(0.0, 1.0).expand([1]).to_event(1))
    numpyro.sample("u", dist.LogNormal(0.0, 0.5))


def classes():
    kind = numpyro.sample("kind", dist.Categorical(probs=jnp.asarray([0.2, 0.5, 0.3])))
    numpyro.sample("z", dist.Normal(jnp.asarray([-1.0, 0.0, 1.0])[kind], 1.0))


def groups(obs):
    centre = numpyro.sample("centre", dist.Normal(0.0, 1.0))
    with obs:
        numpyro.sample("z", dist.Normal(centre, 1.0).expand([2]).to_event(1))


CASES = {
    "joint": (None, STAGE, {}),
    "marginal": (None, ALONE, {}),
    "decoupled": (None, replace(STAGE, denoiser_loss="own"), {}),
    "two sites": (positive, replace(STAGE, site_beta={"u": 2.0}), {}),
    "discrete": (classes, STAGE, {}),
    "global": (groups, STAGE, {"observations": 48}),
    "floor": (None, replace(STAGE, free_bits=0.07, beta=1.0), {}),
    "capacity": (None, replace(STAGE, capacity={"z": 3.0}, beta=1.0), {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_those_of_the_whole_batch(name, tiny_program, build, fill):
    """To 1e-5, in float32."""
    prior, stage, options = CASES[name]
    program = tiny_program() if prior is None else build(prior)
    program = program.replace(denoiser=fill(program.denoiser), encoder=fill(program.encoder))
    loss, whole = gradient(program, stage, **options)
    found, parts = gradient(program, replace(stage, accumulate=4), **options)
    assert float(found) == pytest.approx(float(loss), rel=1e-5)
    assert furthest(parts, whole) < 1e-5


@pytest.mark.slow
def test_codes_that_are_dropped_are_those_of_the_whole_batch():
    """A conditioned denoiser is kept from the same codes, whether it sees them at once or in parts."""
    prior = sp.factors(z=dist.Normal(0, 1).expand([2]))
    settings = {"decoder": "conditioned", "size": {"width": 4, "depth": 1}, "progress": False}
    denoiser = sp.autoencoder(prior, X, **settings, key=KEY).denoiser
    objective, z = Objective(dropped=0.5), jnp.asarray(X[:16, :2])
    whole = np.asarray(objective.told(denoiser, z, KEY))
    parts = [objective.told(denoiser, part, KEY, i, 4) for i, part in enumerate(jnp.split(z, 4))]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    dropped = np.isnan(whole[:, 0]).reshape(4, 4)
    assert 0 < dropped.sum() < 16
    assert (dropped != dropped[0]).any(), "or parts that all drop alike would not be seen"


class SameDraws(accumulate.PartOfBatch):
    """Negative control: every part has the codes and the noise of the first."""

    def __init__(self, index, parts):
        super().__init__(0, parts)


class OwnDraws(accumulate.PartOfBatch):
    """Negative control: every part draws, and spreads its noise levels, as if it were the batch."""

    def process_message(self, msg):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("mistake", [SameDraws, OwnDraws])
def test_draws_that_are_not_those_of_the_rows_are_seen(mistake, tiny_program, fill, monkeypatch):
    program = tiny_program().replace(denoiser=fill(tiny_program().denoiser))
    loss, whole = gradient(program, STAGE)
    monkeypatch.setattr(accumulate, "PartOfBatch", mistake)
    found, parts = gradient(program, replace(STAGE, accumulate=4))
    assert abs(float(found) - float(loss)) > 1e-2 * abs(float(loss))
    assert furthest(parts, whole) > 1e-2


@pytest.mark.slow
def test_a_floor_acts_on_the_mean_of_the_batch(tiny_program, fill, monkeypatch):
    """A floor just below the KL of an axis leaves it be. Control: to parts by themselves it is a loss of its own."""
    program = tiny_program().replace(encoder=fill(tiny_program().encoder))
    stage = replace(STAGE, train=("prior", "encoder"), denoiser_loss="none", beta=1.0, accumulate=4)
    loc, scale = program.moments(jnp.asarray(X[:8]))
    kl = (0.5 * (loc**2 + scale**2 - 1) - jnp.log(scale)).mean(0)
    held = replace(stage, free_bits=0.999 * float(kl.max()))
    whole, parts = gradient(program, replace(held, accumulate=1))[0], gradient(program, held)[0]
    assert float(parts) == pytest.approx(float(whole), rel=1e-6)
    monkeypatch.setattr(accumulate._Batch, "means", lambda self, params: None)
    assert float(gradient(program, held)[0]) > float(whole) + 1e-4


@pytest.mark.slow
def test_a_stage_takes_the_same_steps_in_parts_and_goes_on_bit_for_bit(tiny_program, tmp_path):
    """Six steps, to 1e-5 of the whole batch's; of a fit that was stopped after two, the same to the bit."""

    def fitted(stage, **options):
        program, history = fit(tiny_program(), X, stage, key=KEY, progress=False, **options)
        return jax.tree.leaves(program.params()), [record["train_loss"] for record in history.stage_records()]

    def stop(record):
        raise KeyboardInterrupt

    whole, losses = fitted(ALONE)
    in_parts = replace(ALONE, accumulate=2)
    parts, found = fitted(in_parts)
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    assert all(np.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(parts, whole, strict=True))
    with pytest.raises(KeyboardInterrupt):
        fitted(in_parts, out=tmp_path, callback=stop)
    resumed, again = fitted(in_parts, out=tmp_path, resume=True)
    assert again == found
    assert all(np.array_equal(a, b) for a, b in zip(resumed, parts, strict=True))


def test_parts_must_divide_the_batch(tiny_program, monkeypatch):
    program = tiny_program()
    with pytest.raises(ValueError, match=r"a batch of 8 cannot be taken in 3 equal parts: set batch=9"):
        replace(STAGE, accumulate=3).check(program, 48)

    class Devices:
        size = 4

    monkeypatch.setattr(parallel, "current_devices", Devices)
    with pytest.raises(ValueError, match=r"cannot be taken in 4 equal parts on each of 4 devices: set batch=16"):
        replace(STAGE, accumulate=4).check(program, 48)
    replace(STAGE, accumulate=2).check(program, 48)
    with pytest.raises(ValueError, match="accumulate must be positive, got 0"):
        Sized(accumulate=0)


def test_the_command_line_takes_settings_of_memory():
    configs = {"inference": load_file(find("two_stage", "inference")).Config()}
    settings = {"encoder.accumulate": "4", "encoder.remat": "true", "denoiser.compute": "bfloat16"}
    found = configure(settings, configs)["inference"]
    assert (found.encoder.accumulate, found.encoder.remat, found.denoiser.compute) == (4, True, "bfloat16")
