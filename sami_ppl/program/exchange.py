"""A program with another part: another prior on the same denoiser, or the same prior on a denoiser fitted elsewhere."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Key

from sami_ppl._util.keys import check_key
from sami_ppl.decoders.guidance import check_guided
from sami_ppl.diffusion.denoiser import AbstractDenoiser
from sami_ppl.encoders.encoder import AbstractWrapper, NetworkEncoder, Noise, encoder_for
from sami_ppl.priors.read import Given, Prior, prior_arguments
from sami_ppl.program.guide import GlobalGuide
from sami_ppl.program.program import Program
from sami_ppl.program.sequences import with_frames

FEATURES = 64
"""Length of the feature vector on which encoders build, by default."""


class Networks(NamedTuple):
    """A network for the denoiser, one for the encoder's features, and what they are, for the user."""

    denoiser: Callable
    trunk: Callable
    description: str


def with_prior(
    program: Program,
    prior: Prior,
    *,
    families: Mapping[str, Callable] | None = None,
    given: Given | None = None,
    global_guide: GlobalGuide = "diagonal",
    min_scale: float = 0.03,
    key: Key[Array, ""],
) -> Program:
    """The program with another prior, of any size, on the denoiser at hand; the encoder's last layers begin anew.

        other = sp.with_prior(program, sp.factors(z=dist.Laplace(0, 1).expand([6])), key=key)
        other, history = sp.fit(other, data, sp.EncoderOnly(), key=key)

    Args:
        program: a program of single observations, as a rule a fitted one.
        prior: as for `Program`.
        families: site name → family of posteriors, as for `encoder_for`.
        given: values of the variables that the prior takes, as for `Program`; default those of the program.
        global_guide: guide of global sites, as for `Program`.
        min_scale: least posterior standard deviation, in units of the prior's spread.
        key: random key of the new layers.

    Returns:
        The program, with its denoiser and the features of its encoder as they were.

    Raises:
        ValueError: a decoder that is not guided, an encoder that is not built on a network, such as one of sequences;
            and what `encoder_for` raises.
    """
    check_key(key)
    check_guided(program.denoiser, "with_prior, which keeps the denoiser,")
    encoder = program.encoder
    while isinstance(encoder, AbstractWrapper):
        encoder = encoder.base
    if not isinstance(encoder, NetworkEncoder):
        raise ValueError(
            f"the program's encoder, {type(encoder).__name__}, has no network on which another prior's could be built: "
            "give the program of single frames, frames_of(program), or Program(prior, program.denoiser, encoder)"
        )
    if given is None:
        wanted = prior_arguments(prior)
        given = {n: a for n, a in zip(program.given.names, program.given.arrays, strict=True) if n in wanted}
    built = encoder_for(
        prior, encoder.network, encoder.schedule, encoder.event_shape, families=families, given=given,
        noise=encoder.noise, mean=encoder.mean, std=encoder.std, min_scale=min_scale, key=key,
    )  # fmt: skip
    return Program(
        prior, program.denoiser, built, sampler=program.sampler, given=given, event_dims=program.event_dims,
        global_guide=global_guide,
    )  # fmt: skip


def with_denoiser(
    program: Program,
    denoiser: AbstractDenoiser,
    *,
    features: int = FEATURES,
    families: Mapping[str, Callable] | None = None,
    min_scale: float = 0.03,
    key: Key[Array, ""],
) -> Program:
    """The program with a denoiser fitted elsewhere, and an encoder that begins with its features.

    Args:
        program: the program, of which prior, sampler and guide of global sites stay.
        denoiser: of observations of the same shape, of sequences that of one frame; its schedule becomes the program's.
        features: length of the vector of features on which the encoder's last layers stand.
        families: site name → family of posteriors, as for `encoder_for`.
        min_scale: least posterior standard deviation, in units of the prior's spread.
        key: random key of the encoder's new layers.

    Returns:
        The program, its encoder not fitted yet: `sp.fit(program, data, sp.EncoderOnly(), key=key)`.

    Raises:
        ValueError: a denoiser of observations of another shape, or one that has no features to give; and what
            `encoder_for` raises.
    """
    check_key(key)
    single, _ = program.single()
    if single is not program:
        settings: dict[str, Any] = {"features": features, "families": families, "min_scale": min_scale, "key": key}
        return with_frames(program, with_denoiser(single, denoiser, **settings))
    trunk_key, encoder_key = jax.random.split(key)
    made = brought(denoiser, program.event_shape, features, trunk_key)
    mean, std = denoiser.statistics or (0.0, 1.0)
    encoder = encoder_for(
        program.prior, made.trunk, denoiser.schedule, denoiser.event_shape, families=families,
        given=dict(zip(program.given.names, program.given.arrays, strict=True)), mean=mean, std=std,
        min_scale=min_scale, key=encoder_key,
    )  # fmt: skip
    return program.replace(denoiser=denoiser, encoder=encoder)


def check_brought(decoder: str, noise: Noise, given: list[str]) -> None:
    """Raise ValueError for what a denoiser brings itself."""
    if decoder != "guided":
        raise ValueError(f"decoder={decoder!r} takes codes, the denoiser given does not: leave decoder out")
    if given:
        raise ValueError(f"the denoiser given brings its own {', '.join(given)}: leave {given[0]} out")
    if noise != "full":
        raise ValueError(f"noise={noise!r}, but the features of a denoiser depend on the noise level: leave noise out")


def brought(denoiser: AbstractDenoiser, shape: tuple[int, ...], features: int, key: Array) -> Networks:
    """A denoiser fitted elsewhere, and the trunk that it gives the encoder.

    Raises ValueError for one of observations of another shape, and for one that has no features to give.
    """
    if denoiser.event_shape != shape:
        raise ValueError(
            f"the denoiser is of observations of shape {denoiser.event_shape}, the data are of {shape}: pad, crop or "
            "resize them; one of latents takes those of its own autoencoder"
        )
    trunk = denoiser.trunk(features, key=key)
    if trunk is None:
        raise ValueError(
            f"{type(denoiser).__name__} has no features for an encoder: write sp.Program(prior, denoiser, encoder), "
            "encoder = sp.encoder_for(prior, trunk, denoiser.schedule, denoiser.event_shape, key=key)"
        )
    counts = [sum(leaf.size for leaf in jax.tree.leaves(part) if hasattr(leaf, "size")) for part in (denoiser, trunk)]
    told = f"{type(denoiser).__name__}, fitted already; {counts[0]:,} and {counts[1]:,} parameters"
    return Networks(denoiser, trunk, told)
