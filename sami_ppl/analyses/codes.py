"""What the analyses share: moments and draws of their codes, chunk by chunk on the host."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpy as np
import xarray as xr

from sami_ppl._util.chunks import padded_chunks
from sami_ppl.data import unrolled, unrolled_names
from sami_ppl.diagnostics.gain import draw_code
from sami_ppl.program.program import Program

CHUNK = 256
CODE_UNITS = "spreads of the prior"
ACTIVE_VARIANCE = 0.05
"""An axis is active if its posterior means vary by more than this; the prior's variance is 1."""


@eqx.filter_jit
def _draw(program: Program, x: Array, key: Array) -> Array:
    return draw_code(program, x, key)


def draw_codes(
    program: Program, x: Float[np.ndarray, "obs *event"], key: Key[Array, ""], *, chunk: int = CHUNK
) -> Float[np.ndarray, "obs D"]:
    """One draw of the code from the posterior of every observation."""
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


def read_factors(data: xr.Dataset, names: Any = None) -> tuple[Float[np.ndarray, "obs F"], list[str]]:
    """Known factors of the data and their names: those named, else every real-valued variable on obs.

    A factor that goes round counts as two, its cosine and sine. Raises ValueError where there is none, and for values
    that are not finite.
    """
    if not isinstance(data, xr.Dataset) or "x" not in data.data_vars:
        raise ValueError(
            "data must be an xarray.Dataset with the observations x and their factors, such as data.disks(key, 1000)"
        )
    there = [str(n) for n, v in data.data_vars.items() if n != "x" and v.dims == ("obs",)]
    if names is None:
        names = [name for name in there if np.issubdtype(data[name].dtype, np.floating)]
    if unknown := [name for name in names if name not in there]:
        raise ValueError(f"data has no factor {', '.join(map(repr, unknown))}; its variables on obs are {there}")
    if not len(names):
        raise ValueError(
            'data holds no known factors: give real-valued variables on obs, data.assign(size=("obs", sizes))'
        )
    data = unrolled(data, list(names))
    columns = [column for name in names for column in unrolled_names(data[name])]
    values = np.stack([np.asarray(data[name].values, float) for name in columns], axis=1)
    if bad := [name for name, column in zip(columns, values.T, strict=True) if not np.isfinite(column).all()]:
        raise ValueError(f"factors {', '.join(bad)} are NaN or infinite somewhere: drop these, data.isel(obs=keep)")
    return values, columns


def axis_dataset(program: Program, variables: dict, coords: dict | None = None, **attrs: Any) -> xr.Dataset:
    """A Dataset on the axes of the code; `variables`: name → (dims, values, units, long name)."""
    made = {
        name: (dims, np.asarray(values), {"units": units, "long_name": long_name})
        for name, (dims, values, units, long_name) in variables.items()
    }
    return xr.Dataset(made, coords={"axis": list(program.latents.axes), **(coords or {})}, attrs=attrs)
