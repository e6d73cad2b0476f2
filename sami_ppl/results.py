"""The end of every inference: gauge, saved program, posterior."""

from pathlib import Path

from jaxtyping import Array, Key
import xarray as xr

from sami_ppl.data import train_test
from sami_ppl.gauge import align, symmetric_axes
from sami_ppl.io import save
from sami_ppl.program import Program


def check_at_least(least: int, **settings: int) -> None:
    """Raise ValueError for settings below the least: a run would find out at its end, hours later."""
    for name, value in settings.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def conclude(
    program: Program,
    data: xr.Dataset,
    out: Path,
    *,
    key: Key[Array, ""],
    rotate: bool,
    posterior_obs: int,
    draws: int,
) -> xr.DataTree:
    """Fix the gauge, save the program to `out/model`, and draw the posterior.

    The gauge is fixed if asked to (`rotate`) and if the prior has the symmetry. The posterior is of the first
    `posterior_obs` held-out observations, `draws` times each.
    """
    train, test = train_test(data)
    if rotate and symmetric_axes(program).sum() > 1:
        program = align(program, train["x"].values).program
    save(program, Path(out) / "model")
    return program.posterior(test.isel(obs=slice(posterior_obs)), key=key, draws=draws)
