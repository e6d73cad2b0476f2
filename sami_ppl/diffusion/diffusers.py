"""Denoisers out of checkpoints of Hugging Face diffusers: a folder that `save_pretrained` wrote, read without PyTorch.

denoiser = sp.diffusion.from_diffusers("ddpm-clothes")                       # a pipeline, or a model, saved there
program = sp.autoencoder(prior, images, network=denoiser, key=a)
program, history = sp.fit(program, images, sp.EncoderOnly(), key=b)
"""

from collections.abc import Mapping
from dataclasses import asdict, fields
import math
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from sami_ppl._util.keys import check_key
from sami_ppl._util.tensors import TensorFileError, read_tensors
from sami_ppl.diffusion.denoiser import AbstractDenoiser
from sami_ppl.diffusion.folders import REPOSITORY, read_json, root_of, weights_of
from sami_ppl.diffusion.schedule import AbstractSchedule
from sami_ppl.diffusion.schedulers import SCHEDULERS, AbstractScheduler, scheduler_of
from sami_ppl.nn.convolution import GroupNorm
from sami_ppl.nn.diffusers.network import AbstractHalf, AbstractNetwork
from sami_ppl.nn.diffusers.transformer import DiT2D, HalfDiT2D
from sami_ppl.nn.diffusers.unet import UNet2D
from sami_ppl.nn.mlp import ResidualBlock
from sami_ppl.nn.transformer import TOLD, on_each

NETWORKS: tuple[type[AbstractNetwork], ...] = (UNet2D, DiT2D)
"""Networks that are supported."""
PARTS = ("unet", "transformer")
"""Where a pipeline has its network."""


class DiffusersDenoiser(AbstractDenoiser):
    """A trained network of diffusers as the noise prediction ε̂(x_λ, λ) of images (channels, h, w), by its scheduler.

    Raises ValueError for a range of log SNR that reaches beyond the one of its training.
    """

    network: AbstractNetwork
    scheduler: AbstractScheduler
    schedule: AbstractSchedule
    event_shape: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        network: AbstractNetwork,
        scheduler: AbstractScheduler,
        log_snr_min: float | None = None,
        log_snr_max: float | None = None,
    ):
        low, high = scheduler.ends
        log_snr_min = low if log_snr_min is None else float(log_snr_min)
        log_snr_max = high if log_snr_max is None else float(log_snr_max)
        if log_snr_min < low or log_snr_max > high:
            raise ValueError(
                f"the network was trained at log_snr from {low:.4g} to {high:.4g}, asked for is {log_snr_min:.4g} to "
                f"{log_snr_max:.4g}: give ends within"
            )
        self.network, self.scheduler = network, scheduler
        self.schedule = scheduler.schedule(log_snr_min, log_snr_max)
        self.event_shape = (network.settings.in_channels, *network.settings.sample_size)

    @property
    def statistics(self) -> tuple[float, float]:
        """Mean and standard deviation by which its input is scaled, hence the encoder's, whose features are its own."""
        return 0.0, self.scheduler.std

    def __call__(self, x_noisy: Float[Array, "c h w"], log_snr: Float[Array, ""]) -> Float[Array, "c h w"]:
        out = self.network(self._scale(log_snr) * x_noisy, self.scheduler.timestep(log_snr))
        return self.scheduler.noise(x_noisy, out, log_snr)

    def bottleneck(self, x_noisy: Float[Array, "c h w"], log_snr: Float[Array, ""]) -> Float[Array, "h2 w2 c2"] | None:
        if not isinstance(self.network, UNet2D):
            return None
        return self.network.features(self._scale(log_snr) * x_noisy, self.scheduler.timestep(log_snr))

    def _scale(self, log_snr: Float[Array, ""]) -> Float[Array, ""]:
        """By which the network's input has the variance that it was trained on."""
        alpha, sigma = self.schedule.alpha(log_snr), self.schedule.sigma(log_snr)
        return self.scheduler.factor(log_snr) / jnp.sqrt((alpha * self.scheduler.std) ** 2 + sigma**2)

    def trunk(self, features: int, *, key: Key[Array, ""]) -> "DiffusersTrunk":
        """The network of an encoder: the first half of its own, then `features` numbers by layers that begin anew."""
        check_key(key)
        return DiffusersTrunk(self.network.half, self.scheduler, features, key=key)

    @property
    def settings(self) -> dict[str, Any]:
        """All but the weights, in plain values, of which `from_settings` builds it again."""
        scheduler = {field.name: getattr(self.scheduler, field.name) for field in fields(self.scheduler)}
        ends = {"log_snr_min": self.schedule.log_snr_min, "log_snr_max": self.schedule.log_snr_max}
        return {
            "network": {"kind": self.network.kinds[0], **asdict(self.network.settings)},
            "scheduler": {"kind": type(self.scheduler).__name__, **scheduler},
            **ends,
        }

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> "DiffusersDenoiser":
        """A denoiser with places for its weights, `jax.ShapeDtypeStruct`s."""
        values, network = dict(settings["scheduler"]), dict(settings["network"])
        kind = values.pop("kind")
        scheduler = next(made for made in SCHEDULERS if made.__name__ == kind)(**_tuples(values))
        made = network_for(network.pop("kind", "UNet2DModel"))  # programs saved before there was another have no kind
        empty = made.empty(made.Settings(**_tuples(network)))
        return cls(empty, scheduler, settings["log_snr_min"], settings["log_snr_max"])


