"""Guides with heavy tails: against SciPy's densities, products of Gaussians, and draws."""

import importlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

import sami_ppl as sp
from sami_ppl.calibration.recalibrate import recalibrate
from sami_ppl.decoders.exact import ExactEncoder
from sami_ppl.encoders.law import DiagonalLaw, GaussianLaw
from sami_ppl.encoders.own_guide import OwnGuideEncoder
from sami_ppl.encoders.tails import FACTORS, TailedEncoder, TailedLaw
from tests.test_recalibrate import COLUMNS, KEY, TRUTH, program

module = importlib.import_module("sami_ppl.calibration.recalibrate")  # whose name the function has too
RNG = np.random.default_rng(0)
ROOT, CENTRE = 0.3 * RNG.normal(size=(3, 3)).astype("float32"), RNG.normal(size=3).astype("float32")
SCALE = np.array([0.05, 0.4, 1.0], "float32")
VALUES = (2 * RNG.normal(size=(20, 3))).astype("float32")
LOGITS = jnp.asarray([0.0, -2.0, -3.0, -1.0, -4.0, -2.5, -3.5])
BASES = {
    "full": (GaussianLaw(jnp.asarray(CENTRE), jnp.asarray(ROOT)), ROOT @ ROOT.T),
    "diagonal": (DiagonalLaw(jnp.asarray(CENTRE), jnp.asarray(SCALE)), np.diag(SCALE**2)),
}


def parts(covariance):
    """Means and covariances of the tempered posteriors, in 64 bits: the prior, and the likelihood to the power 1/c²."""
    posterior = np.linalg.inv(covariance.astype(float))
    likelihood, weighted = posterior - np.eye(3), posterior @ CENTRE
    covariances = [np.linalg.inv(np.eye(3) + likelihood / c**2) for c in FACTORS]
    return [(cov @ weighted / c**2, cov) for c, cov in zip(FACTORS, covariances, strict=True)]


class Part:
    """What `of_site` asks of a site: where its coordinates are."""

    def __init__(self, start, stop):
        self.start, self.size, self.code = start, stop - start, slice(start, stop)


@pytest.mark.parametrize("kind", BASES)
def test_density_is_that_of_tempered_posteriors(kind):
    base, covariance = BASES[kind]
    weights = special.log_softmax(np.asarray(LOGITS, float))
    each = [stats.multivariate_normal(mean, cov).logpdf(VALUES) for mean, cov in parts(covariance)]
    expected = special.logsumexp(np.stack(each, 1) + weights, axis=1)
    found = jax.vmap(TailedLaw.of(base, LOGITS).log_prob)(jnp.asarray(VALUES))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_without_weight_it_is_the_gaussian():
    base, _ = BASES["full"]
    only = jnp.asarray([0.0, *[-200.0] * 6])
    near = CENTRE + VALUES @ ROOT.T
    found = jax.vmap(TailedLaw.of(base, only).log_prob)(near)
    np.testing.assert_allclose(found, jax.vmap(base.log_prob)(near), rtol=1e-3, atol=1e-3)


def test_an_axis_that_nothing_is_known_of_has_no_tails():
    law = TailedLaw.of(DiagonalLaw(jnp.zeros(2), jnp.asarray([0.05, 1.0])), LOGITS)
    np.testing.assert_allclose(law.variance[1], 1.0, rtol=1e-5)
    assert 2 * 0.05**2 < law.variance[0] < 1


