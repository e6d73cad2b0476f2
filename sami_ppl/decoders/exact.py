"""Linear-Gaussian SAMI in closed form: every quantity of the method beside its exact value.

    z ~ p(z),      x = μ + W z + s₀ n,      x_λ = α x + σ ε,      n, ε ~ N(0, I)

With y = x_λ/α, the noise around μ + Wz has variance v(λ) = s₀² + e^{−λ}, whatever the schedule. `LinearGaussian` has
z ~ N(0, I), so that everything is Gaussian; `LinearMixture` has a mixture of Gaussians for z and is a mixture of those.
Both give exact networks, `denoiser` and `encoder`, for a program whose every answer is known: the oracle of the tests,
and a tutorial (`models/linear_gaussian.py`).
"""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
from numpyro import distributions as dist

from sami_ppl._util.keys import check_key
from sami_ppl.decoders.bound import Bound, prior_loss, reconstruction_loss
from sami_ppl.diffusion.denoiser import AbstractDenoiser
from sami_ppl.diffusion.schedule import AbstractSchedule
from sami_ppl.encoders.encoder import AbstractEncoder
from sami_ppl.encoders.law import CodeLaw, DiagonalLaw, GaussianLaw, WholeLaw


class AbstractExactModel(eqx.Module):
    """A joint law of z and x whose noisy marginals p(x_λ) and posteriors p(z | x_λ) have densities in closed form."""

    schedule: eqx.AbstractVar[AbstractSchedule]

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, int]:
        """Dimensions d of x and D of z."""

    @abc.abstractmethod
    def log_prob(self, x: Float[Array, " d"]) -> Float[Array, ""]:
        """The evidence log p(x), in nats."""

    @abc.abstractmethod
    def log_prob_noisy(self, x_noisy: Float[Array, " d"], log_snr: Float[Array, ""]) -> Float[Array, ""]:
        """log p(x_λ), in nats."""

    @abc.abstractmethod
    def log_posterior(
        self, z: Float[Array, " D"], x_noisy: Float[Array, " d"], log_snr: Float[Array, ""]
    ) -> Float[Array, ""]:
        """log p(z | x_λ), in nats."""

    @abc.abstractmethod
    def posterior(
        self, x_noisy: Float[Array, " d"], log_snr: Float[Array, ""]
    ) -> tuple[Float[Array, " D"], Float[Array, "D D"]]:
        """Mean and covariance of p(z | x_λ)."""

    def parameters(self, x_noisy: Float[Array, " d"], log_snr: Float[Array, ""]) -> Any:
        """What determines p(z | x_λ): mean and covariance."""
        return self.posterior(x_noisy, log_snr)

    def distribution(self, parameters: Any) -> CodeLaw:
        """p(z | x_λ) from its parameters."""
        mean, cov = parameters
        return GaussianLaw(mean, jnp.linalg.cholesky(cov))

    @abc.abstractmethod
    def sample(self, key: Key[Array, ""], size: int) -> tuple[Float[Array, "size d"], Float[Array, "size D"]]:
        """Draws of x, and the z that each came from."""

    @property
    def denoiser(self) -> "ExactDenoiser":
        """The exact unconditional denoiser."""
        return ExactDenoiser(self)

    @property
    def encoder(self) -> "ExactEncoder":
        """The exact noisy posterior."""
        return ExactEncoder(self)


class ExactDenoiser(AbstractDenoiser):
    """ε̂ = −σ ∇ log p(x_λ) of a model with known noisy density."""

    model: AbstractExactModel

    def __init__(self, model: AbstractExactModel):
        self.model = model

    @property
    def schedule(self) -> AbstractSchedule:
        return self.model.schedule

    @property
    def event_shape(self) -> tuple[int, ...]:
        return self.model.shape[:1]

    def __call__(self, x_noisy: Float[Array, " d"], log_snr: Float[Array, ""]) -> Float[Array, " d"]:
        return -self.schedule.sigma(log_snr) * jax.grad(self.model.log_prob_noisy)(x_noisy, log_snr)


class AbstractModelEncoder(AbstractEncoder):
    """An encoder that is made of a model alone."""

    model: eqx.AbstractVar[AbstractExactModel]

    @property
    def schedule(self) -> AbstractSchedule:
        return self.model.schedule

    @property
    def event_shape(self) -> tuple[int, ...]:
        return self.model.shape[:1]

    @property
    def latent_size(self) -> int:
        return self.model.shape[1]


