"""Laws of the code z: what the encoder's parameters determine, and all that is known of a posterior follows from it.

    draws, log densities, means and variances of q(z | x_λ, λ), and the laws of its single sites, one after another

A law has event shape (D,); leading dims of the parameters are its batch.
"""

from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from numpyro import distributions as dist
from numpyro.distributions import constraints

from sami_ppl.distributions.gaussian import RootedNormal, gaussian_root
from sami_ppl.distributions.matern import Smoothed
from sami_ppl.encoders.families import AbstractFamily, Diagonal
from sami_ppl.priors.sites import LatentSite


class CodeLaw(dist.Distribution):
    """A law of the whole code z (…, D), in nats and spreads of the prior."""

    support = cast(Any, constraints.real_vector)
    arg_constraints: dict = {}

    @property
    def mean(self) -> Float[Array, "*batch D"]:
        """The mean."""
        raise NotImplementedError

    @property
    def variance(self) -> Float[Array, "*batch D"]:
        """The variance of every coordinate."""
        raise NotImplementedError

    @property
    def root(self) -> Float[Array, "*batch D D"] | None:
        """A with covariance A Aᵀ, where the law is Gaussian, or a mixture of tempered ones; else None."""
        return None

    @property
    def covariance(self) -> Float[Array, "*batch D D"]:
        """The covariance where there is a `root`; of other laws the variances along its diagonal."""
        if (root := self.root) is not None:
            return root @ jnp.swapaxes(root, -1, -2)
        return self.variance[..., None] * jnp.eye(self.event_shape[0], dtype=self.variance.dtype)

    @property
    def diagonal(self) -> bool:
        """Whether the law is Gaussian with independent coordinates."""
        return False

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draws of shape sample_shape + batch_shape + (D,)."""
        raise NotImplementedError

    def log_prob(self, value: Array, intermediates: None = None) -> Array:
        """Log density in nats."""
        raise NotImplementedError

    def of_site(self, site: LatentSite, codes: Mapping[str, Array]) -> dist.Distribution:
        """Law of the code (…, d) of one site given the `codes` of all sites before it, in the order of the prior."""
        raise NotImplementedError


class WholeLaw(CodeLaw):
    """Any distribution over vectors (D,) as the law of the code of a prior with one site."""

    pytree_data_fields = ("base",)

    def __init__(self, base: dist.Distribution):
        self.base = base
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    @property
    def mean(self) -> Float[Array, "*batch D"]:
        """The mean."""
        return jnp.asarray(self.base.mean)

    @property
    def variance(self) -> Float[Array, "*batch D"]:
        """The variance of every coordinate."""
        return jnp.asarray(self.base.variance)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draws of shape sample_shape + batch_shape + (D,)."""
        return jnp.asarray(self.base.sample(key, sample_shape))

    def log_prob(self, value: Array, intermediates: None = None) -> Array:
        """Log density in nats."""
        return jnp.asarray(self.base.log_prob(value))

    def of_site(self, site: LatentSite, codes: Mapping[str, Array]) -> dist.Distribution:
        """The law itself. Raises TypeError where the prior has more sites than this one."""
        if site.size != self.event_shape[0]:
            raise TypeError(
                f"the encoder's posterior of the whole code, {type(self.base).__name__}, does not say what that of "
                f"the single site {site.name!r} is: build the encoder with encoder_for(prior, network, ...)"
            )
        return self.base


