"""Do samples look like data? Distances between two sets of feature vectors, with their standard errors.

A sample quality is a distance between laws in the space of some features, and means nothing without them: say which,
and compare only what has the same features and the same numbers of rows. `random_features` needs nothing,
`class_features` labels; features of your own serve as well.

- Fréchet distance (Dowson & Landau 1982; Heusel et al. 2017): that of two Gaussians with the moments of the features,
  |m₁ − m₂|² + tr(C₁ + C₂ − 2 (C₁^½ C₂ C₁^½)^½). From n rows it is too large by O(1/n), more so the more features there
  are (Chong & Forsyth 2020): the distance of two halves of the data is the floor to compare with.
- MMD² (Gretton et al. 2012, eq. 3): unbiased, about 0 for equal laws, and may be negative. `mmd_test` gives it an exact
  p-value.
"""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Float, Int
import numpy as np

Features = Float[np.ndarray, "n features"]


class Distance(NamedTuple):
    """A distance between two sets of features and its standard error over bootstrap samples of both."""

    value: float
    standard_error: float

    def __str__(self) -> str:
        return f"{self.value:.3g} ± {self.standard_error:.1g}"


def frechet(a: Features, b: Features, *, bootstrap: int = 100, seed: int = 0) -> Distance:
    """Fréchet distance between the Gaussians of two sets of features, in squared units of the features.

    Args:
        a: features (n, F), of samples say.
        b: features (m, F), of data.
        bootstrap: samples, drawn with replacement from the rows of both, for the standard error; 0 gives NaN.
        seed: of these samples.

    Raises:
        ValueError: features of unequal width, not finite, or of fewer than two rows.
    """
    a, b = _checked(a, b)
    spread = _bootstrap(lambda i, j: _frechet(a[i], b[j]), len(a), len(b), bootstrap, seed)
    return Distance(_frechet(a, b), spread)


def _frechet(a: np.ndarray, b: np.ndarray) -> float:
    covariance_a, covariance_b = (np.atleast_2d(np.cov(rows.T)) for rows in (a, b))
    values, vectors = np.linalg.eigh(covariance_a)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    overlap = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ covariance_b @ root), 0)).sum()
    gap = a.mean(0) - b.mean(0)
    return float(gap @ gap + np.trace(covariance_a) + np.trace(covariance_b) - 2 * overlap)


def mmd(
    a: Features, b: Features, *, bandwidth: float | None = None, most: int = 2000, bootstrap: int = 100, seed: int = 0
) -> Distance:
    """Squared maximum mean discrepancy of two sets of features, unbiased, with the kernel exp(−|u − v|²/2h²).

    Args:
        a: features (n, F), of samples say.
        b: features (m, F), of data.
        bandwidth: h, in units of the features; default, the median distance of the rows of b.
        most: rows that are used of each at most, drawn at random: costs grow with their square.
        bootstrap: samples, drawn with replacement from the rows of both, for the standard error; 0 gives NaN.
        seed: of all that is drawn.

    Raises:
        ValueError: features of unequal width, not finite, or of fewer than two rows; a bandwidth that is not positive,
            or rows of b that do not differ.
    """
    from sklearn.metrics.pairwise import euclidean_distances

    a, b = _checked(a, b)
    rng = np.random.default_rng(seed)
    a, b = (rows[rng.permutation(len(rows))[:most]] for rows in (a, b))
    squares = euclidean_distances(np.concatenate([a, b]), squared=True)
    n = len(a)
    if bandwidth is None:
        between = squares[n:, n:][np.triu_indices(len(b), 1)]
        bandwidth = float(np.sqrt(np.median(between)))
    if not bandwidth > 0:
        raise ValueError(f"bandwidth must be positive, got {bandwidth}: where most rows of b are alike, give one")
    kernel = np.exp(-squares / (2 * bandwidth**2))
    np.fill_diagonal(kernel, 0.0)  # a row beside itself says nothing of the law

    def value(i: np.ndarray, j: np.ndarray) -> float:
        # Rows drawn k times count k times, but never beside themselves.
        u, v = np.bincount(i, minlength=n).astype(float), np.bincount(j, minlength=len(b)).astype(float)
        pairs_a, pairs_b = u.sum() ** 2 - u @ u, v.sum() ** 2 - v @ v
        within = u @ kernel[:n, :n] @ u / pairs_a + v @ kernel[n:, n:] @ v / pairs_b
        return float(within - 2 * (u @ kernel[:n, n:] @ v) / (u.sum() * v.sum()))

    return Distance(value(np.arange(n), np.arange(len(b))), _bootstrap(value, n, len(b), bootstrap, seed))


