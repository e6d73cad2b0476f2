"""Program and observations → an ArviZ DataTree.

Every group is computed in chunks of observations and moved to the host chunk by chunk, so that device memory does not
grow with the number of observations times draws; with `out`, host memory does not either.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
import warnings

from jaxtyping import Array, Key
import numpy as np
import xarray as xr

from sami_ppl._util.chunks import chunk_of
from sami_ppl._util.keys import check_key
from sami_ppl._util.maps import forget_if_many
from sami_ppl._util.progress import progress_bar
from sami_ppl.data.pixels import warn_of_scale
from sami_ppl.diagnostics.collapse import CollapseWarning, collapse_warning
from sami_ppl.diagnostics.fitted import warn_if_not_fitted
from sami_ppl.posteriors.draws import Groups, Sampler, concatenate
from sami_ppl.posteriors.encode import batches, opened
from sami_ppl.posteriors.tree import check_labels, check_out, root_attrs, to_tree, write_chunks
from sami_ppl.program.program import Program


def posterior(
    program: Program,
    data: xr.Dataset | Array | np.ndarray | str | Path,
    *,
    key: Key[Array, ""],
    draws: int = 100,
    predictive: int = 4,
    levels: int | None = None,
    chunk: int | None = None,
    attrs: dict[str, Any] | None = None,
    out: str | Path | None = None,
    progress: bool = False,
) -> xr.DataTree:
    """The posterior of each observation, as a DataTree. Dims are chain = 1, draw, obs, and those of sites and event.

    - `posterior` and `prior`: `draws` draws of every site; global sites have no obs.
    - `unconstrained_posterior`: the same draws as codes, `code` (…, axis), centred and scaled by the prior, and
      `global_code` (…, global_axis) of global sites.
    - `posterior_predictive`, `prior_predictive`: `predictive` observations for each one (at most `draws`), by guided
      reverse diffusion from the first draws.
    - `log_likelihood`: a **lower bound** on log p(x | z) in nats from `levels` noise levels, the same noise for every
      draw. Unless given, these are 64 where draws need no passes through the encoder of their own (`tabulated`; when
      its posterior is made up of no more numbers than there are draws), else 8. `log_prior`: log density of every
      site, on its own support, in nats.
    - `sample_stats`: `kl` (site) and `kl_axis` (axis), KL(q ‖ p) of each observation in nats, `kl_global` of global
      sites; and from the same draws `lp`, a lower bound on log p(x, z), `log_weight`, lp − log q(z | x), `pareto_k`
      of these weights (NaN for fewer than 32 draws) and `importance_ess`, the effective number of draws.
    - `observed_data`; `constant_data`, the other variables of `data` on obs, such as true factors.

    Draws are independent, so effective sample sizes of ArviZ only say how many there are. Weights are those of an
    observation's own sites at draws of the global ones; `levels` decides how noisy they are, and noise makes `pareto_k`
    larger: `importance_weighted_bound` says how much of it there is. Warns where all axes have collapsed and where the
    program has never been fitted.

    Args:
        program: the program.
        data: observations x, an array (obs, *event) or a Dataset, which holds the variables that the prior takes too;
            with `out`, also the path of a `.zarr` or `.nc` file, of which whole chunks are read.
        key: random key.
        draws: draws of every site, for each observation.
        predictive: observations drawn for each one; 0 leaves their groups out.
        levels: noise levels of the bound on log p(x | z); 0 leaves out `log_likelihood` and what follows from it.
            Default 64, down to 8 of observations of more than 4,096 numbers, 8 where every draw calls the encoder.
        chunk: observations at a time; default 64, fewer of large ones.
        attrs: attributes of the tree, as JSON text.
        out: a new zarr store, written chunk by chunk and opened, not read; it appears when it is complete.
        progress: show a bar.

    Returns:
        The tree.

    Raises:
        ValueError: observations of another shape, none, counts below 1, an `out` that is not .zarr, a path without it;
            labels or variables that `out` cannot hold.
        FileExistsError: `out` exists.
    """
    check_key(key)
    forget_if_many()
    chunk = chunk_of(64, program.event_shape) if chunk is None else chunk
    if draws < 1 or chunk < 1 or predictive < 0 or (levels is not None and levels < 0):
        raise ValueError(
            f"draws and chunk must be at least 1, predictive and levels at least 0; got draws={draws}, chunk={chunk}, "
            f"predictive={predictive}, levels={levels}"
        )
    if isinstance(data, str | Path) and out is None:
        raise ValueError(
            f'data is a path, {data}, and out is not given: write posterior(program, load_data("{data}"), …) to hold '
            'everything in memory, or out="posterior.zarr" to stream'
        )
    warn_if_not_fitted(program)
    place = None if out is None else check_out(out)
    source = _labelled(program, data) if place is None else opened(program, data)
    if place is not None:
        check_labels(source, zarr=True)
    count = source.sizes["obs"]
    program.variables(source, count)  # all of them, before the first is computed
    size = min(chunk, count)
    sampler = Sampler(program, size, key=key, draws=draws, predictive=predictive, levels=levels)
    common = root_attrs(program, attrs or {})
    kl = np.zeros(program.latents.size)

    def computed() -> Iterator[tuple[xr.Dataset, Groups]]:
        nonlocal kl
        with progress_bar(count, "posterior", show=progress) as bar:
            for i, piece in enumerate(_pieces(program, source, size)):
                if place is not None and i == 0:
                    warn_of_scale(piece["x"].values, program.denoiser.statistics)
                groups = sampler(i, piece["x"].values, program.variables(piece, piece.sizes["obs"]))
                kl = kl + groups["sample_stats"]["kl_axis"].sum((0, 1)) / count
                yield piece, groups
                bar.update(piece.sizes["obs"])

    global_values = sampler.global_groups
    if place is None:
        groups = concatenate(program, [groups for _, groups in computed()])
        tree = to_tree(program, groups, global_values, source, common, sampler.levels)
    else:
        tree = write_chunks(
            (to_tree(program, g, global_values, piece, common, sampler.levels) for piece, g in computed()), place
        )
    if (message := collapse_warning(list(kl), np.inf)) is not None:
        warnings.warn(message, CollapseWarning, stacklevel=2)
    return tree


def _labelled(program: Program, data: Any) -> xr.Dataset:
    """The observations in float32, with their labels and the other variables on obs."""
    x = program.observed(data).astype(np.float32, copy=False)
    if not isinstance(data, xr.Dataset):
        data = xr.Dataset()
    else:
        data = data.drop_vars([n for n, v in data.data_vars.items() if n == "x" or v.dims[:1] != ("obs",)])
        data = data.drop_vars([n for n, c in data.coords.items() if not {*c.dims} <= {"obs", *program.event_dims}])
    return data.assign(x=(("obs", *program.event_dims), x))


def _pieces(program: Program, source: xr.Dataset, size: int) -> Iterator[xr.Dataset]:
    """The data in pieces of `size` observations, the last one shorter, x in float32."""
    start = 0
    for x in batches(program, source["x"], size):
        piece = source.drop_vars("x").isel(obs=slice(start, start + len(x)), missing_dims="ignore").load()
        yield piece.assign(x=(("obs", *program.event_dims), x))
        start += len(x)
