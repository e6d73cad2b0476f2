"""From a prior and data to a program: networks, sizes, statistics and encoder follow from the two.

Everything that is guessed is said in one line each, and everything can be given.
"""

from collections.abc import Callable, Mapping
import math
from typing import Any, Literal, NamedTuple, get_args

import jax
from jaxtyping import Array, Key
import numpy as np
import xarray as xr

from sami_ppl._util.keys import check_key
from sami_ppl.data.checks import as_array, as_floats, check_spread, check_variable, prior_variables, training_part
from sami_ppl.data.layout import Layout, arranged, layout_of
from sami_ppl.decoders.conditional import ConditionedDenoiser, IsotropicDenoiser
from sami_ppl.decoders.guidance import check_guided
from sami_ppl.diffusion.denoiser import AbstractDenoiser, PreconditionedDenoiser
from sami_ppl.diffusion.sampler import AbstractSampler
from sami_ppl.diffusion.schedule import AbstractSchedule, VariancePreserving
from sami_ppl.encoders.encoder import AbstractWrapper, NetworkEncoder, Noise, encoder_for
from sami_ppl.nn import AscendingUNet, HalfUNet, ResidualMLP, UNet
from sami_ppl.priors.read import Given, Prior, prior_arguments, read_prior
from sami_ppl.program.guide import GlobalGuide
from sami_ppl.program.program import Program

SMALL = 400
"""Numbers of an observation up to which a perceptron takes images too."""
TOLD = 1000
"""The same for the encoder alone, beside a U-Net: guidance differentiates the encoder twice, so that one of perceptrons
takes twice as many 28×28 images in the same seconds at least, and tells more after them (docs/panel.md)."""
FEATURES = 64
"""Length of the feature vector on which encoders build, by default."""
MOST_GIVEN = 4096
"""Observations whose variables a prior p(z | u) is read from, at most."""

Network = Literal["mlp", "unet", "hybrid"]
Decoder = Literal["guided", "conditioned", "gaussian"]


class Networks(NamedTuple):
    """A network for the denoiser, one for the encoder's features, and what they are, for the user."""

    denoiser: Callable
    trunk: Callable
    description: str


