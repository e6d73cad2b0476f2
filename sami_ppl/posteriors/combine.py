"""Posteriors of several fits on the dim `chain`, so that ArviZ's diagnostics of chains say whether the fits agree."""

from collections.abc import Sequence
import json
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment
import xarray as xr

from sami_ppl.metrics.correlation import correlation


def combine(trees: Sequence[xr.DataTree], *, match: bool = True) -> xr.DataTree:
    """One DataTree of the posteriors of the same observations under independent fits, each a chain of its own.

    `az.rhat`, `az.plot_rank` and the others that compare chains then say whether restarts agree. Fits agree at best up
    to what the prior cannot tell apart, so first the axes of each are reordered, and turned round, to follow those of
    the first: along every dim whose order the prior leaves open by the assignment with the largest correlation of
    posterior means over observations, then the signs where it leaves those open. `match=False` leaves them as they are.

    The attribute `matched`, JSON text, says for every chain and dim the order, for every site the signs, and the
    correlation with the first fit after it. `unconstrained_posterior`, whose coordinates are each fit's own, and groups
    that not all trees have are left out.

    Raises ValueError for fewer than two trees, for one without the groups needed, and where observations, sites or the
    number of draws differ.
    """
    if len(trees) < 2:
        raise ValueError(f"combine takes at least two trees, got {len(trees)}: write combine([tree, other])")
    for i, tree in enumerate(trees):
        _check(tree, trees[0], i)
    told: list[dict[str, Any]] = [{}]
    moved = [trees[0]]
    reference = _means(trees[0])
    for tree in trees[1:]:
        orders, signs = _match(tree, reference) if match else ({}, {})
        moved.append(_move(tree, orders, signs))
        told.append({"order": _plain(orders), "signs": _plain(signs), "correlation": _agreement(moved[-1], reference)})
    everywhere = [name for name in trees[0].children if all(name in tree.children for tree in trees)]
    groups = {}
    for name in everywhere:
        parts = [tree[name].to_dataset() for tree in moved]
        if name == "unconstrained_posterior":
            continue
        if "chain" not in parts[0].dims:
            groups[name] = parts[0]
            continue
        whole = xr.concat(parts, dim="chain", data_vars="minimal", coords="minimal", compat="override", join="override")
        groups[name] = whole.assign_coords(chain=np.arange(whole.sizes["chain"]))
    attrs = trees[0].attrs | {"matched": json.dumps(told), "fits": len(trees)}
    return xr.DataTree.from_dict({"/": xr.Dataset(attrs=attrs), **groups})


def _check(tree: xr.DataTree, first: xr.DataTree, i: int) -> None:
    for group in ("posterior", "observed_data"):
        if group not in tree.children:
            raise ValueError(
                f"tree {i} has no group {group!r}, it has {', '.join(tree.children) or 'none'}: write "
                "program.posterior(data, key=...) or xr.open_datatree(file)"
            )
    if "symmetries" not in tree.attrs:
        raise ValueError(
            f"tree {i} has no attribute 'symmetries', which says how its axes may be matched: write it anew, "
            "program.posterior(data, key=...)"
        )
    own, other = ({name: group.dims for name, group in t["posterior"].data_vars.items()} for t in (tree, first))
    if own != other:
        raise ValueError(f"tree {i} has the sites {own}, the first tree {other}: combine fits of one prior")
    sizes, wanted = ({k: v for k, v in t["posterior"].sizes.items() if k != "chain"} for t in (tree, first))
    if sizes != wanted:
        raise ValueError(
            f"tree {i} has the sizes {sizes}, the first tree {wanted}: give all fits the same observations and draws, "
            "program.posterior(data, draws=..., key=...)"
        )
    if not first["observed_data"].to_dataset()["x"].equals(tree["observed_data"].to_dataset()["x"]):
        raise ValueError(
            f"tree {i} is of other observations than the first: draw both posteriors from the same data, "
            "[p.posterior(data, key=...) for p in programs]"
        )


