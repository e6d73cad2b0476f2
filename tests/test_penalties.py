"""Penalties: terms of the loss beside the bound, and the total correlation against its closed form."""

from dataclasses import replace
from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scripted_fits import KEY, STAGE

from sami_ppl import fit
from sami_ppl._util.history import summary_line
from sami_ppl.decoders.exact import LinearGaussian
from sami_ppl.diffusion.schedule import VariancePreserving
from sami_ppl.encoders.law import DiagonalLaw, GaussianLaw
from sami_ppl.fitting.penalties import Draw, Penalty, consistency, prior_mmd, total_correlation, weighed
from sami_ppl.fitting.stage import Stage
from sami_ppl.fitting.step import Batch, Fit
from sami_ppl.runs.settings import configure
from sami_ppl.saving.files import find, load_file

X = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)


def gaussian_draw(correlation, batch, total, scale=0.5):
    """Posteriors N(m, s² I) whose means are N(0, C): their aggregate is N(0, C + s² I)."""
    rng = np.random.default_rng(1)
    cov = np.array([[1.0, correlation], [correlation, 1.0]])
    loc = jnp.asarray(rng.multivariate_normal(np.zeros(2), cov, size=batch))
    z = loc + scale * rng.normal(size=(batch, 2))
    aggregate = cov + scale**2 * np.eye(2)
    exact = 0.5 * np.log(np.prod(np.diag(aggregate)) / np.linalg.det(aggregate))
    program = SimpleNamespace(code_law=lambda x, given: DiagonalLaw(loc, jnp.full(loc.shape, scale)))
    return Draw(jnp.zeros((batch, 4)), {}, z, program, {}, {}, total, KEY), exact


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "total"), [(2000, 2000), (1000, 50_000)])
def test_total_correlation_is_that_of_gaussians(batch, total):
    """−½ log det of the correlations of the aggregate, .35 nats; to .05, 2 standard errors of these batches."""
    for correlation in (0.0, 0.9):
        draw, exact = gaussian_draw(correlation, batch, total)
        assert float(total_correlation(draw)) == pytest.approx(exact, abs=0.05)
    assert exact > 0.3, "control: what is told apart"


def test_total_correlation_weighs_the_own_observation_as_one_of_all():
    """By loops: log q(z_i) with weight 1/N for x_i and (N − 1)/(N (B − 1)) for the others. Equal ones are far off."""
    (draw, _), total = gaussian_draw(0.7, 6, 40, scale=0.2), 40
    z, loc = np.asarray(draw.z, float), np.asarray(draw.program.code_law(None, None).mean, float)

    def by_loops(own, other):
        found = []
        for i in range(6):
            weights = [own if i == j else other for j in range(6)]
            each = stats.norm.pdf(z[i], loc, 0.2)  # under every x_j, by axis
            joint = np.log(weights @ each.prod(1))
            found.append(joint - sum(np.log(weights @ each[:, axis]) for axis in range(2)))
        return np.mean(found)

    found = float(total_correlation(draw))
    assert found == pytest.approx(by_loops(1 / total, (total - 1) / (total * 5)), rel=1e-4)
    assert abs(found - by_loops(1 / 6, 1 / 6)) > 0.1


def test_total_correlation_needs_diagonal_posteriors():
    draw, _ = gaussian_draw(0.5, 8, 8)
    full = SimpleNamespace(code_law=lambda x, given: GaussianLaw(draw.z, jnp.broadcast_to(jnp.eye(2), (8, 2, 2))))
    with pytest.raises(ValueError, match=r"needs diagonal Gaussian posteriors .* got a GaussianLaw and 8"):
        total_correlation(draw._replace(program=full))


def prior_draw(z, program=None):
    """Codes beside a standard normal prior."""
    normal = SimpleNamespace(prior_codes=lambda key, size: jax.random.normal(key, (size, z.shape[1])))
    return Draw(jnp.zeros((len(z), 4)), {}, z, program or normal, {}, {}, 50, KEY)


