"""U-Net, and its two halves, for square images of any size and number of channels.

Images are folded into `patch`×`patch` patches first: the same receptive field for a fraction of the cost. Plain
convolutional encoders without normalisation collapse under SAMI's objective; normalised residual ones learn.

Feature maps are channels-last. On CPUs XLA's gradients of convolutions are fast in a function by itself and ten times
slower inside any compiled loop (jax-ml/jax#12868): there they are written as matrix products over 3×3 neighbourhoods,
unless `outside_loops(network)` says that there is none, as the training step does.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from sami_ppl._util.keys import check_key
from sami_ppl.nn.embed import (
    AbstractResidual,
    CodeEmbedding,
    NoiseEmbedding,
    embed,
    from_patches,
    modulation,
    to_patches,
    zero_init,
)


def outside_loops[T](networks: T) -> T:
    """The networks for a function that no compiled loop contains: their convolutions take XLA's own form.

    A network's form is no parameter: weights of either fit the other.
    """
    return jax.tree.map(lambda leaf: convolution if leaf is convolution_anywhere else leaf, networks)


class Conv3x3(eqx.Module):
    """3×3 convolution with zero padding: (h, w, c_in) → (h, w, c_out). `form`: a function of map and weight."""

    weight: Float[Array, "c9 c_out"]
    bias: Float[Array, " c_out"]
    form: Callable[[Array, Array], Array]

    def __init__(self, c_in: int, c_out: int, *, key: Key[Array, ""]):
        bound = (9 * c_in) ** -0.5
        self.weight = jax.random.uniform(key, (9 * c_in, c_out), minval=-bound, maxval=bound)
        self.bias, self.form = jnp.zeros(c_out), convolution_anywhere

    def __call__(self, h: Float[Array, "h w c"]) -> Float[Array, "h w c2"]:
        return self.form(h, self.weight) + self.bias


def convolution_anywhere(h: Float[Array, "h w c"], weight: Float[Array, "c9 c_out"]) -> Float[Array, "h w c_out"]:
    """The form that is fast inside compiled loops too."""
    return (_convolution_in_loops if jax.default_backend() == "cpu" else convolution)(h, weight)


def convolution(h: Float[Array, "h w c"], weight: Float[Array, "c9 c_out"]) -> Float[Array, "h w c_out"]:
    """XLA's own form."""
    dtype, names = jnp.result_type(h, weight), ("NHWC", "HWIO", "NHWC")  # as a matrix product has it
    kernel = weight.reshape(3, 3, h.shape[-1], -1).astype(dtype)
    return jax.lax.conv_general_dilated(h[None].astype(dtype), kernel, (1, 1), "SAME", dimension_numbers=names)[0]


@jax.custom_jvp
def _convolution_in_loops(h: Float[Array, "h w c"], weight: Float[Array, "c9 c_out"]) -> Float[Array, "h w c_out"]:
    return convolution(h, weight)


