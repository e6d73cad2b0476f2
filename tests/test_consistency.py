"""Noisy posteriors against the guide: of the exact program they agree at every level, of broken ones they do not."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
import pytest

import sami_ppl as sp
from sami_ppl.decoders.exact import ExactEncoder
from sami_ppl.diagnostics import consistency
from sami_ppl.diagnostics.consistency import noisy_posterior, standardised

KEY = jax.random.key(4)
COLUMNS = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 2)))[0] * [2.0, 1.0]
TRUTH = sp.LinearGaussian(jnp.asarray(COLUMNS, jnp.float32), 0.5, sp.VariancePreserving(-8.0, 9.0))
X = np.asarray(TRUTH.sample(jax.random.key(1), 2000)[0])


class Wide(ExactEncoder):
    """Noisy posteriors of other standard deviations at the noisy half of the range; the guide is exact."""

    factor: float

    def __init__(self, model, factor):
        super().__init__(model)
        self.factor = factor

    def parameters(self, x_noisy, log_snr):
        mean, cov = super().parameters(x_noisy, log_snr)
        return mean, cov * jnp.where(log_snr < 0, self.factor**2, 1.0)


def prior():
    numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1), infer={"event_dims": ["factor"]})


def found(encoder):
    return consistency(sp.Program(prior, TRUTH.denoiser, encoder), X, key=KEY, levels=8)


@pytest.fixture(scope="module")
def exact():
    return found(TRUTH.encoder)


def test_exact_posteriors_agree_at_every_level(exact):
    """At a false-alarm rate of .01 for all levels; 4.5 standard errors for the moments of each."""
    assert not exact["flagged"].any()
    assert np.all(np.abs(exact["shift"]) < 4.5 * exact["shift_se"])
    assert np.all(np.abs(exact["spread"] - 1) < 4.5 * exact["spread_se"])
    assert exact["spread_se"].max() < 0.03, "what could be told apart"


@pytest.mark.slow
def test_exact_posteriors_are_a_martingale_to_rounding(cubature):
    """E over x, its noise and z ~ q(z | x), exact for what is quadratic: mean 0, mean square 1, at every level.

    What is left is that the guide is at the clean end of the range, not beyond it. Of a broken encoder it is 1/.64.
    """
    points = jnp.asarray(cubature(16), jnp.float32)

    def moments(encoder, level):
        program = sp.Program(prior, TRUTH.denoiser, encoder)

        def one(point):
            u, n, e, eps = jnp.split(point, [2, 8, 10])
            x = TRUTH.weights @ u + TRUTH.noise_std * n
            mean, cov = encoder.parameters(*encoder.clean(x))
            z = mean + jnp.linalg.cholesky(cov) @ e
            return standardised(noisy_posterior(program, x, level, eps), z)

        s = jax.vmap(one)(points)
        return np.asarray(s.mean(0)), np.asarray((s**2).mean(0))

    for level in (-8.0, -3.0, 0.5, 4.0):
        mean, square = moments(TRUTH.encoder, jnp.asarray(level))
        np.testing.assert_allclose(mean, 0, atol=1e-5)
        np.testing.assert_allclose(square, 1, atol=2e-3)
    np.testing.assert_allclose(moments(Wide(TRUTH, 0.8), jnp.asarray(-3.0))[1], 1 / 0.64, rtol=2e-3)


def test_a_broken_encoder_is_flagged_where_it_is_broken():
    """Too narrow by a factor of .8: spread 1.25, and a gap of ½ D (1/.64 − 1) nats."""
    broken = found(Wide(TRUTH, 0.8))
    noisy = broken["log_snr"] < 0
    assert broken["flagged"][noisy].all()
    assert not broken["flagged"][~noisy].any()
    np.testing.assert_allclose(broken["spread"][noisy], 1.25, atol=0.07)
    np.testing.assert_allclose(broken["gap"][noisy], 1 / 0.64 - 1, atol=0.15)


def test_the_dataset_is_labelled(exact):
    assert exact["spread"].dims == ("log_snr", "axis")
    assert exact["axis"].values.tolist() == ["z[0]", "z[1]"]
    assert (exact["gap"].attrs["units"], exact.attrs["observations"]) == ("nats", 2000)


def test_bad_input():
    program = sp.Program(prior, TRUTH.denoiser, TRUTH.encoder)
    for settings in ({"levels": 0}, {"false_alarm": 1.0}):
        with pytest.raises(ValueError, match="levels must be at least 1"):
            consistency(program, X, key=KEY, **settings)
    with pytest.raises(ValueError, match="observations 2"):
        consistency(program, X[:1], key=KEY)
    conditioned = sp.autoencoder(
        prior, X, decoder="conditioned", size={"width": 4, "depth": 1}, progress=False, key=KEY
    )
    with pytest.raises(ValueError, match="guided"):
        consistency(conditioned, X, key=KEY)
