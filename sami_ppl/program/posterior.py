"""`program.posterior`, with every option of the function that it calls."""

from pathlib import Path
from typing import Any

import equinox as eqx
from jaxtyping import Array, Key
import numpy as np
import xarray as xr


class WithPosterior(eqx.Module):
    """What has a posterior of observations."""

    def posterior(
        self,
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
        """The posterior of each observation as an ArviZ DataTree: `sami_ppl.posterior(program, data, …)`, which see.

        Args:
            data: observations x, an array (obs, *event), a Dataset, or, with `out`, the path of a store of them.
            key: random key.
            draws: draws of every site, for each observation.
            predictive: images drawn for each observation from the first draws; 0 for none.
            levels: noise levels for the bound on log p(x | z); None chooses, 0 leaves it out.
            chunk: observations at a time.
            attrs: attributes of the tree.
            out: a new zarr store, written chunk by chunk; None keeps everything in memory.
            progress: show a bar.

        Returns:
            The tree.
        """
        from sami_ppl.posteriors import posterior  # a convenience: the module itself builds on programs

        program: Any = self
        return posterior(
            program, data, key=key, draws=draws, predictive=predictive, levels=levels, chunk=chunk, attrs=attrs,
            out=out, progress=progress,
        )  # fmt: skip
