"""From a prior and data to a program: networks, sizes, statistics and encoder follow from the two.

Everything that is guessed is said in one line each, and everything can be given.
"""

from collections.abc import Callable, Mapping
import math
from typing import Any, Literal, cast, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key
import numpy as np
import xarray as xr

from sami_ppl._util.keys import check_key
from sami_ppl.data.checks import as_array, as_floats, check_spread, check_variable, prior_variables
from sami_ppl.data.layout import Layout, arranged, layout_of
from sami_ppl.data.splitting import training_part
from sami_ppl.data.stream import Source, Stream, at_hand
from sami_ppl.decoders.conditional import ConditionedDenoiser, IsotropicDenoiser
from sami_ppl.decoders.twisted import TwistedSampler
from sami_ppl.diffusion.denoiser import AbstractDenoiser, PreconditionedDenoiser
from sami_ppl.diffusion.sampler import AbstractSampler
from sami_ppl.diffusion.schedule import AbstractSchedule, VariancePreserving
from sami_ppl.encoders.encoder import Noise, encoder_for
from sami_ppl.nn import AscendingUNet, DiT, HalfUNet, ResidualMLP, UNet
from sami_ppl.nn.masked import Masked, unmasked
from sami_ppl.nn.unet import bottom_sides, sides_of
from sami_ppl.priors.read import Given, Prior, prior_arguments, read_prior
from sami_ppl.program.exchange import FEATURES, Networks, brought, check_brought
from sami_ppl.program.guide import GlobalGuide
from sami_ppl.program.program import Program
from sami_ppl.program.transformers import transformers

SMALL = 400
"""Numbers of an observation up to which a perceptron takes images too."""
TOLD = 1000
"""The same for the encoder alone, beside a U-Net: guidance differentiates the encoder twice, so that one of perceptrons
takes twice as many 28×28 images in the same seconds at least, and tells more after them (docs/panel.md)."""
MOST_GIVEN = 4096
"""Observations whose variables a prior p(z | u) is read from, at most."""

Network = Literal["mlp", "unet", "hybrid", "dit"]
Decoder = Literal["guided", "conditioned", "gaussian"]


