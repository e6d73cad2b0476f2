"""Warm starts of the encoder: a smooth, unfolded code to begin with, found without labels.

Trained from random weights, an encoder may fold the space of factors: two places of an object share a code, and no
later gradient unfolds it. Two starts prevent that and save most of the time. `transfer` copies the denoiser's own
features. `fit_codes` then fits q(z | x_λ, λ), at every noise level, by maximum likelihood to the leading principal
components of low-pass filtered observations (`components`), one on every axis that has something of its own to tell.
"""

from functools import lru_cache
import itertools
from typing import Any, Literal, cast
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpy as np
import optax
import xarray as xr

from sami_ppl._util.keys import check_key
from sami_ppl._util.progress import phase, progress_bar, say, telling
from sami_ppl.data.stream import Source, Stream, at_hand
from sami_ppl.diagnostics.gain import draw_codes
from sami_ppl.diffusion.denoiser import PreconditionedDenoiser
from sami_ppl.encoders.affine import AbstractAffine
from sami_ppl.encoders.encoder import AbstractEncoder, NetworkEncoder
from sami_ppl.encoders.own_guide import OwnGuideEncoder
from sami_ppl.fitting.components import SOME, start_codes, widest_blur
from sami_ppl.fitting.parts import count_of, rows_of
from sami_ppl.fitting.stage import batches
from sami_ppl.fitting.start_prior import fit_prior, with_clusters
from sami_ppl.priors.latents import Latents
from sami_ppl.priors.sites import Direction, Discrete
from sami_ppl.program.build import as_data
from sami_ppl.program.program import Program
from sami_ppl.program.sequences import with_frames


def transfer(source: eqx.Module, target: eqx.Module) -> eqx.Module:
    """The target network with every array replaced that the source has at the same place in the same shape.

    A half U-Net takes the descending half of a U-Net, a perceptron all layers but those at its ends that differ.
    """
    found = {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(eqx.filter(source, eqx.is_inexact_array))
    }

    def take(path: tuple, leaf: Array) -> Array:
        other = found.get(jax.tree_util.keystr(path))
        return other if other is not None and other.shape == getattr(leaf, "shape", None) else leaf

    return jax.tree_util.tree_map_with_path(take, target)


def arrange(codes: Float[np.ndarray, "obs D"], latents: Latents, components: int) -> Float[np.ndarray, "obs D"]:
    """Columns of codes in another order: those that lie on a circle or sphere together at the sites of directions.

    A factor that goes round shows in components of equal weight, whose squares add up to a constant. Discrete sites
    take the last columns: a place, cut into sectors, is no kind.
    """
    left, order = list(range(codes.shape[1])), np.full(codes.shape[1], -1)
    for site in latents.sites:
        if not isinstance(site, Direction):
            continue
        dim = site.dimension
        for start in range(site.start, site.start + site.size, dim):
            sets = list(itertools.combinations([c for c in left if c < components], dim)) or [tuple(left[:dim])]
            squares = [np.sum(codes[:, list(columns)] ** 2, 1) for columns in sets]
            best = sets[int(np.argmin([square.std() / square.mean() for square in squares]))]
            order[start : start + dim] = best
            left = [c for c in left if c not in best]
    discrete = np.concatenate([np.full(site.size, isinstance(site, Discrete)) for site in latents.sites])
    free = np.flatnonzero(order < 0)
    order[np.concatenate([free[~discrete[free]], free[discrete[free]]])] = left
    return codes[:, order]


