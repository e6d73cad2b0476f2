"""Encoders of another encoder's code in other axes."""

import abc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sami_ppl.encoders.encoder import AbstractEncoder, AbstractWrapper, check_gaussian
from sami_ppl.encoders.law import AffineLaw, CodeLaw
from sami_ppl.priors.latents import Latents


class AbstractAffine(AbstractWrapper):
    """The encoder of z' = A (z − m) for an A that can be inverted: the same noisy posterior, in other axes.

    q'(z' | x_λ, λ) = q(z | x_λ, λ) / |det A| exactly, so guidance and samples given the code are unchanged; so is the
    bound where A is a rotation, m is 0 and the prior is invariant under A. The posterior of z must be Gaussian.
    """

    @abc.abstractmethod
    def linear(self) -> Float[Array, "D D"]:
        """A."""

    def shift(self) -> Float[Array, " D"]:
        """Here m; 0 unless a kind of encoder has another."""
        return jnp.zeros(self.latent_size)

    def family_of(self, site: str) -> str:
        return f"{self.base.family_of(site)}, turned"

    def distribution(self, parameters: Any) -> AffineLaw:
        return self._turned(self.base.distribution(parameters))

    def law(self, x: Float[Array, "*event"]) -> AffineLaw:
        return self._turned(self.base.law(x))

    def guide(self, x: Float[Array, "obs *event"], prior: Callable[[], Any]) -> AffineLaw:
        return self._turned(self.base.guide(x, prior))

    def _turned(self, law: CodeLaw) -> AffineLaw:
        return AffineLaw(law, self.linear(), self.shift())

    def check_latents(self, latents: Latents) -> None:
        super().check_latents(latents)
        check_gaussian(latents)


class AffineEncoder(AbstractAffine):
    """Axes that are given, and kept while the encoder behind them is trained: what gauge fixing makes.

    `matrix` A (D, D), `centre` m (D,), None for 0.
    """

    base: AbstractEncoder
    matrix: Float[Array, "D D"]
    centre: Float[Array, " D"]

    def __init__(self, base: AbstractEncoder, matrix: Float[Array, "D D"], centre: Float[Array, " D"] | None = None):
        self.base, self.matrix = base, matrix
        self.centre = jnp.zeros(base.latent_size) if centre is None else centre

    def linear(self) -> Float[Array, "D D"]:
        """A, without a gradient."""
        return jax.lax.stop_gradient(self.matrix)

    def shift(self) -> Float[Array, " D"]:
        """Here m, without a gradient."""
        return jax.lax.stop_gradient(self.centre)
