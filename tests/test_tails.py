"""Guides with the tails of a Student t: against SciPy's densities, closed forms and draws."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from sami_ppl.calibration.recalibrate import recalibrate
from sami_ppl.decoders.exact import ExactEncoder
from sami_ppl.encoders.law import DiagonalLaw, GaussianLaw
from sami_ppl.encoders.tails import HeavyTailedEncoder, StudentLaw
from tests.test_recalibrate import COLUMNS, KEY, TRUTH, program

module = importlib.import_module("sami_ppl.calibration.recalibrate")  # whose name the function has too
RNG = np.random.default_rng(0)
ROOT, CENTRE = RNG.normal(size=(3, 3)).astype("float32"), RNG.normal(size=3).astype("float32")
SCALE = np.exp(RNG.normal(size=3)).astype("float32")
VALUES = (3 * RNG.normal(size=(20, 3))).astype("float32")


class Part:
    """What `of_site` asks of a site: where its coordinates are."""

    def __init__(self, name, start, stop):
        self.name, self.start, self.size, self.code = name, start, stop - start, slice(start, stop)


@pytest.mark.parametrize("df", [2.5, 5.0, 200.0])
@pytest.mark.parametrize(("base", "root"), [
    (GaussianLaw(jnp.asarray(CENTRE), jnp.asarray(ROOT)), ROOT),
    (DiagonalLaw(jnp.asarray(CENTRE), jnp.asarray(SCALE)), np.diag(SCALE)),
], ids=["full", "diagonal"])  # fmt: skip
def test_density_is_scipys(base, root, df):
    law = StudentLaw(base, jnp.float32(df))
    expected = stats.multivariate_t(CENTRE, root.astype(float) @ root.T, df=df).logpdf(VALUES)
    np.testing.assert_allclose(jax.vmap(law.log_prob)(jnp.asarray(VALUES)), expected, rtol=2e-5, atol=2e-5)


def test_moments_are_those_of_its_draws():
    """200,000 draws at ν = 8, whose fourth moments exist: covariances to 4 standard errors, of some .5 %."""
    law = StudentLaw(GaussianLaw(jnp.asarray(CENTRE), jnp.asarray(ROOT)), jnp.float32(8.0))
    draws = np.asarray(law.sample(jax.random.key(0), (200_000,)), float)
    size = np.sqrt(np.diag(law.covariance))
    np.testing.assert_allclose((draws.mean(0) - law.mean) / size, 0, atol=4 / np.sqrt(200_000))
    np.testing.assert_allclose((np.cov(draws.T) - law.covariance) / np.outer(size, size), 0, atol=0.02)
    np.testing.assert_allclose(np.diag(law.covariance), law.variance, rtol=1e-5)
    control = (np.cov(draws.T) - ROOT @ ROOT.T) / np.outer(size, size)
    assert np.abs(control).max() > 0.1, "control: A Aᵀ is not the covariance"


def test_draws_are_of_the_density():
    """Ranks of the density among those of other draws, by Kolmogorov and Smirnov at .001; a Gaussian's fail."""
    base = GaussianLaw(jnp.asarray(CENTRE), jnp.asarray(ROOT))
    law = StudentLaw(base, jnp.float32(4.0))
    for drawn, right in ((law, True), (base, False)):
        draws = np.asarray(drawn.sample(jax.random.key(1), (4000,)))
        square = np.sum(np.linalg.solve(ROOT, (draws - CENTRE).T) ** 2, 0) / 3
        assert (stats.kstest(square, stats.f(3, 4).cdf).pvalue > 0.001) == right


@pytest.mark.parametrize("cut", [1, 2])
def test_laws_of_sites_one_after_another_make_the_whole(cut):
    law = StudentLaw(GaussianLaw(jnp.asarray(CENTRE), jnp.asarray(ROOT)), jnp.float32(3.0))
    first, second = Part("a", 0, cut), Part("b", cut, 3)
    for z in jnp.asarray(VALUES):
        parts = law.of_site(first, {}).log_prob(z[:cut]) + law.of_site(second, {"a": z[:cut]}).log_prob(z[cut:])
        np.testing.assert_allclose(parts, law.log_prob(z), rtol=1e-4, atol=1e-4)


def test_a_batch_is_its_members():
    encoder = HeavyTailedEncoder(ExactEncoder(TRUTH), 6.0)
    assert float(encoder.df) == pytest.approx(6.0, rel=1e-5)
    x = np.asarray(TRUTH.sample(jax.random.key(2), 4)[0])
    batch = encoder.guide(x, lambda: None)
    assert batch.batch_shape == (4,)
    assert batch.sample(jax.random.key(0), (5,)).shape == (5, 4, 2)
    z = jnp.asarray(VALUES[:4, :2])
    alone = [encoder.law(x).log_prob(z) for x, z in zip(x, z, strict=True)]
    np.testing.assert_allclose(batch.log_prob(z), alone, rtol=1e-4, atol=1e-4)


def test_noisy_posteriors_stay_gaussian():
    base = ExactEncoder(TRUTH)
    x, z = np.asarray(TRUTH.sample(jax.random.key(2), 1)[0][0]), jnp.zeros(2)
    same = [encoder.log_prob(z, x, jnp.float32(0.0)) for encoder in (base, HeavyTailedEncoder(base, 3.0))]
    np.testing.assert_allclose(*same, rtol=1e-5)


def test_no_variance_is_refused():
    with pytest.raises(ValueError, match="df must be above 2"):
        HeavyTailedEncoder(ExactEncoder(TRUTH), 2.0)


@pytest.mark.slow
def test_tails_are_found_where_there_are_some_and_not_where_there_are_none(monkeypatch):
    """Samples of codes whose errors are those of a t of 4 degrees of freedom, and of the program as it is.

    Against a Gaussian guide, fitted alike, the first are better told by .02 nats at the least; the second are not.
    """
    made, settings = program(1.0), {"simulations": 4000, "steps": 300, "learning_rate": 1e-2, "progress": False}
    decode, width = module.decode, np.sqrt(np.diag(np.linalg.inv(np.eye(2) + COLUMNS.T @ COLUMNS / 0.25)))
    errors = np.random.default_rng(1).standard_t(3, size=(4000, 2)) * width
    astray = lambda made, z, *rest, **options: decode(made, z + errors, *rest, **options)  # noqa: E731
    found = {}
    for tailed, sampled in ((True, astray), (False, decode)):
        monkeypatch.setattr(module, "decode", sampled)
        found[tailed] = [recalibrate(made, key=KEY, outliers=0.0, tails=tails, **settings) for tails in (True, False)]
    gains = {tailed: gaussian.after - student.after for tailed, (student, gaussian) in found.items()}
    assert gains[True] > 0.02
    assert abs(gains[False]) < 0.02
    own = {tailed: getattr(student.program.encoder, "own", None) for tailed, (student, _) in found.items()}
    assert float(own[True].df) < 12
    assert own[False] is None or float(own[False].df) > 20
