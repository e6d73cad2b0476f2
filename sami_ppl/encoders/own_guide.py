"""Encoders that guide by one posterior and are read by another."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float

from sami_ppl.encoders.encoder import AbstractEncoder, AbstractWrapper
from sami_ppl.encoders.law import CodeLaw
from sami_ppl.priors.latents import Latents


class OwnGuideEncoder(AbstractWrapper):
    """A guide of its own: `base` guides the denoiser, at every noise level; q(z | x), which is read, is that of `own`.

    What `recalibrate` makes, and fits that start from a variational autoencoder. Samples given z are those of `base`,
    and the bound is one with either guide. `own` is held: what is trained with the encoder is `base`.
    """

    base: AbstractEncoder
    own: AbstractEncoder

    def __init__(self, base: AbstractEncoder, own: AbstractEncoder):
        self.base, self.own = base, own

    def distribution(self, parameters: Any) -> CodeLaw:
        return self.base.distribution(parameters)

    def law(self, x: Float[Array, "*event"]) -> CodeLaw:
        return self._held.law(x)

    def guide(self, x: Float[Array, "obs *event"], prior: Callable[[], Any]) -> CodeLaw:
        return self._held.guide(x, prior)

    @property
    def _held(self) -> AbstractEncoder:
        arrays, static = eqx.partition(self.own, eqx.is_inexact_array)
        return eqx.combine(jax.lax.stop_gradient(arrays), static)

    def family_of(self, site: str) -> str:
        return f"{self.own.family_of(site)}, own guide"

    def check_latents(self, latents: Latents) -> None:
        for part in (self.base, self.own):
            part.check_latents(latents)
