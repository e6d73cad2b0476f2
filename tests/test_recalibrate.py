"""Guides fitted to a program's own samples: against the exact posterior of a linear-Gaussian program."""

import importlib
from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
import pytest
from scipy import stats

import sami_ppl as sp
from sami_ppl._util.history import History
from sami_ppl.calibration.recalibrate import recalibrate, recalibrated, samples_for
from sami_ppl.decoders.exact import ExactEncoder
from sami_ppl.encoders.law import GaussianLaw
from sami_ppl.priors.read import read_prior

recalibration = importlib.import_module("sami_ppl.calibration.recalibrate")  # whose name the function has too
RNG = np.random.default_rng(0)

KEY = jax.random.key(3)
COLUMNS = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 2)))[0] * [2.0, 1.0]
TRUTH = sp.LinearGaussian(jnp.asarray(COLUMNS, jnp.float32), 0.5, sp.VariancePreserving(-10.0, 9.0))


class Scaled(ExactEncoder):
    """The exact noisy posterior as guidance; as guide, with other standard deviations, and moved, as it is told."""

    log_factor: jax.Array
    shift: jax.Array

    def __init__(self, model, factor, shift=0.0):
        super().__init__(model)
        self.log_factor, self.shift = jnp.full(2, np.log(factor), jnp.float32), jnp.full(2, shift, jnp.float32)

    def law(self, x):
        mean, cov = self.parameters(*self.clean(x))
        factor = jnp.exp(self.log_factor)
        return GaussianLaw(mean + self.shift, jnp.linalg.cholesky(cov) * factor[:, None])

    def guide(self, x, prior):
        mean, cov = jax.vmap(lambda x: self.parameters(*self.clean(x)))(x)
        return GaussianLaw(mean + self.shift, jnp.linalg.cholesky(cov) * jnp.exp(self.log_factor)[:, None])


def prior():
    numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1), infer={"event_dims": ["factor"]})


def program(factor, shift=0.0):
    return sp.Program(prior, TRUTH.denoiser, Scaled(TRUTH, factor, shift), sampler=sp.StochasticDPMSolver(30))


@pytest.fixture(scope="module")
def narrow():
    """A guide of .6 of the standard deviations, moved by half of one of the prior's, and what became of it."""
    made = program(0.6, 0.5)
    return made, recalibrate(made, key=KEY, simulations=4000, steps=400, learning_rate=1e-2, progress=False)


@pytest.mark.slow
def test_a_narrow_guide_becomes_the_exact_posterior(narrow):
    """Standard deviations to 5 %, 4 standard errors of 4,000 simulations; means, at rms, to a tenth of one."""
    made, found = narrow
    x = np.asarray(TRUTH.sample(jax.random.key(5), 200)[0])
    exact = np.linalg.inv(np.eye(2) + COLUMNS.T @ COLUMNS / 0.25)
    mean, sd = found.program.encode(x)
    np.testing.assert_allclose(sd, np.broadcast_to(np.sqrt(np.diag(exact)), sd.shape), rtol=0.05)
    assert np.sqrt(np.mean(((mean - x @ COLUMNS @ exact / 0.25) / sd) ** 2)) < 0.12
    before = made.encode(x)
    assert np.all(before[1] < 0.65 * sd), "control: it was narrow"
    assert found.before - found.after > 10 * found.error


@pytest.mark.slow
def test_guidance_and_samples_stay_as_they_were(narrow):
    """But for rounding; the bound, which asks the guide, falls."""
    made, found = narrow
    z = np.random.default_rng(1).normal(size=(5, 2)).astype(np.float32)
    samples = [sp.generate(program, z=z, key=KEY) for program in (made, found.program)]
    np.testing.assert_allclose(*samples, atol=1e-5)
    x = np.asarray(TRUTH.sample(jax.random.key(6), 500)[0])
    bounds = [float(sp.evidence_bound(p, x, key=KEY)["bound"].mean()) for p in (made, found.program)]
    exact = -float(np.mean(jax.vmap(TRUTH.log_prob)(x)))
    assert bounds[1] < bounds[0] - 0.5
    assert bounds[1] - exact < bounds[0] - exact


