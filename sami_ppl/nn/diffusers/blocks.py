"""The blocks of a `UNet2DModel`: residual blocks and attention, by which the U-Net of diffusers descends and rises.

Modules and parameters have the names that they have in a checkpoint (`down_blocks.0.resnets.0.conv1.weight`), so that
weights find their places. Feature maps are channels-last, as in `nn.convolution`, of which they come too. Dropout
is that of a trained network: none.
"""

from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpy as np

from sami_ppl.nn.convolution import Conv, GroupNorm, pool, upsample
from sami_ppl.nn.diffusers.settings import DOWN, UP, BlockSettings, UNet2DSettings
from sami_ppl.nn.embed import AbstractBlock, AbstractEmbedding
from sami_ppl.nn.transformer import on_each


class TimeEmbedding(AbstractEmbedding):
    """Time step → feature vector: sines and cosines, then two dense layers."""

    linear_1: eqx.nn.Linear
    linear_2: eqx.nn.Linear
    flip: bool = eqx.field(static=True)
    shift: float = eqx.field(static=True)

    def __init__(self, waves: int, size: int, *, flip: bool, shift: float, key: Key[Array, ""]):
        key1, key2 = jax.random.split(key)
        self.linear_1 = eqx.nn.Linear(waves, size, key=key1)
        self.linear_2 = eqx.nn.Linear(size, size, key=key2)
        self.flip, self.shift = flip, shift

    def __call__(self, timestep: Float[Array, ""]) -> Float[Array, " e"]:
        size = int(self.linear_1.in_features)
        half = size // 2
        frequencies = np.exp(-np.log(10000.0) * np.arange(half) / (half - self.shift)).astype(np.float32)
        phase = timestep * jnp.asarray(frequencies)
        parts = [jnp.sin(phase), jnp.cos(phase)]
        features = jnp.concatenate([*(reversed(parts) if self.flip else parts), jnp.zeros(size % 2)])
        return self.linear_2(jax.nn.silu(self.linear_1(features)))


class ResnetBlock(AbstractBlock):
    """Two 3×3 convolutions around a skip; between them the embedding is added, or scales and shifts the channels.

    An autoencoder's have no embedding. `resample`: "up" or "down" by two at its beginning, or None.
    """

    norm1: GroupNorm
    conv1: Conv
    time_emb_proj: eqx.nn.Linear | None
    norm2: GroupNorm
    conv2: Conv
    conv_shortcut: eqx.nn.Linear | None
    resample: Literal["up", "down"] | None = eqx.field(static=True)
    scale_shift: bool = eqx.field(static=True)
    divisor: float = eqx.field(static=True)

    def __init__(
        self,
        settings: BlockSettings,
        c_in: int,
        c_out: int,
        resample: Literal["up", "down"] | None = None,
        divisor: float = 1.0,
        *,
        key: Key[Array, ""],
    ):
        keys = jax.random.split(key, 4)
        norm = {"groups": settings.norm_num_groups, "eps": settings.norm_eps}
        self.scale_shift, self.resample = settings.resnet_time_scale_shift == "scale_shift", resample
        self.divisor = divisor
        self.norm1, self.norm2 = GroupNorm(c_in, **norm), GroupNorm(c_out, **norm)
        self.conv1, self.conv2 = Conv(c_in, c_out, key=keys[0]), Conv(c_out, c_out, key=keys[1])
        told, size = c_out * (1 + self.scale_shift), settings.embedding
        self.time_emb_proj = None if size is None else eqx.nn.Linear(size, told, key=keys[2])
        self.conv_shortcut = None if c_in == c_out else eqx.nn.Linear(c_in, c_out, key=keys[3])

    def __call__(self, h: Float[Array, "h w c"], embedding: Float[Array, " e"] | None) -> Float[Array, "h2 w2 c2"]:
        inner = jax.nn.silu(self.norm1(h))
        if self.resample is not None:
            resample = upsample if self.resample == "up" else pool
            h, inner = resample(h), resample(inner)
        inner = self.conv1(inner)
        shift = jnp.zeros(())
        if self.time_emb_proj is not None:
            assert embedding is not None, "a block of a U-Net is told the time step"
            shift = self.time_emb_proj(jax.nn.silu(embedding))
        if self.scale_shift:
            gain, shift = jnp.split(shift, 2)
            inner = (1 + gain) * self.norm2(inner) + shift
        else:
            inner = self.norm2(inner + shift)
        skip = h if self.conv_shortcut is None else on_each(self.conv_shortcut, h)
        return (skip + self.conv2(jax.nn.silu(inner))) / self.divisor


