"""Prior: denoiser and encoder of a saved program stay as they are; the prior is fitted to their posteriors.

A flow that is fitted afterwards closes the gap between the prior and where the codes of the data lie, so that draws
from it look like the data; it is cheap, for the denoiser is not called. Then the guide is fitted to samples of the
program as it now is, since a posterior is one under its prior. `--set program=runs/disks/model` names the folder of the
saved program, whose networks have the structure and the schedule of this one's.
"""

from dataclasses import dataclass
from pathlib import Path

import jax
import xarray as xr

from sami_ppl import PriorOnly, Program, Sized, fit
from sami_ppl.calibration import recalibrated
from sami_ppl.data import check_data, train_test
from sami_ppl.saving.save import load_networks


@dataclass(frozen=True)
class Config:
    """Settings; `program` is the folder of a saved program.

    `recalibrate`: samples of the program to which the guide is fitted at the end, at least 500; 0 leaves it out; None
    takes 10,000 where the program samples with particles and the prior took 500 steps.
    """

    program: str = ""
    fit: Sized = Sized()
    recalibrate: int | None = None
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
    """Fit the prior and return the program; checkpoints and the log are in `out`."""
    if not config.program:
        raise ValueError("program is not given: name the folder of a saved program, setting program=runs/disks/model")
    check_data(data, event_shape=program.event_shape)
    train, test = train_test(data)
    program = load_networks(config.program, program)
    plan = PriorOnly(config.fit)
    program, history = fit(program, train, plan, key=key, held_out=test, out=out, resume=resume, progress=progress)
    own_key = jax.random.fold_in(key, 1)
    return recalibrated(program, history, config.recalibrate, key=own_key, progress=progress)