@pytest.mark.slow
def test_ranks_are_uniform_after_it_and_were_not(narrow):
    """At a false-alarm rate of .001."""
    ranks = [
        sp.simulation_based_calibration(program, key=jax.random.key(9), simulations=300, progress=False)
        for program in (narrow[0], narrow[1].program)
    ]
    tables = [sp.calibration_table(tree, false_alarm=0.001) for tree in ranks]
    assert set(tables[1]["verdict"].values) == {"calibrated"}
    assert "calibrated" not in tables[0]["verdict"].values


@pytest.mark.slow
def test_a_guide_that_is_right_is_left_alone():
    """Its weights are at the least already: what is found is no better than by chance, .02 nats here."""
    found = recalibrate(program(1.0), key=KEY, simulations=2000, steps=50, learning_rate=1e-4, progress=False)
    assert 0 <= found.before - found.after < 0.02


@pytest.mark.slow
def test_samples_that_lost_their_code_do_not_widen_the_guide(monkeypatch):
    """One of a hundred comes from another code. Without room for such, widths grow by a quarter or more."""
    decode = recalibration.decode

    def lost(made, z, *rest, **options):
        return decode(made, np.where(np.arange(len(z))[:, None] % 100, z, -3 * z), *rest, **options)

    monkeypatch.setattr(recalibration, "decode", lost)
    x = np.asarray(TRUTH.sample(jax.random.key(5), 50)[0])
    widths = [
        recalibrate(
            program(1.0),
            key=KEY,
            simulations=4000,
            steps=400,
            learning_rate=1e-2,
            outliers=share,
            tails=False,
            progress=False,
        )
        .program.encode(x)[1]
        .mean(0)
        for share in (0.01, 0.0)
    ]
    exact = program(1.0).encode(x)[1].mean(0)
    np.testing.assert_allclose(widths[0], exact, rtol=0.1)
    assert np.all(widths[1] > 1.25 * exact), "control"


def test_the_reference_is_of_the_codes_own_moments_and_frequencies():
    """By SciPy, by the length of the circle, and by counting."""

    def three():
        numpyro.sample("place", dist.Normal(0, 1).expand([2]).to_event(1))
        numpyro.sample("kind", dist.Categorical(jnp.asarray([0.2, 0.8])))
        numpyro.sample("angle", dist.VonMises(0.0, 1e-3))

    latents = read_prior(three)
    place = RNG.multivariate_normal([1.0, -2.0], [[2.0, 0.5], [0.5, 1.0]], 400)
    kind, angle = RNG.integers(0, 2, 400), RNG.uniform(-np.pi, np.pi, 400)
    z = np.asarray(
        latents.to_code({"place": jnp.asarray(place), "kind": jnp.asarray(kind), "angle": jnp.asarray(angle)})
    )
    found = recalibration._reference(SimpleNamespace(latents=latents), z)
    code = z[:, latents.sites[0].code].astype(float)
    expected = stats.multivariate_normal(code.mean(0), np.cov(code.T)).logpdf(code)
    expected += np.log(np.bincount(kind) / 400)[kind] - np.log(2 * np.pi)
    np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.slow
def test_it_is_saved_and_goes_on(narrow, tmp_path):
    """A second recalibration begins with the guide at hand, and guidance is still that of the encoder."""
    found = narrow[1]
    folder = sp.save(found.program, tmp_path / "program")
    again = sp.load(folder, program(0.9))
    for left, right in zip(
        *(jax.tree.leaves(eqx.filter(p, eqx.is_array)) for p in (again, found.program)), strict=True
    ):
        np.testing.assert_array_equal(left, right)
    more = recalibrate(again, key=KEY, simulations=1000, steps=5, learning_rate=1e-6, progress=False)
    assert more.before == pytest.approx(found.after, abs=0.2)
    assert "own guide" in repr(more.program)


def hierarchical(obs):
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    with obs:
        numpyro.sample("z", dist.Normal(0, scale).expand([2]).to_event(1))


