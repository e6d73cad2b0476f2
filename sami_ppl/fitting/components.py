"""Codes to start an encoder from, found without labels: principal components of blurred observations.

A blurred image changes monotonically as an object moves, where components of the sharp image turn over; but what is
blurred away, no code can be started on. So the blur is the widest that leaves nearly all that components of the sharp
image would tell: a quarter of the image's side for a disk on an even ground, a tenth or less for photographs, clothes
and handwriting (`widest_blur`).

Components of a curved set of observations outnumber its factors: those that are functions of the ones before them tell
nothing new, and a code that has them counts the same thing twice. They are left out (`free_components`), by how well
nearest neighbours predict them.
"""

import math
from typing import NamedTuple

from jaxtyping import Array, Float
import numpy as np
from scipy.ndimage import gaussian_filter1d
from scipy.sparse.linalg import eigsh

WIDTHS = (0.25, 0.18, 0.12, 0.08, 0.05, 0.0)
"""Standard deviations of the blur that are tried, in units of the image's side; of unequal ones their mean."""
KEPT = 0.99
"""Share of what components of sharp images tell that those of blurred ones must tell."""
NEIGHBOURS, FEWEST = 5, 20
"""Neighbours that predict an observation, and observations without which nothing is predicted."""
FUNCTION = 0.85
"""R² from which a component is a function of others. Of those that are, nearest neighbours reach .89 to 1; of those
that tell something of their own, .77 at most (disks, bars, digits, clothes, patches, faces)."""
NOTHING = 1e-7
"""Variance, in units of the largest, below which a direction is flat: rounding in single precision."""
LARGE = 1000
"""Size of a matrix above which not all of its eigenvalues are computed."""
SOME = 4000
"""Observations that the blur and the functions are found from, at most."""


class StartCodes(NamedTuple):
    """Codes (obs, D) to start from, of which the first `count` columns carry a component; the others are noise.

    `width` of the blur, in units of the image's side.
    """

    codes: Float[np.ndarray, "obs D"]
    count: int
    width: float


def start_codes(
    x: Float[Array | np.ndarray, "obs *event"], size: int, components: int | None = None, *, seed: int = 0
) -> StartCodes:
    """Codes of `size` axes, each of mean 0 and variance 1, for these observations.

    At most so many `components` are taken, None as many as axes. Axes without one are noise, as the prior is, so that
    no factor starts out spread over more axes than it needs.
    """
    components = size if components is None else min(components, size)
    width = widest_blur(x, components).width
    found = low_pass_codes(x, components, width=width)
    free = free_components(found, seed=seed)
    codes = np.random.default_rng(seed).standard_normal((len(found), size)).astype(np.float32)
    codes[:, : len(free)] = found[:, free]
    return StartCodes(codes, len(free), width)


def low_pass_codes(
    x: Float[Array | np.ndarray, "obs *event"], components: int, *, width: float
) -> Float[np.ndarray, "obs k"]:
    """The leading principal components of blurred observations, each of mean 0 and variance 1, in order of variance.

    No more than there are observations, features or directions in which observations differ. `width`: standard
    deviation of the blur in units of the image's side; vectors are not blurred. What is missing, NaN, counts as the
    mean of what others have there.
    """
    flat = filled(np.asarray(x, dtype=np.float32))
    if flat.ndim > 2 and width > 0:
        pixels = width * math.prod(flat.shape[2:]) ** (1 / (flat.ndim - 2))
        flat = np.concatenate([_blurred(flat[i : i + 1024], pixels) for i in range(0, len(flat), 1024)])
    flat = flat.reshape(len(flat), -1)
    components = min(components, *flat.shape)
    centred = flat - flat.mean(0)
    wide = flat.shape[1] > len(flat)  # then there are fewer products of observations than of features
    values, vectors = _leading((centred @ centred.T if wide else centred.T @ centred) / len(flat), components)
    kept = values > NOTHING * max(values[0], 1e-12)
    values, vectors = values[kept], vectors[:, kept]
    if wide:  # its eigenvectors are the codes
        return (vectors * np.sqrt(len(flat))).astype(np.float32)
    return (centred @ vectors / np.sqrt(np.maximum(values, 1e-12))).astype(np.float32)


