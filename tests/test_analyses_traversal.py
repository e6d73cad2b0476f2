"""Samples along lines in the code: linear for a linear decoder, which only common random numbers make visible."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
import pytest
import xarray as xr

from sami_ppl import DPMSolver, StochasticDPMSolver, analyses, decode
from sami_ppl.analyses.traversal import direction_vector, line_codes
from sami_ppl.decoders.exact import LinearGaussian
from sami_ppl.diffusion.schedule import VariancePreserving
from sami_ppl.priors.read import read_prior
from sami_ppl.program.program import Program

pytestmark = pytest.mark.slow


def prior():
    numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))


@pytest.fixture(scope="module")
def model():
    orthonormal = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 2)))[0]
    return LinearGaussian(jnp.asarray(orthonormal * [2.0, 1.0], jnp.float32), 0.5, VariancePreserving(-8.0, 8.0))


@pytest.fixture(scope="module")
def program(model):
    return Program(prior, model.denoiser, model.encoder, sampler=StochasticDPMSolver(40))


def test_traversal_of_a_linear_decoder_is_linear(model, program):
    """Changes are t W d: along axes, their combination and a vector; within 3 % of the exact column."""
    x, _ = model.sample(jax.random.key(0), 1)
    directions = ["z[0]", {"z[0]": 1.0, "z[1]": -2.0}, np.array([0.0, 0.5])]
    steps = [-1.0, 0.0, 2.0]
    found = analyses.traverse(program, x[0], directions, key=jax.random.key(1), steps=steps)
    assert found["path"].values.tolist() == ["z[0]", "z[0] − 2 z[1]", "direction 3"]
    change = (found["x"] - found["x"].sel(step=0.0)).values
    w = np.asarray(model.weights)
    for path, d in enumerate([np.array([1.0, 0.0]), np.array([1.0, -2.0]), np.array([0.0, 0.5])]):
        for step, t in enumerate(steps):
            np.testing.assert_allclose(change[path, step], t * w @ d, atol=0.03 * np.linalg.norm(t * w @ d) + 1e-5)
    np.testing.assert_allclose(found["z"].sel(step=0.0), np.tile(program.encode(x)[0], (3, 1)), atol=1e-6)
    np.testing.assert_array_equal(found["start"], x[0])


def test_without_common_noise_it_is_not(model, program):
    """Negative control: samples of the same codes with a key each differ by more than the axis makes."""
    x, _ = model.sample(jax.random.key(0), 1)
    found = analyses.traverse(program, x[0], "z[1]", key=jax.random.key(1), steps=[0.0, 1.0])
    codes = found["z"].values[0]
    change = np.diff(decode(program, codes, jax.random.split(jax.random.key(2), 2)), axis=0)[0]
    exact = np.asarray(model.weights)[:, 1]
    assert np.linalg.norm(change - exact) > 0.3
    assert np.linalg.norm(np.diff(found["x"].values[0], axis=0)[0] - exact) < 0.05


def test_posterior_eigenvectors_are_directions(model, program):
    """One standard deviation of the posterior along its largest component is the weaker axis."""
    x, _ = model.sample(jax.random.key(0), 1)
    spectrum = analyses.posterior_covariance_spectrum(program, x, key=jax.random.key(1)).isel(obs=0)
    vectors = list((spectrum["eigenvector"] * spectrum["eigenvalue"] ** 0.5).values)
    found = analyses.traverse(program, x[0], vectors, key=jax.random.key(1), steps=[0.0, 1.0])
    moved = found["z"].values[0, 1] - found["z"].values[0, 0]
    np.testing.assert_allclose(moved, [0, np.sqrt(float(spectrum["eigenvalue"][0]))], atol=1e-3)


def test_origin_zero_sets_the_share_of_a_direction():
    latents, z = read_prior(prior), np.array([1.5, -0.7])
    np.testing.assert_allclose(
        line_codes(latents, z, np.eye(2), [-2.0, 1.0], origin="zero"),
        [[[-2.0, -0.7], [1.0, -0.7]], [[1.5, -2.0], [1.5, 1.0]]],
    )
    d = np.array([[0.6, 0.8]])
    codes = line_codes(latents, z, d, [0.5], origin="zero")[0, 0]
    assert codes @ d[0] == pytest.approx(0.5)
    assert (codes - z) @ [-0.8, 0.6] == pytest.approx(0, abs=1e-6)


def test_lines_stay_on_directions_of_the_prior():
    def turning():
        numpyro.sample("angle", dist.VonMises(0.0, 1.0))
        numpyro.sample("size", dist.Normal(0.0, 1.0))

    latents = read_prior(turning)
    codes = line_codes(latents, np.array([1.0, 0.0, 0.3]), np.array([[0.0, 1.0, 0.0]]), [-1.0, 0.0, 2.0])[0]
    np.testing.assert_allclose(np.linalg.norm(codes[:, :2], axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(codes[:, 2], 0.3, rtol=1e-6)


def test_interpolation_ends_at_the_two_codes(model, program):
    x, _ = model.sample(jax.random.key(0), 2)
    key = jax.random.key(1)
    found = analyses.interpolate(program, x[0], x[1], key=key, steps=3)
    z = program.encode(x)[0]
    np.testing.assert_allclose(found["z"][0], [z[0], z.mean(0), z[1]], atol=1e-5)
    ends = decode(program, z, jnp.broadcast_to(key, (2,)))
    np.testing.assert_allclose(found["x"].values[0, [0, -1]], ends, atol=1e-4)
    np.testing.assert_allclose(found["x"].values[0, 1], ends.mean(0), atol=1e-4)


def test_conditional_samples_have_their_law(model):
    """x' ~ N(W m, W C Wᵀ + s₀² I) given x: mean and variance of 3,000 draws within 5 standard errors."""
    sampler = DPMSolver(40)
    program = Program(prior, model.denoiser, model.encoder, sampler=sampler)
    x, _ = model.sample(jax.random.key(0), 1)
    found = analyses.conditional_samples(program, x, key=jax.random.key(1), draws=3000)["x"].values[0]
    w = np.asarray(model.weights, float)
    mean, cov = (np.asarray(a, float) for a in model.posterior(*program.encoder.clean(x[0])))
    law = w @ cov @ w.T + 0.25 * np.eye(6)
    error = np.sqrt(np.diag(law) / 3000)
    np.testing.assert_allclose(found.mean(0), w @ mean, atol=5 * error.max() + 0.01)
    np.testing.assert_allclose(found.var(0), np.diag(law), rtol=5 * np.sqrt(2 / 3000) + 0.02)
    # Negative control: of another observation they have not.
    assert np.abs(found.mean(0) + w @ mean).max() > 20 * error.max()