class DiffusersTrunk(eqx.Module):
    """The first half of a denoiser's network, then two layers that begin anew: image → feature vector.

    Of a U-Net it is the descending one. Tokens of a transformer are narrowed before they are flattened (`nn.ViT`).
    Called as (u, log_snr), u being the observation scaled to the variance that the denoiser takes it to have.
    """

    network: AbstractHalf
    norm: GroupNorm
    narrow: eqx.nn.Linear | None
    exit: eqx.nn.Linear
    block: ResidualBlock
    scheduler: AbstractScheduler

    def __init__(self, network: AbstractHalf, scheduler: AbstractScheduler, features: int, *, key: Key[Array, ""]):
        settings = network.settings
        x = jax.ShapeDtypeStruct((settings.in_channels, *settings.sample_size), jnp.float32)
        found = eqx.filter_eval_shape(network.features, x, jax.ShapeDtypeStruct((), jnp.float32))
        *places, width = found.shape
        self.network, self.scheduler, self.norm = network, scheduler, GroupNorm(width)
        exit_key, block_key = jax.random.split(key)
        narrow_key = jax.random.fold_in(key, 2)
        self.narrow = eqx.nn.Linear(width, TOLD, key=narrow_key) if isinstance(network, HalfDiT2D) else None
        self.exit = eqx.nn.Linear((TOLD if self.narrow else width) * math.prod(places), features, key=exit_key)
        self.block = ResidualBlock(features, None, key=block_key)

    def __call__(self, x: Float[Array, "c h w"], log_snr: Float[Array, ""] | None) -> Float[Array, " features"]:
        """Raises ValueError where no noise level is given."""
        if log_snr is None:
            raise ValueError("the network of a checkpoint depends on the noise level: write noise='full'")
        scaled = (self.scheduler.factor(log_snr) * x).astype(x.dtype)
        h = jax.nn.silu(self.norm(self.network.features(scaled, self.scheduler.timestep(log_snr))))
        h = h if self.narrow is None else on_each(self.narrow, h)
        return self.block(self.exit(h.reshape(-1)), None)


def from_diffusers(
    folder: str | Path,
    *,
    scheduler: str | Path | Mapping[str, Any] | None = None,
    log_snr_min: float | None = None,
    log_snr_max: float | None = None,
) -> DiffusersDenoiser:
    """The denoiser of a `UNet2DModel` or `DiTTransformer2DModel` that diffusers' `save_pretrained` wrote.

    PyTorch is not needed. It predicts what diffusers predicts at the same noise level, to rounding, in float32. Steps
    of DDPM and DDIM are interpolated linearly in λ, and the network is told a fraction of a step
    (`diffusion.schedulers`). Data are those of the checkpoint, as a rule images in [−1, 1], channels first, of its
    `sample_size`. A transformer that was trained on classes is told the one that stands for none.

    Args:
        folder: of a pipeline (`model_index.json`, `unet/` or `transformer/`, `scheduler/`) or of a model (`config.json`
            beside `diffusion_pytorch_model.safetensors` or `.bin`); or the name of a repository, such as
            "google/ddpm-cifar10-32", in the cache of Hugging Face. Nothing is downloaded, and nothing in it is run.
        scheduler: where a model's folder has none beside it, its `scheduler_config.json`, the folder of that, or its
            values.
        log_snr_min: least log signal-to-noise ratio of the schedule; default the checkpoint's.
        log_snr_max: the largest; default the checkpoint's.

    Returns:
        A fitted denoiser, whose schedule is `VariancePreserving` (DDPM, DDIM, flow matching) or `VarianceExploding`
        (EDM).

    Raises:
        FileNotFoundError: no such folder or repository, or one that lacks a file; with what to do.
        ValueError: a network or scheduler, or a setting of theirs, that is not supported, by its name; weights of
            another network.
        TensorFileError: weights that are damaged, or a file that asks for more than tensors.
    """
    root = root_of(folder)
    parts = [root / name for name in PARTS if (root / name / "config.json").is_file()]
    model = parts[0] if parts else root
    names = ", ".join(f"no {name}/config.json" for name in PARTS)
    config = read_json(model / "config.json", f"{root} holds no model of diffusers (no config.json, {names})")
    try:
        made = network_for(config.get("_class_name", "UNet2DModel"))
        settings, values = made.Settings.of(config), scheduler_of(_scheduler(root, model, scheduler))
        return DiffusersDenoiser(made.of(settings, read_tensors(weights_of(model))), values, log_snr_min, log_snr_max)
    except TensorFileError:
        raise
    except ValueError as error:
        raise ValueError(f"{root}: {error}") from error


def network_for(kind: str) -> type[AbstractNetwork]:
    """The network that is a class of diffusers. Raises ValueError for a class that is not supported."""
    found = next((made for made in NETWORKS if kind in made.kinds), None)
    if found is None:
        raise ValueError(f"the network is a {kind}, supported is {' or '.join(made.kinds[0] for made in NETWORKS)}")
    return found


def is_diffusers(folder: str | Path) -> bool:
    """Whether a folder is one that diffusers' `save_pretrained` wrote, or its name that of a repository."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        return REPOSITORY.fullmatch(str(folder)) is not None
    if (path / "program.json").is_file():
        return False
    return any(
        (path / name).is_file()
        for name in ("model_index.json", "config.json", *(f"{part}/config.json" for part in PARTS))
    )


def _scheduler(root: Path, model: Path, given: str | Path | Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The values of scheduler_config.json, given or beside the model."""
    if isinstance(given, Mapping):
        return given
    name = "scheduler_config.json"
    places = [root / "scheduler" / name, root / name, model.parent / "scheduler" / name]
    if given is not None:
        places = [Path(given), Path(given) / name]
    file = next((place for place in places if place.is_file()), places[0])
    return read_json(
        file,
        f"there is no {file}, which says what the network was trained on; write "
        'from_diffusers(folder, scheduler={"_class_name": "DDPMScheduler"}), with what differs from its defaults',
    )


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Lists, as JSON gives them, as the tuples that they were."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
