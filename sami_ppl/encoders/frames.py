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
from sami_ppl.encoders.encoder import AbstractEncoder, gaussian
from sami_ppl.encoders.law import FramesLaw, SmoothedLaw
from sami_ppl.priors.latents import Latents
from sami_ppl.priors.sites import Process

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
        if not gaussian(self.frame):
            raise TypeError(
                f"the posterior of the encoder of frames, a {type(self.frame).__name__}, is not Gaussian, as sequences "
                "need it: build it with families.Diagonal, LowRank or Full"
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

    @property
    def single(self) -> AbstractEncoder:
        return self.frame

    def parameters(self, x_noisy: Float[Array, "T *frame"], log_snr: Float[Array, ""]) -> Any:
        return jax.vmap(self.frame.parameters, in_axes=(0, None))(x_noisy, log_snr)

    def family_of(self, site: str) -> str:
        return f"{self.frame.family_of(site)}, smoothed"

    def distribution(self, parameters: Any) -> FramesLaw:
        return FramesLaw(self.frame.distribution(parameters))

    def guide(self, x: Float[Array, "obs T *frame"], prior: Callable[[], Any]) -> SmoothedLaw:
        """q(z_{1:T} | x_{1:T}) of a batch of sequences, under the one process that `prior` samples."""
        # The guide has no such sites; but what the prior learns is a parameter of the guide too.
        with handlers.block(expose_types=["param"]):
            trace = handlers.trace(handlers.seed(prior, jax.random.key(0))).get_trace()
        (process,) = (site["fn"] for site in trace.values() if isinstance(site.get("fn"), Matern))
        return SmoothedLaw(Smoothed(process, *jax.vmap(self.potentials)(x)))

    def check_latents(self, latents: Latents) -> None:
        """Raise ValueError unless the prior is one process over the codes of the frames."""
        shape, sites = (self.frames, self.frame.latent_size), latents.sites
        if len(sites) != 1 or not isinstance(sites[0], Process) or sites[0].event_shape != shape:
            there = ", ".join(f"{site.name!r} {site.event_shape}" for site in sites)
            raise ValueError(
                f"the prior of sequences must have one site, a Matern process of shape (T, D) = {shape}, got {there}: "
                f'write numpyro.sample("z", sp.Matern(times, lengthscale, size={shape[1]})) with {shape[0]} times'
            )

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
        q = self.frame.law(x)
        loc, root = jnp.asarray(q.mean), q.root
        if q.diagonal:
            excess = jnp.maximum(1 / q.variance - 1, LEAST_PRECISION)
            return loc + loc / excess, jnp.diag(excess)
        assert root is not None  # as the encoder was built
        excess = jnp.linalg.inv(root @ root.T) - jnp.eye(len(loc), dtype=loc.dtype)
        # What holds the eigenvalues is added as a constant: derivatives of eigenvectors are infinite where two
        # eigenvalues are equal.
        values, vectors = jnp.linalg.eigh(jax.lax.stop_gradient(0.5 * (excess + excess.T)))
        excess = excess + (vectors * jnp.maximum(LEAST_PRECISION - values, 0)[None]) @ vectors.T
        return loc + jnp.linalg.solve(excess, loc), excess


def seen_frames(x: Float[Array, "T *frame"]) -> Bool[Array, " T"]:
    """Which frames are not missing."""
    return ~jnp.isnan(x).any(tuple(range(1, x.ndim)))


def check_single(encoder: AbstractEncoder, method: str) -> None:
    """Raise ValueError for an encoder of sequences, where a method knows single observations only."""
    if encoder.single is not encoder:
        raise ValueError(
            f"{method} is for programs of single observations, this one is of sequences: give frames_of(program), with "
            "single_frames(data)"
        )
