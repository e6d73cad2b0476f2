"""The end of every inference: saved program, posterior."""

from pathlib import Path

from jaxtyping import Array, Key
import xarray as xr

from sami_ppl.data import train_test
from sami_ppl.program.program import Program
from sami_ppl.saving.save import save


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
    posterior_obs: int,
    draws: int,
) -> xr.DataTree:
    """Save the program to `out/model`; the posterior of `posterior_obs` held-out observations, `draws` times each."""
    _, test = train_test(data)
    save(program, Path(out) / "model")
    return program.posterior(test.isel(obs=slice(posterior_obs)), key=key, draws=draws)