class DiagonalLaw(CodeLaw):
    """N(loc, diag(scale²))."""

    pytree_data_fields = ("loc", "scale")
    reparametrized_params = list(pytree_data_fields)

    def __init__(self, loc: Float[Array, "*batch D"], scale: Float[Array, "*batch D"]):
        self.loc, self.scale = loc, scale
        shape = jnp.broadcast_shapes(jnp.shape(loc), jnp.shape(scale))
        super().__init__(shape[:-1], shape[-1:], validate_args=False)

    @property
    def mean(self) -> Float[Array, "*batch D"]:
        """The mean."""
        return self.loc

    @property
    def variance(self) -> Float[Array, "*batch D"]:
        """The variance of every coordinate."""
        return self.scale**2

    @property
    def diagonal(self) -> bool:
        """It is."""
        return True

    @property
    def root(self) -> Float[Array, "*batch D D"]:
        """diag(scale)."""
        return self.scale[..., None] * jnp.eye(self.event_shape[0], dtype=self.scale.dtype)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draws of shape sample_shape + batch_shape + (D,)."""
        noise = jax.random.normal(key, sample_shape + self.batch_shape + self.event_shape, self.loc.dtype)
        return self.loc + self.scale * noise

    def log_prob(self, value: Array, intermediates: None = None) -> Array:
        """Log density in nats."""
        standard = (value - self.loc) / self.scale
        return -jnp.sum(0.5 * standard**2 + jnp.log(self.scale) + 0.5 * jnp.log(2 * jnp.pi), -1)

    def of_site(self, site: LatentSite, codes: Mapping[str, Array]) -> dist.Distribution:
        """Its own coordinates: they do not depend on the others."""
        return dist.Normal(self.loc[..., site.code], self.scale[..., site.code]).to_event(1)


class GaussianLaw(CodeLaw):
    """N(loc, A Aᵀ) for a square root A (…, D, D) of the covariance."""

    pytree_data_fields = ("loc", "matrix")
    reparametrized_params = list(pytree_data_fields)

    def __init__(self, loc: Float[Array, "*batch D"], root: Float[Array, "*batch D D"]):
        self.loc, self.matrix = loc, root
        super().__init__(jnp.shape(loc)[:-1], jnp.shape(loc)[-1:], validate_args=False)

    @property
    def mean(self) -> Float[Array, "*batch D"]:
        """The mean."""
        return self.loc

    @property
    def variance(self) -> Float[Array, "*batch D"]:
        """The variance of every coordinate."""
        return jnp.sum(self.matrix**2, -1)

    @property
    def root(self) -> Float[Array, "*batch D D"]:
        """A."""
        return self.matrix

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draws loc + A ε of shape sample_shape + batch_shape + (D,)."""
        noise = jax.random.normal(key, sample_shape + self.batch_shape + self.event_shape, self.loc.dtype)
        return self.loc + (self.matrix @ noise[..., None])[..., 0]

    def log_prob(self, value: Array, intermediates: None = None) -> Array:
        """Log density in nats."""
        white = jnp.linalg.solve(self.matrix, (value - self.loc)[..., None])[..., 0]
        return -0.5 * jnp.sum(white**2 + jnp.log(2 * jnp.pi), -1) - jnp.linalg.slogdet(self.matrix)[1]

    def of_site(self, site: LatentSite, codes: Mapping[str, Array]) -> dist.Distribution:
        """The conditional of q(z₁) q(z₂ | z₁) … that is the site's, by the lower triangular root of the covariance."""
        if site.size == self.event_shape[0]:
            return RootedNormal(self.loc, self.matrix)
        lower, span, before = (
            jnp.linalg.cholesky(self.matrix @ jnp.swapaxes(self.matrix, -1, -2)),
            site.code,
            site.start,
        )
        mean = self.loc[..., span]
        if before:
            gap = jnp.concatenate(list(codes.values()), axis=-1)[..., :before] - self.loc[..., :before]
            noise = jnp.linalg.solve(lower[..., :before, :before], gap[..., None])
            mean = mean + (lower[..., span, :before] @ noise)[..., 0]
        return dist.MultivariateNormal(mean, scale_tril=lower[..., span, span])


