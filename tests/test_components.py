"""Components of blurred observations: the codes that encoders start from, and which of them are left out."""

import jax
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from sami_ppl.data import bars, digits, disks
from sami_ppl.fitting.components import WIDTHS, free_components, low_pass_codes, start_codes, widest_blur

RNG = np.random.default_rng


def correlated(obs=400, size=6, seed=0):
    rng = RNG(seed)
    return (3 + rng.normal(size=(obs, size)) @ rng.normal(size=(size, size))).astype(np.float32)


def test_codes_are_white_principal_components():
    x = correlated()
    codes = low_pass_codes(x, 4, width=0.25)
    assert (codes.shape, codes.dtype) == ((400, 4), np.float32)
    np.testing.assert_allclose(codes.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(codes.T @ codes / 400, np.eye(4), atol=1e-3)
    centred = x - x.mean(0)
    fitted = centred @ np.linalg.lstsq(centred, codes, rcond=None)[0]
    np.testing.assert_allclose(fitted, codes, atol=1e-3)
    # The leading ones, in order: they explain as much of x as any four directions can.
    values = np.sort(np.linalg.eigvalsh(centred.T @ centred / 400))[::-1]
    explained = ((codes.T @ centred / 400) ** 2).sum(1)
    np.testing.assert_allclose(explained, values[:4], rtol=1e-3)


def test_spare_axes_are_independent_noise():
    """Correlations of 2 axes with 2 components and each other at 4000 observations: five standard errors."""
    x = correlated(4000)
    codes, count, width = start_codes(x, 4, 2)
    assert (count, width, codes.shape, codes.dtype) == (2, 0.0, (4000, 4), np.float32)
    np.testing.assert_array_equal(codes[:, :2], low_pass_codes(x, 2, width=0.0))
    np.testing.assert_allclose(np.corrcoef(codes.T), np.eye(4), atol=5 / 4000**0.5)
    np.testing.assert_allclose(codes.mean(0), 0, atol=5 / 4000**0.5)
    np.testing.assert_allclose(codes.std(0), 1, atol=5 / 8000**0.5)
    again, other = start_codes(x, 4, 2).codes, start_codes(x, 4, 2, seed=1).codes
    np.testing.assert_array_equal(codes, again)
    assert not np.array_equal(codes[:, 2:], other[:, 2:])
    np.testing.assert_array_equal(codes[:, :2], other[:, :2])


def test_more_components_than_there_are_directions():
    """Never more than axes or features; flat directions give no NaN."""
    assert start_codes(correlated(), 3, 9).codes.shape == (400, 3)
    codes = start_codes(correlated(size=2), 4).codes
    np.testing.assert_allclose(np.abs(np.corrcoef(codes.T)[:2, 2:]).max(), 0, atol=0.25)
    assert np.isfinite(start_codes(np.repeat(correlated(size=1), 4, axis=1), 3).codes).all()


def test_signals_and_wide_images_are_blurred_along_their_sides():
    """By the same number of pixels along every side, a share of their geometric mean."""
    for sides, pixels in (((64,), 16.0), ((4, 16), 2.0), ((2, 4, 8), 1.0)):
        x = RNG(3).normal(size=(60, 2, *sides)).astype(np.float32)
        blurred = np.stack([[gaussian_filter(c, pixels, mode="nearest") for c in one] for one in x])
        step = (slice(None, None, max(1, int(pixels / 4))),) * len(sides)
        found = low_pass_codes(x, 3, width=0.25)
        by_hand = low_pass_codes(blurred[(..., *step)].reshape(60, -1), 3, width=0.0)
        np.testing.assert_allclose(np.abs(np.diag(found.T @ by_hand)) / 60, 1, atol=1e-3)


def test_images_are_blurred_by_a_share_of_their_side():
    """The same as the codes of images blurred by hand; blur keeps channels and observations apart."""
    images = RNG(2).normal(size=(200, 2, 8, 8)).astype(np.float32)
    blurred = np.stack([[gaussian_filter(c, 0.25 * 8, mode="nearest") for c in image] for image in images])
    codes, want = (low_pass_codes(a, 3, width=0.25) for a in (images, blurred.reshape(200, -1)))
    np.testing.assert_allclose(np.abs(np.corrcoef(codes.T, want.T)[:3, 3:]), np.eye(3), atol=2e-3)
    sharp = np.abs(np.corrcoef(codes.T, low_pass_codes(images, 3, width=0.0).T)[:3, 3:])
    assert np.abs(sharp - np.eye(3)).max() > 0.1


def test_codes_of_a_moving_object_unfold_its_place():
    """A spot that crosses the image: one code of the blurred image is monotone in its place; unblurred, none is."""
    place, grid = np.linspace(3, 12, 60), np.arange(16)
    squared = (grid[:, None] - 7.5) ** 2 + (grid[None] - place[:, None, None]) ** 2
    images = np.exp(-squared / 2).astype(np.float32)[:, None]

    def monotone(codes):
        steps = np.diff(codes, axis=0)
        return (np.sign(steps) == np.sign(steps.sum(0))).all(0)

    assert monotone(low_pass_codes(images, 1, width=0.25))[0]
    assert not monotone(low_pass_codes(images, 3, width=0.0)).any()


@pytest.mark.slow
def test_codes_of_large_images_are_those_of_every_nth_pixel():
    """A blurred image holds nothing finer: its leading components are the same to a hundredth, up to their sign."""
    rng, grid = np.random.default_rng(0), np.arange(64)
    place = rng.uniform(16, 48, (200, 2))
    squared = sum(
        (grid.reshape(s) - place[:, i].reshape(-1, 1, 1)) ** 2 for i, s in enumerate([(1, -1, 1), (1, 1, -1)])
    )
    images = np.exp(-squared / 50).astype(np.float32)[:, None]
    blurred = gaussian_filter(images, (0, 0, 16, 16), mode="nearest").reshape(200, -1)
    left = np.linalg.svd(blurred - blurred.mean(0), full_matrices=False)[0][:, :2] * np.sqrt(200)
    codes = low_pass_codes(images, 2, width=0.25)
    assert np.allclose(np.abs((codes * left).mean(0)), 1, atol=0.01)


def test_codes_of_few_wide_vectors_are_their_principal_components():
    """Of 20 observations of 3,000 features, by the products of observations; those of numpy's svd, up to signs."""
    x = np.random.default_rng(0).normal(size=(20, 3000)).astype(np.float32)
    left = np.linalg.svd(x - x.mean(0), full_matrices=False)[0][:, :3] * np.sqrt(20)
    np.testing.assert_allclose(np.abs(low_pass_codes(x, 3, width=0.0)), np.abs(left), atol=1e-3)


def curved(obs=2000, noise=0.0):
    """Two Normal factors, their product and the square of the first: variances fall in this order."""
    u = RNG(0).normal(size=(obs, 2))
    columns = np.stack([3 * u[:, 0], 2 * u[:, 1], u[:, 0] * u[:, 1], (u[:, 0] ** 2 - 1) / 2], 1)
    return (columns + noise * RNG(1).normal(size=columns.shape)).astype(np.float32)


@pytest.mark.slow
def test_functions_of_other_components_are_left_out():
    """A product and a square are found whatever their order; what is independent, and what is half noise, stays."""
    x = curved()
    assert free_components(x) == [0, 1]
    assert free_components(x[:, [0, 3, 1, 2]]) == [0, 2], "by those before it"
    assert free_components(RNG(2).normal(size=(2000, 5))) == [0, 1, 2, 3, 4]
    half = curved(noise=0.5)
    assert free_components(half) == [0, 1, 2, 3], "R² is at most .8 and .67"
    codes, count, _ = start_codes(x, 4)
    assert count == 2
    assert np.abs(np.corrcoef(codes.T) - np.eye(4)).max() < 5 / 2000**0.5


def test_a_direction_keeps_both_of_its_components():
    """The sine of an angle is no function of its cosine: both are kept, and their double angles are not."""
    turn = RNG(0).uniform(0, 2 * np.pi, 2000)
    x = np.stack([3 * np.cos(turn), 2 * np.sin(turn), np.cos(2 * turn)], 1)
    assert free_components(x) == [0, 1]


@pytest.mark.parametrize("obs", [1, 2, 19])
def test_of_few_observations_every_component_is_kept(obs):
    assert free_components(curved(obs)[:, :3]) == [0, 1, 2]


@pytest.mark.slow
def test_start_on_images_of_several_kinds():
    """Of disks and bars as many axes as they have factors, under a wide blur; of digits all, a narrow one."""
    disk, bar = (make(jax.random.key(0), 4000)["x"].values for make in (disks, bars))
    assert start_codes(disk, 6)[1:] == (3, 0.25)
    assert start_codes(bar, 5)[1:] == (3, 0.25), "a direction of two numbers, and the ground"
    digit = digits()["x"].values
    found = start_codes(digit, 8)
    assert found.count == 8
    assert 0 < found.width < 0.12


def test_the_widest_blur_that_leaves_what_components_tell():
    """Bands of whole images, under noise, keep all of it under any blur; stripes a pixel wide are blurred away."""
    rng, side = RNG(0), 16
    bands = rng.normal(size=(300, 2)) @ np.stack([np.ones(side), np.linspace(-1, 1, side)])
    stripes = 3 * rng.normal(size=(300, 1)) * np.tile([1.0, -1.0], side // 2)
    noise = 0.3 * rng.normal(size=(300, 1, side, side))
    images = lambda rows: np.repeat(rows[:, None, None, :], side, 2) + noise  # noqa: E731
    assert widest_blur(images(bands), 2).width == 0.25
    assert widest_blur(images(bands + stripes), 1).width < 0.12, "else the bands come first"
    assert widest_blur(images(bands)[:, 0, 0], 2).width == 0.0, "vectors"
    assert widest_blur(rng.normal(size=(40, 1, 8, 8)), 3).width in WIDTHS, "of noise components tell less than nothing"


@pytest.mark.slow
def test_codes_of_many_features_are_those_of_all_eigenvectors(monkeypatch):
    """Leading eigenvectors alone, of 1,200 features, or all of them: the same codes to rounding, up to signs."""
    x = RNG(0).normal(size=(1500, 8)) @ (RNG(1).normal(size=(8, 1200)) * np.arange(8, 0, -1)[:, None])
    x = (x + 0.1 * RNG(2).normal(size=x.shape)).astype(np.float32)
    found = low_pass_codes(x, 5, width=0.0)
    monkeypatch.setattr("sami_ppl.fitting.components.LARGE", 10_000)
    want = low_pass_codes(x, 5, width=0.0)
    np.testing.assert_allclose(np.abs(found), np.abs(want), atol=2e-3)
    monkeypatch.setattr("sami_ppl.fitting.components.LARGE", 10)
    assert low_pass_codes(np.ones((50, 40)), 3, width=0.0).shape == (50, 0), "all alike"


def test_how_much_of_the_variance_components_tell():
    """Two factors on a plane: one axis tells the share of its own, two all of it; of noise, and of a few, nothing."""
    rng = RNG(0)
    x = (rng.normal(size=(3000, 2)) * [2.0, 1.0]) @ np.linalg.qr(rng.normal(size=(6, 2)))[0].T
    # What is not told, a fifth, counts 1 + Σ w² times, of w the weights of five neighbours: 1.2 to 1.4.
    assert 0.7 < widest_blur(x, 1).told < 0.77
    assert widest_blur(x, 2).told > 0.99
    assert widest_blur(rng.normal(size=(3000, 6)), 1).told < 0.2
    assert widest_blur(x[:10], 2) == (0.0, 0.0)
    where = np.exp(-0.5 * ((np.arange(16) - 16 * rng.uniform(size=(1000, 1))) / 1.5) ** 2)[:, None]
    blurred = widest_blur(where, 1)
    assert blurred.width > 0.1
    assert blurred.told > 0.9, "a bump that moves: one number tells where, if the components are of blurred ones"
