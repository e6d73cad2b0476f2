"""log p(z) + bound on log p(x | z) of one observation as a fixed function of z: what refinement takes for log p(x, z).

The bound's noise is drawn once, so that samplers and optimisers see a smooth function: noise levels at the midpoints of
equal shares of a density of levels, and at each ε and −ε, which cancels what is linear in ε. All that does not depend
on z is computed beforehand (`tabulated`): an evaluation costs some products of small matrices.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpy as np
import numpyro
from numpyro import handlers
from numpyro.infer.util import log_density

from sami_ppl.evidence import importance_proposal
from sami_ppl.program import Program
from sami_ppl.schedule import NoiseLevels
from sami_ppl.tabulated import Table, ends, follows_parameters, noise_terms, tabulated_log_likelihood

PILOT = 256


class Target(NamedTuple):
    """What log p(x, z) needs of one observation: the bound on log p(x | z) as a table, a row for every noise level and
    sign of ε.

    `loc` and `factor` A: amortised mean and a root of the covariance, so that u in z = loc + A u is near N(0, I).
    """

    table: Table
    loc: Float[Array, " D"]
    factor: Float[Array, "D D"]


def targets(program: Program, x: Float[np.ndarray, "obs *event"], key: Key[Array, ""], levels: int) -> list[Target]:
    """The target of every observation, with a noise set of its own.

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
    if not follows_parameters(program.encoder, jnp.asarray(x[0]), key=key):
        raise ValueError(
            f"the density of {type(program.encoder).__name__} is not that of its `parameters`, from which codes are "
            "drawn: refinement needs an encoder whose log_prob is that of guide.code_log_prob"
        )
    keys = jax.random.split(key, len(x))
    return [_target(program, spread, jnp.asarray(one), k) for one, k in zip(x, keys, strict=True)]


@eqx.filter_jit
def _target(program: Program, levels: NoiseLevels, x: Array, key: Array) -> Target:
    encoder = program.encoder
    log_snr, eps = _noise(levels, x, key)
    terms = jax.lax.map(lambda row: noise_terms(program.denoiser, encoder, x, *row), (log_snr, eps))
    loc, scale = encoder.posterior(x)
    table = Table(terms, jnp.tile(levels.weight, 2) / len(log_snr), ends(encoder, x))
    return Target(table, loc, jnp.diag(scale) if scale.ndim == 1 else jnp.linalg.cholesky(scale @ scale.T))


def _noise(levels: NoiseLevels, x: Array, key: Array) -> tuple[Array, Array]:
    """Noise levels and noise of all rows, ε first, then −ε at the same levels."""
    eps = jax.random.normal(key, (len(levels.log_snr), *x.shape), x.dtype)
    return jnp.tile(levels.log_snr, 2), jnp.concatenate([eps, -eps])


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


def log_joint(program: Program, target: Target, z: Float[Array, " D"]) -> Float[Array, ""]:
    """Log p(z) + bound on log p(x | z), in nats."""
    return log_prior(program, z) + tabulated_log_likelihood(program.encoder, target.table, z)
