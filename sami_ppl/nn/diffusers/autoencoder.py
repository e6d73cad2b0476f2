"""The `AutoencoderKL` of Hugging Face diffusers, with the weights of a checkpoint: images to latents and back.

The autoencoder of latent diffusion (Rombach et al. 2022, *High-Resolution Image Synthesis with Latent Diffusion
Models*), of the blocks of a U-Net without a time step.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float, Key
import numpy as np

from sami_ppl._util.keys import check_key
from sami_ppl.nn.convolution import Conv, GroupNorm
from sami_ppl.nn.diffusers.blocks import DownBlock, MidBlock, Resample, ResnetBlock
from sami_ppl.nn.diffusers.settings import supported
from sami_ppl.nn.diffusers.unet import renamed
from sami_ppl.nn.diffusers.weights import with_weights
from sami_ppl.nn.transformer import on_each

KIND = "AutoencoderKL"
# Settings that change nothing of a trained network as it is used here.
IDLE = {"force_upcast", "sample_size"}


@dataclass(frozen=True)
class AutoencoderKLSettings:
    """Settings of an `AutoencoderKL`, with the names, meanings and defaults of diffusers, and what its blocks take."""

    in_channels: int = 3
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    # What the blocks of a U-Net are told, which an autoencoder's do not vary.
    norm_eps = 1e-6
    embedding = None
    downsample_padding = 0
    downsample_type = "conv"
    attention_head_dim = None
    attn_norm_num_groups = None
    mid_block_scale_factor = 1.0
    resnet_time_scale_shift = "default"

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "AutoencoderKLSettings":
        """The settings of a `config.json`. Raises ValueError, with its name, for what is not supported."""
        if (kind := config.get("_class_name", KIND)) != KIND:
            raise ValueError(f"the autoencoder is a {kind}, supported is {KIND}")
        levels = len(config.get("block_out_channels", cls.block_out_channels))
        fixed = {
            "out_channels": (config.get("in_channels", cls.in_channels),), "act_fn": ("silu", "swish"),
            "down_block_types": (["DownEncoderBlock2D"] * levels,), "up_block_types": (["UpDecoderBlock2D"] * levels,),
            "latents_mean": (None,), "latents_std": (None,),
        }  # fmt: skip
        return cls(**supported(cls, config, fixed, IDLE))

    @property
    def down_block_types(self) -> tuple[str, ...]:
        """Those of the blocks that descend, as a U-Net names them."""
        return ("DownBlock2D",) * len(self.block_out_channels)

    @property
    def add_attention(self) -> bool:
        """Whether there is attention in the middle."""
        return self.mid_block_add_attention

    @property
    def unit(self) -> int:
        """Pixels along a side for each place of the latent."""
        return 2 ** (len(self.block_out_channels) - 1)


class Encoder(eqx.Module):
    """An image, channels last, to mean and log variance of its latent."""

    conv_in: Conv
    down_blocks: list[DownBlock]
    mid_block: MidBlock
    conv_norm_out: GroupNorm
    conv_out: Conv

    def __init__(self, settings: AutoencoderKLSettings, *, key: Key[Array, ""]):
        widths = settings.block_out_channels
        in_key, mid_key, out_key, *keys = jax.random.split(key, 3 + len(widths))
        self.conv_in = Conv(settings.in_channels, widths[0], key=in_key)
        self.down_blocks = [DownBlock(settings, level, key=k) for level, k in enumerate(keys)]
        self.mid_block = MidBlock(settings, key=mid_key)
        self.conv_norm_out = GroupNorm(widths[-1], settings.norm_num_groups, settings.norm_eps)
        self.conv_out = Conv(widths[-1], 2 * settings.latent_channels, key=out_key)

    def __call__(self, x: Float[Array, "h w c"]) -> Float[Array, "h2 w2 c2"]:
        h = self.conv_in(x)
        for block in self.down_blocks:
            h = block(h, None)[-1]
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(h, None))))


class UpDecoderBlock(eqx.Module):
    """Residual blocks, then twice the resolution, but for the last block."""

    resnets: list[ResnetBlock]
    upsamplers: list[Resample]

    def __init__(self, settings: AutoencoderKLSettings, level: int, *, key: Key[Array, ""]):
        widths = tuple(reversed(settings.block_out_channels))
        before, width, count = widths[max(level - 1, 0)], widths[level], settings.layers_per_block + 1
        last_key, *keys = jax.random.split(key, 1 + count)
        self.resnets = [ResnetBlock(settings, width if i else before, width, key=k) for i, k in enumerate(keys)]
        self.upsamplers = [Resample(Conv(width, width, key=last_key))] if level < len(widths) - 1 else []

    def __call__(self, h: Float[Array, "h w c"]) -> Float[Array, "h2 w2 c2"]:
        for block in [*self.resnets, *self.upsamplers]:
            h = block(h, None)
        return h


class Decoder(eqx.Module):
    """A latent, channels last, to an image."""

    conv_in: Conv
    mid_block: MidBlock
    up_blocks: list[UpDecoderBlock]
    conv_norm_out: GroupNorm
    conv_out: Conv

    def __init__(self, settings: AutoencoderKLSettings, *, key: Key[Array, ""]):
        widths = settings.block_out_channels
        in_key, mid_key, out_key, *keys = jax.random.split(key, 3 + len(widths))
        self.conv_in = Conv(settings.latent_channels, widths[-1], key=in_key)
        self.mid_block = MidBlock(settings, key=mid_key)
        self.up_blocks = [UpDecoderBlock(settings, level, key=k) for level, k in enumerate(keys)]
        self.conv_norm_out = GroupNorm(widths[0], settings.norm_num_groups, settings.norm_eps)
        self.conv_out = Conv(widths[0], settings.in_channels, key=out_key)

    def __call__(self, latent: Float[Array, "h w c"]) -> Float[Array, "h2 w2 c2"]:
        h = self.mid_block(self.conv_in(latent), None)
        for block in self.up_blocks:
            h = block(h)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(h)))


class AutoencoderKL(eqx.Module):
    """An `AutoencoderKL`: an image (channels, h, w) to its latent (channels, h/f, w/f) and back.

    Latents are shifted and scaled as latent diffusion has them, (mean − `shift_factor`) · `scaling_factor`, so that
    over its training images they have a variance of about 1.
    """

    encoder: Encoder
    decoder: Decoder
    quant_conv: eqx.nn.Linear | None
    post_quant_conv: eqx.nn.Linear | None
    settings: AutoencoderKLSettings = eqx.field(static=True)

    def __init__(self, settings: AutoencoderKLSettings, *, key: Key[Array, ""]):
        check_key(key)
        keys, channels = jax.random.split(key, 4), settings.latent_channels
        self.encoder, self.decoder = Encoder(settings, key=keys[0]), Decoder(settings, key=keys[1])
        both, one = (
            eqx.nn.Linear(2 * channels, 2 * channels, key=keys[2]),
            eqx.nn.Linear(channels, channels, key=keys[3]),
        )
        self.quant_conv = both if settings.use_quant_conv else None
        self.post_quant_conv = one if settings.use_post_quant_conv else None
        self.settings = settings

    @classmethod
    def of(cls, settings: AutoencoderKLSettings, weights: Mapping[str, np.ndarray]) -> "AutoencoderKL":
        """The autoencoder with the weights of a checkpoint. Raises what `with_weights` raises."""
        empty = eqx.filter_eval_shape(cls, settings, key=jax.random.key(0))
        return with_weights(empty, {renamed(name): array for name, array in weights.items()})

    def encode(self, x: Float[Array, "c h w"]) -> Float[Array, "c2 h2 w2"]:
        """The mean of the latent of one image. Raises ValueError for an image that does not fit."""
        channels, unit = self.settings.in_channels, self.settings.unit
        if x.ndim != 3 or x.shape[0] != channels or any(side % unit for side in x.shape[1:]):
            raise ValueError(
                f"the autoencoder takes images ({channels}, h, w) of sides that {unit} divides, got {x.shape}: "
                + ("pad or resize them" if x.ndim == 3 else "of several, to_latents(autoencoder, images)")
            )
        moments = self.encoder(x.transpose(1, 2, 0))
        moments = moments if self.quant_conv is None else on_each(self.quant_conv, moments)
        mean = moments[..., : self.settings.latent_channels].transpose(2, 0, 1)
        return (mean - (self.settings.shift_factor or 0.0)) * self.settings.scaling_factor

    def decode(self, latent: Float[Array, "c2 h2 w2"]) -> Float[Array, "c h w"]:
        """The image of one latent. Raises ValueError for a latent of another number of channels."""
        channels = self.settings.latent_channels
        if latent.ndim != 3 or latent.shape[0] != channels:
            raise ValueError(
                f"the autoencoder takes latents ({channels}, h, w), got {latent.shape}: of several, "
                "to_images(autoencoder, latents)"
            )
        h = (latent / self.settings.scaling_factor + (self.settings.shift_factor or 0.0)).transpose(1, 2, 0)
        h = h if self.post_quant_conv is None else on_each(self.post_quant_conv, h)
        return self.decoder(h).transpose(2, 0, 1)
