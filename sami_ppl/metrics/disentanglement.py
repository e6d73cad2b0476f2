"""Disentanglement: does each axis of the code follow one known factor?

Codes are (n, D), factors (n, F) arrays of numbers. Two kinds of score must not be mixed up. *Information* scores
(`linear_r2`, `forest_r2`, the third of `dci`) ask whether the factors can be read off the whole code; they do not
change when the code is rotated (the linear one exactly, forests nearly). *Axis* scores (`mig`, the first two of `dci`,
`axis_factor_correlation`) ask whether they lie along its axes; a rotation destroys them. A score is evidence of
aligned axes only where it is well above that of the same code after `random_rotation`.

Predictors are fitted on training codes and scored on test codes. Factors are regressed as numbers, so they need an
order: leave labels without one out.

- MIG (Chen et al. 2018): mean over factors of (m₁ − m₂)/H(y), with m₁ and m₂ the largest and second largest mutual
  information of a code with factor y. Plug-in entropies in nats on histograms: codes in equal-width bins, as in
  disentanglement_lib; factors with more than `bins` different values in quantile bins, unless these are classes: whole
  numbers, at most 100 of them, each of ten observations in the mean. Codes and factors of at most `bins` different
  values are labels, each a bin of its own. The information of an independent code is not 0 but about
  (B − 1)(K − 1)/2n nats, with B and K bins. Equal-width bins see little of an axis with long tails, of which a warning
  tells; the scores of ranks, `scipy.stats.rankdata(codes, axis=0)`, do not depend on how an axis is stretched.
- DCI (Eastwood & Williams 2018): with R_ij the importance of code i for predicting factor j,
  D = Σ_i ρ_i (1 − H_F(R_i· / Σ_j R_ij)) and C = Σ_j ρ_j (1 − H_D(R_·j / Σ_i R_ij)), where H_k is the entropy with
  logarithms to base k and ρ the share of a row or column in the sum of R. Values depend on the regressor: compare
  none with another.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple
import warnings

from jaxtyping import Float, Int
import numpy as np

from sami_ppl.metrics.correlation import correlation

Codes = Float[np.ndarray, "n D"]
Factors = Float[np.ndarray, "n F"] | Int[np.ndarray, "n F"]

DCI_REGRESSOR = "RandomForestRegressor(n_estimators=50)"
LEAST = 0.3
"""Share of a factor's entropy below which nothing is said of what bins miss."""


class DCI(NamedTuple):
    """Disentanglement and completeness in [0, 1]; informativeness = mean R² over factors; and what predicted them."""

    disentanglement: float
    completeness: float
    informativeness: float
    regressor: str


def linear_r2(
    train_codes: Codes, train_factors: Factors, test_codes: Codes, test_factors: Factors
) -> Float[np.ndarray, " F"]:
    """R² on test points of ordinary least squares from the whole code to each factor.

    Raises ValueError for arrays of the wrong shape, values that are not finite, and factors that do not vary.
    """
    from sklearn.linear_model import LinearRegression
    from sklearn.metrics import r2_score

    _check(train_codes, train_factors)
    _check(test_codes, test_factors)
    predicted = LinearRegression().fit(train_codes, train_factors).predict(test_codes)
    return np.asarray(r2_score(test_factors, predicted, multioutput="raw_values"))


def forest_r2(
    train_codes: Codes, train_factors: Factors, test_codes: Codes, test_factors: Factors, *, seed: int
) -> Float[np.ndarray, " F"]:
    """R² on test points of a random forest of 100 trees from the whole code to each factor. Raises as `linear_r2`."""
    _check(train_codes, train_factors)
    _check(test_codes, test_factors)
    forests = _forests(train_codes, train_factors, trees=100, seed=seed)
    return _r2(forests, test_codes, test_factors)


