"""Distances between sets of features against closed forms, with standard errors and controls."""

import itertools

import numpy as np
import pytest
from scipy.linalg import sqrtm
from scipy.stats import kstest

from sami_ppl.metrics import class_features, frechet, mmd, mmd_test, random_features


def gaussian(seed, n=4000, shift=0.0, scale=1.0, columns=3):
    return shift + scale * np.random.default_rng(seed).standard_normal((n, columns))


def with_moments(rows, mean, root):
    """Rows whose sample moments are exactly these."""
    centred = rows - rows.mean(0)
    white = centred @ np.linalg.inv(np.linalg.cholesky(np.cov(centred.T))).T
    return mean + white @ root.T


def test_frechet_is_that_of_two_gaussians():
    """Against scipy's matrix root, for covariances that do not commute."""
    root = np.array([[1.0, 0.0, 0.0], [0.8, 0.5, 0.0], [-0.3, 0.4, 2.0]])
    a, b = with_moments(gaussian(0), np.array([1.0, 2.0, 3.0]), root), with_moments(gaussian(1), np.zeros(3), root.T)
    first, second = root @ root.T, root.T @ root
    want = 14 + np.trace(first + second - 2 * np.real(sqrtm(first @ second)))
    assert frechet(a, b, bootstrap=0).value == pytest.approx(want, rel=1e-9)
    commuting = 14 + np.sum((np.sqrt(np.linalg.eigvalsh(first)) - np.sqrt(np.linalg.eigvalsh(second))) ** 2)
    assert abs(want - commuting) > 0.1, "or the order of the factors would not matter"
    assert frechet(a, a, bootstrap=0).value == pytest.approx(0, abs=1e-9)


def test_frechet_of_one_feature_and_of_fewer_rows_than_features():
    a, b = gaussian(0, columns=1), gaussian(1, shift=2.0, scale=3.0, columns=1)
    want = (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
    assert frechet(a, b).value == pytest.approx(want)
    assert np.isfinite(frechet(gaussian(0, n=4, columns=20), gaussian(1, n=5, columns=20)).value)


def test_standard_errors_are_those_of_repetitions():
    """Over 60 pairs of samples; their standard deviation is right within 37 % (four standard errors)."""
    for distance in (frechet, mmd):
        pairs = [(gaussian(2 * i, n=150), gaussian(2 * i + 1, n=150, shift=0.7)) for i in range(60)]
        values = [distance(a, b, bootstrap=0).value for a, b in pairs]
        errors = [distance(a, b, bootstrap=40, seed=i).standard_error for i, (a, b) in enumerate(pairs[:6])]
        assert np.mean(errors) == pytest.approx(np.std(values), rel=0.45)


def test_mmd_is_that_of_two_gaussians():
    """E k(u, v) of Gaussians has a closed form; equal laws give 0 within 4 standard errors, and less at times."""
    h, gap = 1.5, 1.0

    def expected(shift, variance, d=3):  # of exp(−|u − v|²/2h²), u − v ~ N(shift, variance I)
        return (h**2 / (h**2 + variance)) ** (d / 2) * np.exp(-d * shift**2 / (2 * (h**2 + variance)))

    want = expected(0, 2.0) + expected(0, 2 * 4.0) - 2 * expected(gap, 5.0)
    found = mmd(gaussian(0), gaussian(1, shift=gap, scale=2.0), bandwidth=h, most=1000, bootstrap=30)
    assert abs(found.value - want) < 4 * found.standard_error
    assert found.standard_error < want / 10
    equal = [mmd(gaussian(2 * i, n=200), gaussian(2 * i + 1, n=200), bootstrap=0).value for i in range(40)]
    assert abs(np.mean(equal)) < 4 * np.std(equal) / np.sqrt(40)
    assert min(equal) < 0
    biased = np.mean(np.exp(-np.zeros(200) / 2)) / 100
    assert biased > 4 * np.std(equal) / np.sqrt(40), "or rows beside themselves would not be seen"


def test_mmd_takes_so_many_rows_and_its_bandwidth_from_the_data():
    a, b = gaussian(0, n=500), gaussian(1, n=500, shift=1.0)
    assert mmd(a, b, bootstrap=0).value == pytest.approx(mmd(10 * a, 10 * b, bootstrap=0).value)
    assert mmd(a, b, most=100, bootstrap=0).value != mmd(a, b, bootstrap=0).value


def images(seed, blur=0, n=300):
    x = np.random.default_rng(seed).standard_normal((n, 1, 12, 12)).astype(np.float32)
    for _ in range(blur):
        x = (x + np.roll(x, 1, -1) + np.roll(x, 1, -2)) / 3
    return x / x.std()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["images", "vectors"])