def kinds():
    kind = numpyro.sample("kind", dist.Categorical(jnp.ones(3) / 3))
    numpyro.sample("z", dist.Normal(jnp.asarray([-2.0, 0.0, 2.0])[kind], 0.5))


def circle():
    numpyro.sample("angle", dist.VonMises(0.0, 1e-3))
    numpyro.sample("z", dist.Normal(0, 1))


@pytest.mark.slow
@pytest.mark.parametrize("prior", [hierarchical, kinds, circle])
def test_every_kind_of_site_can_be_recalibrated(prior, tiny_program, mlp):
    """Scales that all share, discrete sites, directions: the loss falls by more than chance, posteriors are drawn."""
    plain = tiny_program()
    encoder = sp.encoder_for(prior, mlp(4, 6, key=KEY), plain.denoiser.schedule, (4,), key=KEY)
    made = sp.Program(prior, plain.denoiser, encoder, sampler=plain.sampler)
    found = recalibrate(made, key=KEY, simulations=1000, steps=60, learning_rate=1e-2, progress=False)
    assert found.before - found.after > 3 * found.error
    tree = found.program.posterior(np.zeros((2, 4), np.float32), key=KEY, draws=3, levels=0, predictive=0)
    assert all(np.all(np.isfinite(value)) for value in tree["posterior"].data_vars.values())


@pytest.mark.slow
def test_turning_the_axes_turns_both(narrow):
    """The gauge of a program with a guide of its own: guidance and guide in the same axes."""
    made = narrow[1].program
    x = np.asarray(TRUTH.sample(jax.random.key(7), 800)[0])
    turned = sp.align(made, x)
    z = (made.encode(x[:4])[0] - turned.centre) @ turned.matrix.T
    np.testing.assert_allclose(turned.program.encode(x[:4])[0], z, atol=1e-4)
    samples = [
        sp.generate(p, z=c.astype(np.float32), key=KEY) for p, c in ((made, made.encode(x[:4])[0]), (turned.program, z))
    ]
    np.testing.assert_allclose(*samples, atol=2e-3)


def test_bad_input():
    x = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
    fresh = sp.autoencoder(prior, x, size={"width": 4, "depth": 1}, progress=False, key=KEY)
    with pytest.raises(ValueError, match=r"have never been fitted.*sp.fit"):
        recalibrate(fresh, key=KEY)
    for settings in ({"simulations": 100}, {"steps": 0}, {"batch": 0}, {"outliers": 1.0}):
        with pytest.raises(ValueError, match="simulations must be at least 500"):
            recalibrate(program(1.0), key=KEY, **settings)

    class Endless(dist.Normal):
        """Draws that are NaN, as those of a prior whose parameters ran away."""

        def sample(self, key, sample_shape=()):
            return super().sample(key, sample_shape) * jnp.nan

    def broken():
        numpyro.sample("z", Endless(0, 1).expand([2]).to_event(1))

    lost = sp.Program(broken, TRUTH.denoiser, TRUTH.encoder)
    with pytest.raises(ValueError, match=r"100.0% of the draws of the prior are not finite"):
        recalibrate(lost, key=KEY, simulations=500, progress=False)
    with pytest.raises(TypeError, match="key"):
        recalibrate(program(1.0), key=0)


def test_a_fit_ends_with_it_where_its_samples_follow_their_codes():
    """By default: after 500 steps and with particles; not after a rehearsal, nor by guidance alone."""
    made, long, short = program(1.0), History(), History()
    long.add({"step": 500, "loss": 1.0})
    short.add({"step": 499, "loss": 1.0})
    particles = made.replace(sampler=sp.TwistedSampler(20))
    assert [samples_for(p, h) for p, h in ((particles, long), (particles, short), (made, long))] == [10_000, 0, 0]
    assert samples_for(particles, History()) == 0
    for simulations, history in ((0, long), (None, short)):
        assert recalibrated(particles, history, simulations, key=jax.random.key(0), progress=False) is particles
    with pytest.raises(ValueError, match="simulations must be at least 500"):
        recalibrated(particles, short, 20, key=jax.random.key(0), progress=False)
