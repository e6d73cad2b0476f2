"""Disks: one bright disk on a uniform background; centre x, centre y and background are to be recovered.

The smallest data set on which a representation can be right or wrong: three independent factors, two of which (where
the disk is) change every pixel in a nonlinear way. Images are drawn as they are needed, anti-aliased, in JAX.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
from numpyro.contrib.module import eqx_module
import xarray as xr

from sami_ppl import (
    DiagonalEncoder,
    PreconditionedDenoiser,
    Program,
    TurningEncoder,
    VariancePreserving,
    coupling_flow,
    flow_distribution,
    soft_uniform,
)
from sami_ppl.data import disks, fit_disks, split
from sami_ppl.nn import HalfUNet, ResidualMLP, UNet


@dataclass(frozen=True)
class Config:
    """Settings; sizes in pixels, the radius in units of the image's side.

    `width` and `depth` shape the perceptrons, `widths` the U-Nets.
    """

    latents: int = 3
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
    mean: float = 0.0
    std: float = 1.0


# Settings of the inference that suit these data; `--set` has the last word.
RECOMMENDED = {
    "align": True,
}


def make_prior(name: str, latents: int):
    """Independent factors of one kind. The images are drawn from uniform ones; the default does not know that.

    "soft_uniform": flat with soft edges, of learned scales; with `turn`, a rotation behind the encoder, axes become the
    factors.
    "hierarchical": Normal factors, each of a scale that all images share and that is inferred; a priori it is small.
    "flow": a coupling flow, learned with the encoder or fitted to its posteriors afterwards; it starts as the default.
    """
    dims = {"event_dims": ["factor"]}
    if name == "flow":
        with jax.ensure_compile_time_eval():
            start = coupling_flow(latents, key=jax.random.key(0))

        def bent():
            numpyro.sample("z", flow_distribution(eqx_module("flow", start)), infer=dims)

        return bent
    if name == "hierarchical":

        def scaled(obs):
            spread = dist.HalfCauchy(0.1).expand([latents]).to_event(1)
            scale = numpyro.sample("scale", spread, infer=dims)
            with obs:
                numpyro.sample("z", dist.Normal(0, scale).to_event(1), infer=dims)

        return scaled

    if name == "soft_uniform":

        def bounded():
            log_scale: Any = numpyro.param("log_scale", jnp.zeros(latents))
            numpyro.sample("z", soft_uniform(jnp.exp(log_scale)).to_event(1), infer=dims)

        return bounded

    factor = {
        "normal": dist.Normal(0, 1),
        "uniform_box": dist.Uniform(-1, 1),
        "laplace": dist.Laplace(0, 1),
        "student_t": dist.StudentT(4.0),
    }[name]

    def prior():
        numpyro.sample("z", factor.expand([latents]).to_event(1), infer=dims)

    return prior


def load(config: Config, *, key: jax.Array) -> xr.Dataset:
    """Images with their true factors, four fifths for training."""
    data_key, split_key = jax.random.split(key)
    data = disks(data_key, config.observations, resolution=config.resolution, radius=config.radius)
    return split(data, test=0.2, key=split_key)


def adapt(config: Config, data: xr.Dataset) -> Config:
    """What follows from the data: image size, pixel mean and standard deviation."""
    x = data["x"]
    return replace(config, resolution=x.shape[-1], mean=float(x.mean()), std=float(x.std()))


def build(config: Config, *, key: jax.Array) -> Program:
    """The program: an x-predicting denoiser and an encoder of the same kind."""
    shape = (1, config.resolution, config.resolution)
    schedule = VariancePreserving(config.log_snr_min, config.log_snr_max)
    noise_aware = config.noise == "full"
    denoiser_key, trunk_key, encoder_key = jax.random.split(key, 3)
    if config.network == "mlp":
        size: dict[str, Any] = {"width": config.width, "depth": config.depth}
        network = ResidualMLP(shape, shape, **size, key=denoiser_key)
        trunk = ResidualMLP(shape, (64,), **size, noise=noise_aware, key=trunk_key)
    else:
        network = UNet(shape, widths=config.widths, key=denoiser_key)
        trunk = HalfUNet(shape, (64,), widths=config.widths, noise=noise_aware, key=trunk_key)
    statistics: dict[str, Any] = {"mean": config.mean, "std": config.std}
    encoder = DiagonalEncoder(
        trunk,
        schedule,
        shape,
        config.latents,
        noise=config.noise,
        min_scale=config.min_scale,
        **statistics,
        key=encoder_key,
    )
    return Program(
        prior=make_prior(config.prior, config.latents),
        denoiser=PreconditionedDenoiser(network, schedule, shape, **statistics),
        encoder=TurningEncoder(encoder) if config.turn else encoder,
    )


def distance(images: np.ndarray, config: Config) -> np.ndarray:
    """Root-mean-square distance of each image to the nearest true disk: how far samples are from the data's law."""
    return np.asarray(fit_disks(images, radius=config.radius)[1])
