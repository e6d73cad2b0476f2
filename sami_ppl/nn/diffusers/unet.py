"""The `UNet2DModel` of Hugging Face diffusers, and its descending half, with the weights of a checkpoint."""

from collections.abc import Mapping
from typing import Any, ClassVar

import equinox as eqx
import jax
from jaxtyping import Array, Float, Key
import numpy as np

from sami_ppl._util.keys import check_key
from sami_ppl.nn.convolution import Conv, GroupNorm
from sami_ppl.nn.diffusers.blocks import DownBlock, MidBlock, TimeEmbedding, UpBlock
from sami_ppl.nn.diffusers.network import AbstractHalf, AbstractNetwork
from sami_ppl.nn.diffusers.settings import UNet2DSettings


class HalfUNet2D(AbstractHalf):
    """The descending half of a `UNet2DModel` with its middle: the bottom map of an image at a time step."""

    conv_in: Conv
    time_embedding: TimeEmbedding
    down_blocks: list[DownBlock]
    mid_block: MidBlock | None
    settings: UNet2DSettings = eqx.field(static=True)

    def __init__(self, settings: UNet2DSettings, *, key: Key[Array, ""]):
        check_key(key)
        in_key, time_key, mid_key, *keys = jax.random.split(key, 3 + len(settings.block_out_channels))
        self.conv_in = Conv(settings.in_channels, settings.block_out_channels[0], key=in_key)
        self.time_embedding = TimeEmbedding(
            settings.block_out_channels[0],
            settings.embedding,
            flip=settings.flip_sin_to_cos,
            shift=settings.freq_shift,
            key=time_key,
        )
        self.down_blocks = [DownBlock(settings, level, key=k) for level, k in enumerate(keys)]
        self.mid_block = None if settings.mid_block_type is None else MidBlock(settings, key=mid_key)
        self.settings = settings

    def features(self, x: Float[Array, "c h w"], timestep: Float[Array, ""]) -> Float[Array, "h2 w2 c2"]:
        return self.descend(x, timestep)[0]

    def descend(
        self, x: Float[Array, "c h w"], timestep: Float[Array, ""]
    ) -> tuple[Float[Array, "h2 w2 c2"], list[Array], Float[Array, " e"]]:
        """The bottom map, the maps on the way to it, and the embedding of the time step."""
        embedding = self.time_embedding(timestep)
        maps = [self.conv_in((2 * x - 1 if self.settings.center_input_sample else x).transpose(1, 2, 0))]
        for block in self.down_blocks:
            maps += block(maps[-1], embedding)
        h = maps[-1] if self.mid_block is None else self.mid_block(maps[-1], embedding)
        return h, maps, embedding


class UNet2D(HalfUNet2D, AbstractNetwork):
    """A `UNet2DModel`, from an image (channels, h, w) and a time step to an image of the same shape."""

    kinds: ClassVar[tuple[str, ...]] = ("UNet2DModel",)
    Settings: ClassVar[Any] = UNet2DSettings
    Half: ClassVar[Any] = HalfUNet2D
    up_blocks: list[UpBlock]
    conv_norm_out: GroupNorm
    conv_out: Conv

    def __init__(self, settings: UNet2DSettings, *, key: Key[Array, ""]):
        super().__init__(settings, key=key)
        out_key, *keys = jax.random.split(jax.random.fold_in(key, 1), 1 + len(settings.block_out_channels))
        width = settings.block_out_channels[0]
        self.up_blocks = [UpBlock(settings, level, key=k) for level, k in enumerate(keys)]
        self.conv_norm_out = GroupNorm(width, settings.norm_num_groups, settings.norm_eps)
        self.conv_out = Conv(width, settings.in_channels, key=out_key)

    def __call__(self, x: Float[Array, "c h w"], timestep: Float[Array, ""]) -> Float[Array, "c h w"]:
        h, maps, embedding = self.descend(x, timestep)
        for block in self.up_blocks:
            count = len(block.resnets)
            h, maps = block(h, maps[-count:], embedding), maps[:-count]
        return self.conv_out(jax.nn.silu(self.conv_norm_out(h))).transpose(2, 0, 1)

    @staticmethod
    def as_here(settings: UNet2DSettings, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {renamed(name): array for name, array in weights.items()}


# Names of attention in checkpoints of older versions.
OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def renamed(name: str) -> str:
    """The name of a weight in the versions of today."""
    parts = name.split(".")
    return ".".join(OLD.get(part, part) if "attentions" in parts else part for part in parts)
