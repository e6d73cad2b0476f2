"""Guides with heavy tails: a Student t where a Gaussian would say of a few observations that they cannot be."""

from collections.abc import Callable, Mapping
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import gammaln
from jaxtyping import Array, Float
from numpyro import distributions as dist

from sami_ppl.encoders.encoder import AbstractEncoder, AbstractWrapper
from sami_ppl.encoders.law import CodeLaw
from sami_ppl.priors.latents import Latents
from sami_ppl.priors.sites import LatentSite

START = 30.0
"""Degrees of freedom to begin with: nearly a Gaussian, and not so near that nothing pulls."""
FASTER = 10.0
"""By how much log(ν − 2) moves where a weight of a network moves by 1: ν is one number, and has as few steps."""


class StudentLaw(CodeLaw):
    """The multivariate Student t of ν degrees of freedom, with centre m and root A of a Gaussian law N(m, A Aᵀ).

    z = m + A ε / √u with u ~ χ²_ν / ν, one for all coordinates. `base`: the Gaussian, of batch shape (…);
    `df`: ν > 2 (), for which the covariance ν / (ν − 2) A Aᵀ exists.
    """

    pytree_data_fields = ("base", "df")

    def __init__(self, base: CodeLaw, df: Float[Array, "*batch"]):
        self.base, self.df = base, df
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    @property
    def _inflation(self) -> Array:
        return self.df / (self.df - 2)

    @property
    def mean(self) -> Float[Array, "*batch D"]:
        """The mean."""
        return self.base.mean

    @property
    def variance(self) -> Float[Array, "*batch D"]:
        """The variance of every coordinate."""
        return self._inflation[..., None] * self.base.variance

    @property
    def root(self) -> Float[Array, "*batch D D"]:
        """√(ν / (ν − 2)) A."""
        return jnp.sqrt(self._inflation)[..., None, None] * jnp.asarray(self.base.root)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draws of shape sample_shape + batch_shape + (D,)."""
        normal_key, width_key = jax.random.split(key)
        centre, drawn = self.base.mean, self.base.sample(normal_key, sample_shape)
        u = jnp.asarray(dist.Gamma(self.df / 2, self.df / 2).expand(self.batch_shape).sample(width_key, sample_shape))
        return centre + (drawn - centre) / jnp.sqrt(u)[..., None]

    def log_prob(self, value: Array, intermediates: None = None) -> Array:
        """Log density in nats."""
        ν, size = self.df, self.event_shape[0]
        highest = self.base.log_prob(self.base.mean)  # −log |A| − D/2 log 2π
        square = jnp.maximum(2 * (highest - self.base.log_prob(value)), 0.0)  # |A⁻¹ (z − m)|²
        log_ratio = gammaln((ν + size) / 2) - gammaln(ν / 2) - size / 2 * jnp.log(ν / 2)
        return highest + log_ratio - (ν + size) / 2 * jnp.log1p(square / ν)

    def of_site(self, site: LatentSite, codes: Mapping[str, Array]) -> dist.Distribution:
        """The site's own given those before it, another Student t: wider, the farther out those are."""
        covariance, mean = self.base.covariance, self.base.mean
        lower, before, ν = jnp.linalg.cholesky(covariance), site.start, self.df
        loc, root = mean[..., site.code], lower[..., site.code, site.code]
        if before:
            gap = jnp.concatenate(list(codes.values()), axis=-1)[..., :before] - mean[..., :before]
            white = jnp.linalg.solve(lower[..., :before, :before], gap[..., None])
            loc = loc + (lower[..., site.code, :before] @ white)[..., 0]
            wider = jnp.sqrt((ν + jnp.sum(white[..., 0] ** 2, -1)) / (ν + before))
            root, ν = wider[..., None, None] * root, ν + before
        return dist.MultivariateStudentT(ν, loc, root)


class HeavyTailedEncoder(AbstractWrapper):
    """The guide of `base`, which must be Gaussian, with the tails of a Student t of `df` degrees of freedom, > 2.

    Noisy posteriors are those of `base`. `raw` is log((ν − 2) / 28) / 10.
    """

    base: AbstractEncoder
    raw: Float[Array, ""]

    def __init__(self, base: AbstractEncoder, df: float = START):
        if not df > 2:
            raise ValueError(f"df must be above 2, where there is a variance, got {df}")
        self.base, self.raw = base, jnp.asarray(math.log((df - 2) / (START - 2)) / FASTER, jnp.float32)

    @property
    def df(self) -> Float[Array, ""]:
        """Degrees of freedom ν."""
        return 2 + (START - 2) * jnp.exp(FASTER * self.raw)

    def distribution(self, parameters: Any) -> CodeLaw:
        return self.base.distribution(parameters)

    def law(self, x: Float[Array, "*event"]) -> StudentLaw:
        return StudentLaw(self.base.law(x), self.df)

    def guide(self, x: Float[Array, "obs *event"], prior: Callable[[], Any]) -> StudentLaw:
        return StudentLaw(self.base.guide(x, prior), self.df)

    def family_of(self, site: str) -> str:
        return f"{self.base.family_of(site)}, Student t"

    def check_latents(self, latents: Latents) -> None:
        self.base.check_latents(latents)