def test_prior_mmd_is_that_of_gaussians():
    """E k(u, v) of Gaussians is a Gaussian integral; 400 batches of 32, to 4.5 standard errors of their mean.

    Narrow codes and codes beside the prior are told from codes that fill it, which have 0: not the KL of each of them.
    """
    size, shift, keys = 3, 0.5, jax.random.split(KEY, 400)

    def kernel(variance, mean):  # of u − v ~ N(mean, variance I)
        return (size / (size + variance)) ** (size / 2) * np.exp(-(size * mean**2) / (2 * (size + variance)))

    def found(scale, mean):
        codes = jax.vmap(lambda key: scale * jax.random.normal(key, (32, size)) + mean)(jax.random.split(keys[0], 400))
        each = jax.vmap(lambda z, key: prior_mmd(prior_draw(z)._replace(key=key)))(codes, keys)
        return np.mean(each), 4.5 * np.std(each) / 20

    for scale, mean in ((1.0, 0.0), (0.3, 0.0), (1.0, shift)):
        exact = kernel(2 * scale**2, 0) + kernel(2, 0) - 2 * kernel(1 + scale**2, mean)
        value, error = found(scale, mean)
        assert abs(value - exact) < error
    assert error < exact / 4, "control: what is told apart"
    with pytest.raises(ValueError, match="got one observation: take a larger batch"):
        prior_mmd(prior_draw(jnp.zeros((1, size))))


def test_prior_mmd_draws_from_the_prior_of_the_program(tiny_program):
    """Codes that are such draws themselves have 0, by the same draws; codes elsewhere nearly all there can be."""
    program = tiny_program()
    z = program.prior_codes(KEY, 16)
    same, far = (float(prior_mmd(prior_draw(codes, program))) for codes in (z, z + 100))
    assert abs(same) < 0.1
    assert 0.5 < far < 2


def test_consistency_is_the_entropy_of_exact_noisy_posteriors():
    """Of z and x drawn together, −E log p(z | x_λ) is the entropy of z less the information, over all noise levels.

    20,000 observations, to .05 nats: 4.5 standard errors. Any other noisy posterior has more.
    """
    weights, schedule = jnp.asarray([[1.0, 0.5], [0.0, 1.0], [0.5, -1.0]]), VariancePreserving()
    exact, other = (LinearGaussian(weights, noise, schedule) for noise in (0.3, 0.9))
    key, noise_key = jax.random.split(KEY)
    x, z = exact.sample(key, 20_000)
    denoiser = SimpleNamespace(fill_missing=lambda x: (x, jnp.ones_like(x)))

    def draw(encoder):
        return Draw(x, {}, z, SimpleNamespace(encoder=encoder, denoiser=denoiser), {}, {}, len(x), noise_key)

    levels = jnp.linspace(schedule.log_snr_min, schedule.log_snr_max, 2001)
    entropy = jnp.log(2 * jnp.pi * jnp.e) - jnp.mean(jax.vmap(exact.information)(levels))
    assert float(consistency(draw(exact.encoder))) == pytest.approx(float(entropy), abs=0.05)
    assert float(consistency(draw(other.encoder))) > entropy + 0.2, "control: what is told apart"
    assert not np.any(jax.grad(lambda z: consistency(draw(exact.encoder)._replace(z=z)))(z)), "the code is given"


@pytest.mark.slow
def test_a_penalty_is_added_and_logged_apart(tiny_program):
    """The loss grows by it, in training and validation; the bound and the KL are the same to the last bit."""
    seen = []

    def three(draw):
        seen.append(draw)
        return jnp.asarray(3.0) + 0.0 * jnp.sum(draw.z)

    assert isinstance(three, Penalty)
    program, data = tiny_program(), Batch(jnp.asarray(X), {})
    records, losses = [], []
    for penalties in ({}, {"three": three}):
        run = Fit(program, replace(STAGE, penalties=penalties), steps=6, observations=50)
        records.append(run.record(program.params(), data, KEY))
        sides = run.recipe.sides(program)
        losses.append(run.recipe.loss_at(0, program).loss(KEY, program.params(), *sides, X))
    assert float(losses[1]) == pytest.approx(float(losses[0]) + 3, rel=1e-5)
    assert records[1].pop("penalties") == {"three": 3.0}
    assert records[1].pop("loss") == pytest.approx(records[0].pop("loss") + 3, rel=1e-6)
    jax.tree.map(np.testing.assert_array_equal, *records)
    draw = seen[-1]
    assert draw.z.shape == (50, 2)
    assert draw.total == 50
    assert set(draw.guide) >= {"z"}
    assert set(draw.model) >= {"z", "x"}
    np.testing.assert_allclose(draw.z, draw.guide["z"]["value"], rtol=1e-6)
    record = {**records[0], "loss": 1.0, "penalties": {"three": 3.0}}
    assert "penalty three 3.00" in summary_line(record)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::sami_ppl.diagnostics.CollapseWarning")
