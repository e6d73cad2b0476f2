"""Whether the factors themselves were found, up to order, sign and scale, and whether the data could have told them."""

from jaxtyping import Float
import numpy as np
from scipy.optimize import linear_sum_assignment

from sami_ppl.metrics.disentanglement import axis_factor_correlation


def mean_correlation(codes: Float[np.ndarray, "n D"], factors: Float[np.ndarray, "n F"]) -> float:
    """Mean correlation coefficient (MCC): mean of |Pearson correlation| over factors, each with an axis of its own.

    The assignment is the best one (Khemakhem et al. 2020, sect. 5). With fewer axes than factors, those without one
    count 0. Raises as `linear_r2`.
    """
    found = np.abs(axis_factor_correlation(codes, factors))
    rows, columns = linear_sum_assignment(found, maximize=True)
    return float(found[rows, columns].sum() / factors.shape[1])


def check_variability(loc: Float[np.ndarray, "K D"], scale: Float[np.ndarray, "K D"]) -> None:
    """Whether Normal priors of K values of u suffice for identifiability (Khemakhem et al. 2020, theorem 1, iv).

    The natural parameters (loc/scale², −1/(2 scale²)) of the D factors must differ between the values of u in all 2D
    directions, which takes at least 2D + 1 values. Where scales are the same for all u, only linear mixtures of the
    factors are found. Raises ValueError otherwise, and says how many directions there are.
    """
    natural = np.concatenate([loc / scale**2, -0.5 / scale**2], axis=1).astype(float)
    differences = natural[1:] - natural[:1]
    scaled = differences / np.maximum(np.abs(differences).max(0, initial=0), 1e-12)
    rank, needed = int(np.linalg.matrix_rank(scaled, tol=1e-6)) if scaled.size else 0, natural.shape[1]
    if rank < needed:
        raise ValueError(
            f"{len(natural)} values of u change the natural parameters in {rank} directions, identifiability needs "
            f"{needed}: give at least {needed + 1} values of u, whose means and scales differ"
        )
