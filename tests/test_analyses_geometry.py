"""The geometry of the code against closed forms, finite differences and sums over pairs written out."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
import pytest

from sami_ppl import DDIM, analyses, decode, families
from sami_ppl.decoders.exact import LinearGaussian
from sami_ppl.diffusion.schedule import VariancePreserving
from sami_ppl.encoders.encoder import FamilyEncoder
from sami_ppl.priors.read import read_prior
from sami_ppl.program.program import Program

SCHEDULE = VariancePreserving(-8.0, 8.0)
pytestmark = pytest.mark.slow


def prior():
    numpyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))


def linear(spreads, *, slanted=False):
    weights = np.random.default_rng(0).normal(size=(6, 3)) if slanted else np.linalg.qr(np.eye(6)[:, :3] + 0.2)[0]
    return LinearGaussian(jnp.asarray(weights * spreads, jnp.float32), 0.5, SCHEDULE)


def program_of(model):
    return Program(prior, model.denoiser, model.encoder, sampler=DDIM(12))


def test_covariance_spectrum_is_the_closed_form():
    """Of a correlated posterior, the same for all x; eigenvectors reproduce the covariance."""
    model = linear([3.0, 1.0, 0.5], slanted=True)
    x, _ = model.sample(jax.random.key(0), 5)
    found = analyses.posterior_covariance_spectrum(program_of(model), x, key=jax.random.key(1))
    w = np.asarray(model.weights, float)
    cov = np.linalg.inv(np.eye(3) + w.T @ w / (0.25 + np.exp(-8.0)))
    np.testing.assert_allclose(found["eigenvalue"], np.tile(np.linalg.eigvalsh(cov)[::-1], (5, 1)), rtol=1e-3)
    vectors = found["eigenvector"].values
    again = np.einsum("nci,nc,ncj->nij", vectors, found["eigenvalue"].values, vectors)
    np.testing.assert_allclose(again, np.tile(cov, (5, 1, 1)), atol=1e-4)
    assert found.attrs["from"] == "closed form"
    # Negative control: the marginal variances alone are another spectrum.
    assert not np.allclose(np.sort(np.diag(cov))[::-1], found["eigenvalue"][0], rtol=0.1)


def test_covariance_spectrum_of_a_diagonal_posterior(tiny_program):
    program = tiny_program()
    x = jax.random.normal(jax.random.key(0), (4, 4))
    found = analyses.posterior_covariance_spectrum(program, x, key=jax.random.key(1))
    scale = program.encode(x)[1]
    np.testing.assert_allclose(found["eigenvalue"], np.sort(scale**2, axis=1)[:, ::-1], rtol=1e-5)
    assert np.allclose(np.abs(found["eigenvector"]).max("axis"), 1)


def test_covariance_spectrum_from_draws(mlp, tiny_program, fill):
    """A mixture's own covariance within 5 standard errors √(2/4096) of an eigenvalue; its diagonal is far from it."""
    latents = read_prior(prior)
    network = mlp(4, 6, key=jax.random.key(0))
    encoder = FamilyEncoder(
        network, VariancePreserving(-4.0, 4.0), (4,), latents, families={"z": families.Mixture}, key=jax.random.key(1)
    )
    encoder = fill(encoder, 0.3)
    base = tiny_program(prior)
    program = base.replace(encoder=encoder)
    x = jax.random.normal(jax.random.key(2), (2, 4))
    found = analyses.posterior_covariance_spectrum(program, x, key=jax.random.key(3))
    assert found.attrs["from"] == "4096 draws"
    for i in range(2):
        log_weights, loc, scale = encoder.parameters(*encoder.clean(x[i]))["z"]
        weights, away = np.exp(log_weights), loc - np.exp(log_weights) @ loc
        exact = np.einsum("k,ki,kj->ij", weights, away, away) + np.diag(weights @ scale**2)
        values = np.linalg.eigvalsh(np.asarray(exact, float))[::-1]
        np.testing.assert_allclose(found["eigenvalue"][i], values, rtol=5 * np.sqrt(2 / 4096))
        assert not np.allclose(np.sort(np.diag(exact))[::-1], values, rtol=0.12)