class AffineLaw(GaussianLaw):
    """The law of z' = A (z − m) for a Gaussian law of z: densities and draws are those of z, carried over.

    A (D, D) can be inverted.
    """

    pytree_data_fields = ("base", "linear", "shift")

    def __init__(self, base: CodeLaw, linear: Float[Array, "D D"], shift: Float[Array, " D"]):
        self.base, self.linear, self.shift = base, linear, shift
        loc = jnp.asarray(base.mean) - shift
        root = linear * base.scale[..., None, :] if isinstance(base, DiagonalLaw) else linear @ jnp.asarray(base.root)
        super().__init__((linear @ loc[..., None])[..., 0], root)

    def log_prob(self, value: Array, intermediates: None = None) -> Array:
        """Log density in nats."""
        before = (jnp.linalg.inv(self.linear) @ value[..., None])[..., 0] + self.shift
        return jnp.asarray(self.base.log_prob(before)) - jnp.linalg.slogdet(self.linear)[1]


class SitewiseLaw(CodeLaw):
    """A law of its own for every site, of a family each; some depend on the values of discrete sites before them.

    `parameters`: by site, as the families make them; `slices`: by site, in the order of the prior, first and last plus
    one of its coordinates.
    """

    pytree_data_fields = ("families", "parameters")
    pytree_aux_fields = ("slices",)

    def __init__(
        self,
        families: tuple[AbstractFamily, ...],
        parameters: Mapping[str, Any],
        slices: tuple[tuple[str, tuple[int, int]], ...],
    ):
        self.families, self.parameters, self.slices = families, parameters, slices
        first = families[0].distribution(parameters[slices[0][0]])  # which depends on no other
        super().__init__(first.batch_shape, (slices[-1][1][1],), validate_args=False)

    def _law(self, family: AbstractFamily, name: str, codes: Mapping[str, Array]) -> dist.Distribution:
        return family.distribution(family.given(self.parameters[name], codes))

    def _sites(self) -> list[tuple[AbstractFamily, str, slice]]:
        each = zip(self.families, self.slices, strict=True)
        return [(family, name, slice(*ends)) for family, (name, ends) in each]

    def of_site(self, site: LatentSite, codes: Mapping[str, Array]) -> dist.Distribution:
        """The site's own; of the `codes` only those of discrete sites matter."""
        family = dict(zip((name for name, _ in self.slices), self.families, strict=True))[site.name]
        return self._law(family, site.name, codes)

    @property
    def diagonal(self) -> bool:
        """Whether the law of every site is, whatever the others are."""
        return all(isinstance(family, Diagonal) for family in self.families)

    @property
    def root(self) -> Float[Array, "*batch D D"] | None:
        """The roots of the sites along the diagonal, where all are Gaussian and none depends on another."""
        whole = jnp.zeros((*self.batch_shape, *self.event_shape * 2))
        for family, name, span in self._sites():
            root = None if family.depends else gaussian_root(self._law(family, name, {}))
            if root is None:
                return None
            whole = whole.astype(root.dtype).at[..., span, span].set(root)
        return whole

    def _moments(self) -> tuple[Array, Array]:
        means: dict[str, Array] = {}
        variances = []
        for family, name, _ in self._sites():
            means[name], variance = family.marginal_moments(self.parameters[name], means)
            variances.append(variance)
        return jnp.concatenate(list(means.values()), -1), jnp.concatenate(variances, -1)

    @property
    def mean(self) -> Float[Array, "*batch D"]:
        """The mean; of discrete sites the probabilities."""
        return self._moments()[0]

    @property
    def variance(self) -> Float[Array, "*batch D"]:
        """The variance of every coordinate."""
        return self._moments()[1]

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draws of shape sample_shape + batch_shape + (D,)."""
        if sample_shape:
            draw = self.sample
            for _ in sample_shape:
                draw = jax.vmap(draw)
            return draw(jax.random.split(key, sample_shape))
        codes: dict[str, Array] = {}
        for (family, name, _), own_key in zip(self._sites(), jax.random.split(key, len(self.slices)), strict=True):
            codes[name] = jnp.asarray(self._law(family, name, codes).sample(own_key))
        return jnp.concatenate(list(codes.values()), axis=-1)

    def log_prob(self, value: Array, intermediates: None = None) -> Array:
        """Log density in nats."""
        if value.ndim > len(self.batch_shape) + 1:  # several draws of each
            return jax.vmap(self.log_prob)(value)
        codes = {name: value[..., span] for _, name, span in self._sites()}
        each = [jnp.asarray(self._law(family, name, codes).log_prob(codes[name])) for family, name, _ in self._sites()]
        return jnp.sum(jnp.stack(each), 0)


class FramesLaw(CodeLaw):
    """The law of the codes of T independent frames, one after another, from a batch (…, T) of laws of single ones."""

    pytree_data_fields = ("each",)

    def __init__(self, each: CodeLaw):
        self.each = each
        *batch, frames = each.batch_shape
        super().__init__(tuple(batch), (frames * each.event_shape[0],), validate_args=False)

    def _flat(self, value: Any) -> Array:
        return jnp.asarray(value).reshape(*jnp.shape(value)[:-2], -1)

    @property
    def mean(self) -> Float[Array, "*batch TD"]:
        """The mean."""
        return self._flat(self.each.mean)

    @property
    def variance(self) -> Float[Array, "*batch TD"]:
        """The variance of every coordinate."""
        return self._flat(self.each.variance)

    @property
    def root(self) -> Float[Array, "*batch TD TD"] | None:
        """The roots of the frames along the diagonal, where they are Gaussian."""
        roots = self.each.root
        if roots is None:
            return None
        frames, size = roots.shape[-3:-1]
        whole = jnp.einsum("...tij,ts->...tisj", roots, jnp.eye(frames, dtype=roots.dtype))
        return whole.reshape(*roots.shape[:-3], frames * size, frames * size)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draws of shape sample_shape + batch_shape + (T · D,)."""
        return self._flat(self.each.sample(key, sample_shape))

    def log_prob(self, value: Array, intermediates: None = None) -> Array:
        """Log density in nats."""
        shape = (*value.shape[:-1], self.each.batch_shape[-1], *self.each.event_shape)
        return jnp.sum(jnp.asarray(self.each.log_prob(value.reshape(shape))), -1)

    def of_site(self, site: LatentSite, codes: Mapping[str, Array]) -> dist.Distribution:
        """The law itself: the prior of sequences has one site."""
        return self