def test_a_fit_draws_the_penalty_down(tiny_program):
    """Location of the codes, 100 (mean z)²: gradients reach the encoder, whose codes begin elsewhere."""

    def centre(draw):
        return 100.0 * jnp.sum(draw.z.mean(0) ** 2)

    program = tiny_program()
    moved = eqx.tree_at(lambda encoder: encoder.loc.bias, program.encoder, program.encoder.loc.bias + 1.0)
    program = program.replace(encoder=moved)
    stage = Stage(steps=40, batch=16, warmup=1, learning_rate=0.05, validate_every=20, ema=0.0, train=("encoder",))
    _, history = fit(program, X, replace(stage, penalties={"centre": centre}), key=KEY, progress=False)
    first, last = (record["penalties"]["centre"] for record in history.records)
    begun = 100 * float(jnp.sum(jnp.mean(program.encode(X)[0], 0) ** 2))
    assert max(first, last) < 0.3 * begun


@pytest.mark.slow
def test_penalties_that_make_no_sense_are_refused(tiny_program):
    one = lambda draw: jnp.ones(())  # noqa: E731
    for name in ("z", "x"):
        with pytest.raises(ValueError, match=f"penalties name {name}, which is a site"):
            Fit(tiny_program(), Stage(penalties={name: one}), steps=1)
    with pytest.raises(ValueError, match="penalties are of codes, and target='marginal' has none"):
        Fit(tiny_program(), Stage(penalties={"one": one}, target="marginal"), steps=1)
    program, data = tiny_program(), Batch(jnp.asarray(X[:8]), {})
    recipe = Fit(program, replace(STAGE, penalties={"each": lambda draw: draw.z[:, 0]}), steps=1).recipe
    with pytest.raises(ValueError, match=r"the penalty 'each' must be one number, .* got shape \(8,\)"):
        recipe.loss_at(0, program).loss(KEY, program.params(), program.model, program.guide, data.x)


def test_penalties_of_the_library_take_a_weight():
    """From Python and as the command line reads it; a weight of anything else is refused."""
    weight = Stage(penalties={"consistency": 0.3})
    assert hash(weight) != hash(Stage(penalties={"consistency": 0.4}))
    own = weighed("consistency", 0.3)
    codes = gaussian_draw(0.5, 64, 64)[0]
    assert float(weighed("total_correlation", 2.0)(codes)) == pytest.approx(2 * float(total_correlation(codes)))
    assert isinstance(own, Penalty)
    assert weighed("mine", total_correlation) is total_correlation
    config = load_file(find("two_stage", "inference")).Config()
    for text, value in (("{'consistency': 0.3}", 0.3), ("{'consistency': 1}", 1)):
        found = configure({"encoder.penalties": text}, {"inference": config})["inference"]
        assert found.encoder.penalties == {"consistency": value}
    for wrong in ("{'sparsity': 1.0}", "{'consistency': -1.0}", "{'consistency': 'much'}"):
        with pytest.raises(ValueError, match=r"encoder.penalties"):
            configure({"encoder.penalties": wrong}, {"inference": config})
    with pytest.raises(ValueError, match="the weight, at least 0, of one of total_correlation, consistency, prior_mmd"):
        Stage(penalties={"sparsity": 1.0})


@pytest.mark.slow
def test_a_weight_is_that_penalty_times_it(tiny_program):
    """The loss of a step, and what is logged, are those of the function."""
    program, data = tiny_program(), Batch(jnp.asarray(X), {})
    records = []
    for penalty in (0.3, lambda draw: 0.3 * consistency(draw)):
        run = Fit(program, replace(STAGE, penalties={"consistency": penalty}), steps=6, observations=50)
        records.append(run.record(program.params(), data, KEY))
    assert records[0]["penalties"]["consistency"] == pytest.approx(records[1]["penalties"]["consistency"], rel=1e-5)
    assert records[0]["loss"] == pytest.approx(records[1]["loss"], rel=1e-5)
    assert records[0]["penalties"]["consistency"] != 0
