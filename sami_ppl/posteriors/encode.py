"""Posteriors of more observations than fit in memory: from one zarr store to another, batch by batch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

from sami_ppl._util.files import written_aside
from sami_ppl._util.progress import progress_bar
from sami_ppl.data import check_shape, open_data, scale_bytes
from sami_ppl.data.checks import as_floats, fill_value
from sami_ppl.data.pixels import warn_of_scale
from sami_ppl.diagnostics.fitted import warn_if_not_fitted
from sami_ppl.posteriors.tree import check_labels
from sami_ppl.program.program import Program, compiled_moments


def encode(
    program: Program,
    data: xr.Dataset | str | Path,
    out: str | Path,
    *,
    chunk: int = 1024,
    progress: bool = True,
) -> xr.Dataset:
    """Location and scale of the posterior of the code z, for every observation of a store: `Program.encode` to disk.

        codes = sp.encode(program, "images.zarr", "codes.zarr")

    The encoder is compiled once; the store is read in whole chunks of its own. Memory holds one of those, `chunk`
    observations and the labels of obs, however many observations there are.

    Args:
        program: the program.
        data: the path of a `.zarr` or `.nc` file, or a Dataset opened by `open_data`, with the variable x
            (obs, *event); uint8 is scaled as `load_data` does.
        out: a new zarr store for `location` and `scale`, mean and standard deviation, (obs, axis); `axis` is labelled,
            `obs` as in the data. It appears when it is complete.
        chunk: observations that the encoder takes at a time.
        progress: show a bar.

    Returns:
        The store, opened but not read.

    Raises:
        FileExistsError: `out` exists.
        TypeError: an x that `check_data` would refuse for its type.
        ValueError: an x that it would refuse for its shape, values that are not finite, a `chunk` below 1, labels of
            obs that `out` cannot hold.
    """
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"out {out} exists and is not overwritten: give a new folder")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 observation, got {chunk}")
    warn_if_not_fitted(program)
    data = opened(program, data)
    check_labels(data[["x"]], zarr=True)
    count = data.sizes["obs"]
    size = min(chunk, count)
    with written_aside(out) as part, progress_bar(count, "encode", show=progress) as bar:
        arrays, start = _create(part, program, data, size), 0
        for batch in batches(program, data["x"], size):
            if start == 0:
                warn_of_scale(batch, program.denoiser.statistics)
            rows = np.minimum(np.arange(size), len(batch) - 1)  # the last batch is filled up
            found = jax.device_get(compiled_moments(program, jnp.asarray(batch[rows]), {}))
            for array, values in zip(arrays, found, strict=True):
                array[start : start + len(batch)] = values[: len(batch)]
            start += len(batch)
            bar.update(len(batch))
    return xr.open_dataset(out, engine="zarr", consolidated=False)


def opened(program: Program, data: Any) -> xr.Dataset:
    """Data opened by their path, or as they are, checked as `encode` says, without reading any values."""
    if not isinstance(data, str | Path | xr.Dataset):
        raise TypeError(
            f"data must be a path or an xarray.Dataset to be streamed, got {type(data).__name__}: write "
            'xr.Dataset({"x": (("obs", "feature"), array)})'
        )
    if not isinstance(data, xr.Dataset):
        data = open_data(data)
    if "x" in data and {*data["x"].dims} == {"obs", *program.event_dims}:
        data = data.assign(x=data["x"].variable.transpose("obs", *program.event_dims))  # matched by name
    check_shape(data, event_shape=program.event_shape)
    if data["x"].dtype != np.uint8 and data["x"].dtype.kind != "f":
        raise TypeError(f"x must be floating point or uint8, got {data['x'].dtype}: store it as one of them")
    return data


def _create(folder: Path, program: Program, data: xr.Dataset, size: int) -> list:
    """A store with the labels, and its arrays `location` and `scale`, to be filled."""
    import zarr

    labels = {"axis": list(program.latents.axes), **({"obs": data["obs"]} if "obs" in data.coords else {})}
    xr.Dataset(coords=labels, attrs={"description": "posterior of the code z"}).to_zarr(folder, consolidated=False)
    group, dims = zarr.open_group(folder, mode="a"), ("obs", "axis")
    x = jax.ShapeDtypeStruct((1, *program.event_shape), jnp.float32)
    return [
        group.create_array(
            name, shape=(data.sizes["obs"], *one.shape[1:]), chunks=(size, *one.shape[1:]), dtype=one.dtype,
            fill_value=np.nan, dimension_names=dims,
        )
        for name, one in zip(("location", "scale"), jax.eval_shape(program.moments, x), strict=True)
    ]  # fmt: skip


def batches(program: Program, x: xr.DataArray, size: int) -> Iterator[np.ndarray]:
    """Batches of `size` observations in float32, the last one shorter, cut from whole chunks of the store.

    Raises what `data.checks.as_floats` raises.
    """
    fill = fill_value(x)
    stored = x.encoding.get("preferred_chunks", {}).get("obs", size)
    block = -(-size // stored) * stored
    blocks = (x.isel(obs=slice(start, start + block)).values for start in range(0, len(x), block))
    top = _largest_byte(x, block) if x.dtype == np.uint8 else None
    left, seen = np.empty((0, *x.shape[1:]), np.float32), 0
    for values in blocks:
        values = as_floats(
            values if top is None else scale_bytes(values, top), missing=program.missing, first=seen, fill=fill
        )
        seen += len(values)
        left = np.concatenate([left, values.astype(np.float32, copy=False)])
        while len(left) >= size:
            yield left[:size]
            left = left[size:]
    if len(left):
        yield left


def _largest_byte(x: xr.DataArray, block: int) -> int:
    """1 for masks of zeros and ones, else 255; as a rule the first block tells."""
    starts = range(0, len(x), block)
    return 255 if any(x.isel(obs=slice(start, start + block)).values.max() > 1 for start in starts) else 1