class SmoothedLaw(CodeLaw):
    """The law of the codes of sequences, frame after frame: a process over time and what its frames have shown."""

    pytree_data_fields = ("smoothed",)

    def __init__(self, smoothed: Smoothed):
        self.smoothed = smoothed
        frames, size = smoothed.event_shape
        super().__init__(smoothed.batch_shape, (frames * size,), validate_args=False)

    def _flat(self, value: Any) -> Array:
        return jnp.asarray(value).reshape(*jnp.shape(value)[:-2], -1)

    @property
    def mean(self) -> Float[Array, "*batch TD"]:
        """The mean."""
        return self._flat(self.smoothed.mean)

    @property
    def variance(self) -> Float[Array, "*batch TD"]:
        """The variance of every coordinate."""
        return self._flat(self.smoothed.variance)

    @property
    def covariance(self) -> Float[Array, "*batch TD TD"]:
        """The covariance."""
        return self.smoothed.covariance

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draws of shape sample_shape + batch_shape + (T · D,)."""
        return self._flat(self.smoothed.sample(key, sample_shape))

    def log_prob(self, value: Array, intermediates: None = None) -> Array:
        """Log density in nats."""
        return jnp.asarray(self.smoothed.log_prob(value.reshape(*value.shape[:-1], *self.smoothed.event_shape)))

    def of_site(self, site: LatentSite, codes: Mapping[str, Array]) -> dist.Distribution:
        """The process, whose values are its code."""
        return self.smoothed
