"""Arrays with the names that they have here: `.npz` and `.npy` files, HDF5 and netCDF files and zarr stores."""

from collections.abc import Callable, Hashable, Iterable, Iterator
import itertools
from pathlib import Path
from typing import Any
import warnings

import numpy as np
import xarray as xr

from sami_ppl._util.errors import attempt
from sami_ppl.data.layout import default_event_dims
from sami_ppl.data.readers.opened import Files, Opened

HDF5 = (".h5", ".hdf5")
METADATA = ("zarr.json", ".zarray")
"""Files of a zarr array that say how it is stored."""


def read_npz(path: Path) -> xr.Dataset:
    """The array x of a `.npz` file, and those of its length as factors.

    Raises ValueError for files that cannot be read, have no x, or factors named as dims are. A warning names arrays of
    another length.
    """

    def read() -> dict[str, np.ndarray]:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
        if others := [name for name, array in found.items() if not isinstance(array, np.ndarray)]:
            raise ValueError(f"{', '.join(others)} in it is no array")
        return found

    arrays, error = attempt(read)
    if arrays is None:
        raise ValueError(
            f"{path.name} cannot be read as a .npz file of plain arrays ({_reason(error)}): "
            "write it by np.savez(path, x=array), with no object arrays in it"
        ) from error
    if "x" not in arrays:
        raise ValueError(f"{path.name} has no array 'x', it has {sorted(arrays)}: write np.savez(path, x=array)")
    x = arrays.pop("x")
    if x.ndim < 2:
        raise ValueError(
            f"array 'x' in {path.name} has shape {x.shape}, expected observations on the first axis and at least one "
            "axis more: write np.savez(path, x=array[:, None])"
        )
    if taken := sorted({"obs", *default_event_dims(x.shape[1:])} & set(arrays)):
        raise ValueError(
            f"{path.name} has arrays named as dims of x are, {', '.join(taken)}, which would not be kept as factors: "
            f"write another name, np.savez(path, x=x, centre_{taken[0]}=array)"
        )
    factors = {name: a for name, a in arrays.items() if a.ndim and len(a) == len(x)}
    if others := sorted(set(arrays) - set(factors)):
        warnings.warn(
            f"{path.name}: {others} left out, a factor has one entry for each of the {len(x)} observations of x",
            stacklevel=4,
        )
    return xr.Dataset(
        {
            "x": (("obs", *default_event_dims(x.shape[1:])), x),
            **{name: (("obs", *(f"{name}_axis{i}" for i in range(a.ndim - 1))), a) for name, a in factors.items()},
        }
    )


def read_npy(path: Path) -> xr.Dataset:
    """The one array of a `.npy` file, as x. Raises ValueError for files that cannot be read, and for a single axis."""
    x = _mapped(path)
    return xr.Dataset({"x": (("obs", *default_event_dims(x.shape[1:])), np.array(x))})


def _mapped(path: Path) -> np.ndarray:
    x, error = attempt(lambda: np.load(path, mmap_mode="r", allow_pickle=False))
    if x is None or not isinstance(x, np.ndarray) or x.ndim < 2:
        reason = f"its shape is {x.shape}" if isinstance(x, np.ndarray) else _reason(error)
        raise ValueError(
            f"{path.name} cannot be read as one array of observations ({reason}): write it by np.save(path, array), "
            "with observations on the first axis and at least one axis more"
        ) from error
    return x


class NpySource:
    """The array of a `.npy` file, of which the operating system reads the pages that are asked for."""

    def __init__(self, path: Path):
        self.array, self.files = _mapped(path), Files(path.parent, [path.name])

    def __len__(self) -> int:
        return len(self.array)

    def rows(self, i: np.ndarray, /) -> np.ndarray:
        """The observations at these places. Raises ValueError where the file has changed."""
        self.files.check(self.files.stamps)
        return np.asarray(self.array[i])


def open_npy(path: Path) -> Opened:
    """The array of a `.npy` file as a source. Raises ValueError as `read_npy` does."""
    return Opened(NpySource(path))