class ExactEncoder(AbstractModelEncoder):
    """p(z | x_λ) of a model."""

    model: AbstractExactModel

    def __init__(self, model: AbstractExactModel):
        self.model = model

    def parameters(self, x_noisy: Float[Array, " d"], log_snr: Float[Array, ""]) -> Any:
        return self.model.parameters(x_noisy, log_snr)

    def distribution(self, parameters: Any) -> CodeLaw:
        return self.model.distribution(parameters)

    def log_prob(
        self, z: Float[Array, " D"], x_noisy: Float[Array, " d"], log_snr: Float[Array, ""]
    ) -> Float[Array, ""]:
        # The same density by eigenvalues: no matrix is solved for.
        return self.model.log_posterior(z, x_noisy, log_snr)


class LinearGaussian(AbstractExactModel):
    """z ~ N(0, I), x = μ + W z + s₀ n.

    Posterior of x_λ, with y = x_λ/α and v = s₀² + e^{−λ}: precision P = I + WᵀW/v, mean P⁻¹Wᵀ(y − μ)/v. Evidence of
    y: N(μ, WWᵀ + vI), by the singular values w of W: only they and the projections on their vectors are needed.
    """

    weights: Float[Array, "d D"]
    noise_std: Float[Array, ""]
    mean: Float[Array, " d"]
    gram_values: Float[Array, " D"]
    gram_vectors: Float[Array, "D D"]
    schedule: AbstractSchedule

    def __init__(
        self,
        weights: Float[Array, "d D"],
        noise_std: float | Float[Array, ""],
        schedule: AbstractSchedule,
        *,
        mean: Float[Array, " d"] | None = None,
    ):
        if jnp.ndim(weights) != 2:
            raise ValueError(f"weights must be a matrix (d, D), one column per axis of z, got shape {weights.shape}")
        self.weights, self.schedule = weights, schedule
        self.noise_std = jnp.asarray(noise_std, weights.dtype)
        self.mean = jnp.zeros(weights.shape[0], weights.dtype) if mean is None else mean
        values, self.gram_vectors = jnp.linalg.eigh(weights.T @ weights)
        self.gram_values = jnp.maximum(values, 0)

    @property
    def shape(self) -> tuple[int, int]:
        return self.weights.shape[0], self.weights.shape[1]

    @property
    def mean_field_encoder(self) -> "MeanFieldEncoder":
        """The best diagonal Gaussian posterior; the exact one where WᵀW is diagonal."""
        return MeanFieldEncoder(self)

    def variance(self, log_snr: Float[Array, ""]) -> Float[Array, ""]:
        """V(λ) = s₀² + e^{−λ}, the variance of y = x_λ/α around μ + Wz."""
        return self.noise_std**2 + jnp.exp(-log_snr)

    def precision(self, log_snr: Float[Array, ""]) -> Float[Array, "D D"]:
        """P = I + WᵀW/v, the precision of p(z | x_λ)."""
        return self._by_eigenvalue(1 + self.gram_values / self.variance(log_snr))

    def posterior(
        self, x_noisy: Float[Array, " d"], log_snr: Float[Array, ""]
    ) -> tuple[Float[Array, " D"], Float[Array, "D D"]]:
        v = self.variance(log_snr)
        cov = self._by_eigenvalue(v / (v + self.gram_values))
        return cov @ (self.weights.T @ (x_noisy / self.schedule.alpha(log_snr) - self.mean)) / v, cov

    def log_posterior(
        self, z: Float[Array, " D"], x_noisy: Float[Array, " d"], log_snr: Float[Array, ""]
    ) -> Float[Array, ""]:
        mean, _ = self.posterior(x_noisy, log_snr)
        precisions = 1 + self.gram_values / self.variance(log_snr)
        centred = self.gram_vectors.T @ (z - mean)
        return -0.5 * jnp.sum(precisions * centred**2 - jnp.log(precisions) + jnp.log(2 * jnp.pi))

    def log_prob(self, x: Float[Array, " d"]) -> Float[Array, ""]:
        return self._log_marginal(x, self.noise_std**2)

    def log_prob_noisy(self, x_noisy: Float[Array, " d"], log_snr: Float[Array, ""]) -> Float[Array, ""]:
        alpha = self.schedule.alpha(log_snr)
        return self._log_marginal(x_noisy / alpha, self.variance(log_snr)) - self.shape[0] * jnp.log(alpha)

    def information(self, log_snr: Float[Array, ""]) -> Float[Array, ""]:
        """I(x_λ; z) = ½ log det(I + WᵀW/v), in nats."""
        return 0.5 * jnp.sum(jnp.log1p(self.gram_values / self.variance(log_snr)))

    def axis_information(self, log_snr: Float[Array, ""]) -> Float[Array, " D"]:
        """I(x_λ; z_j) = −½ log Var(z_j | x_λ) of each axis, in nats; they sum to `information` if WᵀW is diagonal."""
        v = self.variance(log_snr)
        return -0.5 * jnp.log(jnp.diagonal(self._by_eigenvalue(v / (v + self.gram_values))))

    def bound(
        self, x: Float[Array, " d"], loc: Float[Array, " D"], cov: Float[Array, "D D"]
    ) -> tuple[Bound, Float[Array, ""]]:
        """What the diffusion bound of `bound.bound` estimates under the guide N(loc, cov), with exact guidance.

        Its three parts, averaged over z, ε and λ in closed form, and KL(q ‖ p(z)), in nats. With a = s₀² e^λ,

            E_ε‖ε − ε̂‖² = d (a/(1+a))² + a/(1+a)² ‖x − μ − Wz‖²/s₀²,

        of which the antiderivatives in λ are log(1+a) + 1/(1+a) and −1/(1+a).
        """
        low, high = (
            self.noise_std**2 * jnp.exp(jnp.asarray(end, x.dtype))
            for end in (self.schedule.log_snr_min, self.schedule.log_snr_max)
        )
        step = 1 / (1 + low) - 1 / (1 + high)
        square = jnp.sum((x - self.mean - self.weights @ loc) ** 2) + jnp.sum((self.weights @ cov) * self.weights)
        error = self.shape[0] * (jnp.log1p(high) - jnp.log1p(low) - step) + square / self.noise_std**2 * step
        parts = Bound(prior_loss(self.schedule, x), 0.5 * error, reconstruction_loss(self.schedule, x))
        kl = 0.5 * (jnp.trace(cov) + jnp.sum(loc**2) - self.shape[1] - jnp.linalg.slogdet(cov)[1])
        return parts, kl

    def sample(self, key: Key[Array, ""], size: int) -> tuple[Float[Array, "size d"], Float[Array, "size D"]]:
        check_key(key)
        z_key, x_key = jax.random.split(key)
        z = jax.random.normal(z_key, (size, self.shape[1]), self.weights.dtype)
        return self.sample_given(x_key, z), z

    def sample_given(self, key: Key[Array, ""], z: Float[Array, "size D"]) -> Float[Array, "size d"]:
        """Draws of x given z."""
        check_key(key)
        noise = jax.random.normal(key, (len(z), self.shape[0]), self.weights.dtype)
        return self.mean[None] + z @ self.weights.T + self.noise_std * noise

    def _by_eigenvalue(self, values: Float[Array, " D"]) -> Float[Array, "D D"]:
        return (self.gram_vectors * values[None]) @ self.gram_vectors.T

    def _log_marginal(self, y: Float[Array, " d"], variance: Float[Array, ""]) -> Float[Array, ""]:
        """Log N(y; μ, WWᵀ + variance·I)."""
        centred = y - self.mean
        projected = self.gram_vectors.T @ (self.weights.T @ centred)
        square = (jnp.sum(centred**2) - jnp.sum(projected**2 / (self.gram_values + variance))) / variance
        log_det = jnp.sum(jnp.log1p(self.gram_values / variance)) + self.shape[0] * jnp.log(variance)
        return -0.5 * (square + log_det + self.shape[0] * jnp.log(2 * jnp.pi))


