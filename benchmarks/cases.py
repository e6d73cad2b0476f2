"""What is timed: configurations, and the steps of each, compiled once and called with their own state.

All training steps share one optimiser, the one that `sami_ppl.fit` builds (clip, Adam, running average), and one loss,
so that ratios compare gradients and nothing else. `Fit`, the library's own loop over NumPyro's SVI, is timed beside
them: what it costs beyond the bare step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro
from numpyro import distributions as dist
import optax

from sami_ppl import DDIM, DiagonalEncoder, PreconditionedDenoiser, Program, Stage, VariancePreserving
from sami_ppl.decoders.guidance import GuidedDenoiser
from sami_ppl.decoders.training import DenoiserLoss, Objective
from sami_ppl.fitting.step import Batch, Fit
from sami_ppl.nn import DiT, HalfUNet, ResidualMLP, UNet, ViT
from sami_ppl.nn.convolution import outside_loops

FEATURES = 64
STAGE = Stage(steps=1000, warmup=1, clip=100.0, train=("encoder",))
Step = tuple[Callable, tuple, bool]
"""A function, its arguments, and whether it returns its next arguments, followed by its loss."""


@dataclass(frozen=True)
class Case:
    """One configuration. `widths`: channels per level of the U-Net, or width and depth of the perceptron, or width,
    depth and patch of the transformer, whose encoder has a third as many blocks.
    """

    network: Literal["unet", "mlp", "dit"]
    pixels: int
    batch: int
    latents: int
    widths: tuple[int, ...] = (32, 64)
    channels: int = 1

    @property
    def name(self) -> str:
        return (
            f"{self.network} {'-'.join(map(str, self.widths))}, {self.pixels} px, batch {self.batch}, D {self.latents}"
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.channels, self.pixels, self.pixels)


CASES = (
    Case("unet", 16, 64, 3),
    Case("unet", 32, 16, 6),
    Case("unet", 32, 64, 6),
    Case("unet", 32, 256, 6),
    Case("unet", 32, 64, 64),
    Case("unet", 64, 64, 16, (32, 64, 128), channels=3),
    Case("mlp", 16, 128, 3, (512, 3)),
    Case("mlp", 16, 256, 64, (512, 3)),
    Case("mlp", 32, 64, 16, (512, 3)),
)
QUICK = (Case("unet", 32, 64, 6), Case("mlp", 16, 128, 3, (512, 3)))
TINY = (Case("unet", 8, 4, 2, (8, 8)), Case("mlp", 8, 4, 2, (8, 1)))


def program_of(case: Case) -> Program:
    """A program of this size: the encoder is the descending half of the denoiser, or a perceptron like it."""
    keys, shape, schedule = jax.random.split(jax.random.key(0), 3), case.shape, VariancePreserving()

    def prior() -> None:
        numpyro.sample("z", dist.Normal(0, 1).expand([case.latents]).to_event(1))

    if case.network == "unet":
        network = UNet(shape, widths=case.widths, key=keys[0])
        trunk = HalfUNet(shape, (FEATURES,), widths=case.widths, key=keys[1])
    elif case.network == "dit":
        width, depth, patch = case.widths
        network = DiT(shape, width=width, depth=depth, patch=patch, key=keys[0])
        trunk = ViT(shape, (FEATURES,), width=width, depth=-(-depth // 3), patch=patch, key=keys[1])
    else:
        size = {"width": case.widths[0], "depth": case.widths[1]}
        network = ResidualMLP(shape, shape, **size, key=keys[0])
        trunk = ResidualMLP(shape, (FEATURES,), **size, key=keys[1])
    denoiser = PreconditionedDenoiser(network, schedule, shape)
    encoder = DiagonalEncoder(trunk, schedule, shape, case.latents, key=keys[2])
    return Program(prior, denoiser, encoder, sampler=DDIM(2))


def _training_step(program: Program, batch: int, trained: tuple[str, ...], kind: DenoiserLoss, *, guided: bool) -> Step:
    """One step of Adam on the bound per observation, for the networks `trained`."""
    networks = {"denoiser": program.denoiser, "encoder": program.encoder}
    split = {name: eqx.partition(network, eqx.is_inexact_array) for name, network in networks.items()}
    schedule, objective = program.denoiser.schedule, Objective(kind)
    optimiser = optax.chain(optax.clip_by_global_norm(STAGE.clip), optax.adam(STAGE.learning_rate, b2=0.99))

    def loss(params: dict, frozen: dict, x: jax.Array, key: jax.Array) -> jax.Array:
        denoiser, encoder = (outside_loops(eqx.combine((params | frozen)[n], split[n][1])) for n in networks)
        level_key, eps_key, z_key = jax.random.split(key, 3)
        levels = objective.noise_levels(schedule, level_key, batch)
        eps = jax.random.normal(eps_key, x.shape, x.dtype)
        if not guided:
            return jnp.mean(objective.bounds(denoiser, None, x, None, levels, eps))
        noise = jax.random.normal(z_key, (batch, encoder.latent_size), x.dtype)
        clean = objective.clean_pass(lambda encoder, x: jax.vmap(encoder.posterior)(x))
        loc, scale = clean(encoder, x)
        kl = jnp.sum(0.5 * (loc**2 + scale**2 - 1) - jnp.log(scale), axis=1)
        bounds = objective.bounds(denoiser, encoder, x, loc + scale * noise, levels, eps)
        return jnp.mean(bounds + STAGE.beta * kl)

    def step(params: dict, average: dict, state: Any, frozen: dict, x: jax.Array, key: jax.Array) -> tuple:
        key, step_key = jax.random.split(key)
        value, gradient = jax.value_and_grad(loss)(params, frozen, x, step_key)
        updates, state = optimiser.update(gradient, state)
        params = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda old, new: old + (1 - STAGE.ema) * (new - old), average, params)
        return params, average, state, frozen, x, key, value

    params = {name: split[name][0] for name in trained}
    frozen = {name: split[name][0] for name in networks if name not in trained}
    x = jax.random.normal(jax.random.key(1), (batch, *program.event_shape))
    return step, (params, params, optimiser.init(params), frozen, x, jax.random.key(2)), True


def _fit_step(program: Program, batch: int) -> Step:
    """The encoder step as `sami_ppl.fit` takes it: NumPyro's SVI on the program's model and guide."""
    fit = Fit(program, STAGE, steps=STAGE.steps)
    x = Batch(jax.random.normal(jax.random.key(1), (batch, *program.event_shape)), {})

    def step(state: Any, x: Batch) -> tuple:
        state, value = fit.recipe.update(outside_loops(program), state, x)
        return state, x, value

    return step, (fit.init(jax.random.key(2), x), x), True


def _inference_steps(program: Program, batch: int) -> dict[str, Step]:
    """One evaluation of a sampler with guidance and without, and encoding."""
    x = jax.random.normal(jax.random.key(1), (batch, *program.event_shape))
    z = jax.random.normal(jax.random.key(2), (batch, program.latents.size))
    levels = jnp.full(batch, 0.3)
    params, static = eqx.partition((program.denoiser, program.encoder), eqx.is_inexact_array)

    def guided(params: Any, x: jax.Array, z: jax.Array, levels: jax.Array) -> jax.Array:
        denoiser, encoder = eqx.combine(params, static)
        return jax.vmap(lambda x, z, level: GuidedDenoiser(denoiser, encoder, z).x_hat(x, level))(x, z, levels)

    def plain(params: Any, x: jax.Array, levels: jax.Array) -> jax.Array:
        return jax.vmap(eqx.combine(params, static)[0].x_hat)(x, levels)

    def encode(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.vmap(eqx.combine(params, static)[1].posterior)(x)

    return {
        "sampling": (plain, (params, x, levels), False),
        "guided sampling": (guided, (params, x, z, levels), False),
        "encoding": (encode, (params, x), False),
    }


def steps_of(case: Case) -> dict[str, Step]:
    """Every step of a configuration, by name."""
    program, batch = program_of(case), case.batch
    both, encoder = ("denoiser", "encoder"), ("encoder",)
    training = {"plain": _training_step(program, batch, ("denoiser",), "guided", guided=False)}
    for name, trained, kind in (("encoder", encoder, "none"), ("decoupled", both, "own"), ("joint", both, "guided")):
        training[name] = _training_step(program, batch, trained, kind, guided=True)
    return {**training, "encoder, by Fit": _fit_step(program, batch), **_inference_steps(program, batch)}