def _means(tree: xr.DataTree) -> dict[str, xr.DataArray]:
    """Posterior means of the sites of each observation."""
    found = tree["posterior"].to_dataset().mean(["chain", "draw"])
    return {str(name): variable for name, variable in found.data_vars.items() if "obs" in variable.dims}


def _match(
    tree: xr.DataTree, reference: dict[str, xr.DataArray]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Orders by dim and signs by site that make the posterior means follow the reference."""
    allowed, means = json.loads(tree.attrs["symmetries"]), _means(tree)
    orders, signs = {}, {}
    for dim in allowed["permute"]:
        score: Any = 0.0
        for name, ours in means.items():
            if dim not in ours.dims:
                continue
            parts = [m.transpose(dim, ..., "obs").values for m in (reference[name], ours)]
            for index in np.ndindex(parts[0].shape[1:-1]):  # elements along the other dims of a site
                found = correlation(*(part[(slice(None), *index)].T for part in parts))
                score = score + (np.abs(found) if name in allowed["flip"] else found)
        if np.ndim(score):
            orders[dim] = linear_sum_assignment(score, maximize=True)[1]
    for name, ours in means.items():
        if name in allowed["flip"]:
            here = ours.variable.isel({dim: order for dim, order in orders.items() if dim in ours.dims})
            centred = [m - m.mean("obs") for m in (here, reference[name].variable)]
            signs[name] = np.where((centred[0] * centred[1]).sum("obs").values < 0, -1.0, 1.0)
    return orders, signs


def _move(tree: xr.DataTree, orders: dict[str, np.ndarray], signs: dict[str, np.ndarray]) -> xr.DataTree:
    """The tree with its axes reordered and turned round."""
    groups = {name: node.to_dataset() for name, node in tree.children.items()}
    for group in ("posterior", "prior"):
        if group not in groups:
            continue
        made = {}
        for name, variable in groups[group].data_vars.items():
            order = {dim: order for dim, order in orders.items() if dim in variable.dims}
            values = variable.variable.isel(order)
            if name in signs:
                dims = [dim for dim in values.dims if dim not in ("chain", "draw", "obs")]
                values = values * xr.Variable(dims, signs[str(name)].astype(values.dtype))
            made[name] = values.transpose(*variable.dims)
        groups[group] = groups[group].assign(made)
    if "kl_axis" in groups.get("sample_stats", {}):
        stats = groups["sample_stats"]
        order = _axis_order(groups["posterior"], [str(axis) for axis in stats["axis"].values], orders)
        groups["sample_stats"] = stats.assign(kl_axis=stats["kl_axis"].variable.isel(axis=order))
    return xr.DataTree.from_dict({"/": xr.Dataset(attrs=tree.attrs), **groups})


def _axis_order(posterior: xr.Dataset, axes: list[str], orders: dict[str, np.ndarray]) -> np.ndarray:
    """The order of the axes of the code that goes with that of the sites' elements, where each has an axis."""
    order = np.arange(len(axes))
    for name, variable in posterior.data_vars.items():
        dims = [dim for dim in variable.dims if dim not in ("chain", "draw", "obs")]
        places = np.array([i for i, axis in enumerate(axes) if axis.split("[")[0] == name])
        shape = tuple(variable.sizes[dim] for dim in dims)
        if len(places) == np.prod(shape, dtype=int) and "obs" in variable.dims:
            block = places.reshape(shape)
            for axis, dim in enumerate(dims):
                block = np.take(block, orders[str(dim)], axis=axis) if dim in orders else block
            order[places] = block.ravel()
    return order


def _agreement(tree: xr.DataTree, reference: dict[str, xr.DataArray]) -> dict[str, list]:
    """Correlation over observations of each element's posterior mean with the reference's."""
    found = {}
    for name, ours in _means(tree).items():
        pair = [m.transpose(..., "obs").values.reshape(-1, m.sizes["obs"]).T for m in (ours, reference[name])]
        found[name] = np.diag(correlation(*pair)).round(4).tolist()
    return found


def _plain(arrays: dict[str, np.ndarray]) -> dict[str, list]:
    return {name: array.tolist() for name, array in arrays.items()}