def _leading(products: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The largest eigenvalues of a symmetric matrix, in falling order, and their vectors; of a large one by Lanczos."""
    if len(products) > LARGE and 4 * count < len(products) and np.trace(products) > 0:
        start = np.random.default_rng(0).standard_normal(len(products)).astype(products.dtype)
        values, vectors = eigsh(products, count, v0=start)
    else:
        values, vectors = np.linalg.eigh(products)
    order = np.argsort(values)[::-1][:count]
    return values[order], vectors[:, order]


def filled(x: Float[np.ndarray, "obs *event"]) -> Float[np.ndarray, "obs *event"]:
    """Observations whose missing entries, NaN, are the mean of those seen at the same place, or 0 where none is."""
    seen = ~np.isnan(x)
    if seen.all():
        return x
    means = np.where(seen, x, 0).sum(0, dtype=np.float64) / np.maximum(seen.sum(0), 1)
    return np.where(seen, x, means).astype(x.dtype)


def _blurred(x: Float[np.ndarray, "n c *sides"], pixels: float) -> Float[np.ndarray, "n c *fewer"]:
    """Observations under a Gaussian blur of so many pixels along every side, every few of their places."""
    step = max(1, int(pixels / 4))  # a blurred image holds nothing finer
    for axis in range(2, x.ndim):
        along = gaussian_filter1d(x, pixels, axis=axis, mode="nearest")
        x = along[(slice(None),) * axis + (slice(None, None, step),)]
    return x


class Blur(NamedTuple):
    """A blur, its `width` in units of the image's side, and the share of the variance that its components tell."""

    width: float
    told: float


def widest_blur(x: Float[Array | np.ndarray, "obs *event"], components: int, *, seed: int = 0) -> Blur:
    """The widest blur, of `WIDTHS`, whose components tell nearly as much of the observations as those without blur.

    What codes tell is the share of the sharp observations' variance that nearest neighbours of the codes predict;
    `KEPT` of it must be left. The width is 0 for vectors, and for too few images to tell, of which 0 is told; of noise
    it is below 0.
    """
    some = filled(np.asarray(x[np.random.default_rng(seed).permutation(len(x))[:SOME]], dtype=np.float32))
    if len(some) < FEWEST:
        return Blur(0.0, 0.0)
    flat = some.reshape(len(some), -1)

    def tried(width: float) -> Blur:
        return Blur(width, predicted(low_pass_codes(some, components, width=width), flat))

    sharp = tried(0.0)
    if some.ndim < 3:
        return sharp
    least = sharp.told - (1 - KEPT) * abs(sharp.told)
    return next((blur for blur in map(tried, WIDTHS) if blur.told >= least), sharp)


def predicted(codes: Float[np.ndarray, "obs k"], values: Float[np.ndarray, "obs d"]) -> float:
    """R² of values of the first quarter of observations by the nearest neighbours that their codes have in the others.

    Neighbours count by their nearness. The variance explained and the whole one are summed over the values.
    """
    from sklearn.neighbors import KNeighborsRegressor

    held, cut = values[: len(values) // 4], len(values) // 4
    neighbours = KNeighborsRegressor(NEIGHBOURS, weights="distance").fit(codes[cut:], values[cut:])
    error = np.sum((neighbours.predict(codes[:cut]) - held) ** 2)
    return float(1 - error / max(np.sum((held - values[cut:].mean(0)) ** 2), 1e-12))


def free_components(codes: Float[np.ndarray, "obs k"], *, seed: int = 0) -> list[int]:
    """Columns that are no function of those before them; the first always is one of them.

    A column is one where nearest neighbours in the columns taken so far predict it with R² above `FUNCTION`. Of a few
    observations none is found.
    """
    some = codes[np.random.default_rng(seed).permutation(len(codes))[:SOME]]
    free = list(range(min(1, codes.shape[1])))
    for column in range(1, codes.shape[1]):
        if len(some) < FEWEST or predicted(some[:, free], some[:, [column]]) <= FUNCTION:
            free.append(column)
    return free
