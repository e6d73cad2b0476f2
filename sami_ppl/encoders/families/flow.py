"""Flows: a Gaussian bent by coupling layers that see the features."""

from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float, Key
from numpyro import distributions as dist

from sami_ppl.distributions.flows import FlowDistribution, coupling_flow
from sami_ppl.distributions.gaussian import Affine
from sami_ppl.encoders.families.base import AbstractFamily
from sami_ppl.encoders.families.gaussian import Diagonal
from sami_ppl.priors.sites import LatentSite


class Flow(AbstractFamily):
    """z = loc + scale · f(u), u ~ N(0, I), f a coupling flow given `context` numbers made of the features.

    It starts as `Diagonal`. `layers` and `width` are those of `coupling_flow`. `min_scale` bounds the scale, not what
    the flow does with it. Moments are over 256 fixed quasi-random points. Needs the extra `sami_ppl[flows]`; raises
    ValueError for a site with one coordinate, of which it could only make a Gaussian.
    """

    diagonal: Diagonal
    context: eqx.nn.Linear
    flow: Any
    size: int = eqx.field(static=True)

    def __init__(
        self,
        features: int,
        site: LatentSite,
        *,
        layers: int = 4,
        width: int = 32,
        context: int = 8,
        min_scale: float = 0.03,
        key: Key[Array, ""],
    ):
        if site.size < 2:
            raise ValueError(
                f"prior site {site.name!r} has one coordinate, of which an affine coupling flow makes a Gaussian: take "
                "families.Mixture"
            )
        diagonal_key, context_key, flow_key = jax.random.split(key, 3)
        self.diagonal = Diagonal(features, site, min_scale=min_scale, key=diagonal_key)
        self.context = eqx.nn.Linear(features, context, key=context_key)
        self.flow = coupling_flow(site.size, condition=context, layers=layers, width=width, key=flow_key)
        self.size = site.size

    def parameters(self, features: Float[Array, " features"]) -> tuple[Array, Array, Array]:
        return (*self.diagonal.parameters(features), self.context(features))

    def distribution(self, parameters: tuple[Array, Array, Array]) -> dist.Distribution:
        loc, scale, context = parameters
        return Affine(FlowDistribution(self.flow, context), loc, scale)
