"""The decoder: the distribution of an observation given its latent factors, as NumPyro sees it."""

import copy
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
from numpyro.distributions import Distribution, constraints

from sami_ppl.decoders.guidance import given
from sami_ppl.decoders.training import BOUND, Objective
from sami_ppl.diffusion.denoiser import AbstractDenoiser
from sami_ppl.diffusion.sampler import AbstractSampler
from sami_ppl.diffusion.schedule import NoiseLevels
from sami_ppl.encoders.encoder import AbstractEncoder


class NoisePass(NamedTuple):
    """Noise level of each observation and weight of its error, and the key of ε for all; of one pass or of several."""

    log_snr: Float[Array, "*passes obs"]
    weight: Float[Array, "*passes obs"]
    key: Key[Array, "*passes"]


class ScoreDecoder(Distribution):
    """p(x | z) by reverse diffusion, by the denoiser that the code gives (`guidance.given`).

    `log_prob` is minus the diffusion bound in nats, one unbiased estimate per observation from `levels` noise levels,
    stratified over the batch. It is a lower bound on log p(x | z), not its value; of a Gaussian decoder it is the exact
    log prob, in closed form. `sample` is reverse diffusion.

    Noise comes from `key`. With `key=None`, as where NumPyro runs a model without a seed (`log_likelihood`), a fixed
    noise set is used, the same one for all values of z: differences between draws of z are then free of it.

    `objective` says what of the bound is trained (`training.Objective`); the default is the bound.

    Without an encoder (`encoder=None, z=None`), the marginal p(x) of the denoiser, of shape `batch_shape`.

    Observations may be one of several equal parts of a batch (`part`): their noise is then that of these rows of it.
    """

    objective: Objective
    arg_constraints: dict = {}
    pytree_data_fields = ("denoiser", "encoder", "z", "key", "index")
    pytree_aux_fields = ("sampler", "levels", "objective", "parts")

    def __init__(
        self,
        denoiser: AbstractDenoiser,
        encoder: AbstractEncoder | None,
        z: Array | None,
        *,
        sampler: AbstractSampler,
        key: Array | None = None,
        levels: int = 1,
        objective: Objective = BOUND,
        batch_shape: tuple[int, ...] = (),
    ):
        self.denoiser, self.encoder, self.z, self.key = denoiser, encoder, z, key
        self.sampler, self.levels, self.objective = sampler, levels, objective
        self.index: Array | int = 0
        self.parts = 1
        super().__init__(
            batch_shape=tuple(batch_shape) if z is None else z.shape[:-1],
            event_shape=denoiser.event_shape,
            validate_args=False,
        )

    def part(self, index: Array | int, parts: int) -> "ScoreDecoder":
        """The decoder of observations that are the part of this index, of so many equal parts of a batch."""
        found = copy.copy(self)
        found.index, found.parts = index, parts
        return found

    @property
    def support(self) -> constraints.Constraint:
        """Real arrays of the event's shape."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def passes(self, count: int) -> NoisePass:
        """The noise of `levels` passes over `count` observations.

        Each pass takes one noise level in every stratum of the batch; over the passes, an observation's levels are
        themselves spread evenly over the range.
        """
        level_key, noise_key = jax.random.split(jax.random.key(0) if self.key is None else self.key)
        found = self.objective.noise_levels(self.denoiser.schedule, level_key, self.levels * self.parts * count)
        log_snr, weight = (leaf.reshape(self.levels, self.parts, count)[:, self.index] for leaf in found)
        return NoisePass(log_snr, weight, jax.random.split(noise_key, self.levels))

    def log_prob(self, value: Float[Array, "*batch_and_event"], intermediates: None = None) -> Float[Array, "*batch"]:
        """Minus the diffusion bound, in nats: a stochastic lower bound on log p(x | z)."""
        event = len(self.event_shape)
        batch = jnp.broadcast_shapes(jnp.shape(value)[: jnp.ndim(value) - event], self.batch_shape)
        x = jnp.broadcast_to(value, batch + self.event_shape).reshape((-1, *self.event_shape))
        z = None if self.z is None else jnp.broadcast_to(self.z, batch + self.z.shape[-1:]).reshape((len(x), -1))

        def one_pass(noise: NoisePass) -> Array:
            eps = jax.random.normal(noise.key, (self.parts, *x.shape), x.dtype)[self.index]
            levels = NoiseLevels(noise.log_snr, noise.weight)
            told = self.objective.told(self.denoiser, z, jax.random.fold_in(noise.key, 1), self.index, self.parts)
            return self.objective.bounds(self.denoiser, self.encoder, x, told, levels, eps)

        passes = self.passes(len(x))
        if self.levels == 1:
            return -one_pass(jax.tree.map(lambda leaf: leaf[0], passes)).reshape(batch)
        return -jax.lax.map(one_pass, passes).mean(0).reshape(batch)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Float[Array, "*sample_and_batch_and_event"]:
        """Draws by reverse diffusion, of shape sample_shape + batch_shape + event_shape."""
        shape = tuple(sample_shape) + self.batch_shape
        count = 1
        for size in shape:
            count *= size
        keys = jax.random.split(key, count)
        denoiser, encoder = self.denoiser, self.encoder
        if self.z is None or encoder is None:
            draws = jax.vmap(lambda key: self.sampler.sample(denoiser, key))(keys)
        else:
            z = jnp.broadcast_to(self.z, (*shape, self.z.shape[-1])).reshape(count, -1)
            draws = jax.vmap(lambda key, z: self.sampler.sample(given(denoiser, encoder, z), key))(keys, z)
        return draws.reshape(shape + self.event_shape)
