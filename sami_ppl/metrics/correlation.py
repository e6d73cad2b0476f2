"""Pearson correlation of columns with columns, and what it is where one of them does not vary."""

from jaxtyping import Float
import numpy as np


def correlation(
    a: Float[np.ndarray, "n D"], b: Float[np.ndarray, "n F"], *, constant: float = 0.0
) -> Float[np.ndarray, "D F"]:
    """Pearson correlation of each column of a with each column of b; `constant` for columns of one value."""
    standard, varies = [], []
    for values in (a, b):
        values = np.asarray(values, dtype=np.float64)
        varies.append((values != values[:1]).any(0))
        standard.append((values - values.mean(0)) / np.where(varies[-1], values.std(0), 1.0))
    return np.where(varies[0][:, None] & varies[1], standard[0].T @ standard[1] / len(standard[0]), constant)