def fit_codes(
    program: Program,
    x: Float[Array | np.ndarray, "obs *event"],
    codes: Float[np.ndarray, "obs D"],
    *,
    key: Key[Array, ""],
    steps: int = 500,
    batch: int = 128,
    learning_rate: float = 2e-3,
    noise: float = 0.05,
    progress: bool = True,
) -> Program:
    """The program with its encoder fitted to codes of the observations by maximum likelihood, at all noise levels.

    `noise`: standard deviation added to the codes, so that the clean posterior keeps a width.
    """
    batch = min(batch, len(x))
    rate = (learning_rate, steps)
    params, static = eqx.partition(program.encoder, eqx.is_inexact_array)
    seed = int(jax.random.randint(key, (), 0, 2**31 - 1))
    observations, targets = jnp.asarray(x), jnp.asarray(codes)
    state = _optimiser(*rate).init(params)
    with progress_bar(steps, "warm start", show=progress, unit="step") as bar:
        for step in range(steps):
            rows, own_key = batches(seed, len(x), batch, step, 1)[0], jax.random.fold_in(key, step)
            inputs = (observations, targets, rows, own_key, jnp.asarray(noise))
            params, state = _update(program.latents, static, rate, params, state, *inputs)
            bar.update()
    return program.replace(encoder=eqx.combine(params, static))


@lru_cache(maxsize=32)
def _optimiser(learning_rate: float, steps: int) -> optax.GradientTransformation:
    rate = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, min(50, steps // 2 + 1), steps + 1, learning_rate / 10
    )
    return optax.chain(optax.clip_by_global_norm(10.0), optax.adam(rate, b2=0.99))


@eqx.filter_jit
def _update(
    latents: Latents, static: Any, rate: tuple[float, int], params: Any, state: optax.OptState,
    x: Array, codes: Array, rows: Array, key: Array, noise: Array,
) -> tuple[Any, optax.OptState]:  # fmt: skip
    """One step of the encoder towards codes of single observations."""

    def loss(params: AbstractEncoder, x: Array, codes: Array, key: Array) -> Array:
        encoder: AbstractEncoder = eqx.combine(params, static)
        level_key, eps_key, code_key = jax.random.split(key, 3)
        log_snr, _ = encoder.schedule.stratified(level_key, len(x))
        eps = jax.random.normal(eps_key, x.shape, x.dtype)
        z = latents.onto_support(codes + noise * jax.random.normal(code_key, codes.shape, codes.dtype))
        x_noisy = jax.vmap(encoder.schedule.add_noise)(x, log_snr, eps)
        return -jnp.mean(jax.vmap(encoder.log_prob)(z, x_noisy, log_snr))

    updates, state = _optimiser(*rate).update(jax.grad(loss)(params, x[rows], codes[rows], key), state)
    return optax.apply_updates(params, updates), state


def check_clusters(program: Program) -> None:
    """Raise ValueError where `warm_start` cannot start a program on clusters."""
    if program.latents.global_sites or not (program.latents.discrete or program.latents.params):
        raise ValueError(
            "clusters is for priors with discrete sites or learned parameters (numpyro.param), without global sites: "
            "leave it out"
        )
    if program.of_sequences:
        raise ValueError("clusters is for programs of single observations, this one is of sequences: leave it out")


