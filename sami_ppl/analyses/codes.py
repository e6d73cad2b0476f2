"""What the analyses share: moments and draws of their codes, chunk by chunk on the host."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpy as np
import xarray as xr

from sami_ppl._util.chunks import chunk_of, padded_chunks
from sami_ppl.diagnostics.gain import draw_code
from sami_ppl.program.program import Program

CHUNK = 256
"""Observations at a time, fewer of large ones."""
CODE_UNITS = "spreads of the prior"
ACTIVE_VARIANCE = 0.05
"""An axis is active if its posterior means vary by more than this; the prior's variance is 1."""


@eqx.filter_jit
def _draw(program: Program, x: Array, key: Array) -> Array:
    return draw_code(program, x, key)


def draw_codes(
    program: Program, x: Float[np.ndarray, "obs *event"], key: Key[Array, ""], *, chunk: int | None = None
) -> Float[np.ndarray, "obs D"]:
    """One draw of the code from the posterior of every observation."""
    chunk = chunk_of(CHUNK, program.event_shape) if chunk is None else chunk
    parts = [
        np.asarray(_draw(program, jnp.asarray(x[rows]), jax.random.fold_in(key, i)))[:count]
        for i, (rows, count) in enumerate(padded_chunks(len(x), chunk))
    ]
    return np.concatenate(parts)


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
