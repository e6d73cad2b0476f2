"""Groups as a DataTree: names, dims, coordinates and attributes, and its files."""

from collections.abc import Iterator
from io import BytesIO
import json
from pathlib import Path
from typing import Any
import warnings

import numpy as np
import xarray as xr
from xarray.indexes import PandasMultiIndex

from sami_ppl._util.files import written_aside
from sami_ppl._util.versions import versions
from sami_ppl.posteriors.draws import Groups, layout
from sami_ppl.posteriors.symmetry import symmetries
from sami_ppl.program.program import Program

OWN_WEIGHT = "of the own sites of an observation, at draws of global ones"
TIME_UNITS = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
"""By NumPy's codes; xarray holds times in no others."""
STATS = {
    "kl": ("KL(q ‖ p) of each site", "nats"),
    "kl_axis": ("KL(q ‖ p) of each axis of the code", "nats"),
    "kl_global": ("KL(q ‖ p) of each global site, of all observations", "nats"),
    "lp": (f"lower bound on log p(x, z), {OWN_WEIGHT}", "nats"),
    "log_weight": (f"lower bound on log p(x, z) − log q(z | x), {OWN_WEIGHT}", "nats"),
    "pareto_k": ("Pareto k-hat of the weights; above .7 the posterior's moments are not to be trusted", "1"),
    "importance_ess": ("effective number of draws by the weights", "draws"),
}


def root_attrs(program: Program, attrs: dict[str, Any]) -> dict[str, str]:
    """Attributes of the whole tree. Bool, None and nested ones do not survive netCDF: they go in as JSON text."""
    common = {
        "inference_library": "sami_ppl",
        "versions": json.dumps(versions()),
        "attrs": json.dumps(attrs, default=str),
        "symmetries": json.dumps(symmetries(program)),
    }
    if program.origin is not None:
        common |= {"program": Path(program.origin.file).name, "config": program.origin.config}
    return common


def to_tree(
    program: Program, groups: Groups, global_values: Groups, data: xr.Dataset, attrs: dict[str, str], levels: int
) -> xr.DataTree:
    """The DataTree of observations `data` from their groups, and from those of global sites."""
    dims, x = layout(program), data["x"].values
    coords: dict[str, Any] = {
        "obs": obs_labels(data, len(x)), "chain": np.arange(1),
        **{dim: list(names) for dim, names in program.latents.coords.items()},
        **{dim: data[dim].values for dim in program.event_dims if dim in data.coords},
    }  # fmt: skip
    # Of groups without sites of the prior, whose dims may have the same names.
    labels: dict[str, Any] = coords | {
        "axis": list(program.latents.axes),
        "site": [site.name for site in program.latents.sites],
        "global_site": [site.name for site in program.latents.global_sites],
        "global_axis": [axis for site in program.latents.global_sites for axis in site.axes],
    }
    found = {name: group | global_values.get(name, {}) for name, group in groups.items()} | {"observed_data": {"x": x}}
    children = {}
    for group, values in found.items():
        made = xr.Dataset({name: (dims[group][name], value) for name, value in values.items()})
        children[group] = _labelled(made, labels if group in ("sample_stats", "unconstrained_posterior") else coords)
    constants = data.drop_vars("x")
    if constants.data_vars:
        plain = {name: (variable.dims, variable.values) for name, variable in constants.data_vars.items()}
        children["constant_data"] = _labelled(xr.Dataset(plain), coords)
    _describe(program, children, levels)
    return xr.DataTree.from_dict({"/": xr.Dataset(attrs=attrs), **children})


def _labelled(group: xr.Dataset, coords: dict[str, Any]) -> xr.Dataset:
    labels = {dim: coords.get(str(dim), np.arange(size)) for dim, size in group.sizes.items()}
    return group.assign_coords({str(dim): (dim, values) for dim, values in labels.items()})


def _describe(program: Program, groups: dict[str, xr.Dataset], levels: int) -> None:
    for site in program.latents.sites:
        groups["posterior"][site.name].attrs["long_name"] = f"q({site.name} | x), amortised"
    for site in program.latents.global_sites:
        groups["posterior"][site.name].attrs["long_name"] = f"q({site.name}), of all observations"
    groups["unconstrained_posterior"]["code"].attrs |= {
        "long_name": "sites in unconstrained space, directions as vectors", "units": "spreads of the prior",
    }  # fmt: skip
    for variable in groups["log_prior"].values():
        variable.attrs |= {"long_name": "log density on the site's own support", "units": "nats"}
    for name, variable in groups["sample_stats"].items():
        variable.attrs["long_name"], variable.attrs["units"] = STATS[str(name)]
    if "log_likelihood" in groups:
        groups["log_likelihood"]["x"].attrs |= {
            "long_name": "lower bound on log p(x | z)", "units": "nats", "noise_levels": levels,
            "note": "an evidence bound of the diffusion decoder, not a likelihood; not for az.loo, whose estimate from "
            "posteriors as narrow as these does not converge: compare programs by sami_ppl.compare",
        }  # fmt: skip


