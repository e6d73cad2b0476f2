"""Sequences whose frames are independent given their codes: networks of single frames, applied to every frame.

    p(x_{1:T} | z_{1:T}) = ∏_t p(x_t | z_t)

The score of such a sequence guided by ∏_t q(z_t | x_{t,λ}, λ) is that of every frame guided by its own noisy posterior,
each under the prior N(0, I) that z_t has by itself. The guide is another density: q(z_{1:T} | x_{1:T}) ∝ p(z_{1:T})
∏_t q(z_t | x_t) / p(z_t), exact where the encoder of frames is (Johnson et al. 2016, for potentials; here they are the
ratios). A frame that is NaN is missing: its potential is 1.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
from numpyro import handlers

from sami_ppl.diffusion.denoiser import AbstractDenoiser
from sami_ppl.diffusion.schedule import AbstractSchedule
from sami_ppl.distributions.matern import Matern, Smoothed
from sami_ppl.distributions.supports import normal_base
from sami_ppl.encoders.encoder import AbstractEncoder, FamilyEncoder
from sami_ppl.encoders.families import Diagonal, Full, LowRank
from sami_ppl.priors.sites import Latents

LEAST_PRECISION = 1e-2
"""Of a potential: a frame's posterior counts as no wider than 0.995, where the prior's own spread is 1."""


class FramewiseDenoiser(AbstractDenoiser):
    """The denoiser of T independent frames, each by the denoiser of one."""

    frame: AbstractDenoiser
    frames: int = eqx.field(static=True)

    def __init__(self, frame: AbstractDenoiser, frames: int):
        self.frame, self.frames = frame, frames

    @property
    def schedule(self) -> AbstractSchedule:
        return self.frame.schedule

    @property
    def event_shape(self) -> tuple[int, ...]:
        return (self.frames, *self.frame.event_shape)

    @property
    def statistics(self) -> tuple[float, float] | None:
        return self.frame.statistics

    def fill_missing(self, x: Float[Array, "T *frame"]) -> tuple[Float[Array, "T *frame"], Float[Array, "T *frame"]]:
        """x with 0 where it is missing (NaN), and 1 where it is seen, 0 where it is not."""
        missing = jnp.isnan(x)
        return jnp.where(missing, 0, x), (~missing).astype(x.dtype)

    def __call__(self, x_noisy: Float[Array, "T *frame"], log_snr: Float[Array, ""]) -> Float[Array, "T *frame"]:
        return jax.vmap(self.frame, in_axes=(0, None))(x_noisy, log_snr)


class FramewiseEncoder(AbstractEncoder):
    """The noisy posterior ∏_t q(z_t | x_{t,λ}, λ) over the codes of T frames, each by the encoder of one.

    It guides; the guide of sequences combines its `potentials` with the prior over time. Raises TypeError for an
    encoder of frames that is not Gaussian.
    """

    frame: AbstractEncoder
    frames: int = eqx.field(static=True)

    def __init__(self, frame: AbstractEncoder, frames: int):
        self.frame, self.frames = frame, frames

    def __check_init__(self) -> None:
        for family in self.frame.families if isinstance(self.frame, FamilyEncoder) else ():
            if not isinstance(family, Diagonal | LowRank | Full):
                raise TypeError(
                    f"the encoder of frames has the family {type(family).__name__}, but sequences need Gaussian "
                    "posteriors: build it with families.Diagonal, LowRank or Full"
                )

    @property
    def schedule(self) -> AbstractSchedule:
        return self.frame.schedule

    @property
    def event_shape(self) -> tuple[int, ...]:
        return (self.frames, *self.frame.event_shape)

    @property
    def latent_size(self) -> int:
        return self.frames * self.frame.latent_size

    def __call__(
        self, x_noisy: Float[Array, "T *frame"], log_snr: Float[Array, ""]
    ) -> tuple[Float[Array, " TD"], Float[Array, "*scale"]]:
        loc, scale = jax.vmap(self.frame, in_axes=(0, None))(x_noisy, log_snr)
        return loc.reshape(-1), scale.reshape(-1) if scale.ndim == 2 else jax.scipy.linalg.block_diag(*scale)

    def log_prob(
        self, z: Float[Array, " TD"], x_noisy: Float[Array, "T *frame"], log_snr: Float[Array, ""]
    ) -> Float[Array, ""]:
        each = jax.vmap(self.frame.log_prob, in_axes=(0, 0, None))(z.reshape(self.frames, -1), x_noisy, log_snr)
        return jnp.sum(each)

    def potentials(self, x: Float[Array, "T *frame"]) -> tuple[Float[Array, "T D"], Float[Array, "T D D"]]:
        """Centre and precision of ψ_t(z) = q(z | x_t) / N(z; 0, I) for every frame; 0 and 0 where it is missing.

        With q = N(m, Σ) the precision is Λ = Σ⁻¹ − I and the centre (I + Λ⁻¹) m. Eigenvalues of Λ are held at
        `LEAST_PRECISION`, so that p ∏_t ψ_t can be normalised: a frame cannot be less certain than the prior.
        """
        seen = seen_frames(x)
        ones = (slice(None), *(None,) * (x.ndim - 1))
        loc, precision = jax.vmap(self._potential)(jnp.where(seen[ones], x, 0))
        return jnp.where(seen[:, None], loc, 0), jnp.where(seen[:, None, None], precision, 0)

    def _potential(self, x: Float[Array, "*frame"]) -> tuple[Float[Array, " D"], Float[Array, "D D"]]:
        loc, scale = _gaussian(self.frame, x)
        if scale.ndim == 1:
            excess = jnp.maximum(scale**-2 - 1, LEAST_PRECISION)
            return loc + loc / excess, jnp.diag(excess)
        excess = jnp.linalg.inv(scale @ scale.T) - jnp.eye(len(loc), dtype=loc.dtype)
        # What holds the eigenvalues is added as a constant: derivatives of eigenvectors are infinite where two
        # eigenvalues are equal.
        values, vectors = jnp.linalg.eigh(jax.lax.stop_gradient(0.5 * (excess + excess.T)))
        excess = excess + (vectors * jnp.maximum(LEAST_PRECISION - values, 0)[None]) @ vectors.T
        return loc + jnp.linalg.solve(excess, loc), excess


def seen_frames(x: Float[Array, "T *frame"]) -> Bool[Array, " T"]:
    """Which frames are not missing."""
    return ~jnp.isnan(x).any(tuple(range(1, x.ndim)))


def check_sequences(encoder: AbstractEncoder, latents: Latents) -> None:
    """Raise ValueError for an encoder of sequences, unless the prior is one process over the codes of its frames."""
    if not isinstance(encoder, FramewiseEncoder):
        return
    shape = (encoder.frames, encoder.frame.latent_size)
    found = ", ".join(f"{site.name!r} {site.event_shape}" for site in latents.sites)
    if len(latents.sites) != 1 or not latents.sites[0].process or latents.sites[0].event_shape != shape:
        raise ValueError(
            f"the prior of sequences must have one site, a Matern process of shape (T, D) = {shape}, got {found}: "
            f'write numpyro.sample("z", sp.Matern(times, lengthscale, size={shape[1]})) with {shape[0]} times'
        )


def check_single(encoder: AbstractEncoder, method: str) -> None:
    """Raise ValueError for an encoder of sequences, where a method knows single observations only."""
    if isinstance(encoder, FramewiseEncoder):
        raise ValueError(
            f"{method} is for programs of single observations, this one is of sequences: give frames_of(program), with "
            "single_frames(data)"
        )


def smoothed(encoder: FramewiseEncoder, x: Float[Array, "obs T *frame"], prior: Callable[[], Any]) -> Smoothed:
    """q(z_{1:T} | x_{1:T}) of a batch of sequences, under the one process that `prior` samples in a plate over them."""
    # The guide has no such sites; but what the prior learns is a parameter of the guide too.
    with handlers.block(expose_types=["param"]):
        trace = handlers.trace(handlers.seed(prior, jax.random.key(0))).get_trace()
    (process,) = (site["fn"] for site in trace.values() if isinstance(site.get("fn"), Matern))
    return Smoothed(process, *jax.vmap(encoder.potentials)(x))


def _gaussian(encoder: AbstractEncoder, x: Array) -> tuple[Array, Array]:
    """Location and scale, or factor, of q(z | x), of one frame."""
    if not isinstance(encoder, FamilyEncoder):
        return encoder.posterior(x)
    parameters = encoder.parameters(*encoder.clean(x))
    found: list[Any] = [encoder.distribution(site, parameters, {}) for site in encoder.sites]
    factors = [jnp.diag(q.base_dist.scale) if normal_base(q) is not None else q.scale_tril for q in found]
    return jnp.concatenate([q.mean for q in found]), jax.scipy.linalg.block_diag(*factors)