class StoreSource:
    """A Dataset that is opened and not read, in the store at `path`; x with its dims in the order `dims`.

    Of zarr the chunks that are asked for must be those that were there when it was opened, of others the file.
    """

    def __init__(self, path: Path, data: xr.Dataset, dims: tuple[Hashable, ...] | None = None):
        self.data, self.dims = data, dims or data["x"].dims
        stored = data["x"].encoding
        self.chunk = int((stored.get("chunks") or stored.get("chunksizes") or (1,))[0])
        self.grid: tuple[int, ...] = ()
        self.keys: Any = None
        if path.suffix != ".zarr":
            self.files = Files(path.parent, [path.name])
            return
        import zarr

        array = zarr.open_array(path / "x", mode="r")
        size = array.shards or array.chunks
        self.size, self.keys = size[0], array.metadata.encode_chunk_key
        self.grid = tuple(-(-n // s) for n, s in zip(array.shape, size, strict=True))
        self.files = Files(path / "x", itertools.chain(METADATA, self._names(range(self.grid[0]))))

    def _names(self, along: Iterable[int]) -> Iterator[str]:
        """Names of the files of chunks at these places along obs."""
        for first, *rest in itertools.product(along, *(range(n) for n in self.grid[1:])):
            yield self.keys((first, *rest))

    def __len__(self) -> int:
        return self.data.sizes["obs"]

    def rows(self, i: np.ndarray, /) -> xr.Dataset:
        """The observations at these places. Raises ValueError where files have changed, and what readers raise."""
        together = i[-1] - i[0] == len(i) - 1
        names = list(self.files.stamps)
        if self.keys is not None:
            names = [*METADATA, *self._names(np.unique(i // self.size))]
        try:
            found = self.data.isel(obs=slice(i[0], i[-1] + 1) if together else i).load()
        finally:
            self.files.check(names)
        return found.assign(x=found["x"].variable.transpose(*self.dims))


def open_store(path: Path) -> Opened:
    """A `.nc`, `.zarr` or HDF5 dataset with the variable x as a source. Raises ValueError for what is none."""
    return opened_store(path, open_xarray(path))


def opened_store(path: Path, data: xr.Dataset, dims: tuple[Hashable, ...] | None = None) -> Opened:
    """The source of a Dataset that was opened from a store, with its `split`.

    Raises ValueError for variables that are not on obs, x above all, and for another `split` than "train" and "test".
    """
    if "x" not in data or data["x"].dims[:1] != ("obs",):
        raise ValueError(
            f'the first dim of x must be "obs", got dims {data["x"].dims}: write data.transpose("obs", ...)'
        )
    if odd := [str(name) for name, variable in data.data_vars.items() if variable.dims[:1] != ("obs",)]:
        raise ValueError(f"variables of {path.name} must be on obs, got {', '.join(odd)} that are not: write drop_vars")
    test = None
    if "split" in data.variables:
        labels = data["split"].values.astype(str)
        if labels.shape != (data.sizes["obs"],) or {*labels} - {"train", "test"}:
            raise ValueError(
                f'split in {path.name} must label each obs "train" or "test", got {sorted({*labels.flat})[:5]}'
            )
        test = labels == "test"
    data = data.drop_vars([*data.coords, *({"split"} & {*data.data_vars})])
    # A store keeps numbers of all observations together: they would be read with every chunk of x.
    known = {name: variable.load() for name, variable in data.data_vars.items() if variable.ndim == 1}
    source = StoreSource(path, data.assign(known), dims)
    return Opened(source, source.chunk, test)


def read_xarray(path: Path) -> xr.Dataset:
    """A `.nc`, `.zarr` or HDF5 dataset with the variable x. Raises ValueError for what is none."""
    with open_xarray(path) as data:
        return _opened(path, data.load)


def _opened(path: Path, read: Callable[[], xr.Dataset]) -> xr.Dataset:
    data, error = attempt(read)
    if data is None:
        raise ValueError(
            f"{path.name} cannot be read as a dataset ({_reason(error)}): write it by xarray, "
            f"dataset.to_{'zarr' if path.suffix == '.zarr' else 'netcdf'}(path), with no dim called 'x' beside the "
            "variable x"
        ) from error
    return data


def _reason(error: Exception | None) -> str:
    return str(error) or type(error).__name__


def open_xarray(path: Path) -> xr.Dataset:
    """The same, opened and not read. Raises ValueError for what is none."""
    # Without consolidated=False, a zarr store that has no consolidated metadata is read with a warning.
    options: dict[str, Any] = {"engine": "zarr", "consolidated": False} if path.suffix == ".zarr" else {}
    if path.suffix in HDF5:
        options = {"engine": "h5netcdf", "phony_dims": "sort"}
    data = _opened(path, lambda: xr.open_dataset(path, **options))
    if "x" not in data.data_vars:
        raise ValueError(
            f"{path.name} has no variable 'x', it has {sorted(map(str, data.data_vars))}: "
            'write dataset.rename({"<name>": "x"}) before saving'
        )
    return _named(data) if path.suffix in HDF5 else data


def _named(data: xr.Dataset) -> xr.Dataset:
    """The dims of x as arrays have them here, where an HDF5 file has no names of dims."""
    x = data["x"]
    if not all(str(dim).startswith("phony_dim_") for dim in x.dims):
        return data
    return data.rename(dict(zip(x.dims, ("obs", *default_event_dims(x.shape[1:])), strict=True)))
