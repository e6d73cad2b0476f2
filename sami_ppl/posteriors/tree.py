"""Groups as a DataTree: names, dims, coordinates and attributes, and its files."""

from collections.abc import Iterator
import json
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from sami_ppl._util.files import written_aside
from sami_ppl._util.versions import versions
from sami_ppl.posteriors.draws import Groups, layout
from sami_ppl.posteriors.symmetry import symmetries
from sami_ppl.program.program import Program

OWN_WEIGHT = "of the own sites of an observation, at draws of global ones"
STATS = {
    "kl": ("KL(q ‖ p) of each site", "nats"),
    "kl_axis": ("KL(q ‖ p) of each axis of the code", "nats"),
    "kl_shared": ("KL(q ‖ p) of each global site, of all observations", "nats"),
    "lp": (f"bound on log p(x, z), {OWN_WEIGHT}", "nats"),
    "log_weight": (f"bound on log p(x, z) − log q(z | x), {OWN_WEIGHT}", "nats"),
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
    program: Program, groups: Groups, shared: Groups, data: xr.Dataset, attrs: dict[str, str], levels: int
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
        "shared_site": [site.name for site in program.latents.shared],
        "shared_axis": [axis for site in program.latents.shared for axis in site.axes],
    }
    found = {name: group | shared.get(name, {}) for name, group in groups.items()} | {"observed_data": {"x": x}}
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
    for site in program.latents.shared:
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
            "note": "an evidence bound of the diffusion decoder, not a likelihood",
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
                chunks = {
                    node.path: {name: {"chunks": v.shape} for name, v in node.data_vars.items() if v.ndim}
                    for node in tree.children.values()
                }
                tree.to_zarr(part, mode="w", consolidated=False, encoding=chunks)
                continue
            for name, node in tree.children.items():
                group = node.to_dataset(inherit=False)
                more = group.drop_vars([n for n, variable in group.variables.items() if "obs" not in variable.dims])
                more.to_zarr(part, group=name, append_dim="obs", consolidated=False)
    return xr.open_datatree(out, engine="zarr", consolidated=False)


def site_coords(program: Program, data: xr.Dataset) -> dict[str, list]:
    """Labels of the prior for the dims of `data`, in the prior's own order."""
    return {dim: list(labels) for dim, labels in program.latents.coords.items() if dim in data.dims}


def obs_labels(data: Any, count: int) -> np.ndarray:
    """Labels of `count` observations: the coordinate obs of a Dataset, else their numbers."""
    return data["obs"].values if isinstance(data, xr.Dataset) and "obs" in data.coords else np.arange(count)