def warm_start(
    program: Program,
    data: xr.Dataset | Float[Array | np.ndarray, "obs *event"] | Source,
    *,
    key: Key[Array, ""],
    steps: int = 500,
    batch: int = 128,
    clusters: bool = False,
    source: Literal["components", "guide"] = "components",
    progress: bool = True,
) -> Program:
    """The program with its encoder started from its fitted denoiser and from low-pass codes of the observations.

    The encoder takes its features from the denoiser's network where both are built on one (`PreconditionedDenoiser`,
    `NetworkEncoder`, rotated or not); an encoder of another kind keeps its own, with a warning. Every continuous axis
    carries a component, but for those that would only repeat the others (`components.free_components`): these start at
    the prior, and that is said. Of sequences, the encoder of frames is started, from all frames that are seen. With
    `clusters`, discrete sites start on clusters of the observations, else at random; and what the prior learns starts
    at its most likely value for these codes. A guide of its own (`recalibrate`) is given up.

    With `source="guide"` the noisy posteriors are fitted to draws of the encoder's own guide, which stays as it is: the
    encoder guides from there on, and q(z | x) is that guide.
    `data`: observations, as an array or a Dataset, which holds the variables that the prior takes too; of a stream,
    10,000 of them are read.

    Raises ValueError for `clusters` with a prior that has global sites or nothing to learn, or is of sequences.
    """
    check_key(key)
    x, given = program.observations(at_hand(as_data(data)))
    if clusters:
        check_clusters(program)
    single, x = program.single(x)
    if single is not program:
        batch = batch * program.event_shape[0]
        return with_frames(program, warm_start(single, x, key=key, steps=steps, batch=batch, progress=progress))
    if source == "guide":
        return _beside_guide(program, x, given, key=key, steps=steps, batch=batch, progress=progress)
    if isinstance(program.encoder, OwnGuideEncoder):  # its guide is of what the encoder was
        program = program.replace(encoder=program.encoder.base)
    program = program.replace(encoder=_with_features(program))
    axes = program.latents.size - sum(site.categories for site in program.latents.discrete)
    with telling(progress):
        with phase("warm start: principal components of blurred observations"):
            codes, count, width = start_codes(x, program.latents.size, axes)
            codes = arrange(codes, program.latents, count)
        say(_told(count, axes, width))
    if clusters:
        codes = with_clusters(program, x, given, codes)
        program = fit_prior(program, codes, given)
    return fit_codes(program, x, codes, key=key, steps=steps, batch=batch, progress=progress)


def told(program: Program, data: xr.Dataset | Float[Array | np.ndarray, "obs *event"] | Stream) -> float:
    """The share of the variance of observations that the components tell which an encoder of the program starts from.

    By nearest neighbours, of 4,000 observations at most, of a stream from all over it; of sequences, of their frames.
    """
    data = at_hand(data, SOME)
    rows = np.random.default_rng(0).permutation(count_of(data))[:SOME]
    single, x = program.single(program.observations(rows_of(data, rows))[0])
    return widest_blur(x, single.latents.size).told


def _beside_guide(program: Program, x: np.ndarray, given: Any, *, key: Key[Array, ""], **settings: Any) -> Program:
    """The program with its guide kept, and its noisy posteriors fitted to draws of it."""
    encoder = program.encoder
    base, own = (encoder.base, encoder.own) if isinstance(encoder, OwnGuideEncoder) else (encoder, encoder)
    draw_key, key = jax.random.split(key)
    codes = draw_codes(program, x, draw_key, given=given)
    fitted = fit_codes(program.replace(encoder=base), x, codes, key=key, noise=0.0, **settings)
    return program.replace(encoder=OwnGuideEncoder(fitted.encoder, own))


def _told(count: int, axes: int, width: float) -> str:
    """The start in words."""
    blur = f"blurred by {width:g} of their side" if width else "as they are"
    rest = "" if count == axes else f"; {axes - count} start at the prior, further components repeat these"
    return f"warm start: {count} of {axes} axes carry a component of observations {blur}{rest}"


def _with_features(program: Program) -> AbstractEncoder:
    """The encoder with the features of the denoiser's network in its own."""
    if not isinstance(program.denoiser, PreconditionedDenoiser):
        return program.encoder  # nothing was learned that could be taken

    def inside(encoder: AbstractEncoder) -> AbstractEncoder:
        return inside(encoder.base) if isinstance(encoder, AbstractAffine) else encoder

    built = inside(program.encoder)
    if not isinstance(built, NetworkEncoder):
        warnings.warn(
            f"the warm start leaves the features of {type(built).__name__} as they are: it is no NetworkEncoder, whose "
            "network could take those of the denoiser",
            stacklevel=3,
        )
        return program.encoder
    network = transfer(cast(eqx.Module, program.denoiser.network), cast(eqx.Module, built.network))
    return eqx.tree_at(lambda encoder: cast(NetworkEncoder, inside(encoder)).network, program.encoder, network)
