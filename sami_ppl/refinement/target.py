"""log p(z) + bound on log p(x | z) of one observation as a fixed function of z: what refinement takes for log p(x, z).

The bound's noise is drawn once, so that samplers and optimisers see a smooth function: noise levels at the midpoints of
equal shares of a density of levels, and at each ε and −ε, which cancels what is linear in ε. All that does not depend
on z is computed beforehand. With θ = the encoder's parameters at x_λ, guidance is Jᵀ ∂ log q(z; θ)/∂θ, J = ∂θ/∂x_λ:
neither network is called again, and an evaluation costs some products of small matrices.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpy as np
import numpyro
from numpyro import handlers
from numpyro.infer.util import log_density

from sami_ppl.bound import prior_loss, reconstruction_loss
from sami_ppl.evidence import importance_proposal
from sami_ppl.guidance import guidance
from sami_ppl.guide import code_log_prob
from sami_ppl.program import Program
from sami_ppl.schedule import NoiseLevels

PILOT = 256


class Table(NamedTuple):
    """What log p(x | z) needs of one observation: a row for every noise level and sign of ε.

    `residual` ε − ε_θ and σ (rows, …), the encoder's `parameters` and their derivatives in x_λ, (rows, …, *event);
    `ends`, the parts of the bound that depend on x alone. `loc` and `factor` A: amortised mean and a root of the
    covariance, so that u in z = loc + A u is near N(0, I).
    """

    residual: Float[Array, "rows *event"]
    sigma: Float[Array, " rows"]
    weight: Float[Array, " rows"]
    parameters: Any
    jacobian: Any
    ends: Float[Array, ""]
    loc: Float[Array, " D"]
    factor: Float[Array, "D D"]


def tables(program: Program, x: Float[np.ndarray, "obs *event"], key: Key[Array, ""], levels: int) -> list[Table]:
    """The table of every observation, with a noise set of its own.

    Raises ValueError for observations of another shape, fewer than 2 levels, priors with directions, discrete or global
    sites or with variables of the data, and an encoder whose density is not determined by its `parameters`.
    """
    program.check_observations(x)
    if levels < 2:
        raise ValueError(f"levels must be at least 2, got {levels}")
    if program.latents.shared or program.latents.arguments or any(site.process for site in program.latents.sites):
        raise ValueError(
            "the prior has global sites, is one over time, or takes variables of the data: refinement is for priors of "
            "a single observation, def prior()"
        )
    for site in program.latents.sites:
        if site.categories:
            raise ValueError(
                f"prior site {site.name!r} is discrete: refinement moves codes in unconstrained space. Marginalise it "
                "by dist.MixtureSameFamily, or use importance_weighted_bound to judge such a posterior"
            )
        if site.manifold is not None:
            raise ValueError(
                f"prior site {site.name!r} lives on a {site.manifold}: refinement moves codes in unconstrained space. "
                "Use importance_weighted_bound to judge such a posterior"
            )
    pilot_key, key = jax.random.split(key)
    proposal = importance_proposal(program, x[:PILOT], key=pilot_key)
    spread = proposal.at((jnp.arange(levels) + 0.5) / levels)
    made = [
        _table(program, spread, jnp.asarray(one), k) for one, k in zip(x, jax.random.split(key, len(x)), strict=True)
    ]
    _check_guidance(program, spread, jnp.asarray(x[0]), jax.random.split(key, len(x))[0], made[0])
    return made


@eqx.filter_jit
def _table(program: Program, levels: NoiseLevels, x: Array, key: Array) -> Table:
    encoder, schedule = program.encoder, program.denoiser.schedule

    def row(inputs: tuple[Array, Array]) -> tuple[Array, Any, Any]:
        log_snr, eps = inputs
        x_noisy = schedule.add_noise(x, log_snr, eps)
        at = lambda x_noisy: encoder.parameters(x_noisy, log_snr)  # noqa: E731
        return eps - program.denoiser(x_noisy, log_snr), at(x_noisy), jax.jacrev(at)(x_noisy)

    log_snr, eps = _noise(levels, x, key)
    residual, parameters, jacobian = jax.lax.map(row, (log_snr, eps))
    loc, scale = encoder.posterior(x)
    weight = jnp.tile(levels.weight, 2) / len(log_snr)
    ends = prior_loss(schedule, x) + reconstruction_loss(schedule, x)
    factor = jnp.diag(scale) if scale.ndim == 1 else jnp.linalg.cholesky(scale @ scale.T)
    return Table(residual, schedule.sigma(log_snr), weight, parameters, jacobian, ends, loc, factor)


def _noise(levels: NoiseLevels, x: Array, key: Array) -> tuple[Array, Array]:
    """Noise levels and noise of all rows, ε first, then −ε at the same levels."""
    eps = jax.random.normal(key, (len(levels.log_snr), *x.shape), x.dtype)
    return jnp.tile(levels.log_snr, 2), jnp.concatenate([eps, -eps])


def _guidance(program: Program, parameters: Any, jacobian: Any, z: Array) -> Array:
    slope = jax.grad(lambda parameters: code_log_prob(program.encoder, parameters, z))(parameters)
    pairs = zip(jax.tree.leaves(slope), jax.tree.leaves(jacobian), strict=True)
    return sum((jnp.tensordot(s, j, axes=s.ndim) for s, j in pairs), jnp.zeros(()))


def log_likelihood(program: Program, table: Table, z: Float[Array, " D"]) -> Float[Array, ""]:
    """Minus the diffusion bound of the observation given z, in nats."""

    def error(residual: Array, sigma: Array, parameters: Any, jacobian: Any) -> Array:
        return jnp.sum((residual + sigma * _guidance(program, parameters, jacobian, z)) ** 2)

    errors = jax.vmap(error)(table.residual, table.sigma, table.parameters, table.jacobian)
    return -table.ends - 0.5 * jnp.sum(table.weight * errors)


def log_prior(program: Program, z: Float[Array, " D"]) -> Float[Array, ""]:
    """The fitted prior's log density of a code, in nats: that of the sites' values, and the Jacobians to them."""
    values = program.latents.from_code(z)

    def prior() -> None:
        program.sample_prior(numpyro.plate("obs", 1), 1)

    data = {name: value[None] for name, value in values.items()}
    total = jnp.asarray(log_density(handlers.substitute(prior, data=data), (), {}, {})[0])
    for site in program.latents.sites:
        spread = jnp.asarray(site.scale, z.dtype)
        unconstrained = (jnp.asarray(site.shift, z.dtype) + spread * z[site.code]).reshape(site.unconstrained_shape)
        jacobian = site.transform.log_abs_det_jacobian(unconstrained, values[site.name])
        total = total + jnp.sum(jnp.asarray(jacobian)) + jnp.sum(jnp.log(spread))
    return total


def log_joint(program: Program, table: Table, z: Float[Array, " D"]) -> Float[Array, ""]:
    """Log p(z) + bound on log p(x | z), in nats."""
    return log_prior(program, z) + log_likelihood(program, table, z)


def _check_guidance(program: Program, levels: NoiseLevels, x: Array, key: Array, table: Table) -> None:
    """Raise ValueError where guidance by `parameters` is not the encoder's own."""
    log_snr, eps = (leaf[0] for leaf in _noise(levels, x, key))
    own = guidance(program.encoder, table.loc, program.denoiser.schedule.add_noise(x, log_snr, eps), log_snr)
    parameters, jacobian = jax.tree.map(lambda leaf: leaf[0], (table.parameters, table.jacobian))
    found = _guidance(program, parameters, jacobian, table.loc)
    if not np.allclose(own, found, rtol=1e-2, atol=1e-3 * float(jnp.abs(own).max())):
        raise ValueError(
            f"the density of {type(program.encoder).__name__} is not that of its `parameters`, from which codes are "
            "drawn: refinement needs an encoder whose log_prob is that of guide.code_log_prob"
        )
