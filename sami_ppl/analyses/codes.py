"""What the analyses share: moments of their codes, and labelled results."""

from typing import Any

from jaxtyping import Float
import numpy as np
import xarray as xr

from sami_ppl.program.program import Program

CHUNK = 256
"""Observations at a time, fewer of large ones."""
CODE_UNITS = "spreads of the prior"
ACTIVE_VARIANCE = 0.05
"""An axis is active if its posterior means vary by more than this; the prior's variance is 1."""


def posterior_means(program: Program, x: Float[np.ndarray, "obs *event"]) -> Float[np.ndarray, "obs D"]:
    """Posterior means of the code, with a word where none of them varies.

    Raises ValueError if all axes have collapsed: there is nothing to relate to anything.
    """
    means = program.encode(x)[0]
    if not (means.var(0) > ACTIVE_VARIANCE).any():
        raise ValueError(
            f"all axes have collapsed: no posterior mean varies by more than {ACTIVE_VARIANCE} over {len(x)} "
            f"observations (largest variance {means.var(0).max():.2g}); see diagnostics.collapse.ADVICE"
        )
    return means


def axis_dataset(program: Program, variables: dict, coords: dict | None = None, **attrs: Any) -> xr.Dataset:
    """A Dataset on the axes of the code; `variables`: name → (dims, values, units, long name)."""
    made = {
        name: (dims, np.asarray(values), {"units": units, "long_name": long_name})
        for name, (dims, values, units, long_name) in variables.items()
    }
    return xr.Dataset(made, coords={"axis": list(program.latents.axes), **(coords or {})}, attrs=attrs)
