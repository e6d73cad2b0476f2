"""Procedural disks, the fit of true disks to images, and the digits."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from sami_ppl.data import check_data, digits, disks, fit_disks, render
from sami_ppl.data.disks import FACTORS


@pytest.fixture
def unchecked_shapes():
    """As for users: our own messages, not those of the shape annotations."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def true_factors(data):
    return np.stack([data[name].values for name in FACTORS], axis=1)


def test_render_by_hand():
    image = np.asarray(render(0.25, 0.5, -1.0, resolution=4, radius=0.25))
    assert image.shape == (1, 4, 4)
    assert image.dtype == np.float32
    # Pixel centres at 1/8, 3/8, ...: the four nearest lie √2/8 from the centre, hence coverage ½ + 4 (¼ − √2/8).
    near = 2 * (0.5 + 4 * (0.25 - np.sqrt(2) / 8)) - 1
    # The next ones in the middle rows, at (5/8, 3/8): distance √10/8.
    next_ = 2 * (0.5 + 4 * (0.25 - np.sqrt(10) / 8)) - 1
    far = max(next_, -1)
    corner = 2 * max(0.5 + 4 * (0.25 - np.sqrt(10) / 8), 0) - 1
    expected = [[corner, corner, -1, -1], [near, near, far, -1], [near, near, far, -1], [corner, corner, -1, -1]]
    np.testing.assert_allclose(image[0], expected, atol=1e-6)


def test_render_orientation_and_range():
    image = np.asarray(render(0.8, 0.2, 0.3))[0]
    row, column = np.unravel_index(image.argmax(), image.shape)
    assert row < 8 < column  # y grows downwards
    assert image.min() == pytest.approx(0.3)
    assert image.max() == pytest.approx(1.0)


def test_area_is_that_of_a_disk():
    image = np.asarray(render(0.47, 0.51, -1.0, resolution=32, radius=0.2))
    assert ((image + 1) / 2).mean() == pytest.approx(np.pi * 0.2**2, rel=5e-3)


def test_gradient_is_finite_at_a_pixel_centre():
    centre = 0.5 / 16
    gradient = jax.grad(lambda a: render(a, centre, 0.0).sum())(jnp.asarray(centre))
    assert np.isfinite(gradient)


@pytest.mark.slow
def test_single_precision_and_explicit_promotion_everywhere(x64, strict):
    data = disks(jax.random.key(0), 4, resolution=8)
    assert {variable.dtype for variable in data.values()} == {np.dtype("float32")}
    factors, rms = fit_disks(data.x.values, radius=0.2)
    assert factors.dtype == rms.dtype == np.float32


def test_disks_are_a_valid_data_set():
    data = check_data(disks(jax.random.key(0), 500), event_shape=(1, 16, 16), batch=128)
    assert data.x.dims == ("obs", "channel", "row", "column")
    factors = true_factors(data)
    assert factors.dtype == np.float32
    assert np.all((factors >= [0.2, 0.2, -1]) & (factors <= [0.8, 0.8, 0.5]))
    # Independent uniform factors: correlations of 500 draws stay within 4.5 standard errors, p < 1e-4 for the three.
    assert np.abs(np.corrcoef(factors.T) - np.eye(3)).max() < 4.5 / np.sqrt(500)
    np.testing.assert_array_equal(data.x.values, disks(jax.random.key(0), 500).x.values)
    assert not np.array_equal(data.x.values, disks(jax.random.key(1), 500).x.values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n must be at least 1 image, got 0"),
        ({"resolution": 1}, "resolution must be at least 2 pixels, got 1"),
        ({"radius": 0.0}, "radius must be positive"),
        ({"centre": (0.8, 0.2)}, r"centre must be a range .* got \(0.8, 0.2\)"),
        ({"centre": (0.2, 1.2)}, "centre must be a range"),
        ({"background": (-2.0, 0.5)}, r"background must be a range .* -1.0 <= low .* got \(-2.0, 0.5\)"),
        ({"background": (float("nan"), 0.5)}, "background must be a range"),
    ],
)
def test_impossible_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        disks(jax.random.key(0), **{"n": 4, **options})


@pytest.mark.slow
@pytest.mark.parametrize(("resolution", "radius", "n"), [(16, 0.2, 256), (24, 0.1, 150)])
def test_fit_recovers_noiseless_factors(resolution, radius, n):
    # Centres up to the border; once a whole number of chunks, once with a rest.
    data = disks(jax.random.key(1), n, resolution=resolution, radius=radius, centre=(0.0, 1.0))
    factors, rms = fit_disks(data.x.values, radius=radius, chunk=128)
    np.testing.assert_allclose(factors, true_factors(data), atol=1e-3)
    assert float(rms.max()) < 1e-4


def test_fit_of_noisy_images_errs_as_the_noise_says():
    noise, n = 0.05, 256
    data = disks(jax.random.key(2), n)
    truth = true_factors(data)
    images = data.x.values + noise * np.random.default_rng(0).standard_normal(data.x.shape).astype(np.float32)
    factors, rms = fit_disks(images, radius=0.2, chunk=128)
    jacobian = jax.vmap(jax.jacfwd(lambda f: render(*f).reshape(-1)))(jnp.asarray(truth))
    information = np.einsum("npi,npj->nij", jacobian, jacobian) / noise**2
    # Squared errors in units of the Cramér–Rao bound: χ² with 3 degrees of freedom to first order in the noise.
    error = np.asarray(factors) - truth
    squared = np.einsum("ni,nij,nj->n", error, information, error)
    assert 2.3 < squared.mean() < 3.7  # 4.5 standard errors of 0.15
    assert float(np.mean(rms**2)) == pytest.approx(noise**2 * (1 - 3 / 256), rel=0.02)


def test_fit_tells_other_images_from_disks():
    square = -np.ones((1, 1, 16, 16), np.float32)
    square[..., 5:11, 5:11] = 1
    two = np.maximum(render(0.25, 0.25, -1.0), render(0.75, 0.75, -1.0))[None]
    _, rms = fit_disks(np.concatenate([square, two]), radius=0.2)
    assert rms[0] > 0.1
    assert rms[1] > 0.5


def test_fit_names_the_shape_it_wants(unchecked_shapes):
    with pytest.raises(ValueError, match=r"images must have shape \(n, 1, .*, got \(2, 3, 8, 8\)"):
        fit_disks(np.zeros((2, 3, 8, 8), np.float32), radius=0.2)


def test_digits():
    data = check_data(digits(), event_shape=(1, 8, 8))
    assert data.sizes["obs"] == 1797
    assert float(data.x.min()) == -1
    assert float(data.x.max()) == 1
    assert data.digit.dims == ("obs",)
    assert set(data.digit.values.tolist()) == set(range(10))
