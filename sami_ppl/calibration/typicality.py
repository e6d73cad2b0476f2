"""Is an observation like those that the program knows? By its evidence bound among theirs."""

import jax
from jaxtyping import Array, Float, Key
import numpy as np
import xarray as xr

from sami_ppl._util.errors import UserError
from sami_ppl._util.keys import check_key
from sami_ppl.evidence import evidence_bound, importance_proposal
from sami_ppl.program.program import Program


def typicality(
    program: Program,
    data: xr.Dataset | Float[Array | np.ndarray, "obs *event"],
    reference: xr.Dataset | Float[Array | np.ndarray, "other *event"],
    *,
    key: Key[Array, ""],
    levels: int = 64,
) -> xr.Dataset:
    """How the bound of each observation on −log p(x) stands among those of `reference` observations.

    Variables on `obs`: `bound` in nats; `z_score`, its distance from the reference's median, where ±1 is a standard
    deviation of a Gaussian with the reference's quartiles; `p_value`, two-sided, from its rank: of observations drawn
    as the reference was, and used for the fit as little or as much, a share of at most p has a p-value of p or less,
    whatever the program is worth. Beside n reference observations none is below 2/(n + 1). Both sides count, since
    images that are too plain have too high a density (Nalisnick et al. 2019).

    Raises ValueError for observations of another shape, UserError for fewer than 20 reference observations.
    """
    check_key(key)
    count = len(program.observations(reference)[0])
    if count < 20:
        raise UserError(f"reference must hold at least 20 observations, got {count}")
    pilot_key, own_key, reference_key = jax.random.split(key, 3)
    proposal = importance_proposal(program, reference, key=pilot_key)
    own, known = (
        evidence_bound(program, given, key=k, levels=levels, proposal=proposal)["bound"].values
        for given, k in ((data, own_key), (reference, reference_key))
    )
    low, median, high = np.quantile(known, [0.25, 0.5, 0.75])
    ordered = np.sort(known)
    above = count - np.searchsorted(ordered, own, side="left")
    below = np.searchsorted(ordered, own, side="right")
    p_value = np.minimum(1.0, 2 * (np.minimum(above, below) + 1) / (count + 1))
    variables = {
        "bound": ("obs", own),
        "z_score": ("obs", (own - median) / max((high - low) / 1.349, 1e-9)),
        "p_value": ("obs", p_value),
    }
    return xr.Dataset(variables, attrs={"levels": levels, "reference": count, "units": "nats"})
