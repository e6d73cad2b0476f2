"""VAE: encoder and decoder at once by the bound itself, β = 1, for Gaussian decoders (`decoder=gaussian`).

A Gaussian likelihood with a learned noise level leaves its codes informed at β = 1; other decoders, which can explain
an observation without them, need a smaller one: see joint.
"""

from dataclasses import dataclass
from pathlib import Path

import jax
import xarray as xr

from sami_ppl import Joint, Program, Sized, fit
from sami_ppl.data import check_data, train_test


@dataclass(frozen=True)
class Config:
    """Settings; the posterior is drawn for `posterior_obs` held-out observations, `draws` times each."""

    both: Sized = Sized()
    align: bool = True
    posterior_obs: int = 64
    draws: int = 100


def run(
    program: Program,
    data: xr.Dataset,
    config: Config,
    *,
    key: jax.Array,
    out: Path,
    resume: bool = False,
    progress: bool = True,
) -> Program:
    """Fit and return the program; checkpoints and the log are in `out`."""
    check_data(data, event_shape=program.event_shape)
    train, test = train_test(data)
    plan = Joint(config.both, config.align)
    program, _ = fit(program, train, plan, key=key, held_out=test, out=out, resume=resume, progress=progress)
    return program