@_convolution_in_loops.defjvp
def _as_matrix_products(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    def product(h: Array, weight: Array) -> Array:
        height, width, _ = h.shape
        padded = jnp.pad(h, ((1, 1), (1, 1), (0, 0)))
        neighbours = [padded[i : i + height, j : j + width] for i in range(3) for j in range(3)]
        return jnp.concatenate(neighbours, axis=-1) @ weight

    (h, weight), (h_dot, weight_dot) = primals, tangents
    return _convolution_in_loops(h, weight), product(h_dot, weight) + product(h, weight_dot)


class GroupNorm(eqx.Module):
    """Group normalisation of a channels-last map (Wu & He 2018), up to 8 groups."""

    gain: Float[Array, " c"]
    bias: Float[Array, " c"]
    groups: int = eqx.field(static=True)

    def __init__(self, channels: int):
        self.groups = next(g for g in range(min(8, channels), 0, -1) if channels % g == 0)
        self.gain, self.bias = jnp.ones(channels), jnp.zeros(channels)

    def __call__(self, h: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
        grouped = h.reshape(-1, self.groups, h.shape[-1] // self.groups)
        mean = grouped.mean((0, 2), keepdims=True)
        centred = grouped - mean
        scaled = centred * jax.lax.rsqrt((centred**2).mean((0, 2), keepdims=True) + 1e-5)
        return scaled.reshape(h.shape) * self.gain + self.bias


class ConvBlock(AbstractResidual):
    """Two 3×3 convolutions around a skip, group-normalised, the second one modulated by the embedding (FiLM)."""

    norm1: GroupNorm
    conv1: Conv3x3
    film: eqx.nn.Linear | None
    norm2: GroupNorm
    conv2: Conv3x3
    skip: Float[Array, "c_in c_out"] | None

    def __init__(self, c_in: int, c_out: int, embedding: int | None, *, key: Key[Array, ""]):
        key1, key2, film_key, skip_key = jax.random.split(key, 4)
        self.norm1, self.norm2 = GroupNorm(c_in), GroupNorm(c_out)
        self.conv1 = Conv3x3(c_in, c_out, key=key1)
        self.film = None if embedding is None else zero_init(eqx.nn.Linear(embedding, 2 * c_out, key=film_key))
        self.conv2 = zero_init(Conv3x3(c_out, c_out, key=key2))
        self.skip = None if c_in == c_out else jax.random.normal(skip_key, (c_in, c_out)) * c_in**-0.5

    @property
    def last(self) -> Conv3x3:
        return self.conv2

    def __call__(self, h: Float[Array, "h w c"], embedding: Float[Array, " e"] | None) -> Float[Array, "h w c2"]:
        inner = self.norm2(self.conv1(jax.nn.silu(self.norm1(h))))
        if self.film is not None and embedding is not None:
            gain, bias = jnp.split(self.film(embedding), 2)
            inner = (1 + gain) * inner + bias
        return (h if self.skip is None else h @ self.skip) + self.conv2(jax.nn.silu(inner))


class Down(eqx.Module):
    """The descending half: entry convolution, then per level a mean pooling and `blocks` residual blocks."""

    entry: Conv3x3
    levels: list[list[ConvBlock]]

    def __init__(self, c_in: int, widths: tuple[int, ...], blocks: int, embedding: int | None, *, key: Key[Array, ""]):
        entry_key, *keys = jax.random.split(key, 1 + len(widths) * blocks)
        self.entry = Conv3x3(c_in, widths[0], key=entry_key)
        self.levels, before = [], widths[0]
        for level, width in enumerate(widths):
            level_keys = keys[level * blocks : (level + 1) * blocks]
            self.levels.append(
                [ConvBlock(before if i == 0 else width, width, embedding, key=k) for i, k in enumerate(level_keys)]
            )
            before = width

    def __call__(self, h: Float[Array, "h w c"], embedding: Float[Array, " e"] | None) -> list[Array]:
        """The feature map that leaves each level, finest first; the last one is the bottom of the network."""
        h, maps = self.entry(h), []
        for i, level in enumerate(self.levels):
            h = _pool(h) if i else h
            for block in level:
                h = block(h, embedding)
            maps.append(h)
        return maps


class UNet(eqx.Module):
    """U-Net from an image (channels, size, size) to an image of the same shape; λ modulates every block.

    With `condition`, the length of a code z, the code modulates them too.
    """

    embedding: NoiseEmbedding
    code: CodeEmbedding | None
    down: Down
    middle: ConvBlock
    up: list[ConvBlock]
    norm: GroupNorm
    exit: Conv3x3
    patch: int = eqx.field(static=True)

    def __init__(
        self,
        in_shape: tuple[int, int, int],
        *,
        widths: tuple[int, ...] = (32, 64),
        blocks: int = 1,
        patch: int = 2,
        condition: int = 0,
        key: Key[Array, ""],
    ):
        check_key(key)
        channels = check_image_shape(in_shape, patch, len(widths)) * patch * patch
        embed_key, down_key, middle_key, exit_key, *up_keys = jax.random.split(key, 4 + len(widths))
        size = 128
        self.embedding = NoiseEmbedding(size, key=embed_key)
        self.code = CodeEmbedding(condition, size, key=jax.random.fold_in(embed_key, 1)) if condition else None
        self.down = Down(channels, widths, blocks, size, key=down_key)
        self.middle = ConvBlock(widths[-1], widths[-1], size, key=middle_key)
        below = (*widths[1:], widths[-1])
        self.up = [
            ConvBlock(below[i] + widths[i], widths[i], size, key=up_keys[i]) for i in reversed(range(len(widths)))
        ]
        self.norm = GroupNorm(widths[0])
        self.exit = Conv3x3(widths[0], channels, key=exit_key)
        self.patch = patch

    def __call__(
        self, x: Float[Array, "c h w"], log_snr: Float[Array, ""], z: Float[Array, " D"] | None = None
    ) -> Float[Array, "c h w"]:
        embedding = modulation(self.embedding, self.code, log_snr, z)
        maps = self.down(to_patches(x, self.patch), embedding)
        h = self.middle(maps[-1], embedding)
        for i, (block, skip) in enumerate(zip(self.up, reversed(maps), strict=True)):
            h = block(jnp.concatenate([_upsample(h) if i else h, skip], axis=-1), embedding)
        return from_patches(self.exit(jax.nn.silu(self.norm(h))), self.patch)


class HalfUNet(eqx.Module):
    """The descending half of a U-Net, then the flattened bottom map: image → feature vector of `out_shape`.

    The bottom map is flattened, not averaged: where a thing is must survive.
    """

    embedding: NoiseEmbedding | None
    down: Down
    norm: GroupNorm
    exit: eqx.nn.Linear
    patch: int = eqx.field(static=True)
    out_shape: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        in_shape: tuple[int, int, int],
        out_shape: tuple[int, ...],
        *,
        widths: tuple[int, ...] = (32, 64, 128),
        blocks: int = 1,
        patch: int = 2,
        noise: bool = True,
        key: Key[Array, ""],
    ):
        check_key(key)
        channels = check_image_shape(in_shape, patch, len(widths)) * patch * patch
        embed_key, down_key, exit_key = jax.random.split(key, 3)
        size = 128 if noise else None
        self.embedding = NoiseEmbedding(size, key=embed_key) if size else None
        self.down = Down(channels, widths, blocks, size, key=down_key)
        self.norm = GroupNorm(widths[-1])
        bottom = in_shape[-1] // patch // 2 ** (len(widths) - 1)
        self.exit = eqx.nn.Linear(widths[-1] * bottom * bottom, out_shape[0], key=exit_key)
        self.patch, self.out_shape = patch, tuple(out_shape)

    def __call__(self, x: Float[Array, "c h w"], log_snr: Float[Array, ""] | None) -> Float[Array, " out"]:
        embedding = embed(self.embedding, log_snr)
        bottom = self.down(to_patches(x, self.patch), embedding)[-1]
        return self.exit(jax.nn.silu(self.norm(bottom)).reshape(-1))


class AscendingUNet(eqx.Module):
    """The ascending half of a U-Net, from a code (D,) to an image (channels, size, size); it knows of no noise level.

    Called as (z, log_snr), of which the second counts nothing.
    """

    entry: eqx.nn.Linear
    up: list[ConvBlock]
    norm: GroupNorm
    exit: Conv3x3
    bottom: int = eqx.field(static=True)
    blocks: int = eqx.field(static=True)
    patch: int = eqx.field(static=True)

    def __init__(
        self,
        codes: int,
        out_shape: tuple[int, int, int],
        *,
        widths: tuple[int, ...] = (32, 64),
        blocks: int = 1,
        patch: int = 2,
        key: Key[Array, ""],
    ):
        check_key(key)
        channels = check_image_shape(out_shape, patch, len(widths)) * patch * patch
        entry_key, exit_key, *keys = jax.random.split(key, 2 + len(widths) * blocks)
        self.bottom = out_shape[-1] // patch // 2 ** (len(widths) - 1)
        self.entry = eqx.nn.Linear(codes, widths[-1] * self.bottom**2, key=entry_key)
        rising = [width for width in reversed(widths) for _ in range(blocks)]
        before = [rising[0], *rising[:-1]]
        self.up = [ConvBlock(b, width, None, key=k) for b, width, k in zip(before, rising, keys, strict=True)]
        self.norm = GroupNorm(widths[0])
        self.exit = Conv3x3(widths[0], channels, key=exit_key)
        self.blocks, self.patch = blocks, patch

    def __call__(self, z: Float[Array, " D"], log_snr: Float[Array, ""] | None = None) -> Float[Array, "c h w"]:
        h = self.entry(z).reshape(self.bottom, self.bottom, -1)
        for i, block in enumerate(self.up):
            h = block(_upsample(h) if i and i % self.blocks == 0 else h, None)
        return from_patches(self.exit(jax.nn.silu(self.norm(h))), self.patch)


def check_image_shape(in_shape: tuple[int, ...], patch: int, levels: int) -> int:
    """Number of channels of a square image that `levels` levels on `patch`×`patch` patches can take.

    Raises ValueError otherwise, with the sizes that fit.
    """
    if len(in_shape) != 3 or in_shape[1] != in_shape[2]:
        raise ValueError(f"in_shape must be (channels, size, size), a square image, got {tuple(in_shape)}")
    unit = patch * 2 ** (levels - 1)
    if in_shape[1] % unit:
        near = sorted({max(unit, in_shape[1] // unit * unit), (in_shape[1] // unit + 1) * unit})
        raise ValueError(
            f"image size {in_shape[1]} is no multiple of patch · 2^(levels − 1) = {patch} · {2 ** (levels - 1)} = "
            f"{unit}: resize the images to {' or '.join(map(str, near))}, or use a smaller patch or fewer widths"
        )
    return in_shape[0]


def _pool(h: Float[Array, "h w c"]) -> Float[Array, "h2 w2 c"]:
    height, width, c = h.shape
    return h.reshape(height // 2, 2, width // 2, 2, c).mean((1, 3))


def _upsample(h: Float[Array, "h w c"]) -> Float[Array, "h2 w2 c"]:
    return jnp.repeat(jnp.repeat(h, 2, axis=0), 2, axis=1)
