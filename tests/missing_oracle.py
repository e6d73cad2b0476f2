"""The exact model of observations in which something is missing: a linear Gaussian whose networks know what."""

import jax
import jax.numpy as jnp
import numpy as np

from sami_ppl.decoders.exact import LinearGaussian
from sami_ppl.diffusion.denoiser import AbstractDenoiser
from sami_ppl.diffusion.schedule import VariancePreserving
from sami_ppl.encoders.encoder import AbstractEncoder

RNG = np.random.default_rng(0)
MODEL = LinearGaussian(
    jnp.asarray(RNG.normal(size=(6, 2)), jnp.float32), 0.5, VariancePreserving(-9.0, 9.0),
    mean=jnp.asarray(RNG.normal(size=6), jnp.float32),
)  # fmt: skip
SEEN = np.array([1, 0, 1, 1, 0, 1], bool)


def of_seen(x):
    """The model in which missing entries tell nothing of z, and x with 0 there."""
    seen = ~jnp.isnan(x)
    model = LinearGaussian(MODEL.weights * seen[:, None], MODEL.noise_std, MODEL.schedule, mean=MODEL.mean * seen)
    return model, jnp.where(seen, x, 0), seen


class ExactDenoiser(AbstractDenoiser):
    """−σ ∇ log p(x_seen), and 0 of the rest."""

    seen: jax.Array | None = None

    @property
    def schedule(self):
        return MODEL.schedule

    @property
    def event_shape(self):
        return (6,)

    def __call__(self, x_noisy, log_snr):
        model, x, seen = of_seen(x_noisy)
        return jnp.where(seen, model.denoiser(x, log_snr), 0)


class ExactEncoder(AbstractEncoder):
    """p(z | x_seen)."""

    @property
    def schedule(self):
        return MODEL.schedule

    @property
    def event_shape(self):
        return (6,)

    @property
    def latent_size(self):
        return 2

    def parameters(self, x_noisy, log_snr):
        model, x, _ = of_seen(x_noisy)
        return model.parameters(x, log_snr)

    def distribution(self, parameters):
        return MODEL.distribution(parameters)
