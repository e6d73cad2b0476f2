"""Guides with heavy tails: a Gaussian posterior, and the same one where the observation is believed less.

A few samples of a program have little to do with their code, since the denoiser decided at high noise for another place
than guidance asked. No Gaussian is right for them and for the rest. With a likelihood of precision Λ, a posterior
N(m, S) under N(0, I) has S⁻¹ = I + Λ; where the observation is worth only 1/c² of what it seems (a tempered, or power,
posterior) it is N(m_c, S_c) with

    S_c⁻¹ = I + Λ / c² = S⁻¹ / c² + (1 − 1/c²) I,        m_c = S_c S⁻¹ m / c²,

the prior itself as c grows. What is read is the mixture of those for c = 1, 2, 4, … 64 by weights that all observations
share: the law of a scale that is fitted rather than assumed, where a Student t has one parameter for it. Axes that an
observation tells nothing of are those of the prior in each of them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float
import numpy as np
from numpyro import distributions as dist

from sami_ppl.encoders.encoder import AbstractEncoder, AbstractWrapper
from sami_ppl.encoders.law import CodeLaw
from sami_ppl.priors.latents import Latents
from sami_ppl.priors.sites import LatentSite

FACTORS = 2.0 ** np.arange(7)
"""The factors c by which a narrow posterior's standard deviation grows."""
FEW, FASTER = -7.0, 20.0
"""Log weight of a factor above 1 to begin with; by how much it moves where a weight of a network moves by 1."""


class TailedLaw(CodeLaw):
    """A mixture of Gaussians N(m_k, L_k L_kᵀ) over whole codes.

    `logits` (…, K) of the weights, `loc` m (…, K, D), `tril` L (…, K, D, D), lower triangular.
    """

    pytree_data_fields = ("logits", "loc", "tril")

    def __init__(
        self, logits: Float[Array, "*batch K"], loc: Float[Array, "*batch K D"], tril: Float[Array, "*batch K D D"]
    ):
        self.logits, self.loc, self.tril = jnp.broadcast_to(logits, jnp.shape(loc)[:-1]), loc, tril
        super().__init__(jnp.shape(loc)[:-2], jnp.shape(loc)[-1:], validate_args=False)

    @classmethod
    def of(cls, base: CodeLaw, logits: Float[Array, " K"]) -> "TailedLaw":
        """The mixture of the tempered laws of a Gaussian, for the K `FACTORS`."""
        mean, eye = jnp.asarray(base.mean), jnp.eye(base.event_shape[0])
        precision = jnp.linalg.inv(base.covariance)
        worth = jnp.asarray(FACTORS**-2.0, mean.dtype)[:, None, None]
        covariance = jnp.linalg.inv(worth * precision[..., None, :, :] + (1 - worth) * eye)
        loc = (worth * covariance @ (precision @ mean[..., None])[..., None, :, :])[..., 0]
        return cls(logits, loc, jnp.linalg.cholesky(covariance))

    @property
    def _mixture(self) -> dist.MixtureSameFamily:
        each = dist.MultivariateNormal(self.loc, scale_tril=self.tril)
        return dist.MixtureSameFamily(dist.Categorical(logits=self.logits), each)

    @property
    def mean(self) -> Float[Array, "*batch D"]:
        """The mean."""
        return jnp.sum(jax.nn.softmax(self.logits)[..., None] * self.loc, -2)

    @property
    def variance(self) -> Float[Array, "*batch D"]:
        """The variance of every coordinate."""
        return jnp.diagonal(self.covariance, axis1=-2, axis2=-1)

    @property
    def covariance(self) -> Float[Array, "*batch D D"]:
        """The covariance: the mean of those of the Gaussians, and the covariance of their means."""
        gap = (self.loc - self.mean[..., None, :])[..., None]
        each = self.tril @ jnp.swapaxes(self.tril, -1, -2) + gap @ jnp.swapaxes(gap, -1, -2)
        return jnp.sum(jax.nn.softmax(self.logits)[..., None, None] * each, -3)

    @property
    def root(self) -> Float[Array, "*batch D D"]:
        """The lower triangular root of the covariance."""
        return jnp.linalg.cholesky(self.covariance)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draws of shape sample_shape + batch_shape + (D,)."""
        return jnp.asarray(self._mixture.sample(key, sample_shape))

    def log_prob(self, value: Array, intermediates: None = None) -> Array:
        """Log density in nats."""
        return jnp.asarray(self._mixture.log_prob(value))

    def of_site(self, site: LatentSite, codes: Mapping[str, Array]) -> dist.Distribution:
        """The site's own given those before it, which also say which of the Gaussians it may be."""
        before, logits, loc = site.start, self.logits, self.loc[..., site.code]
        if before:
            known = jnp.concatenate(list(codes.values()), axis=-1)[..., :before]
            corner = self.tril[..., :before, :before]
            white = solve_triangular(corner, (known[..., None, :] - self.loc[..., :before])[..., None], lower=True)
            loc = loc + (self.tril[..., site.code, :before] @ white)[..., 0]
            log_det = jnp.sum(jnp.log(jnp.diagonal(corner, axis1=-2, axis2=-1)), -1)
            logits = logits - 0.5 * jnp.sum(white[..., 0] ** 2, -1) - log_det
        each = dist.MultivariateNormal(loc, scale_tril=self.tril[..., site.code, site.code])
        return dist.MixtureSameFamily(dist.Categorical(logits=logits), each)


class TailedEncoder(AbstractWrapper):
    """The Gaussian guide of `base` with heavy tails; its noisy posteriors stay as they are.

    `raw`: log weights of the `FACTORS`, divided by 20.
    """

    base: AbstractEncoder
    raw: Float[Array, " K"]

    def __init__(self, base: AbstractEncoder):
        self.base = base
        self.raw = jnp.where(jnp.arange(len(FACTORS)) > 0, FEW / FASTER, 0.0)

    @property
    def logits(self) -> Float[Array, " K"]:
        """Log weights, up to a constant."""
        return FASTER * self.raw

    def distribution(self, parameters: Any) -> CodeLaw:
        return self.base.distribution(parameters)

    def law(self, x: Float[Array, "*event"]) -> TailedLaw:
        return TailedLaw.of(self.base.law(x), self.logits)

    def guide(self, x: Float[Array, "obs *event"], prior: Callable[[], Any]) -> TailedLaw:
        return TailedLaw.of(self.base.guide(x, prior), self.logits)

    def family_of(self, site: str) -> str:
        return f"{self.base.family_of(site)}, heavy tails"

    def check_latents(self, latents: Latents) -> None:
        self.base.check_latents(latents)
