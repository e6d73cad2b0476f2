"""How the bound is trained: whose error teaches the denoiser, how noise levels are weighed, and how they are drawn.

Nothing of it is part of a program. Decoupled training is here as a whole: the denoiser by its own unguided error, the
encoder by the guided one. One pass of the denoiser serves both, and what its backpropagation keeps is gone before the
encoder starts.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key
import numpy as np

from sami_ppl.decoders.bound import bound
from sami_ppl.decoders.guidance import check_guided, is_guided
from sami_ppl.diffusion.denoiser import AbstractDenoiser
from sami_ppl.diffusion.schedule import AbstractSchedule, NoiseLevels, NoiseProposal
from sami_ppl.encoders.encoder import AbstractEncoder
from sami_ppl.nn.evaluate import COMPUTE, Compute, evaluated

DenoiserLoss = Literal["guided", "own", "none"]
Weighting = Literal["bound", "simple"]


@dataclass(frozen=True)
class Objective:
    """What of the bound is trained; the default is the bound itself.

    `denoiser_loss` says what teaches the denoiser: "guided", the error of the guided noise prediction (joint training);
    "own", its error without guidance, ‖ε − ε_θ‖², of which the gradient counts and not the value; "none", nothing.
    Noise levels are weighed by w(λ) = v(λ) exp(−c max(λ, 0)), c the `discount`. `weighting` says v: 1 is "bound";
    "simple" is sech(λ/2), by which the loss is the mean of ‖ε − ε̂‖² over a cosine schedule, up to a factor (Ho, Jain &
    Abbeel 2020; the density of λ is sech(λ/2) / 2π there, Kingma & Gao 2023, table 1). `proposal`: shares of draws that
    fall into equal bins of the noise range, from the noisy end, or a `NoiseProposal` that has them; each error is
    divided by its density, so that the expected loss is the same. None is the uniform density. `dropped`: share of the
    observations whose code is kept from a conditioned denoiser, so that it learns to do without. `remat`, `compute`:
    how networks are evaluated (`nn.evaluate`); what is made of them, laws of the code, errors and their sums, is in
    float32. Raises ValueError for another loss, weighting or compute, for a discount below 0, for shares that are not
    positive, and for a share dropped outside [0, 1).
    """

    denoiser_loss: DenoiserLoss = "guided"
    discount: float = 0.0
    proposal: NoiseProposal | tuple[float, ...] | None = None
    dropped: float = 0.0
    weighting: Weighting = "bound"
    remat: bool = False
    compute: Compute = "float32"

    def __post_init__(self) -> None:
        if self.denoiser_loss not in get_args(DenoiserLoss):
            raise ValueError(f"denoiser_loss must be one of {get_args(DenoiserLoss)}, got {self.denoiser_loss!r}")
        if self.weighting not in get_args(Weighting):
            raise ValueError(f"weighting must be one of {get_args(Weighting)}, got {self.weighting!r}")
        if self.compute not in COMPUTE:
            raise ValueError(f"compute must be one of {COMPUTE}, got {self.compute!r}")
        if not self.discount >= 0:
            raise ValueError(f"discount must be at least 0, got {self.discount}: 0 is the bound itself")
        if not 0 <= self.dropped < 1:
            raise ValueError(f"dropped must lie in [0, 1), got {self.dropped}: 0 is the bound itself")
        shares = self.shares
        if shares is not None and not (shares and all(0 < share < float("inf") for share in shares)):
            raise ValueError(f"proposal must hold positive shares of the bins, got {shares}")
        # Plain numbers: they are compared, and written to checkpoints.
        object.__setattr__(self, "proposal", shares)

    @property
    def shares(self) -> tuple[float, ...] | None:
        """The proposal in plain numbers."""
        found = self.proposal.probabilities if isinstance(self.proposal, NoiseProposal) else self.proposal
        return None if found is None else tuple(float(share) for share in np.asarray(found))

    def noise_levels(self, schedule: AbstractSchedule, key: Key[Array, ""], n: int) -> NoiseLevels:
        """N stratified noise levels with their weights in the loss."""
        shares = self.shares
        drawn = schedule if shares is None else NoiseProposal(schedule, jnp.asarray(shares))
        log_snr, weight = drawn.stratified(key, n)
        return NoiseLevels(log_snr, weight * self.weight(log_snr))

    def weight(self, log_snr: Float[Array, "*n"]) -> Float[Array, "*n"]:
        """w(λ), which is 1 for the bound itself."""
        base = 1 / jnp.cosh(log_snr / 2) if self.weighting == "simple" else 1.0
        return base * jnp.exp(-self.discount * jnp.maximum(log_snr, 0.0))

    def told(
        self,
        denoiser: AbstractDenoiser,
        z: Float[Array, "obs D"] | None,
        key: Key[Array, ""],
        index: Array | int = 0,
        parts: int = 1,
    ) -> Float[Array, "obs D"] | None:
        """The codes as the denoiser is told them: of a conditioned one, some are dropped, NaN.

        `index`, `parts`: which of so many equal parts of a batch they are; the draw is that of the whole batch.
        """
        if z is None or not self.dropped or is_guided(denoiser) or not denoiser.marginal:
            return z
        dropped = jax.random.bernoulli(key, self.dropped, (parts, len(z), 1))[index]
        return jnp.where(dropped, jnp.nan, z)

    def evaluated[Part](self, part: Part) -> Part:
        """A denoiser or an encoder as training evaluates it."""
        return evaluated(part, remat=self.remat, compute=self.compute)

    def clean_pass(self, function: Callable) -> Callable:
        """The encoder's pass at the clean end, as training takes it: decoupled, once more for its gradient.

        Nothing of it is then held while guidance is differentiated: a tenth more work of the encoder for a fifth less
        memory.
        """
        return eqx.filter_checkpoint(function) if self.denoiser_loss == "own" else function

    def bounds(
        self,
        denoiser: AbstractDenoiser,
        encoder: AbstractEncoder | None,
        x: Float[Array, "obs *event"],
        z: Float[Array, "obs D"] | None,
        levels: NoiseLevels,
        eps: Float[Array, "obs *event"],
    ) -> Float[Array, " obs"]:
        """The bounds on −log p(x | z) of a batch at one noise level each, in nats, with the gradient asked for.

        Whatever the loss, the value is that of the guided error; without encoder, that of the denoiser's own.
        """
        denoiser, encoder = self.evaluated(denoiser), self.evaluated(encoder)
        if self.denoiser_loss == "own" and encoder is not None:
            check_guided(denoiser, "denoiser_loss='own'")
            known, eps, zero = _own_noise(denoiser, x, *levels, eps)

            def encoder_alone(known: Array, *inputs: Any) -> Array:
                return bound(KnownNoise(denoiser, known), encoder, *inputs).total

            return jax.vmap(encoder_alone)(known, x, z, *levels, eps) + zero / len(x)
        if self.denoiser_loss == "none":
            params, static = eqx.partition(denoiser, eqx.is_inexact_array)
            denoiser = eqx.combine(jax.lax.stop_gradient(params), static)

        def one(x: Array, z: Array | None, *inputs: Array) -> Array:
            return bound(denoiser, encoder, x, z, *inputs).total

        return jax.vmap(one, in_axes=(0, None if z is None else 0, 0, 0, 0))(x, z, *levels, eps)


BOUND = Objective()
"""The bound itself."""


def refuse(function: str, unknown: Collection[str], taken: Collection[str] = ()) -> None:
    """Raise TypeError for unknown arguments, with where those of training are given."""
    if not unknown:
        return
    names = ", ".join(sorted(unknown))
    hint = f": it takes {', '.join(taken)}" if taken else ""
    if moved := sorted({"denoiser_loss", "discount", "target", "train"} & set(unknown)):
        hint = f": what is trained is said by the stage, sp.fit(program, data, sp.Stage({moved[0]}=...), key=key)"
    raise TypeError(f"{function}() does not take {names}{hint}")


def _own_noise(
    denoiser: AbstractDenoiser,
    x: Float[Array, "obs *event"],
    log_snr: Float[Array, " obs"],
    weight: Float[Array, " obs"],
    eps: Float[Array, "obs *event"],
) -> tuple[Float[Array, "obs *event"], Float[Array, "obs *event"], Float[Array, ""]]:
    """ε_θ of a batch without gradient, ε, and a zero whose gradient is that of Σ ½ weight ‖ε − ε_θ‖² in the denoiser.

    What decoupled training needs of the denoiser, all at once: its gradient does not wait for the guidance, so it is
    taken right after its forward pass, and what backpropagation keeps is freed before the encoder starts. For that, the
    encoder must take its noise from the ε returned here, which is the one given, but not before the gradient is there.
    """
    params, static = eqx.partition(denoiser, eqx.is_inexact_array)
    x, seen = jax.vmap(denoiser.fill_missing)(x)
    x_noisy = jax.vmap(denoiser.schedule.add_noise)(x, log_snr, eps)

    def forward(params: Any, x_noisy: Array, log_snr: Array) -> Array:
        return jax.vmap(eqx.combine(params, static))(x_noisy, log_snr)

    @jax.custom_vjp
    def both(params: Any, x_noisy: Array, log_snr: Array, pull: Array, eps: Array) -> tuple[Array, Array, Array]:
        return forward(params, x_noisy, log_snr), eps, jnp.zeros((), x_noisy.dtype)

    def ahead(params: Any, x_noisy: Array, log_snr: Array, pull: Array, eps: Array) -> tuple[tuple, Any]:
        found, backward = jax.vjp(lambda params: forward(params, x_noisy, log_snr), params)
        (gradient,) = backward(pull * (found - eps))
        # Without the barrier the compiler starts the encoder first, and holds both.
        gradient, found, eps = jax.lax.optimization_barrier((gradient, found, eps))
        return (found, eps, jnp.zeros((), x_noisy.dtype)), gradient

    def later(gradient: Any, cotangents: tuple[Array, Array, Array]) -> tuple:
        return jax.tree.map(lambda leaf: cotangents[2] * leaf, gradient), None, None, None, None

    both.defvjp(ahead, later)
    pull = seen * jnp.reshape(weight, (-1,) + (1,) * (x.ndim - 1))
    found, after, zero = both(params, x_noisy, log_snr, pull, eps)
    return jax.lax.stop_gradient(found), jax.lax.stop_gradient(after), zero


class KnownNoise(AbstractDenoiser):
    """A denoiser whose ε̂ of one noisy observation has been computed."""

    base: AbstractDenoiser
    noise: Float[Array, "*event"]

    def __init__(self, base: AbstractDenoiser, noise: Float[Array, "*event"]):
        self.base, self.noise = base, noise

    @property
    def schedule(self) -> AbstractSchedule:
        return self.base.schedule

    @property
    def event_shape(self) -> tuple[int, ...]:
        return self.base.event_shape

    def __call__(self, x_noisy: Float[Array, "*event"], log_snr: Float[Array, ""]) -> Float[Array, "*event"]:
        return self.noise

    @property
    def seen(self) -> Bool[Array, "*event"] | None:
        return self.base.seen

    def fill_missing(self, x: Float[Array, "*event"]) -> tuple[Float[Array, "*event"], Float[Array, "*event"]]:
        return self.base.fill_missing(x)