def normalised_information(
    codes: Codes, factors: Factors, *, bins: int = 20, names: Sequence[str] | None = None
) -> Float[np.ndarray, "D F"]:
    """Plug-in mutual information of each code and each factor, over the factor's entropy. Raises as `linear_r2`.

    Warns of factors whose values, whole numbers, are too many to be classes, and of codes with tails so long that the
    bins see less than half of their information; `names` are those that it tells.
    """
    from sklearn.metrics import mutual_info_score

    _check(codes, factors)
    _warn_of_classes(factors, bins, names)
    labels = [_labels(factor, bins) for factor in factors.T]
    entropy = np.array([mutual_info_score(y, y) for y in labels])

    def shares(cells: list[np.ndarray]) -> Float[np.ndarray, "D F"]:
        return np.array([[mutual_info_score(cell, y) for y in labels] for cell in cells]) / entropy

    information = shares([_equal_width(code, bins) for code in codes.T])
    ranked = shares([_quantile_bins(code, bins) for code in codes.T])
    for i, j in np.argwhere((ranked > LEAST) & (ranked > 2 * information))[:1]:
        warnings.warn(
            f"axis {i} of the code has tails so long that {bins} bins of equal width see {information[i, j]:.2f} of "
            f"factor {j if names is None else names[j]!r} and bins of ranks {ranked[i, j]:.2f}: for scores of ranks "
            "write codes = scipy.stats.rankdata(codes, axis=0)",
            stacklevel=3,
        )
    return information


def mig(codes: Codes, factors: Factors, *, bins: int = 20, names: Sequence[str] | None = None) -> float:
    """Mutual information gap, in [0, 1]. With a single code, its information.

    Raises as `linear_r2`, warns as `normalised_information`.
    """
    information = np.sort(normalised_information(codes, factors, bins=bins, names=names), axis=0)
    second = information[-2] if len(information) > 1 else 0.0
    return float(np.mean(information[-1] - second))


def dci(train_codes: Codes, train_factors: Factors, test_codes: Codes, test_factors: Factors, *, seed: int) -> DCI:
    """DCI with random forests of 50 trees and their impurity importances; informativeness = mean R² on test points.

    Raises as `linear_r2`.
    """
    _check(train_codes, train_factors)
    _check(test_codes, test_factors)
    forests = _forests(train_codes, train_factors, trees=50, seed=seed)
    importances = np.stack([forest.feature_importances_ for forest in forests], axis=1)
    informativeness = float(_r2(forests, test_codes, test_factors).mean())
    return DCI(*dci_from_importances(importances), informativeness, DCI_REGRESSOR)


def dci_from_importances(importances: Float[np.ndarray, "D F"]) -> tuple[float, float]:
    """Disentanglement and completeness of a table of importances; both 0 if all importances are, as of a dead code.

    With a single factor, disentanglement is 1 by convention, and with a single code completeness is. Raises
    ValueError for negative importances.
    """
    if not (importances >= 0).all():
        raise ValueError(f"importances must not be negative, got {importances.tolist()}")
    return _concentration(importances), _concentration(importances.T)


def axis_factor_correlation(codes: Codes, factors: Factors) -> Float[np.ndarray, "D F"]:
    """Pearson correlation of each code and each factor; 0 for a code that is constant. Raises as `linear_r2`."""
    _check(codes, factors)
    return correlation(codes, factors)


def random_rotation(codes: Codes, seed: int) -> Float[np.ndarray, "n D"]:
    """The codes times a random orthogonal matrix (uniform, by QR), the same for the same seed and D.

    The code is rotated as it is, not standardised before: a rotation keeps all distances, and the standard normal
    prior of a code, so that a model has no reason to prefer one over the other. A single axis can only change sign.
    """
    q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((codes.shape[1], codes.shape[1])))
    return codes @ (q * np.sign(np.diag(r)))


def disentanglement_report(
    train_codes: Codes,
    train_factors: Factors,
    test_codes: Codes,
    test_factors: Factors,
    names: Sequence[str],
    seed: int,
) -> dict[str, Any]:
    """All scores, with controls, sample sizes and settings, as numbers and strings that JSON takes.

    `names`: one per factor. MIG and correlations, which fit nothing, are of the test points. Controls: the axis scores
    of the code rotated at random, and the MIG of codes shuffled over the test points, its value by chance.
    Raises as `linear_r2`, and ValueError for another number of names.
    """
    _check(train_codes, train_factors)
    if len(names) != train_factors.shape[1]:
        raise ValueError(f"names must give one name per factor, expected {train_factors.shape[1]}, got {list(names)}")
    turned = [random_rotation(codes, seed) for codes in (train_codes, test_codes)]
    shuffled = np.random.default_rng(seed).permutation(test_codes)
    scores = dci(train_codes, train_factors, test_codes, test_factors, seed=seed)
    rotated = dci(turned[0], train_factors, turned[1], test_factors, seed=seed)

    def by_name(values: np.ndarray) -> dict[str, Any]:
        return dict(zip(names, np.asarray(values, float).tolist(), strict=True))

    return {
        "linear_r2": by_name(linear_r2(train_codes, train_factors, test_codes, test_factors)),
        "forest_r2": by_name(forest_r2(train_codes, train_factors, test_codes, test_factors, seed=seed)),
        "mig": mig(test_codes, test_factors, names=names),
        "dci": scores._asdict(),
        "correlation": by_name(axis_factor_correlation(test_codes, test_factors).T),
        "rotated": {"mig": mig(turned[1], test_factors), "dci": rotated._asdict()},
        "shuffled": {"mig": mig(shuffled, test_factors)},
        "settings": {
            "train": len(train_codes),
            "test": len(test_codes),
            "axes": test_codes.shape[1],
            "seed": seed,
            "forest_r2": "RandomForestRegressor(n_estimators=100)",
            "mig": "20 equal-width bins per code; 20 quantile bins per continuous factor",
        },
    }