def autoencoder(
    prior: Prior,
    data: xr.Dataset | Array | np.ndarray,
    *,
    decoder: Decoder = "guided",
    network: Network | tuple[Callable, Callable] | None = None,
    size: Mapping[str, Any] | None = None,
    features: int = FEATURES,
    families: Mapping[str, Callable] | None = None,
    given: Given | None = None,
    mean: float | None = None,
    std: float | None = None,
    noise: Noise = "full",
    min_scale: float = 0.03,
    schedule: AbstractSchedule | None = None,
    predict: Literal["data", "noise"] | None = None,
    sampler: AbstractSampler | None = None,
    global_guide: GlobalGuide = "diagonal",
    progress: bool = True,
    key: Key[Array, ""],
) -> Program:
    """The program that suits a prior and data, not fitted yet: `program, history = sp.fit(program, data, key=key)`.

        prior = sp.factors(place=dist.Uniform(-1, 1).expand([2]), light=dist.Normal(0, 1))
        program = sp.autoencoder(prior, images, key=jax.random.key(0))

    What is guessed is printed, a line each: the layout of the data, their mean and standard deviation (of the training
    part, where data are split), the kind and size of the networks.

    Args:
        prior: a NumPyro function over the factors of one observation, or what `factors` makes.
        data: observations x, an array (obs, *event), or a Dataset with the variable x on obs, and with the variables
            that the prior takes. Images may have their channels first or last, or none where they are grey; 8-bit ones
            are scaled from 0 … 255 to [−1, 1]; floating-point ones should have about unit scale.
        decoder: the likelihood p(x | z): "guided", a denoiser guided by the encoder's gradient; "conditioned", a
            denoiser whose blocks z modulates; "gaussian", N(m(z), s² I) with a network for the mean and one learned s,
            a variational autoencoder's.
        network: "mlp", a residual perceptron, for vectors and small images; "unet", a U-Net with half a U-Net as
            encoder, for larger ones; "hybrid", a U-Net with a perceptron as encoder, for those between; or your own
            pair (denoiser network, encoder trunk), called as (x, log_snr); the first gives the shape of x, the second a
            vector of features. That of a conditioned decoder is called as
            (x, log_snr, z) too, of a Gaussian one as (z, None). Default: by the shape of the data.
        size: arguments of these networks, such as {"width": 256, "depth": 4} or {"widths": (32, 64), "patch": 2}; of a
            hybrid those of the U-Net.
        features: length of the vector of features on which the encoder's last layers stand.
        families: site name → family of posteriors, as for `encoder_for`.
        given: values of the variables that the prior takes, as for `Program`; default those of the data.
        mean: mean that the networks take the observations to have; default that of the data.
        std: the same of their standard deviation.
        noise: what of the encoder may depend on the noise level, see `NetworkEncoder`; of guided decoders only.
        min_scale: least posterior standard deviation, in units of the prior's spread.
        schedule: noise levels; default `VariancePreserving()`.
        predict: what the denoiser's network puts out, see `PreconditionedDenoiser`; default "data" of a perceptron,
            "noise" of a U-Net and of conditioned decoders, which learn what the code is for only where errors at the
            clean end do not drown it. A Gaussian decoder predicts nothing but its mean.
        sampler: of reverse diffusion; default as for `Program`.
        global_guide: guide of global sites, as for `Program`.
        progress: print what is guessed.
        key: random key of the initial weights.

    Returns:
        A program with fresh networks.

    Raises:
        TypeError: observations that are no numbers, a prior that is no function.
        ValueError: fewer than two observations, none that differ, values that are not finite or far from unit scale,
            integers that are no pixels, a `size` that the networks do not take, another word for the decoder, settings
            that it does not have; and what `read_prior` and `Program` raise.
    """
    check_key(key)
    _check_decoder(decoder, noise, predict)
    say = print if progress else _silent
    data = as_data(data)
    part = training_part(data)
    x, layout = _observations(part)
    given = _given(prior, part) if given is None else given
    latents = read_prior(prior, given)
    raw = part["x"] if isinstance(part, xr.Dataset) else part
    notes = [note for note in (layout.change, _scaling(np.dtype(raw.dtype))) if note]
    shape = layout.event_shape
    sides = " × ".join(f"{dim} {length}" for dim, length in zip(layout.event_dims, shape, strict=True))
    say("; ".join([f"data: {len(x):,} observations, {sides}", *notes]))
    statistics: dict[str, Any] = {
        "mean": float(x.mean(dtype=np.float64)) if mean is None else mean,
        "std": _spread(x) if std is None else std,
    }
    say(f"mean {statistics['mean']:.3g}, standard deviation {statistics['std']:.3g}")
    say(f"prior: {', '.join(site.name for site in latents.sites)}; code of {latents.size} numbers")

    denoiser_key, trunk_key, encoder_key = jax.random.split(key, 3)
    codes = (decoder, latents.size)
    made = _networks(layout, network, dict(size or {}), features, noise, codes, denoiser_key, trunk_key)
    say(f"networks: {made.description}")
    schedule = VariancePreserving() if schedule is None else schedule
    if predict is None:
        predict = "noise" if isinstance(made.denoiser, UNet) or decoder == "conditioned" else "data"
    denoiser: AbstractDenoiser
    if decoder == "gaussian":
        denoiser = IsotropicDenoiser(made.denoiser, schedule, shape, latents.size, **statistics)
    elif decoder == "conditioned":
        denoiser = ConditionedDenoiser(made.denoiser, schedule, shape, latents.size, **statistics, predict=predict)
    else:
        denoiser = PreconditionedDenoiser(made.denoiser, schedule, shape, **statistics, predict=predict)
    return Program(
        prior,
        denoiser,
        encoder_for(
            prior, made.trunk, schedule, shape,
            families=families, given=given, noise=noise, min_scale=min_scale, **statistics, key=encoder_key,
        ),
        sampler=sampler, given=given, event_dims=layout.event_dims, global_guide=global_guide,
    )  # fmt: skip


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


def as_data(data: Any) -> xr.Dataset | np.ndarray:
    """Observations as an array or a Dataset.

    Raises TypeError for what is neither and for observations that are no numbers, ValueError for arrays of unequal
    shapes and for arrays without a dim of observations.
    """
    if isinstance(data, xr.Dataset):
        check_variable(data, "x")
        return data
    if isinstance(data, xr.DataArray):
        raise TypeError(f"data is a DataArray of {data.dims}: write data.to_dataset(name='x'), with obs its first dim")
    x = as_array(data)
    if x.ndim < 2:
        raise ValueError(
            f"data must have shape (obs, *event), got {x.shape}: of numbers by themselves write data[:, None]"
        )
    return x


def _observations(part: xr.Dataset | np.ndarray) -> tuple[np.ndarray, Layout]:
    """Observations as floats, and the layout a program should have for them."""
    named = isinstance(part, xr.Dataset)
    layout = layout_of(part)
    raw = as_array(part["x"].values if named else part)
    if len(raw) < 2:
        raise ValueError(
            f"data hold {len(raw)} observation{'s' * (len(raw) != 1)}, of which nothing can be learned: give an array "
            "(obs, *event) of many; a single one is encoded by a fitted program, program.posterior(x[None])"
        )
    x = arranged(raw, part["x"].dims[1:] if named else None, layout.event_shape, layout.event_dims)
    x = as_floats(x)
    check_spread(x)
    return x, layout


def _given(prior: Prior, part: xr.Dataset | np.ndarray) -> dict[str, np.ndarray]:
    """The variables that the prior takes, of some observations."""
    names = prior_arguments(prior) if callable(prior) else ()
    return prior_variables(part.isel(obs=slice(MOST_GIVEN)) if isinstance(part, xr.Dataset) else part, names)