@pytest.mark.parametrize("kind", BASES)
def test_moments_are_those_of_its_draws(kind):
    """200,000 draws: means to 5 standard errors, covariances to 2 %; those of the Gaussian are others."""
    base, covariance = BASES[kind]
    law = TailedLaw.of(base, LOGITS)
    draws = np.asarray(law.sample(jax.random.key(0), (200_000,)), float)
    size = np.sqrt(np.diag(law.covariance))
    np.testing.assert_allclose((draws.mean(0) - law.mean) / size, 0, atol=5 / np.sqrt(200_000))
    np.testing.assert_allclose((np.cov(draws.T) - law.covariance) / np.outer(size, size), 0, atol=0.02)
    np.testing.assert_allclose(law.root @ law.root.T, law.covariance, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(law.variance, np.diag(law.covariance), rtol=1e-5)
    assert np.abs((np.cov(draws.T) - covariance) / np.outer(size, size)).max() > 0.1, "control"


@pytest.mark.parametrize("cut", [1, 2])
@pytest.mark.parametrize("kind", BASES)
def test_laws_of_sites_one_after_another_make_the_whole(kind, cut):
    law = TailedLaw.of(BASES[kind][0], LOGITS)
    z = jnp.asarray(VALUES)
    batch = TailedLaw(LOGITS, *(jnp.broadcast_to(a, (20, *a.shape)) for a in (law.loc, law.tril)))
    first = batch.of_site(Part(0, cut), {}).log_prob(z[:, :cut])
    second = batch.of_site(Part(cut, 3), {"a": z[:, :cut]}).log_prob(z[:, cut:])
    np.testing.assert_allclose(first + second, batch.log_prob(z), rtol=1e-3, atol=1e-3)


def test_a_batch_is_its_members():
    encoder = TailedEncoder(ExactEncoder(TRUTH))
    x = np.asarray(TRUTH.sample(jax.random.key(2), 4)[0])
    batch = encoder.guide(x, lambda: None)
    assert batch.batch_shape == (4,)
    assert batch.sample(jax.random.key(0), (5,)).shape == (5, 4, 2)
    z = jnp.asarray(VALUES[:4, :2])
    alone = [encoder.law(x).log_prob(z) for x, z in zip(x, z, strict=True)]
    np.testing.assert_allclose(batch.log_prob(z), alone, rtol=1e-3, atol=1e-3)


def test_noisy_posteriors_stay_gaussian():
    base = ExactEncoder(TRUTH)
    x, z = np.asarray(TRUTH.sample(jax.random.key(2), 1)[0][0]), jnp.zeros(2)
    same = [encoder.log_prob(z, x, jnp.float32(0.0)) for encoder in (base, TailedEncoder(base))]
    np.testing.assert_allclose(*same, rtol=1e-5)


@pytest.mark.slow
def test_it_is_saved_and_turned(tmp_path):
    """The weights of the tails come back, and the Gaussian that they stand on turns with the axes."""
    made = program(1.0)
    encoder = TailedEncoder(made.encoder)
    encoder = eqx.tree_at(lambda e: e.raw, encoder, LOGITS / 20)
    made = made.replace(encoder=OwnGuideEncoder(made.encoder, encoder))
    again = sp.load(sp.save(made, tmp_path / "program"), program(0.9))
    np.testing.assert_array_equal(again.encoder.own.logits, encoder.logits)
    turned = sp.align(made, np.asarray(TRUTH.sample(jax.random.key(7), 800)[0]))
    np.testing.assert_array_equal(turned.program.encoder.own.logits, encoder.logits)
    x = np.asarray(TRUTH.sample(jax.random.key(8), 1)[0][0])
    mean, expected = (turned.program.encoder.own.base.law(x).mean, made.encoder.own.base.law(x).mean)
    np.testing.assert_allclose(mean, (expected - turned.centre) @ turned.matrix.T, atol=1e-4)


@pytest.mark.slow
def test_tails_are_found_where_there_are_some_and_not_where_there_are_none(monkeypatch):
    """One of fifty samples is of a code that has nothing to do with its own, and none: the program as it is.

    Without room for outliers. The first are told better than by a Gaussian by a nat at the least, the second alike.
    """
    made, settings = program(1.0), {"simulations": 4000, "steps": 300, "learning_rate": 1e-2, "progress": False}
    decode = module.decode
    lost = lambda z: np.where(np.arange(len(z))[:, None] % 50, z, np.roll(z, 1, axis=0))  # noqa: E731
    astray = lambda made, z, *rest, **options: decode(made, lost(z), *rest, **options)  # noqa: E731
    found = {}
    for tailed, sampled in ((True, astray), (False, decode)):
        monkeypatch.setattr(module, "decode", sampled)
        found[tailed] = [recalibrate(made, key=KEY, outliers=0.0, tails=tails, **settings) for tails in (True, False)]
    gains = {tailed: gaussian.after - own.after for tailed, (own, gaussian) in found.items()}
    assert gains[True] > 0.1
    assert abs(gains[False]) < 0.03
    weights = jax.nn.softmax(found[True][0].program.encoder.own.logits)
    assert 0.005 < float(weights[1:].sum()) < 0.06
    width = np.sqrt(np.diag(np.linalg.inv(np.eye(2) + COLUMNS.T @ COLUMNS / 0.25)))
    centre = found[True][0].program.encoder.own.base.posterior(jnp.zeros(6))[1]
    np.testing.assert_allclose(centre, width, rtol=0.08), "the rest keeps its widths"