def _check(codes: np.ndarray, factors: np.ndarray) -> None:
    if codes.ndim != 2 or factors.ndim != 2 or len(codes) != len(factors) or len(codes) < 2:
        raise ValueError(
            "codes must have shape (n, D) and factors (n, F), with the same n of at least 2, "
            f"got {codes.shape} and {factors.shape}"
        )
    for name, values in (("codes", codes), ("factors", factors)):
        if bad := np.argwhere(~np.isfinite(values)).tolist():
            raise ValueError(f"{name} must be finite, got {len(bad)} values that are not, the first at {tuple(bad[0])}")
    if constant := np.flatnonzero((factors == factors[:1]).all(0)).tolist():
        raise ValueError(f"factors in columns {constant} do not vary, so that nothing follows them: leave them out")


def _forests(codes: np.ndarray, factors: np.ndarray, *, trees: int, seed: int) -> list:
    from sklearn.ensemble import RandomForestRegressor

    return [RandomForestRegressor(trees, random_state=seed, n_jobs=-1).fit(codes, factor) for factor in factors.T]


def _r2(forests: list, codes: np.ndarray, factors: np.ndarray) -> Float[np.ndarray, " F"]:
    from sklearn.metrics import r2_score

    return np.array([r2_score(y, forest.predict(codes)) for forest, y in zip(forests, factors.T, strict=True)])


def _equal_width(code: np.ndarray, bins: int) -> Int[np.ndarray, " n"]:
    values, labels = np.unique(code, return_inverse=True)
    if len(values) <= bins:
        return labels
    # In double precision, so that the range of a nearly constant code can still be cut.
    code = code.astype(np.float64)
    return np.digitize(code, np.histogram(code, bins)[1][:-1])


def _warn_of_classes(factors: np.ndarray, bins: int, names: Sequence[str] | None) -> None:
    for i, factor in enumerate(factors.T):
        values = np.unique(factor)
        if len(values) > bins and (values == np.round(values)).all() and not _are_classes(values, len(factor)):
            warnings.warn(
                f"factor {i if names is None else names[i]!r} holds {len(values)} whole numbers: mutual information "
                f"takes it in {bins} quantile bins, in order; if these are classes, give bins={len(values)} or more",
                stacklevel=4,
            )


def _are_classes(values: np.ndarray, count: int) -> bool:
    # With few observations of each value, every one tells all of the code by chance.
    whole = (values == np.round(values)).all()
    return bool(whole and len(values) <= 100 and count >= 10 * len(values))


def _labels(factor: np.ndarray, bins: int) -> Int[np.ndarray, " n"]:
    values, labels = np.unique(factor, return_inverse=True)
    return labels if _are_classes(values, len(factor)) else _quantile_bins(factor, bins)


def _quantile_bins(values: np.ndarray, bins: int) -> Int[np.ndarray, " n"]:
    different, labels = np.unique(values, return_inverse=True)
    if len(different) <= bins:
        return labels
    return np.searchsorted(np.quantile(values, np.arange(1, bins) / bins), values, side="right")


def _concentration(importances: np.ndarray) -> float:
    """Mean over rows, weighted by their share in the sum, of 1 − entropy of the row to the base of its length."""
    total = importances.sum(1)
    if not total.sum() > 0:
        return 0.0
    if importances.shape[1] == 1:
        return 1.0
    share = importances / np.where(total > 0, total, 1.0)[:, None]
    logs = np.log(share, out=np.zeros_like(share), where=share > 0)
    entropy = -(share * logs).sum(1) / np.log(importances.shape[1])
    return float((total / total.sum()) @ (1 - entropy))