def _scaling(dtype: np.dtype) -> str:
    return "8-bit pixels 0 … 255 scaled to [−1, 1]" if dtype == np.uint8 else ""


def _check_decoder(decoder: str, noise: str, predict: str | None) -> None:
    if decoder not in get_args(Decoder):
        raise ValueError(f"decoder must be one of {get_args(Decoder)}, got {decoder!r}")
    if decoder != "guided" and noise != "full":
        raise ValueError(
            f"noise={noise!r} is of noisy posteriors, which a {decoder} decoder leaves untrained: leave it out, or "
            'write decoder="guided"'
        )
    if decoder == "gaussian" and predict == "noise":
        raise ValueError("predict='noise' is of denoising networks, a gaussian decoder predicts its mean: leave it out")


def _networks(
    layout: Layout, network: Any, size: dict[str, Any], features: int, noise: Noise, codes: tuple[str, int],
    denoiser_key: Array, trunk_key: Array,
) -> Networks:  # fmt: skip
    shape, (decoder, code) = layout.event_shape, codes
    condition: Any = {"condition": code} if decoder == "conditioned" else {}
    if isinstance(network, tuple):
        if len(network) != 2 or not all(map(callable, network)) or size:
            raise ValueError("a network of your own is a pair (denoiser network, encoder trunk), without size")
        return Networks(*network, " and ".join(type(part).__name__ for part in network))
    if network not in (None, *get_args(Network)):
        raise ValueError(f"network must be 'mlp', 'unet', 'hybrid', a pair of your own, or None, got {network!r}")
    widths, sees, odd = unet_size(shape), noise == "full", ""
    numbers = math.prod(shape)
    if network is None:
        large = "hybrid" if numbers <= TOLD else "unet"
        asked = len(shape) == 3 and not {"widths", "blocks", "patch"}.isdisjoint(size)
        network = large if asked or (numbers > SMALL and widths is not None) else "mlp"
        if network == "mlp" and len(shape) == 3 and numbers > SMALL:
            odd = f" (sides {shape[1]}×{shape[2]} do not halve as a U-Net needs: crop or resize the images for one)"
    if network in ("unet", "hybrid"):
        chosen: dict[str, Any] = {**(widths or {}), **size}
        image: Any = shape
        try:
            pair = (
                AscendingUNet(code, image, **chosen, key=denoiser_key)
                if decoder == "gaussian"
                else UNet(image, **chosen, **condition, key=denoiser_key),
                HalfUNet(image, (features,), **chosen, noise=sees, key=trunk_key)
                if network == "unet"
                else ResidualMLP(image, (features,), width=512, depth=3, noise=sees, key=trunk_key),
            )
        except TypeError as error:
            raise ValueError(
                f"size holds {', '.join(size)}, a U-Net takes widths, blocks and patch: {error}"
            ) from error
        kind = "U-Net" if network == "unet" else "U-Net, with a residual perceptron as encoder"
    else:
        chosen = {"width": 512 if numbers >= 64 else 256, "depth": 3, **size}
        try:
            pair = (
                ResidualMLP((code,), shape, **chosen, noise=False, key=denoiser_key)
                if decoder == "gaussian"
                else ResidualMLP(shape, shape, **chosen, **condition, key=denoiser_key),
                ResidualMLP(shape, (features,), **chosen, noise=sees, key=trunk_key),
            )
        except TypeError as error:
            raise ValueError(f"size holds {', '.join(size)}, a perceptron takes width and depth: {error}") from error
        kind = f"residual perceptron{odd}"
    settings = ", ".join(f"{name} {value}" for name, value in chosen.items())
    counts = [sum(leaf.size for leaf in jax.tree.leaves(part) if hasattr(leaf, "size")) for part in pair]
    return Networks(*pair, f"{kind}, {settings}; {counts[0]:,} and {counts[1]:,} parameters")


def unet_size(shape: tuple[int, ...]) -> dict[str, Any] | None:
    """Widths and patch of a U-Net whose bottom map is 4 to 12 pixels wide, or None where the sides do not halve so."""
    if len(shape) != 3 or shape[1] != shape[2]:
        return None
    for patch in (2, 1, 4):
        for widths in ((32, 64), (32, 64, 128), (32, 64, 128, 128)):
            unit = patch * 2 ** (len(widths) - 1)
            if shape[1] % unit == 0 and 4 <= shape[1] // unit <= 12:
                return {"widths": widths, "patch": patch}
    return None


def _spread(x: np.ndarray) -> float:
    """Standard deviation in 64 bits, a thousand observations at a time: there is no room for a copy of all in them."""
    mean = x.mean(dtype=np.float64)
    parts = (x[start : start + 1024] for start in range(0, len(x), 1024))
    return float(np.sqrt(sum(np.square(part - mean, dtype=np.float64).sum() for part in parts) / x.size))


def _silent(line: str) -> None:
    """Say nothing."""
