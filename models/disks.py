"""Disks: one bright disk on a uniform background; centre x, centre y and background are to be recovered.

The smallest data set on which a representation can be right or wrong: three independent factors, two of which (where
the disk is) change every pixel in a nonlinear way. Images are drawn as they are needed, anti-aliased, in JAX.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
from numpyro.contrib.module import eqx_module
import xarray as xr

import sami_ppl as sp
from sami_ppl.data import disks, fit_disks, split


@dataclass(frozen=True)
class Config:
    """Settings; sizes in pixels, the radius in units of the image's side.

    `width` and `depth` shape the perceptrons, `widths` the U-Nets. None: `mean` and `std` of the data.
    """

    latents: int = 3
    decoder: Literal["guided", "conditioned", "gaussian"] = "guided"
    prior: Literal["normal", "uniform_box", "soft_uniform", "laplace", "student_t", "hierarchical", "flow"] = "normal"
    turn: bool = False
    resolution: int = 16
    radius: float = 0.2
    observations: int = 25_000
    network: Literal["mlp", "unet"] = "mlp"
    width: int = 512
    depth: int = 4
    widths: tuple[int, ...] = (16, 32, 64)
    log_snr_min: float = -6.0
    log_snr_max: float = 6.0
    noise: Literal["full", "variance", "blind"] = "full"
    min_scale: float = 0.03
    mean: float | None = None
    std: float | None = None


def load(config: Config, *, key: jax.Array) -> xr.Dataset:
    """Images with their true factors, four fifths for training."""
    data_key, split_key = jax.random.split(key)
    data = disks(data_key, config.observations, resolution=config.resolution, radius=config.radius)
    return split(data, test=0.2, key=split_key)


def build(config: Config, data: xr.Dataset, *, key: jax.Array) -> sp.Program:
    """The program: an x-predicting denoiser and an encoder of the same kind."""
    size = {"mlp": {"width": config.width, "depth": config.depth}, "unet": {"widths": config.widths, "patch": 2}}
    program = sp.autoencoder(
        make_prior(config.prior, config.latents), data, decoder=config.decoder, network=config.network,
        size=size[config.network], families={"z": sp.families.Diagonal}, noise=config.noise,
        min_scale=config.min_scale, predict="data" if config.decoder == "guided" else None,
        schedule=sp.VariancePreserving(config.log_snr_min, config.log_snr_max),
        mean=config.mean, std=config.std, progress=False, key=key,
    )  # fmt: skip
    return program.replace(encoder=sp.TurningEncoder(program.encoder)) if config.turn else program


def make_prior(name: str, latents: int):
    """Independent factors of one kind. The images are drawn from uniform ones; the default does not know that.

    Most of it can be left out of a copy. "soft_uniform": flat with soft edges, of learned scales; with `turn`, a
    rotation behind the encoder, axes become the factors. "hierarchical": Normal factors, each of a scale that all
    images share and that is inferred; a priori it is small. "flow": a coupling flow, learned with the encoder or fitted
    to its posteriors afterwards; it starts as the default.
    """
    dims = {"event_dims": ["factor"]}
    start: Any = None
    if name == "flow":
        with jax.ensure_compile_time_eval():
            start = sp.coupling_flow(latents, key=jax.random.key(0))

    def flow():
        numpyro.sample("z", sp.flow_distribution(eqx_module("flow", start)), infer=dims)

    def hierarchical(obs):
        spread = dist.HalfCauchy(0.1).expand([latents]).to_event(1)
        scale = numpyro.sample("scale", spread, infer=dims)
        with obs:
            numpyro.sample("z", dist.Normal(0, scale).to_event(1), infer=dims)

    def soft_uniform():
        log_scale: Any = numpyro.param("log_scale", jnp.zeros(latents))
        numpyro.sample("z", sp.soft_uniform(jnp.exp(log_scale)).to_event(1), infer=dims)

    if special := {"flow": flow, "hierarchical": hierarchical, "soft_uniform": soft_uniform}.get(name):
        return special
    laws = {"normal": dist.Normal(0, 1), "uniform_box": dist.Uniform(-1, 1), "laplace": dist.Laplace(0, 1)}
    law = {**laws, "student_t": dist.StudentT(4.0)}[name]
    return sp.factors(z=law.expand([latents]), dims={"z": "factor"})


def distance(images: np.ndarray, config: Config) -> np.ndarray:
    """Root-mean-square distance of each image to the nearest true disk: how far samples are from the data's law."""
    return np.asarray(fit_disks(images, radius=config.radius)[1])
