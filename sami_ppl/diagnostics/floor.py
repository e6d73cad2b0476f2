"""Are the widths of posteriors those of the data, or the least that the encoder may give?"""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from sami_ppl._util.chunks import by_chunks, chunk_of
from sami_ppl.encoders.encoder import AbstractEncoder, AbstractWrapper, DiagonalEncoder, FamilyEncoder
from sami_ppl.encoders.families import Diagonal
from sami_ppl.encoders.own_guide import OwnGuideEncoder
from sami_ppl.program.program import Program

NEAR = 1.05
"""Multiple of the least scale up to which a scale lies at it."""


def floor_share(program: Program, x: Float[np.ndarray, "obs *event"]) -> float | None:
    """Share of the standard deviations of q(z | x), over observations and axes, at the least that the encoder gives.

    Such a width is a setting, `min_scale`, and says nothing of the observation. None for families without independent
    coordinates, whose widths have other parameters.
    """
    encoder = program.encoder.single
    while isinstance(encoder, AbstractWrapper):
        encoder = encoder.own if isinstance(encoder, OwnGuideEncoder) else encoder.base
    if isinstance(encoder, FamilyEncoder) and not any(isinstance(family, Diagonal) for family in encoder.families):
        return None
    if not isinstance(encoder, DiagonalEncoder | FamilyEncoder):
        return None
    at = by_chunks(partial(_at_floor, encoder), chunk_of(1024, encoder.event_shape), x)
    return float(np.mean(at))


@eqx.filter_jit
def _at_floor(encoder: AbstractEncoder, x: Float[Array, "obs *event"]) -> Array:
    """Whether each independent scale is at its floor (obs, scales)."""

    def one(x: Array) -> Array:
        parameters = encoder.parameters(*encoder.clean(x))
        if isinstance(encoder, DiagonalEncoder):
            return parameters[1] <= NEAR * encoder.min_scale
        assert isinstance(encoder, FamilyEncoder)
        each = zip(encoder.sites, encoder.families, strict=True)
        found = [parameters[name][1] <= NEAR * f.min_scale for name, f in each if isinstance(f, Diagonal)]
        return jnp.concatenate(found)

    return jax.vmap(one)(x)