class TokenAttention(eqx.Module):
    """Self-attention between all tokens, in heads of `size` numbers: (tokens, channels) → the same.

    `bias`: whether queries, keys and values have one.
    """

    to_q: eqx.nn.Linear
    to_k: eqx.nn.Linear
    to_v: eqx.nn.Linear
    to_out: list[eqx.nn.Linear]
    heads: int = eqx.field(static=True)

    def __init__(self, channels: int, heads: int, size: int, bias: bool = True, *, key: Key[Array, ""]):
        keys = jax.random.split(key, 4)
        self.heads, inner = heads, heads * size
        self.to_q, self.to_k, self.to_v = (eqx.nn.Linear(channels, inner, bias, key=k) for k in keys[:3])
        self.to_out = [eqx.nn.Linear(inner, channels, key=keys[3])]

    def attend(self, tokens: Float[Array, "tokens c"]) -> Float[Array, "tokens c"]:
        q, k, v = (
            on_each(part, tokens).reshape(len(tokens), self.heads, -1) for part in (self.to_q, self.to_k, self.to_v)
        )
        weights = jax.nn.softmax(jnp.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5, axis=-1)
        return on_each(self.to_out[0], jnp.einsum("hqk,khd->qhd", weights, v).reshape(len(tokens), -1))