def test_random_features_tell_samples_from_data(kind):
    """Images that are too smooth, vectors that are too wide; the distance of two halves of the data is the floor."""
    data, other, wrong = images(0), images(1), images(2, blur=2)
    if kind == "vectors":
        data, other, wrong = (x.reshape(len(x), -1) for x in (data, other, 1.5 * images(2)))
    features = random_features(16, seed=1)
    assert features(data).shape == (300, 16)
    np.testing.assert_array_equal(features(data), random_features(16, seed=1)(data))
    assert not np.allclose(features(data), random_features(16, seed=2)(data))
    same, different = frechet(features(data), features(other)), frechet(features(data), features(wrong))
    assert different.value > 3 * same.value


def test_class_features_tell_classes_apart():
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=400)
    x = rng.standard_normal((400, 10)).astype(np.float32)
    x[:, 0] += 4 * labels
    features = class_features(x, labels, size=8)
    assert features(x).shape == (400, 8)
    of = lambda kind: features(x[labels == kind])  # noqa: E731
    half = len(of(0)) // 2
    assert frechet(of(0), of(2)).value > 10 * frechet(of(0)[:half], of(0)[half:]).value


def test_what_cannot_be_compared():
    good = gaussian(0, n=10)
    with pytest.raises(ValueError, match=r"one F, got \(10, 3\) and \(10, 2\)"):
        frechet(good, good[:, :2])
    with pytest.raises(ValueError, match="at least two rows"):
        frechet(good[:1], good)
    with pytest.raises(ValueError, match="finite"):
        mmd(np.where(good > 1, np.nan, good), good)
    with pytest.raises(ValueError, match="bandwidth must be positive"):
        mmd(good, np.zeros((10, 3)))
    with pytest.raises(ValueError, match="size must be at least 1"):
        random_features(0)
    with pytest.raises(ValueError, match="of at least two classes, got 10 of 1 for 10"):
        class_features(good, np.zeros(10, int))


def test_the_p_value_of_two_samples_is_that_of_all_permutations():
    """Of 3 and 3 rows there are 20 labellings: by loops over them; a draw of 20,000 permutations, to 4.5 errors."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(3, 2)), rng.normal(size=(3, 2)) + 1.0
    rows = np.concatenate([a, b])
    squares = ((rows[:, None] - rows[None]) ** 2).sum(-1)
    kernel = np.exp(-squares / np.median(squares[squares > 0]))

    def discrepancy(first):
        other = [i for i in range(6) if i not in first]
        between = kernel[np.ix_(first, other)].mean()
        return kernel[np.ix_(first, first)].mean() + kernel[np.ix_(other, other)].mean() - 2 * between

    every = [discrepancy(list(one)) for one in itertools.combinations(range(6), 3)]
    exact = np.mean(np.array(every) >= every[0] - 1e-9)
    assert 0 < exact < 1
    found = mmd_test(a, b, permutations=20_000)
    assert found == pytest.approx(exact, abs=4.5 * np.sqrt(exact * (1 - exact) / 20_000) + 1e-4)


@pytest.mark.slow
def test_p_values_of_two_samples_are_uniform_and_small_where_laws_differ():
    """Kolmogorov–Smirnov at a false-alarm rate of .001, 200 pairs; a scale of .6 and a mean of .7 are told."""
    pairs = [(gaussian(2 * i, n=40), gaussian(2 * i + 1, n=60)) for i in range(200)]
    values = [mmd_test(a, b, permutations=199, seed=i) for i, (a, b) in enumerate(pairs)]
    assert kstest(values, "uniform").pvalue > 0.001
    a, b = pairs[0]
    assert mmd_test(0.6 * a, b) < 0.02
    assert mmd_test(a + 0.7, b) < 0.02
    with pytest.raises(ValueError, match="permutations must be at least 1"):
        mmd_test(a, b, permutations=0)