def test_sensitivity(tiny_program):
    """0 in a linear-Gaussian model; else central differences, which are not 0."""
    model = linear([3.0, 1.0, 0.5], slanted=True)
    x, _ = model.sample(jax.random.key(0), 5)
    np.testing.assert_array_equal(analyses.sensitivity(program_of(model), x, chunk=2)["sensitivity"], 0)

    program = tiny_program()
    x = np.asarray(jax.random.normal(jax.random.key(0), (3, 4)))
    found = analyses.sensitivity(program, x, chunk=2)["sensitivity"].values
    step = 0.02 * np.eye(4, dtype=np.float32)
    ends = [program.encode((x[:, None] + sign * step).reshape(-1, 4))[1] ** 2 for sign in (1, -1)]
    slope = ((ends[0] - ends[1]) / 0.04).reshape(3, 4, 2)
    np.testing.assert_allclose(found, np.linalg.norm(slope, axis=1), rtol=0.01)
    assert found.min() > 1e-3


def test_coherence_of_a_linear_decoder_is_one():
    """An axis that the decoder ignores has none: its changes are rounding errors."""
    model = linear([3.0, 1.0, 0.0])
    x, _ = model.sample(jax.random.key(0), 6)
    found = analyses.coherence(program_of(model), x, key=jax.random.key(1))
    np.testing.assert_allclose(found["coherence"][:2], 1, atol=1e-4)
    assert np.isnan(found["coherence"][2])
    column = np.linalg.norm(np.asarray(model.weights), axis=0) / np.sqrt(6)
    np.testing.assert_allclose(found["change"][:2], column[:2], rtol=0.05)
    empty = linear([0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="all axes have collapsed"):
        analyses.coherence(program_of(empty), x, key=jax.random.key(1))


def test_coherence_is_the_mean_over_pairs(tiny_program):
    """Written out, for a decoder that is not linear, where it is not 1 (the control)."""
    program = tiny_program()
    x = 2 * jax.random.normal(jax.random.key(0), (5, 4))
    found = analyses.coherence(program, x, key=jax.random.key(1), step=1.5)
    keys, means = jax.random.split(jax.random.key(1), 5), program.encode(x)[0]
    for j in range(2):
        moved = means + 1.5 * np.eye(2)[j]
        change = decode(program, moved, keys) - decode(program, means, keys)
        cosines = [
            change[a] @ change[b] / np.linalg.norm(change[a]) / np.linalg.norm(change[b])
            for a, b in itertools.combinations(range(5), 2)
        ]
        assert found["coherence"].values[j] == pytest.approx(np.mean(cosines), abs=1e-3)
        assert np.mean(cosines) < 0.999


def test_axis_geometry_is_sorted_and_agrees_with_its_parts():
    model = linear([1.0, 3.0, 0.0])
    x, _ = model.sample(jax.random.key(0), 40)
    program = program_of(model)
    found = analyses.axis_geometry(program, x, key=jax.random.key(1), log_snr=-1.0, pairs_of=8)
    assert found["axis"].values[-1] == "z[2]", "an axis without coherence comes last"
    assert np.all(np.diff(found["coherence"].values[:2]) <= 0)
    by_axis = found.sel(axis=list(program.latents.axes))
    np.testing.assert_allclose(by_axis["mean_variance"], program.encode(x)[0].var(0, ddof=1), rtol=1e-5)
    exact = np.asarray(jnp.diagonal(jnp.linalg.inv(model.precision(jnp.asarray(-1.0)))))
    np.testing.assert_allclose(by_axis["noisy_variance"], exact, rtol=1e-4)
    assert (found.attrs["observations"], found.attrs["pairs_of"]) == (40, 8)
    figure = analyses.plot_axis_geometry(found)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == found["axis"].values.tolist()
    spectrum = analyses.posterior_covariance_spectrum(program, x[:1], key=jax.random.key(1))
    assert len(analyses.plot_posterior_covariance_spectrum(spectrum).axes) == 1


def test_bad_input():
    model = linear([3.0, 1.0, 0.5])
    program, key = program_of(model), jax.random.key(0)
    x, _ = model.sample(key, 3)
    for analysis in (analyses.coherence, analyses.axis_geometry):
        with pytest.raises(ValueError, match="at least 2 observations, got 1"):
            analysis(program, x[:1], key=key)
    with pytest.raises(ValueError, match=r"add the leading dim"):
        analyses.posterior_covariance_spectrum(program, x[0], key=key)
    with pytest.raises(ValueError, match=r"x must have shape"):
        analyses.sensitivity(program, x[:, :4])