class Attention(TokenAttention, AbstractBlock):
    """Self-attention between all pixels, around a skip."""

    group_norm: GroupNorm | None
    divisor: float = eqx.field(static=True)

    def __init__(
        self,
        settings: BlockSettings,
        channels: int,
        groups: int | None,
        divisor: float = 1.0,
        *,
        key: Key[Array, ""],
    ):
        size = settings.attention_head_dim or channels
        super().__init__(channels, channels // size, size, key=key)
        self.divisor = divisor
        self.group_norm = None if groups is None else GroupNorm(channels, groups, settings.norm_eps)

    def __call__(self, h: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
        normed = h if self.group_norm is None else self.group_norm(h)
        return (h + self.attend(normed.reshape(-1, h.shape[-1])).reshape(h.shape)) / self.divisor


class StridedConv(eqx.Module):
    """3×3 convolution of every other pixel: (h, w, c) → (h/2, w/2, c), written as a matrix product.

    `padding`: 1, on all sides, or 0, with one row and column at the end.
    """

    weight: Float[Array, "c9 c"]
    bias: Float[Array, " c"]
    padding: int = eqx.field(static=True)

    def __init__(self, channels: int, padding: int, *, key: Key[Array, ""]):
        same = Conv(channels, channels, key=key)
        self.weight, self.bias, self.padding = same.weight, same.bias, padding

    def __call__(self, h: Float[Array, "h w c"]) -> Float[Array, "h2 w2 c"]:
        height, width, _ = h.shape
        padded = jnp.pad(h, ((self.padding, 1), (self.padding, 1), (0, 0)))
        neighbours = [padded[i : i + height : 2, j : j + width : 2] for i in range(3) for j in range(3)]
        return jnp.concatenate(neighbours, axis=-1) @ self.weight + self.bias


class Resample(eqx.Module):
    """Half or twice the resolution, by a convolution."""

    conv: StridedConv | Conv

    def __call__(self, h: Float[Array, "h w c"], embedding: Float[Array, " e"] | None) -> Float[Array, "h2 w2 c"]:
        return self.conv(h if isinstance(self.conv, StridedConv) else upsample(h))


class DownBlock(eqx.Module):
    """Residual blocks, with attention or not, then half the resolution, but for the last block."""

    resnets: list[ResnetBlock]
    attentions: list[Attention]
    downsamplers: list[Resample | ResnetBlock]

    def __init__(self, settings: BlockSettings, level: int, *, key: Key[Array, ""]):
        widths, groups = settings.block_out_channels, settings.norm_num_groups
        attends, change = DOWN[settings.down_block_types[level]]
        c_in, c_out, layers = widths[max(level - 1, 0)], widths[level], settings.layers_per_block
        last_key, *keys = jax.random.split(key, 1 + 2 * layers)
        self.resnets = [ResnetBlock(settings, c_out if i else c_in, c_out, key=keys[i]) for i in range(layers)]
        self.attentions = [Attention(settings, c_out, groups, key=k) for k in keys[layers:] if attends]
        self.downsamplers = []
        if level < len(widths) - 1:
            by_conv = (change or settings.downsample_type) == "conv"
            self.downsamplers = [
                Resample(StridedConv(c_out, settings.downsample_padding, key=last_key))
                if by_conv
                else ResnetBlock(settings, c_out, c_out, "down", key=last_key)
            ]

    def __call__(self, h: Float[Array, "h w c"], embedding: Float[Array, " e"] | None) -> list[Array]:
        """The maps that the ascending half takes, the last of them what the next block takes."""
        maps = []
        for i, resnet in enumerate(self.resnets):
            h = resnet(h, embedding)
            h = self.attentions[i](h) if self.attentions else h
            maps.append(h)
        return maps + [downsampler(h, embedding) for downsampler in self.downsamplers]


class MidBlock(eqx.Module):
    """Two residual blocks at the bottom, with attention between them or not."""

    resnets: list[ResnetBlock]
    attentions: list[Attention]

    def __init__(self, settings: BlockSettings, *, key: Key[Array, ""]):
        *keys, last_key = jax.random.split(key, 3)
        width, divisor = settings.block_out_channels[-1], settings.mid_block_scale_factor
        self.resnets = [ResnetBlock(settings, width, width, divisor=divisor, key=k) for k in keys]
        default = settings.norm_num_groups if settings.resnet_time_scale_shift == "default" else None
        groups = default if settings.attn_norm_num_groups is None else settings.attn_norm_num_groups
        attends = settings.add_attention
        self.attentions = [Attention(settings, width, groups, divisor, key=last_key)] if attends else []

    def __call__(self, h: Float[Array, "h w c"], embedding: Float[Array, " e"] | None) -> Float[Array, "h w c"]:
        h = self.resnets[0](h, embedding)
        for attention in self.attentions:
            h = attention(h)
        return self.resnets[1](h, embedding)


class UpBlock(eqx.Module):
    """Residual blocks that take the maps of the descending half, then twice the resolution, but for the last block."""

    resnets: list[ResnetBlock]
    attentions: list[Attention]
    upsamplers: list[Resample | ResnetBlock]

    def __init__(self, settings: UNet2DSettings, level: int, *, key: Key[Array, ""]):
        widths = tuple(reversed(settings.block_out_channels))
        attends, change = UP[settings.up_block_types[level]]
        layers, last = settings.layers_per_block + 1, len(widths) - 1
        before, c_out, beside = widths[max(level - 1, 0)], widths[level], widths[min(level + 1, last)]
        last_key, *keys = jax.random.split(key, 1 + 2 * layers)
        self.resnets = [
            ResnetBlock(settings, (c_out if i else before) + (beside if i == layers - 1 else c_out), c_out, key=keys[i])
            for i in range(layers)
        ]
        groups = settings.norm_num_groups
        self.attentions = [Attention(settings, c_out, groups, key=k) for k in keys[layers:] if attends]
        self.upsamplers = []
        if level < last:
            by_conv = (change or settings.upsample_type) == "conv"
            self.upsamplers = [
                Resample(Conv(c_out, c_out, key=last_key))
                if by_conv
                else ResnetBlock(settings, c_out, c_out, "up", key=last_key)
            ]

    def __call__(
        self, h: Float[Array, "h w c"], skips: list[Array], embedding: Float[Array, " e"]
    ) -> Float[Array, "h2 w2 c2"]:
        """`skips`: maps of the descending half, as many as residual blocks; the last is taken first."""
        for i, (resnet, skip) in enumerate(zip(self.resnets, reversed(skips), strict=True)):
            h = resnet(jnp.concatenate([h, skip], axis=-1), embedding)
            h = self.attentions[i](h) if self.attentions else h
        for upsampler in self.upsamplers:
            h = upsampler(h, embedding)
        return h
