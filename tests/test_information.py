"""The information spectrum against closed forms of the linear-Gaussian model."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
import pytest

from sami_ppl.decoders.exact import LinearGaussian
from sami_ppl.diagnostics import information_spectrum
from sami_ppl.diagnostics.information import code_kl
from sami_ppl.diffusion.schedule import VarianceExploding, VariancePreserving
from sami_ppl.encoders.affine import AffineEncoder
from sami_ppl.program.program import Program

OBS = 16384
pytestmark = pytest.mark.slow


def prior():
    numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))


def aligned(schedule):
    """WᵀW diagonal: each axis has its own information."""
    orthonormal = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 2)))[0]
    return LinearGaussian(jnp.asarray(orthonormal * [3.0, 0.7], jnp.float32), 0.5, schedule)


def mixed(schedule):
    weights = np.random.default_rng(0).normal(size=(6, 2)) @ np.array([[1.0, 0.8], [0.0, 0.6]])
    return LinearGaussian(jnp.asarray(weights, jnp.float32), 0.5, schedule)


def spectrum(model, encoder=None, obs=OBS):
    x, _ = model.sample(jax.random.key(0), obs)
    program = Program(prior, model.denoiser, model.encoder if encoder is None else encoder)
    return information_spectrum(program, x, key=jax.random.key(1), levels=48)


@pytest.mark.parametrize("kind", [VariancePreserving, VarianceExploding], ids=["vp", "ve"])
@pytest.mark.parametrize("make", [aligned, mixed])
def test_spectrum_is_the_closed_form(make, kind):
    """Total and per axis, integrated to nats: within 1 % of I(x_λmax; z) and of I(x_λmax; z_j), at every level 5 %."""
    model = make(kind(-12.0, 10.0))
    found = spectrum(model)
    end = jnp.asarray(10.0)
    exact, per_axis = float(model.information(end)), np.asarray(model.axis_information(end))
    assert found.attrs["information"] == pytest.approx(exact, rel=0.01)
    np.testing.assert_allclose(found["axis_information"][-1], per_axis, rtol=0.01)
    levels = jnp.asarray(found["log_snr"].values + 0.5 * (22 / 48))
    np.testing.assert_allclose(found["information"], jax.vmap(model.information)(levels), atol=0.03 * exact)
    rate = jax.vmap(jax.jacfwd(model.axis_information))(jnp.asarray(found["log_snr"].values))
    np.testing.assert_allclose(0.5 * found["axis_energy"], rate, atol=0.05 * float(rate.max()))
    if make is aligned:
        np.testing.assert_allclose(found["axis_energy"].sum("axis"), found["energy"], rtol=1e-4, atol=1e-6)
    else:
        assert abs(found["axis_information"][-1].sum() - exact) > 0.1


def test_true_posterior_passes_its_checks():
    """Gain = energy, KL = information, E g = 0, no correlation with the score, up to noise of 16,384 observations."""
    found = spectrum(aligned(VariancePreserving(-12.0, 10.0)))
    difference = np.abs(found["gain"] - found["energy"])
    assert np.all(difference < 5 * found["gain_se"] + 1e-3)
    assert found.attrs["gain"] == pytest.approx(found.attrs["information"], rel=0.03)
    assert found.attrs["kl"] == pytest.approx(found.attrs["information"], rel=0.02)
    assert abs(found.attrs["gap"]) == pytest.approx(abs(found.attrs["kl"] - found.attrs["information"]))
    assert float(found["mean_guidance"].max()) < 20 / OBS
    assert float(np.abs(found["cosine_with_score"]).max()) < 5 / np.sqrt(OBS)


class Drifting(LinearGaussian):
    """A noisy posterior whose mean is off by half a unit below the clean end, and right at it."""

    def posterior(self, x_noisy, log_snr):
        mean, cov = super().posterior(x_noisy, log_snr)
        return mean + jnp.where(log_snr < 9.99, 0.5, 0.0), cov


class Shrunken(LinearGaussian):
    """A noisy posterior with half the mean."""

    def posterior(self, x_noisy, log_snr):
        mean, cov = super().posterior(x_noisy, log_snr)
        return 0.5 * mean, cov


class Late(LinearGaussian):
    """The posterior of a noisier observation."""

    def posterior(self, x_noisy, log_snr):
        mean, cov = super().posterior(x_noisy, log_snr)
        return 0.7 * mean, cov + 0.3 * (jnp.eye(2, dtype=cov.dtype) - cov)


@pytest.mark.parametrize("wrong", [Drifting, Shrunken, Late])
def test_wrong_posteriors_are_flagged(wrong):
    """Negative controls: the gain is not the energy, by more than 5 %; a drifting mean leaves E g away from zero."""
    model = aligned(VariancePreserving(-12.0, 10.0))
    broken = wrong(model.weights, model.noise_std, model.schedule)
    found = spectrum(model, broken.encoder)
    assert abs(found.attrs["gain"] - found.attrs["information"]) > 0.05 * found.attrs["information"]
    flagged = float(found["mean_guidance"].max()) > 20 / OBS
    assert flagged == (wrong is Drifting)


def test_kl_of_correlated_axes_is_that_of_the_code_before_it_was_turned(tiny_program, fill):
    """N(0, I) stays as it is when turned; the marginals of the turned axes alone say less, by their correlations."""
    program = tiny_program()
    program = program.replace(encoder=fill(program.encoder, 0.8))
    turned = program.replace(encoder=AffineEncoder(program.encoder, jnp.array([[0.6, -0.8], [0.8, 0.6]])))
    x = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    own, other = (code_kl(p, x, jax.random.key(0)) for p in (program, turned))
    assert other == pytest.approx(own, rel=1e-4)
    loc, sd = turned.encode(x)
    marginal = (0.5 * (loc**2 + sd**2 - 1) - np.log(sd)).sum(1).mean()
    assert own - marginal > 0.01


def directions():
    numpyro.sample("angle", dist.VonMises(0.0, 1e-3))
    numpyro.sample("light", dist.ProjectedNormal(jnp.zeros(3)))
    numpyro.sample("size", dist.Normal(0.0, 1.0))


def test_kl_of_directions_is_from_the_uniform_law(build):
    """Of a circle and a sphere by quadrature of q log(q · area); four standard errors of the one draw of each."""
    program = build(directions)
    x = np.random.default_rng(0).normal(size=(4000, 4)).astype(np.float32)
    q, sites = program.code_law(jnp.asarray(x)), {site.name: site for site in program.latents.sites}
    turn = np.linspace(0, 2 * np.pi, 128, endpoint=False)
    height, rule = np.polynomial.legendre.leggauss(64)
    radius = np.sqrt(1 - height**2)[:, None]
    sphere = np.stack(np.broadcast_arrays(radius * np.cos(turn), radius * np.sin(turn), height[:, None]), -1)
    places = {
        "angle": (np.stack([np.cos(turn), np.sin(turn)], 1), np.full(128, 2 * np.pi / 128)),
        "light": (sphere.reshape(-1, 3), np.repeat(rule, 128) * 2 * np.pi / 128),
    }
    expected, spread = 0.0, 0.0
    for name, (unit, weight) in places.items():
        law = q.of_site(sites[name], {})
        log_q = np.asarray(jax.lax.map(law.log_prob, jnp.asarray(unit, jnp.float32)), float).T
        ratio = log_q + np.log(weight.sum())
        mean = (weight * np.exp(log_q) * ratio).sum(1)
        assert (weight * np.exp(log_q)).sum(1) == pytest.approx(1, abs=1e-3)
        expected += mean.mean()
        spread += ((weight * np.exp(log_q) * ratio**2).sum(1) - mean**2).mean()
    loc, scale = (moment[:, -1] for moment in program.encode(x))
    expected += (0.5 * (loc**2 + scale**2 - 1) - np.log(scale)).mean()
    allowed = 4 * (spread / len(x)) ** 0.5
    assert code_kl(program, x, jax.random.key(0)) == pytest.approx(expected, abs=allowed)
    assert allowed < 0.1 * expected, "or a normal law would pass too"
