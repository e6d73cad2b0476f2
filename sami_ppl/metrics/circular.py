"""Scores of codes against factors that go round."""

from jaxtyping import Float
import numpy as np


def circular_correlation(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"]) -> float:
    """Correlation of two angles in radians, between −1 and 1 (Fisher & Lee 1983, eq. 2.3).

    ±1 exactly where b = ±a + constant; the sign is the direction of turning. Needs no mean direction, which uniform
    angles do not have. Raises ValueError for arrays that differ in length or hold fewer than 3 angles.
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.shape != b.shape or a.ndim != 1 or len(a) < 3:
        raise ValueError(f"a and b must be two lists of at least 3 angles of one length, got {a.shape} and {b.shape}")
    n = len(a)
    cos_cos, sin_sin = np.cos(a) @ np.cos(b), np.sin(a) @ np.sin(b)
    cos_sin, sin_cos = np.cos(a) @ np.sin(b), np.sin(a) @ np.cos(b)
    spread = [n**2 - np.cos(2 * c).sum() ** 2 - np.sin(2 * c).sum() ** 2 for c in (a, b)]
    scale = np.sqrt(max(spread[0], 0.0) * max(spread[1], 0.0))
    return 0.0 if scale < 1e-9 * n**2 else float(4 * (cos_cos * sin_sin - cos_sin * sin_cos) / scale)


def largest_jump(codes: Float[np.ndarray, "n d"], angle: Float[np.ndarray, " n"], *, bins: int = 64) -> float:
    """Largest step of the mean code between neighbouring angles (radians, period 2π), over the mean step.

    Angles are cut into `bins`; the code's mean is taken in each, all the way round. A code that follows the circle has
    steps of one length, 1; a code on a line that tears has one step as long as all others together, `bins` − 1.
    Raises ValueError where a bin is empty.
    """
    which = np.minimum((np.mod(angle, 2 * np.pi) / (2 * np.pi) * bins).astype(int), bins - 1)
    if len(np.unique(which)) < bins:
        raise ValueError(f"some of {bins} bins of angles are empty: give more observations or fewer bins")
    means = np.stack([codes[which == b].mean(0) for b in range(bins)])
    steps = np.linalg.norm(np.roll(means, -1, axis=0) - means, axis=1)
    return float(steps.max() / steps.mean())
