"""Pretrained: a saved denoiser is reused, only the encoder is trained; the price of trying another prior.

`--set denoiser=runs/disks/model` names the folder of a saved program whose denoiser has the structure of this one's.
"""

from dataclasses import dataclass
from pathlib import Path

import jax
import xarray as xr

from sami_ppl import Program, Stage, fit
from sami_ppl.data import check_data, train_test
from sami_ppl.fit import check_stage
from sami_ppl.io import load_denoiser
from sami_ppl.results import check_at_least, conclude
from sami_ppl.warm_start import check_clusters, warm_start


@dataclass(frozen=True)
class Config:
    """Settings; `denoiser` is the folder of a saved program."""

    denoiser: str = ""
    encoder: Stage = Stage(
        steps=3000, batch=128, learning_rate=8e-4, warmup=300, beta=0.2, validate_every=500, clip=150.0
    )
    warm_steps: int = 500
    warm_clusters: bool = False
    align: bool = False
    posterior_obs: int = 64
    draws: int = 100

    def __post_init__(self) -> None:
        check_at_least(1, posterior_obs=self.posterior_obs, draws=self.draws)
        check_at_least(0, warm_steps=self.warm_steps)


def run(
    program: Program,
    data: xr.Dataset,
    config: Config,
    *,
    key: jax.Array,
    out: Path,
    resume: bool = False,
    progress: bool = True,
) -> xr.DataTree:
    """Fit the encoder, save the program to `out/model`, and return the posterior of held-out observations."""
    if not config.denoiser:
        raise ValueError("denoiser is not given: name the folder of a saved program, --set denoiser=runs/disks/model")
    check_data(data, event_shape=program.event_shape)
    train, test = train_test(data)
    # What cannot be run is said now, not after hours.
    check_stage(program, config.encoder, train.sizes["obs"], train=("encoder",))
    if config.warm_steps and config.warm_clusters:
        check_clusters(program)
    warm_key, encoder_key, posterior_key = jax.random.split(key, 3)
    program = load_denoiser(config.denoiser, program)
    if config.warm_steps:
        program = warm_start(
            program, train, key=warm_key, clusters=config.warm_clusters,
            steps=config.warm_steps, batch=config.encoder.batch, progress=progress,
        )  # fmt: skip
    program, _ = fit(
        program, train, config.encoder, key=encoder_key, train=("encoder",), name="encoder",
        held_out=test, out=out, resume=resume, progress=progress,
    )  # fmt: skip
    return conclude(
        program, data, out, key=posterior_key,
        rotate=config.align, posterior_obs=config.posterior_obs, draws=config.draws,
    )  # fmt: skip
