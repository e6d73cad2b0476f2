"""Gauge fixing: axes that fill the prior, and of those the ones that are most non-Gaussian.

z' = A (z − m) changes no sample and no part of the bound but the KL, since the guidance of z' is that of z. Two things
are left to A, and neither asks for labels.

*Filling the prior.* With m and C the mean and covariance of the aggregate posterior, the average of q(z | x) over the
observations, and A Aᵀ = C⁻¹ up to a rotation, z' has mean 0 and covariance I, as the prior has. No other m and A Aᵀ
give a smaller KL: it falls by ½ (tr C + ‖m‖² − k − log det C) nats for k axes, exactly and never below 0. Codes that a
small weight of the KL has let spread beyond the prior come back to it, so that draws of the prior look like data.

*Turning.* N(0, I) is invariant under rotations, so a fit picks one of many equivalent programs. The rotation is taken
that makes the posterior means as non-Gaussian as possible (orthogonal independent component analysis, FastICA).
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
from sami_ppl.encoders.affine import AffineEncoder
from sami_ppl.encoders.encoder import AbstractEncoder, gaussian
from sami_ppl.encoders.own_guide import OwnGuideEncoder
from sami_ppl.encoders.tails import TailedEncoder
from sami_ppl.fitting.stage import Stage
from sami_ppl.program.program import Program

MOST = 10_000
"""Observations whose posteriors say where the axes lie, at most."""


@readable
class Alignment(NamedTuple):
    """The program with other axes, z' = A (z − m), and what became of its KL.

    `matrix` A (D, D), `centre` m (D,). `gain`: nats of the KL, and so of the bound, that filling the prior saves.
    `diagonal_cost`: KL of the new posterior from the product of its marginals, averaged over observations, in nats:
    what independence of the new axes would cost. The guide keeps the correlations.
    """

    program: Program
    matrix: np.ndarray
    centre: np.ndarray
    gain: float
    diagonal_cost: float


def align(
    program: Program, x: Float[Array | np.ndarray, "obs *event"], *, seed: int = 0, active_variance: float = 0.05
) -> Alignment:
    """The program with axes that fill its standard normal prior, turned by orthogonal ICA of the posterior means.

    Of more than 10,000 observations the first are used. Axes whose posterior means vary less than `active_variance`
    (prior variance 1) carry nothing and stay as they are. Raises ValueError if fewer than two axes have a fixed normal
    prior: other priors have no rotation symmetry; and unless the decoder is guided: others know the code by the axes
    that it was fitted with. Raises TypeError for a seed that is no whole number.
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
    x = x[:MOST]
    means = program.encode(x)[0].astype(float)
    root = by_chunks(partial(posterior_roots, program), chunk_of(1024, program.event_shape), program.observed(x))
    axes = np.flatnonzero(symmetric & (means.var(0) > active_variance))
    matrix, centre, gain = np.eye(program.latents.size), np.zeros(program.latents.size), 0.0
    if len(axes):
        own = root[:, axes].astype(float)
        white, middle, gain = filling(means[:, axes], np.mean(own @ np.swapaxes(own, -1, -2), 0))
        turn = orthogonal_ica((means[:, axes] - middle) @ white.T, seed) if len(axes) > 1 else np.eye(1)
        matrix[np.ix_(axes, axes)], centre[axes] = turn @ white, middle
    factor = matrix @ root
    covariance = factor @ np.swapaxes(factor, -1, -2)
    marginal = np.log(np.diagonal(covariance, axis1=-2, axis2=-1)).sum(-1)
    cost = 0.5 * np.mean(marginal - np.linalg.slogdet(covariance)[1])
    encoder = _in_axes(program.encoder, matrix, centre)
    return Alignment(program.replace(encoder=encoder), matrix, centre, gain, float(cost))


def filling(
    means: Float[np.ndarray, "obs k"], covariance: Float[np.ndarray, "k k"]
) -> tuple[Float[np.ndarray, "k k"], Float[np.ndarray, " k"], float]:
    """A and m by which posteriors of these means and mean covariance fill N(0, I), and the KL that it saves, in nats.

    A is the symmetric square root of C⁻¹: of all that serve, the one that moves the axes least.
    """
    middle = means.mean(0)
    total = np.cov(means.T, bias=True).reshape(covariance.shape) + covariance
    values, vectors = np.linalg.eigh(total)
    gain = 0.5 * (np.sum(values - 1 - np.log(values)) + np.sum(middle**2))
    return vectors / np.sqrt(values) @ vectors.T, middle, float(gain)


def _in_axes(encoder: AbstractEncoder, matrix: np.ndarray, centre: np.ndarray) -> AbstractEncoder:
    """The encoder of A (z − m); of one that is affine already, in one step: A (B (z − n) − m) = A B (z − n − B⁻¹ m)."""
    if isinstance(encoder, OwnGuideEncoder):
        return OwnGuideEncoder(*(_in_axes(part, matrix, centre) for part in (encoder.base, encoder.own)))
    if isinstance(encoder, TailedEncoder):
        return eqx.tree_at(lambda e: e.base, encoder, _in_axes(encoder.base, matrix, centre))
    base = encoder
    if isinstance(encoder, AffineEncoder):
        inner = np.asarray(encoder.matrix, float)
        base, matrix, centre = (
            encoder.base, matrix @ inner, np.asarray(encoder.centre, float) + np.linalg.solve(inner, centre),
        )  # fmt: skip
    return AffineEncoder(base, jnp.asarray(matrix, jnp.float32), jnp.asarray(centre, jnp.float32))


@eqx.filter_jit
def posterior_roots(program: Program, x: Float[Array, "obs *event"]) -> Float[Array, "obs D D"]:
    """Square roots A of the covariances A Aᵀ of the code's posteriors, which must be Gaussian."""
    return jnp.asarray(program.code_law(x).root)


def why_axes_stay(program: Program, stage: Stage) -> str:
    """Why the gauge of a program that a stage has fitted is not to be chosen; nothing where it may."""
    if not program.guided:
        return "the decoder knows the code by them"
    if stage.sites_named() or stage.penalties:
        return "weights of single sites, or penalties, may tell them apart"
    return "" if symmetric_axes(program).sum() > 1 else "the prior has no two that may be turned"


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