def save_tree(tree: xr.DataTree, file: str | Path) -> None:
    """Write a DataTree as `.nc` (netCDF) or `.zarr`. Raises ValueError for another suffix."""
    if str(file).endswith(".nc"):
        with written_aside(file) as part:
            tree.to_netcdf(part, engine="h5netcdf")
    elif str(file).endswith(".zarr"):
        with written_aside(file) as part:
            tree.to_zarr(part, mode="w", consolidated=False)
    else:
        raise ValueError(f"give a file ending in .nc or .zarr, got {file!r}")


def check_out(out: str | Path) -> Path:
    """The place of a new store. Raises ValueError for another suffix than .zarr, FileExistsError where it exists."""
    out = Path(out)
    if out.suffix != ".zarr":
        raise ValueError(f'out must end in .zarr, to be written in parts, got {out}: write out="{out.stem}.zarr"')
    if out.exists():
        raise FileExistsError(f"out {out} exists and is not overwritten: give a new folder")
    return out


def write_chunks(trees: Iterator[xr.DataTree], out: Path) -> xr.DataTree:
    """Write trees of successive observations into one zarr store, and open it, without reading it.

    The store appears when it is complete; its chunks hold the observations of one tree.
    """
    with written_aside(out) as part:
        for i, tree in enumerate(trees):
            if i == 0:
                encoding = {node.path: _stored(node.to_dataset(inherit=False)) for node in tree.children.values()}
                tree.to_zarr(part, mode="w", consolidated=False, encoding=encoding)
                continue
            for name, node in tree.children.items():
                group = node.to_dataset(inherit=False)
                more = group.drop_vars([n for n, variable in group.variables.items() if "obs" not in variable.dims])
                more.to_zarr(part, group=name, append_dim="obs", consolidated=False)
    return xr.open_datatree(out, engine="zarr", consolidated=False)


def _stored(group: xr.Dataset) -> dict[Any, dict[str, Any]]:
    """How the variables of a first chunk are stored, and so those of all that follow.

    Times count in the unit that they come in: by default the first ones would choose it, and later ones be cut to it.
    """
    stored: dict[Any, dict[str, Any]] = {
        name: {"chunks": variable.shape} for name, variable in group.data_vars.items() if variable.ndim
    }
    for name, variable in group.variables.items():
        if variable.dtype.kind in "mM":
            since = " since 1970-01-01" if variable.dtype.kind == "M" else ""
            unit = TIME_UNITS[np.datetime_data(variable.dtype)[0]]
            stored[name] = stored.get(name, {}) | {"units": unit + since, "dtype": "int64"}
    return stored


def check_labels(data: xr.Dataset, *, zarr: bool = False) -> None:
    """Write the labels and variables of observations on trial, to netCDF, or to zarr, in memory.

    Of what is no object the first observation is enough: its type decides. Raises ValueError with the variable's name
    for what cannot be written, before hours are spent on what should be.
    """
    for name, variable in data.variables.items():
        if name == "x" or variable.dims[:1] != ("obs",) or (name in data.coords and name != "obs"):
            continue
        if name == "obs" and isinstance(data.xindexes.get("obs"), PandasMultiIndex):
            raise ValueError(
                "obs is a MultiIndex, which no file holds: write data.reset_index('obs').reset_coords(), which makes "
                "its levels variables"
            )
        rows = variable if variable.dtype == object else variable[:1]
        trial = xr.Dataset({"values": (variable.dims, rows.values)})
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if zarr:
                    trial.to_zarr({}, consolidated=False)
                else:
                    trial.to_netcdf(BytesIO(), engine="h5netcdf")
        except Exception as error:
            fix = "data.drop_vars('obs')" if name == "obs" else f"data.drop_vars({name!r}), or make it numbers or text"
            raise ValueError(
                f"{name!r}, of type {variable.dtype}, cannot be written to {'zarr' if zarr else 'netCDF'} ({error}): "
                f"leave it out, {fix}"
            ) from error


def site_coords(program: Program, data: xr.Dataset) -> dict[str, list]:
    """Labels of the prior for the dims of `data`, in the prior's own order."""
    return {dim: list(labels) for dim, labels in program.latents.coords.items() if dim in data.dims}


def obs_labels(data: Any, count: int) -> np.ndarray:
    """Labels of `count` observations: the coordinate obs of a Dataset, else their numbers."""
    return data["obs"].values if isinstance(data, xr.Dataset) and "obs" in data.coords else np.arange(count)