class MeanFieldEncoder(AbstractModelEncoder):
    """The diagonal Gaussian nearest to p(z | x_λ) in KL(q ‖ p): its mean, and one over the diagonal of its precision.

    KL(q ‖ p) = ½ (Σ log P_jj − log det P): what restricting the posterior to a diagonal costs, in nats.
    """

    model: LinearGaussian

    def __init__(self, model: LinearGaussian):
        self.model = model

    def parameters(
        self, x_noisy: Float[Array, " d"], log_snr: Float[Array, ""]
    ) -> tuple[Float[Array, " D"], Float[Array, " D"]]:
        return self.model.posterior(x_noisy, log_snr)[0], jnp.diagonal(self.model.precision(log_snr)) ** -0.5

    def distribution(self, parameters: tuple[Array, Array]) -> DiagonalLaw:
        return DiagonalLaw(*parameters)


class LinearMixture(AbstractExactModel):
    """z ~ Σ_k π_k N(m_k, diag(s_k²)), x = μ + W z + s₀ n.

    Given the component k, with u = (z − m_k)/s_k, x is a `LinearGaussian` in u with weights W diag(s_k) and mean
    μ + W m_k. Densities are mixtures of theirs; the posterior is a mixture with weights p(k | x_λ).
    """

    components: LinearGaussian
    log_probs: Float[Array, " K"]
    locs: Float[Array, "K D"]
    scales: Float[Array, "K D"]
    schedule: AbstractSchedule

    def __init__(
        self,
        weights: Float[Array, "d D"],
        noise_std: float | Float[Array, ""],
        schedule: AbstractSchedule,
        *,
        probs: Float[Array, " K"],
        locs: Float[Array, "K D"],
        scales: Float[Array, "K D"],
        mean: Float[Array, " d"] | None = None,
    ):
        if not probs.shape[0] == locs.shape[0] == scales.shape[0] or not locs.shape[1:] == weights.shape[1:]:
            raise ValueError(
                f"a mixture of K components over D = {weights.shape[-1]} axes needs probs (K,), locs (K, D) and "
                f"scales (K, D), got {probs.shape}, {locs.shape} and {scales.shape}"
            )
        self.schedule, self.locs, self.scales = schedule, locs, scales
        self.log_probs = jnp.log(probs / probs.sum())
        base = jnp.zeros(weights.shape[0], weights.dtype) if mean is None else mean
        self.components = jax.vmap(
            lambda loc, scale: LinearGaussian(weights * scale[None], noise_std, schedule, mean=base + weights @ loc)
        )(locs, scales)

    @property
    def shape(self) -> tuple[int, int]:
        return self.components.weights.shape[1], self.components.weights.shape[2]

    def log_prob(self, x: Float[Array, " d"]) -> Float[Array, ""]:
        return jax.nn.logsumexp(self.log_probs + self._each(lambda part: part.log_prob(x)))

    def log_prob_noisy(self, x_noisy: Float[Array, " d"], log_snr: Float[Array, ""]) -> Float[Array, ""]:
        return jax.nn.logsumexp(self._log_joint(x_noisy, log_snr))

    def log_posterior(
        self, z: Float[Array, " D"], x_noisy: Float[Array, " d"], log_snr: Float[Array, ""]
    ) -> Float[Array, ""]:
        own = jax.vmap(
            lambda part, loc, scale: part.log_posterior((z - loc) / scale, x_noisy, log_snr) - jnp.sum(jnp.log(scale))
        )(self.components, self.locs, self.scales)
        return jax.nn.logsumexp(jax.nn.log_softmax(self._log_joint(x_noisy, log_snr)) + own)

    def posterior(
        self, x_noisy: Float[Array, " d"], log_snr: Float[Array, ""]
    ) -> tuple[Float[Array, " D"], Float[Array, "D D"]]:
        """Mean and covariance of the mixture p(z | x_λ), by the moments of its components."""
        responsibility = jax.nn.softmax(self._log_joint(x_noisy, log_snr))
        means, covs = self.component_posteriors(x_noisy, log_snr)
        mean = responsibility @ means
        spread = means - mean[None]
        return mean, jnp.einsum("k,kij->ij", responsibility, covs) + (spread.T * responsibility[None]) @ spread

    def parameters(self, x_noisy: Float[Array, " d"], log_snr: Float[Array, ""]) -> Any:
        """What determines the mixture p(z | x_λ): log probabilities, means and covariances of its components."""
        return jax.nn.log_softmax(self._log_joint(x_noisy, log_snr)), *self.component_posteriors(x_noisy, log_snr)

    def distribution(self, parameters: Any) -> CodeLaw:
        log_probs, means, covs = parameters
        parts = dist.MultivariateNormal(means, scale_tril=jnp.linalg.cholesky(covs))
        return WholeLaw(dist.MixtureSameFamily(dist.Categorical(logits=log_probs), parts))

    def component_posteriors(
        self, x_noisy: Float[Array, " d"], log_snr: Float[Array, ""]
    ) -> tuple[Float[Array, "K D"], Float[Array, "K D D"]]:
        """Means and covariances of p(z | x_λ, k)."""
        means, covs = self._each(lambda part: part.posterior(x_noisy, log_snr))
        return self.locs + self.scales * means, covs * self.scales[:, :, None] * self.scales[:, None, :]

    def sample(self, key: Key[Array, ""], size: int) -> tuple[Float[Array, "size d"], Float[Array, "size D"]]:
        check_key(key)
        k_key, u_key, x_key = jax.random.split(key, 3)
        k = jax.random.categorical(k_key, self.log_probs, shape=(size,))
        u = jax.random.normal(u_key, (size, self.shape[1]), self.locs.dtype)
        noise = jax.random.normal(x_key, (size, self.shape[0]), self.locs.dtype)
        x = self.components.mean[k] + jnp.einsum("ndD,nD->nd", self.components.weights[k], u)
        return x + self.components.noise_std[0] * noise, self.locs[k] + self.scales[k] * u

    def _each(self, function):
        return jax.vmap(function)(self.components)

    def _log_joint(self, x_noisy: Float[Array, " d"], log_snr: Float[Array, ""]) -> Float[Array, " K"]:
        return self.log_probs + self._each(lambda part: part.log_prob_noisy(x_noisy, log_snr))
