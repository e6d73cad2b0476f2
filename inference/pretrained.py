"""Pretrained: a saved denoiser is reused, only the encoder is trained; the price of trying another prior.

`--set denoiser=runs/disks/model` names the folder of a saved program whose denoiser has the structure of this one's, or
a folder that `save_pretrained` of Hugging Face diffusers wrote: range of noise and features of the encoder are then
those of its U-Net. Where that is a pipeline of latent diffusion, images become latents by its autoencoder.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import xarray as xr

from sami_ppl import EncoderOnly, Program, Sized, fit
from sami_ppl.calibration import recalibrated
from sami_ppl.data import check_data, train_test
from sami_ppl.diffusion import has_autoencoder
from sami_ppl.saving.save import load_denoiser


@dataclass(frozen=True)
class Config:
    """Settings; `denoiser` is the folder of a saved program, or of a model or pipeline of diffusers.

    `recalibrate`: samples of the program to which the guide is fitted at the end, at least 500; 0 leaves it out; None
    takes 10,000 where the program samples with particles and the encoder took 500 steps.
    """

    denoiser: str = ""
    encoder: Sized = Sized()
    start: Literal["components", "gaussian"] = "components"
    gaussian: Sized = Sized()
    warm_steps: int = 500
    warm_clusters: bool = False
    align: bool = True
    recalibrate: int | None = None
    posterior_obs: int = 64
    draws: int = 100


def autoencoder(config: Config) -> str | None:
    """Whose latents the denoiser is of, where it comes with an autoencoder."""
    return config.denoiser if config.denoiser and has_autoencoder(config.denoiser) else None


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
    """Fit the encoder and return the program; checkpoints and the log are in `out`."""
    if not config.denoiser:
        raise ValueError("denoiser is not given: name the folder of a saved program, setting denoiser=runs/disks/model")
    check_data(data, event_shape=program.event_shape)
    train, test = train_test(data)
    program = load_denoiser(config.denoiser, program, key=jax.random.fold_in(key, 2))
    plan = EncoderOnly(
        config.encoder, config.start, config.gaussian, config.warm_steps, config.warm_clusters, config.align
    )
    program, history = fit(program, train, plan, key=key, held_out=test, out=out, resume=resume, progress=progress)
    own_key = jax.random.fold_in(key, 1)
    return recalibrated(program, history, config.recalibrate, key=own_key, progress=progress)