def test_pictures():
    """One panel of images: the start, the samples, and the end where there is one; samples below their images."""
    x = np.random.default_rng(0).uniform(-1, 1, size=(2, 3, 1, 6, 6))
    dims = ("channel", "row", "column")
    moved = xr.Dataset(
        {"x": (("path", "step", *dims), x), "start": (dims, x[0, 0])}, {"path": ["z[0]", "w"], "step": [-1.0, 0.0, 1.0]}
    )
    panel = analyses.plot_traversal(moved).axes[0]
    assert len(panel.get_images()) == 2 * (1 + 3)
    assert [label.get_text() for label in panel.get_xticklabels()] == ["image", "−1.0", "0.0", "1.0"]
    assert len(analyses.plot_traversal(moved.assign(end=moved["start"])).axes[0].get_images()) == 2 * (1 + 3 + 1)
    samples = xr.Dataset({"x": (("obs", "draw", *dims), x), "start": (("obs", *dims), x[:, 0])})
    assert len(analyses.plot_conditional_samples(samples).axes[0].get_images()) == 2 * (1 + 3 + 1)


def test_bad_input(model, program):
    x, key = model.sample(jax.random.key(0), 2)[0], jax.random.key(1)
    with pytest.raises(ValueError, match=r"there is no axis 'w'; the axes are \['z\[0\]', 'z\[1\]'\]"):
        analyses.traverse(program, x[0], "w", key=key)
    for direction in (np.ones(3), np.zeros(2), np.array([np.nan, 1.0]), {"z[0]": 0.0}):
        with pytest.raises(ValueError, match="a direction is an axis"):
            direction_vector(program.latents, direction)
    with pytest.raises(ValueError, match=r"x must have shape \(obs, 6\)"):
        analyses.traverse(program, x[0, :3], "z[0]", key=key)
    with pytest.raises(ValueError, match="steps must be at least 2"):
        analyses.interpolate(program, x[0], x[1], key=key, steps=1)
    with pytest.raises(ValueError, match="draws must be at least 1"):
        analyses.conditional_samples(program, x, key=key, draws=0)
    vectors = analyses.traverse(program, x[0], "z[0]", key=key, steps=[0.0, 1.0])
    with pytest.raises(ValueError, match=r"observations of shape \(6,\) cannot be drawn: images"):
        analyses.plot_traversal(vectors)
    samples = analyses.conditional_samples(program, x, key=key, draws=1)
    with pytest.raises(ValueError, match="cannot be drawn: images"):
        analyses.plot_conditional_samples(samples)
