"""A rotation of the code that is learned with the encoder, and a prior that has a say in it.

Independent factors that are not Gaussian can be told from rotations of them (independent component analysis). An
encoder's weights hardly follow: the bound changes by a fraction of a nat, while a turn of the axes has to go through
all of them. An explicit rotation R = expm(A − Aᵀ) behind the encoder can turn by itself. The decoder's part of the
bound does not depend on R, draw by draw: the guidance of the turned code is that of the code. What is left to turn it
is the divergence from the prior. It has its least where the axes are the factors, if the prior's tails are lighter than
a Gaussian's where the factors' are, or heavier where they are heavier; under N(0, I) nothing turns.
"""

from typing import Any

import jax.numpy as jnp
import jax.scipy.linalg
from jaxtyping import Array, Float
import numpy as np
from numpyro import distributions as dist

from sami_ppl.encoders.affine import AbstractAffine
from sami_ppl.encoders.encoder import AbstractEncoder, gaussian


class TurningEncoder(AbstractAffine):
    """The encoder of z' = R z for a learned rotation R, which begins as the identity.

    `base`: an encoder with a Gaussian posterior of the whole code. `rate`: factor on the learning rate of R. R turns
    whatever the prior; choose one that prefers axes to others, such as `soft_uniform`.

    Raises ValueError for a rate that is not positive, TypeError for an encoder whose
    posterior is not Gaussian.
    """

    base: AbstractEncoder
    skew: Float[Array, "D D"]
    rate: float

    def __init__(self, base: AbstractEncoder, *, rate: float = 1.0):
        if not rate > 0:
            raise ValueError(f"rate must be positive, got {rate}")
        if not gaussian(base):
            raise TypeError(
                f"the posterior of base, a {type(base).__name__}, is not Gaussian, but only a Gaussian of the whole "
                "code turns: build it as DiagonalEncoder(network, ...)"
            )
        self.base, self.rate = base, rate
        self.skew = jnp.zeros((base.latent_size, base.latent_size))

    @property
    def network(self) -> Any:
        """The network of the encoder that is turned."""
        return getattr(self.base, "network", None)

    def linear(self) -> Float[Array, "D D"]:
        """The rotation, with its gradient in A."""
        return jax.scipy.linalg.expm(self.rate * (self.skew - self.skew.T))


def soft_uniform(
    scale: float | Float[Array, "*batch"] = 1.0, *, softness: float = 0.3, components: int = 8
) -> dist.MixtureSameFamily:
    """Scalars with a flat density and soft edges, mean 0 and standard deviation `scale`: a row of equal Gaussians.

    `softness`: about how wide the edges are, in units of `scale`, in (0, 1). Under `dist.Uniform` a Gaussian posterior
    is squeezed through a sigmoid; this prior it can fill, whose tails are lighter than a Gaussian's, as those of a
    bounded factor are. Codes that are wider than the prior, as fits with β < 1 make them, gain by lying along the
    diagonal of two axes, where a box is wider: let the prior learn its scale. Raises ValueError for fewer than two
    components and other softness.
    """
    if not 0 < softness < 1 or components < 2:
        raise ValueError(
            f"softness must be in (0, 1) and components at least 2, got softness={softness}, components={components}"
        )
    places = np.linspace(-1.0, 1.0, components, dtype=np.float32)
    places *= np.sqrt((1 - softness**2) / np.mean(places**2))
    spread = jnp.asarray(scale)[..., None]
    weights = jnp.broadcast_to(1 / components, spread.shape[:-1] + places.shape)
    return dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(spread * places, spread * softness))
