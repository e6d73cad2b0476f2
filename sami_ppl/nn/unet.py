"""U-Net, and its two halves, for signals, images and volumes of any sides and number of channels.

How many sides an observation has follows from its shape: (channels, length), (channels, rows, columns), (channels,
depth, rows, columns). Inputs are folded into patches of `patch` places a side first: the same receptive field for a
fraction of the cost. Where a side is no multiple of patch · 2^(levels − 1), zeros are added evenly at both of its ends,
and outputs are cut again: weights do not depend on it. Plain convolutional encoders without normalisation collapse
under SAMI's objective; normalised residual ones learn.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from sami_ppl._util.keys import check_key
from sami_ppl.nn.convolution import Conv, GroupNorm, pool, upsample
from sami_ppl.nn.embed import (
    AbstractResidual,
    CodeEmbedding,
    NoiseEmbedding,
    cut,
    embed,
    from_patches,
    modulation,
    padded,
    to_patches,
    zero_init,
)


class ConvBlock(AbstractResidual):
    """Two convolutions around a skip, group-normalised, the second one modulated by the embedding (FiLM)."""

    norm1: GroupNorm
    conv1: Conv
    film: eqx.nn.Linear | None
    norm2: GroupNorm
    conv2: Conv
    skip: Float[Array, "c_in c_out"] | None

    def __init__(self, c_in: int, c_out: int, embedding: int | None, dims: int = 2, *, key: Key[Array, ""]):
        key1, key2, film_key, skip_key = jax.random.split(key, 4)
        self.norm1, self.norm2 = GroupNorm(c_in), GroupNorm(c_out)
        self.conv1 = Conv(c_in, c_out, dims, key=key1)
        self.film = None if embedding is None else zero_init(eqx.nn.Linear(embedding, 2 * c_out, key=film_key))
        self.conv2 = zero_init(Conv(c_out, c_out, dims, key=key2))
        self.skip = None if c_in == c_out else jax.random.normal(skip_key, (c_in, c_out)) * c_in**-0.5

    @property
    def last(self) -> Conv:
        return self.conv2

    def __call__(self, h: Float[Array, "*sides c"], embedding: Float[Array, " e"] | None) -> Float[Array, "*sides c2"]:
        inner = self.norm2(self.conv1(jax.nn.silu(self.norm1(h))))
        if self.film is not None and embedding is not None:
            gain, bias = jnp.split(self.film(embedding), 2)
            inner = (1 + gain) * inner + bias
        return (h if self.skip is None else h @ self.skip) + self.conv2(jax.nn.silu(inner))


class Down(eqx.Module):
    """The descending half: entry convolution, then per level a mean pooling and `blocks` residual blocks."""

    entry: Conv
    levels: list[list[ConvBlock]]

    def __init__(
        self, c_in: int, widths: tuple[int, ...], blocks: int, embedding: int | None, dims: int, *, key: Key[Array, ""]
    ):
        entry_key, *keys = jax.random.split(key, 1 + len(widths) * blocks)
        self.entry = Conv(c_in, widths[0], dims, key=entry_key)
        self.levels, before = [], widths[0]
        for level, width in enumerate(widths):
            level_keys = keys[level * blocks : (level + 1) * blocks]
            self.levels.append(
                [
                    ConvBlock(before if i == 0 else width, width, embedding, dims, key=k)
                    for i, k in enumerate(level_keys)
                ]
            )
            before = width

    def __call__(self, h: Float[Array, "*sides c"], embedding: Float[Array, " e"] | None) -> list[Array]:
        """The feature map that leaves each level, finest first; the last one is the bottom of the network."""
        h, maps = self.entry(h), []
        for i, level in enumerate(self.levels):
            h = pool(h) if i else h
            for block in level:
                h = block(h, embedding)
            maps.append(h)
        return maps


class UNet(eqx.Module):
    """U-Net from an observation (channels, *sides) to one of the same shape; λ modulates every block.

    With `condition`, the length of a code z, the code modulates them too. `out_channels`: another number of channels
    that come out. Raises ValueError for a shape without channels or without sides.
    """

    embedding: NoiseEmbedding
    code: CodeEmbedding | None
    down: Down
    middle: ConvBlock
    up: list[ConvBlock]
    norm: GroupNorm
    exit: Conv
    patch: int = eqx.field(static=True)

    def __init__(
        self,
        in_shape: tuple[int, ...],
        *,
        widths: tuple[int, ...] = (32, 64),
        blocks: int = 1,
        patch: int = 2,
        condition: int = 0,
        out_channels: int | None = None,
        key: Key[Array, ""],
    ):
        check_key(key)
        dims = sides_of(in_shape)
        channels, folded = in_shape[0], patch**dims
        embed_key, down_key, middle_key, exit_key, *up_keys = jax.random.split(key, 4 + len(widths))
        size = 128
        self.embedding = NoiseEmbedding(size, key=embed_key)
        self.code = CodeEmbedding(condition, size, key=jax.random.fold_in(embed_key, 1)) if condition else None
        self.down = Down(channels * folded, widths, blocks, size, dims, key=down_key)
        self.middle = ConvBlock(widths[-1], widths[-1], size, dims, key=middle_key)
        below = (*widths[1:], widths[-1])
        self.up = [
            ConvBlock(below[i] + widths[i], widths[i], size, dims, key=up_keys[i]) for i in reversed(range(len(widths)))
        ]
        self.norm = GroupNorm(widths[0])
        self.exit = Conv(widths[0], (out_channels or channels) * folded, dims, key=exit_key)
        self.patch = patch

    def __call__(
        self, x: Float[Array, "c *sides"], log_snr: Float[Array, ""], z: Float[Array, " D"] | None = None
    ) -> Float[Array, "c_out *sides"]:
        embedding = modulation(self.embedding, self.code, log_snr, z)
        h, maps = self._descend(x, embedding)
        for i, (block, skip) in enumerate(zip(self.up, reversed(maps), strict=True)):
            h = block(jnp.concatenate([upsample(h) if i else h, skip], axis=-1), embedding)
        return cut(from_patches(self.exit(jax.nn.silu(self.norm(h))), self.patch), x.shape[1:])

    def bottleneck(
        self, x: Float[Array, "c *sides"], log_snr: Float[Array, ""], z: Float[Array, " D"] | None = None
    ) -> Float[Array, "*sides2 c2"]:
        """The feature map that leaves the middle, the coarsest there is."""
        return self._descend(x, modulation(self.embedding, self.code, log_snr, z))[0]

    def _descend(self, x: Float[Array, "c *sides"], embedding: Float[Array, " e"] | None) -> tuple[Array, list[Array]]:
        """The map that leaves the middle, and those on the way to it."""
        whole = padded(x, self.patch * 2 ** (len(self.up) - 1))
        maps = self.down(to_patches(whole, self.patch), embedding)
        return self.middle(maps[-1], embedding), maps


class HalfUNet(eqx.Module):
    """The descending half of a U-Net, then the flattened bottom map: observation → feature vector of `out_shape`.

    The bottom map is flattened, not averaged: where a thing is must survive. Raises ValueError as `UNet` does.
    """

    embedding: NoiseEmbedding | None
    down: Down
    norm: GroupNorm
    exit: eqx.nn.Linear
    patch: int = eqx.field(static=True)
    out_shape: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        in_shape: tuple[int, ...],
        out_shape: tuple[int, ...],
        *,
        widths: tuple[int, ...] = (32, 64, 128),
        blocks: int = 1,
        patch: int = 2,
        noise: bool = True,
        key: Key[Array, ""],
    ):
        check_key(key)
        dims = sides_of(in_shape)
        embed_key, down_key, exit_key = jax.random.split(key, 3)
        size = 128 if noise else None
        self.embedding = NoiseEmbedding(size, key=embed_key) if size else None
        self.down = Down(in_shape[0] * patch**dims, widths, blocks, size, dims, key=down_key)
        self.norm = GroupNorm(widths[-1])
        places = math.prod(bottom_sides(in_shape[1:], patch, len(widths)))
        self.exit = eqx.nn.Linear(widths[-1] * places, out_shape[0], key=exit_key)
        self.patch, self.out_shape = patch, tuple(out_shape)

    def __call__(self, x: Float[Array, "c *sides"], log_snr: Float[Array, ""] | None) -> Float[Array, " out"]:
        embedding = embed(self.embedding, log_snr)
        whole = padded(x, self.patch * 2 ** (len(self.down.levels) - 1))
        bottom = self.down(to_patches(whole, self.patch), embedding)[-1]
        return self.exit(jax.nn.silu(self.norm(bottom)).reshape(-1))


class AscendingUNet(eqx.Module):
    """The ascending half of a U-Net, from a code (D,) to an observation (channels, *sides); it knows of no noise level.

    Called as (z, log_snr), of which the second counts nothing. Raises ValueError as `UNet` does.
    """

    entry: eqx.nn.Linear
    up: list[ConvBlock]
    norm: GroupNorm
    exit: Conv
    sides: tuple[int, ...] = eqx.field(static=True)
    bottom: tuple[int, ...] = eqx.field(static=True)
    blocks: int = eqx.field(static=True)
    patch: int = eqx.field(static=True)

    def __init__(
        self,
        codes: int,
        out_shape: tuple[int, ...],
        *,
        widths: tuple[int, ...] = (32, 64),
        blocks: int = 1,
        patch: int = 2,
        key: Key[Array, ""],
    ):
        check_key(key)
        dims = sides_of(out_shape)
        entry_key, exit_key, *keys = jax.random.split(key, 2 + len(widths) * blocks)
        self.sides = tuple(out_shape[1:])
        self.bottom = bottom_sides(self.sides, patch, len(widths))
        self.entry = eqx.nn.Linear(codes, widths[-1] * math.prod(self.bottom), key=entry_key)
        rising = [width for width in reversed(widths) for _ in range(blocks)]
        before = [rising[0], *rising[:-1]]
        self.up = [ConvBlock(b, width, None, dims, key=k) for b, width, k in zip(before, rising, keys, strict=True)]
        self.norm = GroupNorm(widths[0])
        self.exit = Conv(widths[0], out_shape[0] * patch**dims, dims, key=exit_key)
        self.blocks, self.patch = blocks, patch

    def __call__(self, z: Float[Array, " D"], log_snr: Float[Array, ""] | None = None) -> Float[Array, "c *sides"]:
        h = self.entry(z).reshape(*self.bottom, -1)
        for i, block in enumerate(self.up):
            h = block(upsample(h) if i and i % self.blocks == 0 else h, None)
        return cut(from_patches(self.exit(jax.nn.silu(self.norm(h))), self.patch), self.sides)


def sides_of(shape: tuple[int, ...]) -> int:
    """How many sides an observation (channels, *sides) has, one to three. Raises ValueError for other shapes."""
    if not 2 <= len(shape) <= 4 or 0 in shape:
        raise ValueError(
            f"a U-Net takes signals (channels, length), images (channels, rows, columns) and volumes (channels, depth, "
            f"rows, columns), got an observation of shape {tuple(shape)}: add a dim of channels, x[:, None]"
        )
    return len(shape) - 1


def bottom_sides(sides: tuple[int, ...], patch: int, levels: int) -> tuple[int, ...]:
    """Sides of the bottom map of `levels` levels."""
    return tuple(math.ceil(side / (patch * 2 ** (levels - 1))) for side in sides)
