"""Gauge fixing: choosing among equivalent programs the one whose axes are most non-Gaussian.

A prior N(0, I) is invariant under rotations of the axes that share it, so a fit picks one of many equivalent
programs. Rotating z' = R z leaves the prior, the samples and the bound as they are, and turns the diagonal posterior
diag(s²) into R diag(s²) Rᵀ. Among all R the one is taken that makes the posterior means as non-Gaussian as possible
(orthogonal independent component analysis, FastICA); no labels are used.
"""

from functools import partial
from typing import NamedTuple
import warnings

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
import numpy as np
from scipy.optimize import linear_sum_assignment

from sami_ppl._util.chunks import by_chunks, chunk_of
from sami_ppl._util.tables import readable
from sami_ppl.decoders.guidance import check_guided
from sami_ppl.encoders.encoder import RotatedEncoder, gaussian
from sami_ppl.program.program import Program


@readable
class Alignment(NamedTuple):
    """The equivalent program, the rotation R (D, D) of z' = R z, and what independence of the new axes would cost.

    `diagonal_cost`: KL of the rotated posterior from the product of its marginals, averaged over observations, in
    nats. The bound of the program itself does not change: its guide keeps the correlations.
    """

    program: Program
    rotation: np.ndarray
    diagonal_cost: float


def align(
    program: Program, x: Float[Array | np.ndarray, "obs *event"], *, seed: int = 0, active_variance: float = 0.05
) -> Alignment:
    """Rotate the active axes of a program with a standard normal prior by orthogonal ICA on the posterior means.

    Axes whose posterior means vary less than `active_variance` (prior variance 1) carry nothing and stay as they are.
    Raises ValueError if fewer than two axes have a fixed normal prior: other priors have no rotation symmetry; and
    unless the decoder is guided: others know the code by the axes that it was fitted with. Raises TypeError for a seed
    that is no whole number.
    """
    if not isinstance(seed, int | np.integer):
        raise TypeError(f"align takes a whole number as seed, got {type(seed).__name__}: write seed=0")
    check_guided(program.denoiser, "align")
    symmetric = symmetric_axes(program)
    if symmetric.sum() < 2:
        kinds = ", ".join(site.name for site in program.latents.sites if not symmetric[site.code].all())
        raise ValueError(
            "align needs at least two latent axes with independent normal priors: rotations of other priors give "
            f"another program (sites without that symmetry: {kinds or 'none'}, "
            f"{int(symmetric.sum())} normal axis in all). Leave alignment out for this prior"
        )
    means, _ = program.encode(x)
    axes = np.flatnonzero(symmetric & (means.var(0) > active_variance))
    size = program.latents.size
    rotation = np.eye(size)
    if len(axes) > 1:
        rotation[np.ix_(axes, axes)] = orthogonal_ica(means[:, axes], seed)
    root = by_chunks(partial(posterior_roots, program), chunk_of(1024, program.event_shape), program.observed(x))
    factor = rotation @ root
    covariance = factor @ np.swapaxes(factor, -1, -2)
    marginal = np.log(np.diagonal(covariance, axis1=-2, axis2=-1)).sum(-1)
    cost = 0.5 * np.mean(marginal - np.linalg.slogdet(covariance)[1])
    base, before = (
        (program.encoder.base, np.asarray(program.encoder.rotation))
        if isinstance(program.encoder, RotatedEncoder)
        else (program.encoder, np.eye(size))
    )
    encoder = RotatedEncoder(base, jnp.asarray(rotation @ before, jnp.float32))
    return Alignment(program.replace(encoder=encoder), rotation, float(cost))


@eqx.filter_jit
def posterior_roots(program: Program, x: Float[Array, "obs *event"]) -> Float[Array, "obs D D"]:
    """Square roots A of the covariances A Aᵀ of the code's posteriors, which must be Gaussian."""
    return jnp.asarray(program.code_law(x).root)


def symmetric_axes(program: Program) -> Bool[np.ndarray, " D"]:
    """Axes with a fixed normal prior and a Gaussian posterior: rotating those among themselves changes nothing.

    Not those of sites that others depend on: their laws tell the axes apart.
    """
    sites, turns = program.latents.sites, gaussian(program.encoder)
    parents = {name for site in sites for name in site.parents}
    return np.concatenate([np.full(s.size, turns and s.standard and s.name not in parents) for s in sites])


def orthogonal_ica(means: Float[np.ndarray, "obs k"], seed: int) -> Float[np.ndarray, "k k"]:
    """The orthogonal matrix nearest to FastICA's, signed and ordered to be as near the identity as can be.

    FastICA finds the directions of whitened means; in the space of the code these are orthogonal up to the unequal
    spread of the axes, which the polar factor removes. Where its iteration breaks down (on one host with a GPU it did,
    in float32, for one fit of five) the axes stay as they are, with a warning: a fit is not lost for that.
    """
    from sklearn.decomposition import FastICA
    from sklearn.exceptions import ConvergenceWarning

    ica = FastICA(whiten="unit-variance", max_iter=2000, tol=1e-6, random_state=seed)
    with warnings.catch_warnings():
        # Where means are Gaussian no direction is better than another, and the search for one does not end.
        warnings.simplefilter("ignore", ConvergenceWarning)
        try:
            found = ica.fit(means.astype(float) - means.mean(0, dtype=float)).components_
        except ValueError as error:
            if not np.isfinite(means).all():
                raise
            warnings.warn(f"gauge fixing broke down ({error}): the axes stay as they are", stacklevel=3)
            return np.eye(means.shape[1])
    directions = found / np.linalg.norm(found, axis=1, keepdims=True)
    left, _, right = np.linalg.svd(directions)
    rotation = left @ right
    axis_of_row = linear_sum_assignment(-np.abs(rotation))[1]
    ordered = rotation[np.argsort(axis_of_row)]
    return ordered * np.sign(np.diag(ordered))[:, None]
