"""Disentanglement scores against hand computed values, known maxima, chance levels and a control that must fail."""

import json

import jaxtyping
import numpy as np
import pytest
from scipy import stats

from sami_ppl.metrics import (
    axis_factor_correlation,
    correlation,
    dci,
    dci_from_importances,
    disentanglement_report,
    forest_r2,
    linear_r2,
    mig,
    normalised_information,
    random_rotation,
)

N = 600


@pytest.fixture
def unchecked_shapes():
    """As for users: our own messages, not those of the shape annotations."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def draw(seed, columns=3, n=N):
    return np.random.default_rng(seed).uniform(-1, 1, (n, columns))


TRAIN, TEST = draw(0), draw(1)
ORDER, SIGNS = [2, 0, 1], np.array([1.0, -2.0, 0.5])


def permuted(factors):
    """The best possible code: factors in another order, with other signs and scales."""
    return factors[:, ORDER] * SIGNS


@pytest.mark.slow
def test_permuted_factors_score_the_maximum():
    assert linear_r2(permuted(TRAIN), TRAIN, permuted(TEST), TEST) == pytest.approx(np.ones(3))
    assert forest_r2(permuted(TRAIN), TRAIN, permuted(TEST), TEST, seed=0).min() > 0.99
    scores = dci(permuted(TRAIN), TRAIN, permuted(TEST), TEST, seed=0)
    assert min(scores[:3]) > 0.97
    assert "50" in scores.regressor
    expected = np.zeros((3, 3))
    expected[range(3), ORDER] = np.sign(SIGNS)
    correlation = axis_factor_correlation(permuted(TEST), TEST)
    np.testing.assert_allclose(np.abs(correlation)[expected != 0], 1)
    np.testing.assert_array_equal(np.sign(correlation)[expected != 0], expected[expected != 0])
    # 4.5 standard errors, 6 off-diagonal entries
    assert np.abs(correlation[expected == 0]).max() < 4.5 / np.sqrt(N)


def test_mig_of_labels_reaches_one():
    labels = np.random.default_rng(0).integers(0, 5, (100_000, 3))
    # 1 up to the plug-in bias of the second code, (20 − 1)(5 − 1)/2n nats
    assert mig(permuted(labels), labels) == pytest.approx(1, abs=1e-3)


def test_a_rotation_lowers_axis_scores_and_keeps_linear_information():
    train, test = (random_rotation(permuted(f) / np.abs(SIGNS), seed=3) for f in (TRAIN, TEST))
    assert linear_r2(train, TRAIN, test, TEST) == pytest.approx(np.ones(3))
    scores = dci(train, TRAIN, test, TEST, seed=0)
    assert max(scores[:2]) < 0.7
    assert scores.informativeness > 0.9
    assert mig(test, TEST) < 0.5 * mig(permuted(TEST), TEST)


def test_random_rotation_is_orthogonal_and_fixed_by_its_seed():
    rotation = random_rotation(np.eye(4), seed=0)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(4), atol=1e-12)
    np.testing.assert_array_equal(rotation, random_rotation(np.eye(4), seed=0))
    assert not np.allclose(rotation, random_rotation(np.eye(4), seed=1))
    # Uniform on the group: entries have mean 0 and variance 1/D, here over 2,000 matrices of 16 entries.
    entries = np.stack([random_rotation(np.eye(4), seed=seed) for seed in range(2000)])
    assert np.abs(entries.mean(0)).max() < 4.5 * 0.5 / np.sqrt(2000)
    np.testing.assert_allclose((entries**2).mean(0), 0.25, atol=0.03)


@pytest.mark.parametrize("n", [5000, 20_000])
def test_independent_codes_have_the_known_plug_in_bias(n):
    rng = np.random.default_rng(0)
    labels, codes = rng.integers(0, 40, (n, 2)), rng.uniform(size=(n, 3))
    bias = (20 - 1) * (40 - 1) / (2 * n)  # to first order: too small by 15 % at n = 1,000
    information = normalised_information(codes, labels) * np.log(40)
    assert information.mean() == pytest.approx(bias, rel=0.1)
    assert mig(codes, labels) < 0.01


@pytest.mark.slow
def test_independent_codes_predict_nothing():
    train, test = draw(10), draw(11)
    assert linear_r2(train, TRAIN, test, TEST).max() < 0.02
    assert forest_r2(train, TRAIN, test, TEST, seed=0).max() < 0.02
    assert dci(train, TRAIN, test, TEST, seed=0).disentanglement < 0.1


def test_mig_by_hand():
    """Two binary factors; code 0 is the first, code 1 tells the second with errors, code 2 is constant.

    The joint of (second factor, code 1) has cells 3/8, 1/8, 1/8, 3/8: I = log 2 − H(1/4).
    """
    first = np.repeat([0, 1], 8)
    second = np.tile([0, 0, 0, 0, 1, 1, 1, 1], 2)
    noisy = np.tile([0, 0, 0, 1, 0, 1, 1, 1], 2)
    entropy = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))
    gap = 1 - entropy / np.log(2)
    codes = np.stack([10.0 * first, noisy - 0.5, np.full(16, 7.0)], axis=1)
    factors = np.stack([first, second], axis=1)
    np.testing.assert_allclose(normalised_information(codes, factors), [[1, 0], [0, gap], [0, 0]], atol=1e-12)
    assert mig(codes, factors) == pytest.approx((1 + gap) / 2)
    # A copy of a code closes its gap.
    assert mig(codes[:, [0, 0, 1]], factors) == pytest.approx(gap / 2)
    assert mig(codes[:, :1], factors) == pytest.approx(0.5)


def test_bins_are_equal_width_for_codes_and_quantiles_for_factors():
    factor = np.arange(1000.0)[:, None] + 0.5
    assert normalised_information(factor, factor)[0, 0] == pytest.approx(1)
    # exp stretches the code: 20 bins of equal width see its upper tail only
    with pytest.warns(UserWarning, match=r"axis 0 of the code has tails so long .* see 0\.[01]\d of factor 'age'"):
        assert normalised_information(np.exp(factor / 50), factor, names=["age"])[0, 0] < 0.5
    # ... but a factor is cut by rank, so that stretching it changes nothing
    assert normalised_information(factor, np.exp(factor / 500))[0, 0] == pytest.approx(1)
    # integers are labels however many there are: 20 bins for 40 levels cap the score at log 20 / log 40
    labels = np.repeat(np.arange(40), 25)[:, None]
    assert normalised_information(labels * 1.0, labels)[0, 0] == pytest.approx(np.log(20) / np.log(40), rel=0.01)


@pytest.mark.parametrize(
    ("importances", "disentanglement", "completeness"),
    [
        (np.eye(3), 1, 1),
        (np.ones((3, 3)), 0, 0),
        # Row 0 is pure, row 1 even: weights 1/3 and 2/3. Column 0 is (1, 1)/2, column 1 is pure: weights 2/3 and 1/3.
        ([[1, 0], [1, 1]], 1 / 3, 1 / 3),
        # One code for two factors: even row, pure columns.
        ([[1, 1], [0, 0]], 0, 1),
        # Four codes share one factor evenly, in base 4: log 2 / log 4 is lost by two codes.
        ([[1, 0], [1, 0], [0, 1], [0, 1]], 1, 0.5),
        # H(3/4, 1/4) = 0.8113 bits.
        ([[3, 1], [1, 3]], 1 - 0.8112781, 1 - 0.8112781),
        (np.zeros((2, 2)), 0, 0),
    ],
)
def test_dci_by_hand(importances, disentanglement, completeness):
    assert dci_from_importances(np.array(importances, float)) == pytest.approx(
        (disentanglement, completeness), abs=1e-6
    )


@pytest.mark.slow
def test_a_collapsed_code_scores_zero():
    codes = np.full((N, 2), 0.1, np.float32)
    report = disentanglement_report(codes, TRAIN, codes, TEST, ["a", "b", "c"], 0)
    assert report["mig"] == 0
    assert report["dci"]["disentanglement"] == 0
    assert max(report["linear_r2"].values()) <= 0
    assert report["correlation"]["a"] == [0, 0]


@pytest.mark.slow
def test_report_is_json_and_reproducible():
    args = (permuted(TRAIN).astype(np.float32), TRAIN, permuted(TEST).astype(np.float32), TEST, ["a", "b", "c"], 5)
    report = disentanglement_report(*args)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report == disentanglement_report(*args)
    assert report["mig"] > 2 * report["rotated"]["mig"]
    assert report["dci"]["disentanglement"] > report["rotated"]["dci"]["disentanglement"] + 0.2
    assert report["shuffled"]["mig"] < 0.1
    assert report["linear_r2"]["b"] == pytest.approx(1)
    assert abs(report["correlation"]["a"][1]) > 0.99


@pytest.mark.parametrize(
    ("codes", "factors", "message"),
    [
        (np.zeros(4), np.zeros((4, 1)), r"codes must have shape \(n, D\).*got \(4,\) and \(4, 1\)"),
        (np.zeros((3, 2)), draw(0)[:4], r"same n .*got \(3, 2\) and \(4, 3\)"),
        (
            np.full((4, 2), np.nan),
            draw(0)[:4],
            r"codes must be finite, got 8 values .* first at \(0, 0\)",
        ),
        (np.zeros((4, 2)), np.array([[0, 1], [0, 2], [0, 3], [0, 4]]), r"factors in columns \[0\] do not vary"),
    ],
)
def test_errors(unchecked_shapes, codes, factors, message):
    with pytest.raises(ValueError, match=message):
        mig(codes, factors)
    with pytest.raises(ValueError, match=message):
        linear_r2(codes, factors, codes, factors)


def test_report_wants_one_name_per_factor():
    with pytest.raises(ValueError, match=r"one name per factor, expected 3, got \['a'\]"):
        disentanglement_report(TRAIN, TRAIN, TEST, TEST, ["a"], 0)


def test_negative_importances_are_refused():
    with pytest.raises(ValueError, match="importances must not be negative"):
        dci_from_importances(np.array([[1.0, -1.0]]))


def test_correlation_of_columns_is_that_of_numpy_and_named_where_nothing_varies():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(40, 3)).astype(np.float32), rng.normal(size=(40, 2))
    found = correlation(a, b)
    for i, j in np.ndindex(found.shape):
        assert found[i, j] == pytest.approx(np.corrcoef(a[:, i], b[:, j])[0, 1], rel=1e-6)
    a[:, 1] = 0.1
    assert (correlation(a, b)[1] == 0).all()
    assert np.isnan(correlation(a, b, constant=np.nan)).sum() == 2


def test_whole_degrees_are_no_classes():
    """A perfect code of factors in whole degrees scores as with fractions of them, and the factor is named."""
    rng = np.random.default_rng(0)
    degrees = rng.integers(0, 360, (1000, 2)).astype(float)
    codes = np.column_stack([degrees, rng.normal(size=(1000, 2))])
    fractions = mig(codes, degrees + 0.25 * rng.random(degrees.shape))
    with pytest.warns(UserWarning, match="whole numbers") as told:
        assert mig(codes, degrees, names=["angle", "turn"]) == pytest.approx(fractions, abs=0.05)
    assert [str(w.message)[:20] for w in told] == ["factor 'angle' holds", "factor 'turn' holds "]


def test_a_perfect_code_of_labels_with_gaps_reaches_one():
    """Bins of equal width would put the values 0 and 1 of 0 … 50 into one."""
    rng = np.random.default_rng(0)
    gaps = rng.choice([0.0, 1.0, 7.0, 50.0], (5000, 1))
    codes = np.column_stack([gaps**2, rng.normal(size=(5000, 2))])
    assert mig(codes, gaps) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("law", ["uniform", "norm", "cauchy", "lognorm"])
def test_ranks_of_a_perfect_code_reach_the_ceiling(law):
    """1 − (B − 1)²/2n nats of the idle axis over log B, however the axis that follows the factor is stretched."""
    n, bins = 20_000, 20
    factor = np.random.default_rng(0).uniform(size=(n, 1))
    stretched = stats.lognorm(1).ppf(factor) if law == "lognorm" else getattr(stats, law).ppf(factor)
    codes = np.column_stack([stretched, np.random.default_rng(1).normal(size=n)])
    ceiling = 1 - (bins - 1) ** 2 / (2 * n) / np.log(bins)
    assert mig(stats.rankdata(codes, axis=0), factor, bins=bins) == pytest.approx(ceiling, abs=2e-3)