def autoencoder(
    prior: Prior,
    data: xr.Dataset | Array | np.ndarray | Source,
    *,
    decoder: Decoder = "guided",
    network: Network | AbstractDenoiser | tuple[Callable, Callable] | None = None,
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
            that the prior takes. Images may have their channels first or last, or none where they are grey, and any
            sides; signals (channel, length) and volumes (channel, depth, row, column) are told by a first dim of the
            name channel, or by `network="unet"`. Values may be missing, NaN: they count nothing in networks, bound and
            statistics, and entries that no observation has are NaN in samples. Or a source or stream of them
            (`data.Stream`), of which 10,000 are looked at. 8-bit images are scaled from 0 … 255 to
            [−1, 1]; floating-point observations should have about unit scale.
        decoder: the likelihood p(x | z): "guided", a denoiser guided by the encoder's gradient; "conditioned", a
            denoiser whose blocks z modulates; "gaussian", N(m(z), s² I) with a network for the mean and one learned s,
            a variational autoencoder's.
        network: "mlp", a residual perceptron, for vectors and small images; "unet", a U-Net with half a U-Net as
            encoder, for larger ones, and for signals and volumes (vectors are then signals of one channel); "hybrid", a
            U-Net with a perceptron as encoder, for those between; "dit", a transformer of patches for each, for images;
            or your own pair (denoiser network, encoder trunk), called as (x, log_snr); the first gives the shape of x,
            the second a vector of features. That of a conditioned decoder is called as (x, log_snr, z) too, of a
            Gaussian one as (z, None). Or a fitted denoiser (`diffusion.from_diffusers`), of which the encoder takes the
            features, the schedule and the scale of the data; `EncoderOnly` fits the rest. Default: by the shape of the
            data, never a transformer.
        size: arguments of these networks, such as {"width": 256, "depth": 4} or {"widths": (32, 64), "patch": 2}; of a
            hybrid those of the U-Net, of transformers width, depth, heads and patch.
        features: length of the vector of features on which the encoder's last layers stand.
        families: site name → family of posteriors, as for `encoder_for`.
        given: values of the variables that the prior takes, as for `Program`; default those of the data.
        mean: mean that the networks take the observations to have; default that of the data.
        std: the same of their standard deviation.
        noise: what of the encoder may depend on the noise level, see `NetworkEncoder`; of guided decoders only.
        min_scale: least posterior standard deviation, in units of the prior's spread.
        schedule: noise levels; default `VariancePreserving()`.
        predict: what the denoiser's network puts out, see `PreconditionedDenoiser`; default "data" of a perceptron,
            "noise" of a U-Net, a transformer and of conditioned decoders, which learn what the code is for only where
            errors at the clean end do not drown it. A Gaussian decoder predicts nothing but its mean.
        sampler: of reverse diffusion; default `TwistedSampler()` of guided perceptrons, of which four particles cost
            little, else as for `Program`.
        global_guide: guide of global sites, as for `Program`.
        progress: print what is guessed.
        key: random key of the initial weights.

    Returns:
        A program with fresh networks.

    Raises:
        TypeError: observations that are no numbers, a prior that is no function.
        ValueError: fewer than two observations, none that differ, values that are not finite or far from unit scale,
            integers that are no pixels, a `size` that the networks do not take, another word for the decoder, settings
            that it does not have; a denoiser of observations of another shape, or with settings that it brings itself;
            and what `read_prior` and `Program` raise.
    """
    check_key(key)
    _check_decoder(decoder, noise, predict)
    if isinstance(network, AbstractDenoiser):
        settings = {"size": size, "mean": mean, "std": std, "schedule": schedule, "predict": predict}
        check_brought(decoder, noise, [name for name, value in settings.items() if value is not None])
    say = print if progress else _silent
    whole = as_data(data)
    data = at_hand(whole)
    part = training_part(data)
    x, layout = _observations(part, convolved=isinstance(network, str) and network in ("unet", "hybrid"))
    given = _given(prior, part) if given is None else given
    latents = read_prior(prior, given)
    raw = part["x"] if isinstance(part, xr.Dataset) else part
    notes = [note for note in (layout.change, _scaling(np.dtype(raw.dtype))) if note]
    shape = layout.event_shape
    sides = " × ".join(f"{dim} {length}" for dim, length in zip(layout.event_dims, shape, strict=True))
    looked_at = "" if data is whole else f", of which {len(x):,} are looked at"
    count = len(x) if data is whole else len(training_part(whole))
    say("; ".join([f"data: {count:,} observations{looked_at}, {sides}", *notes]))
    if isinstance(network, AbstractDenoiser) and network.statistics is not None:
        mean, std = network.statistics
    known = ~np.isnan(x) if _misses(cast(Any, data)) else None
    seen = None if known is None else jnp.asarray(known.any(0))
    if known is not None:
        if isinstance(network, AbstractDenoiser):
            raise ValueError("values are missing (NaN), of which the denoiser given knows nothing: fill them first")
        say(f"{1 - known.mean():.1%} of the values are missing (NaN): networks are told which, they count nothing")
    statistics: dict[str, Any] = {
        "mean": _mean(x, known) if mean is None else mean,
        "std": _spread(x, known) if std is None else std,
    }
    say(f"mean {statistics['mean']:.3g}, standard deviation {statistics['std']:.3g}")
    say(f"prior: {', '.join(site.name for site in latents.sites)}; code of {latents.size} numbers")

    denoiser_key, trunk_key, encoder_key = jax.random.split(key, 3)
    codes = (decoder, latents.size)
    if isinstance(network, AbstractDenoiser):
        made, schedule = brought(network, shape, features, trunk_key), network.schedule
    else:
        missing = seen is not None
        made = _networks(layout, network, dict(size or {}), features, noise, codes, denoiser_key, trunk_key, missing)
        schedule = VariancePreserving() if schedule is None else schedule
    say(f"networks: {made.description}")
    if predict is None:
        predict = "noise" if isinstance(unmasked(made.denoiser), UNet | DiT) or decoder == "conditioned" else "data"
    denoiser: AbstractDenoiser
    own: dict[str, Any] = {**statistics, "seen": seen}
    if isinstance(network, AbstractDenoiser):
        denoiser = network
    elif decoder == "gaussian":
        denoiser = IsotropicDenoiser(made.denoiser, schedule, shape, latents.size, **own)
    elif decoder == "conditioned":
        denoiser = ConditionedDenoiser(made.denoiser, schedule, shape, latents.size, **own, predict=predict)
    else:
        denoiser = PreconditionedDenoiser(made.denoiser, schedule, shape, **own, predict=predict)
    if sampler is None and decoder == "guided" and isinstance(unmasked(made.denoiser), ResidualMLP):
        sampler = TwistedSampler()
    return Program(
        prior,
        denoiser,
        encoder_for(
            prior, made.trunk, schedule, shape,
            families=families, given=given, noise=noise, min_scale=min_scale, **statistics, key=encoder_key,
        ),
        sampler=sampler, given=given, event_dims=layout.event_dims, global_guide=global_guide,
    )  # fmt: skip


def as_data(data: Any) -> xr.Dataset | np.ndarray | Stream:
    """Observations as an array, a Dataset or, of a source, a stream.

    Raises TypeError for what is neither and for observations that are no numbers, ValueError for arrays of unequal
    shapes and for arrays without a dim of observations.
    """
    if isinstance(data, Stream):
        return data
    if isinstance(data, Source):
        return Stream(data)
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


def _observations(part: xr.Dataset | np.ndarray, *, convolved: bool) -> tuple[np.ndarray, Layout]:
    """Observations as floats, and the layout a program should have for them; `convolved`: vectors are signals."""
    named = isinstance(part, xr.Dataset)
    layout = layout_of(part)
    if convolved:
        layout = layout.with_channel
    raw = as_array(part["x"].values if named else part)
    if len(raw) < 2:
        raise ValueError(
            f"data hold {len(raw)} observation{'s' * (len(raw) != 1)}, of which nothing can be learned: give an array "
            "(obs, *event) of many; a single one is encoded by a fitted program, program.posterior(x[None])"
        )
    x = arranged(raw, part["x"].dims[1:] if named else None, layout.event_shape, layout.event_dims)
    x = as_floats(x, missing="entries")
    check_spread(x)
    return x, layout


def _misses(data: xr.Dataset | np.ndarray) -> bool:
    """Whether something is missing in any observation, of the part for testing too."""
    x = data["x"].values if isinstance(data, xr.Dataset) else data
    return x.dtype.kind == "f" and bool(np.isnan(x).any())


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
    denoiser_key: Array, trunk_key: Array, missing: bool,
) -> Networks:  # fmt: skip
    shape, (decoder, code) = layout.event_shape, codes
    condition: Any = {"condition": code} if decoder == "conditioned" else {}

    def wrapped(denoiser: Callable, trunk: Callable, description: str, told: bool) -> Networks:
        if missing:
            trunk = Masked(trunk, told=told)
            denoiser = denoiser if decoder == "gaussian" else Masked(denoiser, told=told)
        return Networks(denoiser, trunk, description)

    if isinstance(network, tuple):
        if len(network) != 2 or not all(map(callable, network)) or size:
            raise ValueError("a network of your own is a pair (denoiser network, encoder trunk), without size")
        return wrapped(*network, " and ".join(type(part).__name__ for part in network), told=False)
    if network not in (None, *get_args(Network)):
        raise ValueError(f"network must be one of {get_args(Network)}, a pair of your own, or None, got {network!r}")
    sees, numbers = noise == "full", math.prod(shape)
    channels, *sides = shape
    inner = (2 * channels, *sides) if missing else shape  # the others say what is seen
    if network is None:
        large = "hybrid" if numbers <= TOLD else "unet"
        asked = len(shape) > 1 and not {"widths", "blocks", "patch"}.isdisjoint(size)
        network = large if asked or (numbers > SMALL and layout.has_sides) else "mlp"
    if network in ("unet", "hybrid"):
        chosen: dict[str, Any] = {**unet_size(shape), **size}
        try:
            pair = (
                AscendingUNet(code, shape, **chosen, key=denoiser_key)
                if decoder == "gaussian"
                else UNet(inner, **chosen, **condition, out_channels=channels, key=denoiser_key),
                HalfUNet(inner, (features,), **chosen, noise=sees, key=trunk_key)
                if network == "unet"
                else ResidualMLP(inner, (features,), width=512, depth=3, noise=sees, key=trunk_key),
            )
        except TypeError as error:
            raise ValueError(
                f"size holds {', '.join(size)}, a U-Net takes widths, blocks and patch: {error}"
            ) from error
        kind = "U-Net" if network == "unet" else "U-Net, with a residual perceptron as encoder"
    elif network == "dit":
        keys = (denoiser_key, trunk_key)
        pair, chosen = transformers(shape, inner, size, features, decoder=decoder, code=code, sees=sees, keys=keys)
        kind = "transformer"
    else:
        chosen = {"width": 512 if numbers >= 64 else 256, "depth": 3, **size}
        try:
            pair = (
                ResidualMLP((code,), shape, **chosen, noise=False, key=denoiser_key)
                if decoder == "gaussian"
                else ResidualMLP(inner, shape, **chosen, **condition, key=denoiser_key),
                ResidualMLP(inner, (features,), **chosen, noise=sees, key=trunk_key),
            )
        except TypeError as error:
            raise ValueError(f"size holds {', '.join(size)}, a perceptron takes width and depth: {error}") from error
        kind = "residual perceptron"
    settings = ", ".join(f"{name} {value}" for name, value in chosen.items())
    counts = [sum(leaf.size for leaf in jax.tree.leaves(part) if hasattr(leaf, "size")) for part in pair]
    return wrapped(*pair, f"{kind}, {settings}; {counts[0]:,} and {counts[1]:,} parameters", told=True)


def unet_size(shape: tuple[int, ...]) -> dict[str, Any]:
    """Widths and patch of a U-Net for observations (channels, *sides): the bottom map should be 4 to 12 places wide.

    Of those of which it is, the one that adds least to sides that do not halve; of sides that none brings there, the
    one that comes nearest. Raises ValueError for observations without sides.
    """
    sides, dims = shape[1:], sides_of(shape)

    def fit(patch: int, widths: tuple[int, ...]) -> tuple[float, float]:
        bottom = bottom_sides(sides, patch, len(widths))
        unit, places = patch * 2 ** (len(widths) - 1), math.prod(bottom)
        away = max(math.log(4**dims / places), math.log(places / 12**dims), 0.0)
        return away, places * unit**dims / math.prod(sides)

    choices = [(patch, widths) for patch in (2, 1, 4) for widths in ((32, 64), (32, 64, 128), (32, 64, 128, 128))]
    patch, widths = min(choices, key=lambda choice: fit(*choice))
    return {"widths": widths, "patch": patch}


def _mean(x: np.ndarray, known: np.ndarray | None) -> float:
    """Mean in 64 bits of the `known` values, or of all."""
    return float(x.mean(dtype=np.float64) if known is None else x.mean(dtype=np.float64, where=known))


def _spread(x: np.ndarray, known: np.ndarray | None) -> float:
    """Standard deviation in 64 bits, a thousand observations at a time: there is no room for a copy of all in them."""
    mean, count, squares = _mean(x, known), 0, 0.0
    for start in range(0, len(x), 1024):
        part = x[start : start + 1024]
        count += np.count_nonzero(~np.isnan(part))
        squares += np.nansum(np.square(part - mean, dtype=np.float64))
    return float(np.sqrt(squares / count))


def _silent(line: str) -> None:
    """Say nothing."""
