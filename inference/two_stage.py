"""Two stages: the denoiser first, then the encoder against the frozen denoiser (default).

The denoiser is fitted as a model of the observations alone, so it cannot absorb what the encoder gets wrong; the
encoder then can only lower the bound by telling it something true. The encoder starts from the denoiser's features
and from principal components of blurred observations, which keeps it from folding the space of factors.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import xarray as xr

from sami_ppl import Program, Sized, TwoStage, fit
from sami_ppl.calibration import recalibrated
from sami_ppl.data import check_data, train_test


@dataclass(frozen=True)
class Config:
    """Settings; the posterior is drawn for `posterior_obs` held-out observations, `draws` times each.

    `recalibrate`: samples of the program to which the guide is fitted at the end, at least 500; 0 leaves it out; None
    takes 10,000 where the program samples with particles and the encoder took 500 steps.
    """

    denoiser: Sized = Sized()
    encoder: Sized = Sized()
    start: Literal["components", "gaussian"] = "components"
    gaussian: Sized = Sized()
    warm_steps: int = 500
    warm_clusters: bool = False
    align: bool = True
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
    """Fit and return the program; checkpoints and the log are in `out`."""
    check_data(data, event_shape=program.event_shape)
    train, test = train_test(data)
    plan = TwoStage(
        config.denoiser, config.encoder, config.start, config.gaussian, config.warm_steps, config.warm_clusters,
        config.align,
    )  # fmt: skip
    program, history = fit(program, train, plan, key=key, held_out=test, out=out, resume=resume, progress=progress)
    own_key = jax.random.fold_in(key, 1)
    return recalibrated(program, history, config.recalibrate, key=own_key, progress=progress)
