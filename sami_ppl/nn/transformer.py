"""Transformers of images of any sides: an image to an image, an image to a vector, a code to an image.

An image is cut into `patch`×`patch` patches, each a token by one matrix; blocks of attention and a perceptron follow,
modulated by the embedding of λ, with gates that start at zero (adaLN-zero; Peebles & Xie 2023, *Scalable Diffusion
Models with Transformers*). Sides that patches do not divide get a margin of zeros inside, which is cut off again.

Guidance differentiates the encoder twice, which fused kernels of attention with a gradient of their own do not allow.
Attention is two products around a softmax, as `jax.nn.dot_product_attention` has it where it is not fused; that one
rounds to 32 bits in float64, and is no faster (docs/performance.md).
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpy as np

from sami_ppl._util.keys import check_key
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

EMBEDDING = 128
"""Length of the embedding of λ and code."""
TOLD = 32
"""Numbers that an encoder keeps of every token, before they are flattened."""


class TransformerBlock(AbstractResidual):
    """Attention among all tokens, then a perceptron on each, both around a skip: (tokens, width) → the same.

    The embedding gives scale, shift and gate of each of the two branches. Without one, gates are open and the last
    layers of the branches start at zero instead.
    """

    modulate: eqx.nn.Linear | None
    attend: eqx.nn.Linear
    out: eqx.nn.Linear
    inner: eqx.nn.Linear
    outer: eqx.nn.Linear
    heads: int = eqx.field(static=True)

    def __init__(self, width: int, heads: int, embedding: int | None, *, key: Key[Array, ""]):
        modulate_key, attend_key, out_key, inner_key, outer_key = jax.random.split(key, 5)
        self.attend = eqx.nn.Linear(width, 3 * width, key=attend_key)
        self.out = eqx.nn.Linear(width, width, key=out_key)
        self.inner = eqx.nn.Linear(width, 4 * width, key=inner_key)
        self.outer = eqx.nn.Linear(4 * width, width, key=outer_key)
        self.heads, self.modulate = heads, None
        if embedding is None:
            self.out, self.outer = zero_init(self.out), zero_init(self.outer)
        else:
            self.modulate = zero_init(eqx.nn.Linear(embedding, 6 * width, key=modulate_key))

    @property
    def last(self) -> eqx.nn.Linear:
        return self.outer if self.modulate is None else self.modulate

    def __call__(
        self, h: Float[Array, "tokens width"], embedding: Float[Array, " e"] | None
    ) -> Float[Array, "tokens width"]:
        gain, shift, gate, gain2, shift2, gate2 = 0, 0, 1, 0, 0, 1
        if self.modulate is not None and embedding is not None:
            gain, shift, gate, gain2, shift2, gate2 = jnp.split(self.modulate(embedding), 6)
        h = h + gate * self.attention((1 + gain) * normed(h) + shift)
        inner = on_each(self.inner, (1 + gain2) * normed(h) + shift2)
        return h + gate2 * on_each(self.outer, jax.nn.gelu(inner))

    def attention(self, h: Float[Array, "tokens width"]) -> Float[Array, "tokens width"]:
        """Of every token to all of them, in heads."""
        tokens, width = h.shape
        split = on_each(self.attend, h).reshape(tokens, 3, self.heads, width // self.heads)
        queries, keys, values = split[:, 0], split[:, 1], split[:, 2]
        weights = jax.nn.softmax(jnp.einsum("qnh,knh->nqk", queries * (width // self.heads) ** -0.5, keys), axis=-1)
        return on_each(self.out, jnp.einsum("nqk,knh->qnh", weights, values).reshape(tokens, width))


class Exit(AbstractResidual):
    """The last layer of an image from tokens, modulated as the blocks are, zero at first: the image is 0 then."""

    modulate: eqx.nn.Linear | None
    linear: eqx.nn.Linear

    def __init__(self, width: int, out: int, embedding: int | None, *, key: Key[Array, ""]):
        self.linear = zero_init(eqx.nn.Linear(width, out, key=key))
        self.modulate = None if embedding is None else zero_init(eqx.nn.Linear(embedding, 2 * width, key=key))

    @property
    def last(self) -> eqx.nn.Linear:
        return self.linear

    def __call__(
        self, h: Float[Array, "tokens width"], embedding: Float[Array, " e"] | None
    ) -> Float[Array, "tokens out"]:
        h = normed(h)
        if self.modulate is not None and embedding is not None:
            gain, shift = jnp.split(self.modulate(embedding), 2)
            h = (1 + gain) * h + shift
        return on_each(self.linear, h)


class DiT(eqx.Module):
    """Diffusion transformer from an image (channels, rows, columns) to one of the same shape; λ modulates every block.

    With `condition`, the length of a code z, the code modulates them too. `out_channels`: another number of channels
    that come out. `heads`: by default one for every 48 of `width`. `positions` of tokens are learned, and start at
    sines and cosines. Raises ValueError for a shape that is no image's, and a width that heads do not divide.
    """

    embedding: NoiseEmbedding
    code: CodeEmbedding | None
    entry: eqx.nn.Linear
    positions: Float[Array, "tokens width"]
    blocks: list[TransformerBlock]
    exit: Exit
    patch: int = eqx.field(static=True)

    def __init__(
        self,
        in_shape: tuple[int, ...],
        *,
        width: int = 64,
        depth: int = 6,
        heads: int | None = None,
        patch: int = 4,
        condition: int = 0,
        out_channels: int | None = None,
        key: Key[Array, ""],
    ):
        check_key(key)
        places, heads = plan(in_shape, width, heads, patch)
        embed_key, entry_key, exit_key, *block_keys = jax.random.split(key, 3 + depth)
        self.embedding = NoiseEmbedding(EMBEDDING, key=embed_key)
        self.code = CodeEmbedding(condition, EMBEDDING, key=jax.random.fold_in(embed_key, 1)) if condition else None
        self.entry = eqx.nn.Linear(in_shape[0] * patch**2, width, key=entry_key)
        self.positions = sines(places, width)
        self.blocks = [TransformerBlock(width, heads, EMBEDDING, key=k) for k in block_keys]
        self.exit = Exit(width, (out_channels or in_shape[0]) * patch**2, EMBEDDING, key=exit_key)
        self.patch = patch

    def __call__(
        self, x: Float[Array, "c h w"], log_snr: Float[Array, ""], z: Float[Array, " D"] | None = None
    ) -> Float[Array, "c_out h w"]:
        embedding = modulation(self.embedding, self.code, log_snr, z)
        places, tokens = _tokens(x, self.patch)
        h = on_each(self.entry, tokens) + self.positions
        for block in self.blocks:
            h = block(h, embedding)
        return _image(self.exit(h, embedding), places, x.shape[1:], self.patch)


class ViT(eqx.Module):
    """The blocks of a `DiT`, then the flattened tokens: an image → feature vector of `out_shape`.

    Tokens are narrowed to a few numbers each and flattened, not averaged: where a thing is must survive. With
    `noise=False` the network ignores λ, which may then be None. Raises ValueError as `DiT` does.
    """

    embedding: NoiseEmbedding | None
    entry: eqx.nn.Linear
    positions: Float[Array, "tokens width"]
    blocks: list[TransformerBlock]
    narrow: eqx.nn.Linear
    exit: eqx.nn.Linear
    patch: int = eqx.field(static=True)
    out_shape: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        in_shape: tuple[int, ...],
        out_shape: tuple[int, ...],
        *,
        width: int = 64,
        depth: int = 2,
        heads: int | None = None,
        patch: int = 4,
        noise: bool = True,
        key: Key[Array, ""],
    ):
        check_key(key)
        places, heads = plan(in_shape, width, heads, patch)
        embed_key, entry_key, narrow_key, exit_key, *block_keys = jax.random.split(key, 4 + depth)
        size = EMBEDDING if noise else None
        self.embedding = NoiseEmbedding(size, key=embed_key) if size else None
        self.entry = eqx.nn.Linear(in_shape[0] * patch**2, width, key=entry_key)
        self.positions = sines(places, width)
        self.blocks = [TransformerBlock(width, heads, size, key=k) for k in block_keys]
        self.narrow = eqx.nn.Linear(width, TOLD, key=narrow_key)
        self.exit = eqx.nn.Linear(math.prod(places) * TOLD, out_shape[0], key=exit_key)
        self.patch, self.out_shape = patch, tuple(out_shape)

    def __call__(self, x: Float[Array, "c h w"], log_snr: Float[Array, ""] | None) -> Float[Array, " out"]:
        embedding = embed(self.embedding, log_snr)
        h = on_each(self.entry, _tokens(x, self.patch)[1]) + self.positions
        for block in self.blocks:
            h = block(h, embedding)
        return self.exit(jax.nn.gelu(on_each(self.narrow, normed(h))).reshape(-1))


class AscendingDiT(eqx.Module):
    """A code (D,) to tokens by one matrix, then the blocks: an image (channels, rows, columns); no noise level.

    Called as (z, log_snr), of which the second counts nothing. Raises ValueError as `DiT` does.
    """

    entry: eqx.nn.Linear
    blocks: list[TransformerBlock]
    exit: Exit
    sides: tuple[int, ...] = eqx.field(static=True)
    places: tuple[int, ...] = eqx.field(static=True)
    patch: int = eqx.field(static=True)

    def __init__(
        self,
        codes: int,
        out_shape: tuple[int, ...],
        *,
        width: int = 64,
        depth: int = 6,
        heads: int | None = None,
        patch: int = 4,
        key: Key[Array, ""],
    ):
        check_key(key)
        (self.places, heads), self.sides = plan(out_shape, width, heads, patch), tuple(out_shape[1:])
        entry_key, exit_key, *block_keys = jax.random.split(key, 2 + depth)
        entry = eqx.nn.Linear(codes, math.prod(self.places) * width, key=entry_key)
        self.entry = eqx.tree_at(lambda layer: layer.bias, entry, sines(self.places, width).reshape(-1))
        self.blocks = [TransformerBlock(width, heads, None, key=k) for k in block_keys]
        self.exit = Exit(width, out_shape[0] * patch**2, None, key=exit_key)
        self.patch = patch

    def __call__(self, z: Float[Array, " D"], log_snr: Float[Array, ""] | None = None) -> Float[Array, "c h w"]:
        h = self.entry(z).reshape(math.prod(self.places), -1)
        for block in self.blocks:
            h = block(h, None)
        return _image(self.exit(h, None), self.places, self.sides, self.patch)


def on_each(layer: eqx.nn.Linear, h: Float[Array, "tokens n"]) -> Float[Array, "tokens m"]:
    """A layer on every token, as one product; mapped over tokens it would be one of transposed arrays, and slower."""
    return h @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def normed(h: Float[Array, "tokens width"]) -> Float[Array, "tokens width"]:
    """Every token with mean 0 and variance 1."""
    centred = h - h.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5)


def plan(shape: tuple[int, ...], width: int, heads: int | None, patch: int) -> tuple[tuple[int, ...], int]:
    """How many patches lie along each side of an image, and how many heads there are, by default one for 48 numbers.

    Raises ValueError for a shape that is no image's, and for a width that the heads do not divide.
    """
    if len(shape) != 3 or 0 in shape:
        raise ValueError(f"a transformer takes images (channels, rows, columns), got an observation of {tuple(shape)}")
    heads = max(1, width // 48) if heads is None else heads
    if min(width, heads, patch) < 1 or width % heads:
        raise ValueError(
            f"width {width} must be a multiple of heads {heads}, and both and patch {patch} positive: "
            f"write width={48 * max(1, heads)}, heads={max(1, heads)}"
        )
    return tuple(-(-side // patch) for side in shape[1:]), heads


def sines(places: tuple[int, ...], width: int) -> Float[Array, "tokens width"]:
    """Sines and cosines of the place of every token along each side, in turn; periods from 4 places to 400."""
    where = np.stack(np.meshgrid(*map(np.arange, places), indexing="ij"), -1).reshape(-1, len(places))
    count = -(-width // (2 * len(places)))
    phase = where[:, None, :] * (2 * np.pi / np.geomspace(4.0, 400.0, count))[:, None]
    return jnp.asarray(np.stack([np.sin(phase), np.cos(phase)], -1).reshape(len(where), -1)[:, :width], float)


def _tokens(x: Float[Array, "c h w"], patch: int) -> tuple[tuple[int, ...], Float[Array, "tokens ppc"]]:
    """Patches in rows, and how many lie along each side."""
    patches = to_patches(padded(x, patch), patch)
    return patches.shape[:-1], patches.reshape(-1, patches.shape[-1])


def _image(
    tokens: Float[Array, "tokens ppc"], places: tuple[int, ...], sides: tuple[int, ...], patch: int
) -> Float[Array, "c h w"]:
    """The image of patches in rows, without its margins."""
    return cut(from_patches(tokens.reshape(*places, -1), patch), sides)