def mmd_test(a: Features, b: Features, *, permutations: int = 999, seed: int = 0) -> float:
    """p-value of the hypothesis that one law drew two sets of rows, by their maximum mean discrepancy.

    It is the share of permutations of all rows, with the one at hand, whose discrepancy is as large: exact whatever the
    law, where rows are independent, and at least 1/(permutations + 1). The kernel is exp(−|u − v|²/m) with the median m
    of all squared distances.

    Args:
        a: rows (n, F).
        b: rows (m, F).
        permutations: how many; costs grow with them times (n + m)².
        seed: of the permutations.

    Raises:
        ValueError: rows of unequal width, not finite, or fewer than two; no permutations.
    """
    from sklearn.metrics.pairwise import euclidean_distances

    a, b = _checked(a, b)
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1, got {permutations}")
    n, m, rng = len(a), len(b), np.random.default_rng(seed)
    squares = euclidean_distances(np.concatenate([a, b]), squared=True)
    positive = squares[squares > 0]
    kernel = np.exp(-squares / (np.median(positive) if len(positive) else 1.0))

    def discrepancies(of_a: np.ndarray) -> np.ndarray:
        """Of labellings (rows, n + m), 1 for rows of the first set."""
        to_a = of_a @ kernel
        within_a = (to_a * of_a).sum(1)
        between = to_a.sum(1) - within_a
        return within_a / n**2 + (kernel.sum() - within_a - 2 * between) / m**2 - 2 * between / (n * m)

    own = np.repeat([1.0, 0.0], [n, m])[None]
    found, as_large = discrepancies(own)[0], 1
    for start in range(0, permutations, 1000):
        mixed = np.repeat(own, min(1000, permutations - start), axis=0)
        # Permutations that give the same sets may differ by rounding.
        as_large += int((discrepancies(rng.permuted(mixed, axis=1)) >= found - 1e-12).sum())
    return as_large / (permutations + 1)


def random_features(size: int = 64, *, seed: int = 0) -> Callable[[Float[np.ndarray, "n *event"]], Features]:
    """A function from observations (n, *event) to random features (n, `size`), the same for equal seeds.

    Of images (n, channel, row, column): three layers of random 5 × 5 filters, each rectified and pooled, averaged over
    the image at the end. Of anything else: two rectified random layers. What random filters see is texture and layout,
    not meaning: good enough to tell blurred or noisy samples from sharp ones, without labels or downloads.

    Raises ValueError for a size below 1.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")

    def features(x: Float[np.ndarray, "n *event"]) -> Features:
        import jax
        import jax.numpy as jnp

        x = np.asarray(x, np.float32)
        rng = np.random.default_rng((seed, 1729))  # not the numbers of data that were drawn with the same seed

        def layer(h: jax.Array, width: int, axes: tuple[int, ...]) -> jax.Array:
            shape = (width, h.shape[1], *axes)
            weight = rng.standard_normal(shape).astype(np.float32) * np.sqrt(2 / np.prod(shape[1:]))
            if not axes:
                return jax.nn.relu(h @ weight.T)
            h = jax.nn.relu(jax.lax.conv_general_dilated(h, weight, (1, 1), "SAME"))
            pool = tuple(2 if side > 1 else 1 for side in h.shape[2:])
            return jax.lax.reduce_window(h, 0.0, jax.lax.add, (1, 1, *pool), (1, 1, *pool), "VALID") / np.prod(pool)

        image = x.ndim == 4
        h = jnp.asarray(x if image else x.reshape(len(x), -1))
        for width in (16, 32, size) if image else (size, size):
            h = layer(h, width, (5, 5) if image else ())
        return np.asarray(h.mean((2, 3)) if image else h, float)

    def by_parts(x: Float[np.ndarray, "n *event"]) -> Features:
        return np.concatenate([features(x[start : start + 512]) for start in range(0, len(x), 512)])

    return by_parts


def class_features(
    x: Float[np.ndarray, "n *event"], labels: Int[np.ndarray, " n"], *, size: int = 64, seed: int = 0
) -> Callable[[Float[np.ndarray, "m *event"]], Features]:
    """A function from observations (m, *event) to what the last hidden layer of a classifier says of them, (m, `size`).

    The classifier is a perceptron (scikit-learn) fitted to the labels of the data, so that the features are those that
    tell classes apart.

    Raises ValueError for labels of another number than the observations, or of one class.
    """
    from sklearn.neural_network import MLPClassifier

    x, labels = np.asarray(x, np.float32), np.asarray(labels)
    if len(labels) != len(x) or len(np.unique(labels)) < 2:
        raise ValueError(
            f"labels must be one of each observation, of at least two classes, got {len(labels)} of "
            f"{len(np.unique(labels))} for {len(x)} observations"
        )
    flat = x.reshape(len(x), -1)
    mean, std = flat.mean(0), flat.std() + 1e-6
    network = MLPClassifier((256, size), early_stopping=True, max_iter=30, random_state=seed)
    network.fit((flat - mean) / std, labels)

    def features(x: Float[np.ndarray, "m *event"]) -> Features:
        h = (np.asarray(x, np.float32).reshape(len(x), -1) - mean) / std
        for weight, bias in zip(network.coefs_[:-1], network.intercepts_[:-1], strict=True):
            h = np.maximum(h @ weight + bias, 0)
        return np.asarray(h, float)

    return features


def _bootstrap(value: Callable[[np.ndarray, np.ndarray], float], n: int, m: int, samples: int, seed: int) -> float:
    rng = np.random.default_rng(seed)
    drawn = [value(rng.integers(n, size=n), rng.integers(m, size=m)) for _ in range(samples)]
    return float(np.std(drawn, ddof=1)) if samples > 1 else float("nan")


def _checked(a: Features, b: Features) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"features must be (n, F) and (m, F) with one F, got {a.shape} and {b.shape}: take both from one function, "
            "such as sp.metrics.random_features()"
        )
    if min(len(a), len(b)) < 2:
        raise ValueError(f"features need at least two rows each, got {len(a)} and {len(b)}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("features must be finite: some are NaN or infinite")
    return a, b
