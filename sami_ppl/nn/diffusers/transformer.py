"""The `DiTTransformer2DModel` of Hugging Face diffusers, and its first half, with the weights of a checkpoint.

The transformer of Peebles & Xie 2023, *Scalable Diffusion Models with Transformers*, as diffusers has it: every block
embeds time step and class by layers of its own. Of the classes one is kept, which stands for none (`label`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpy as np

from sami_ppl._util.keys import check_key
from sami_ppl.nn.diffusers.blocks import TimeEmbedding, TokenAttention
from sami_ppl.nn.diffusers.network import AbstractHalf, AbstractNetwork
from sami_ppl.nn.diffusers.settings import supported
from sami_ppl.nn.diffusers.weights import check_shape
from sami_ppl.nn.embed import from_patches, to_patches
from sami_ppl.nn.transformer import on_each

# Settings that change nothing of a trained network as it is used here.
IDLE = {"dropout", "norm_num_groups", "upcast_attention"}
WAVES = 256
"""Sines and cosines of the time step."""


@dataclass(frozen=True)
class DiT2DSettings:
    """Settings of a `DiTTransformer2DModel`, with the names, meanings and defaults of diffusers; `sample_size` (h, w).

    `out_channels`: those of the image, or twice as many, of which the second half are variances that are not used.
    """

    sample_size: tuple[int, int] = (32, 32)
    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int = 4
    num_layers: int = 28
    attention_bias: bool = True
    patch_size: int = 2
    num_embeds_ada_norm: int = 1000
    norm_elementwise_affine: bool = False
    norm_eps: float = 1e-5

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "DiT2DSettings":
        """The settings of a `config.json`. Raises ValueError, with its name, for what is not supported."""
        channels, size = config.get("in_channels", cls.in_channels), config.get("sample_size", cls.sample_size[0])
        fixed = {
            "norm_type": ("ada_norm_zero",), "activation_fn": ("gelu-approximate",),
            "out_channels": (None, channels, 2 * channels),
        }  # fmt: skip
        found = supported(cls, config, fixed, IDLE)
        for name in ("sample_size", "patch_size", "num_embeds_ada_norm"):
            if not isinstance(config.get(name, 1), int):
                raise ValueError(f"the network has {name} = {config[name]!r}, supported is a number")
        found |= {"sample_size": (size, size), "out_channels": found.get("out_channels") or channels}
        settings = cls(**found)
        if size % settings.patch_size:
            raise ValueError(
                f"the network cuts images of {size} × {size} pixels into patches of {settings.patch_size}, which do "
                "not divide them"
            )
        if settings.width % 4:
            raise ValueError(
                f"the network has {settings.num_attention_heads} heads of {settings.attention_head_dim} numbers, no "
                "multiple of 4 together, which the sines and cosines of places take"
            )
        return settings

    @property
    def width(self) -> int:
        """Length of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def places(self) -> tuple[int, int]:
        """How many patches lie along each side."""
        height, width = self.sample_size
        return height // self.patch_size, width // self.patch_size

    @property
    def label(self) -> int:
        """The class that stands for none: the last, one more than there are, or of a single one itself.

        In training diffusers puts the former in place of a tenth of the labels (classifier-free guidance; Ho & Salimans
        2022). Of a single class it would be a tenth of what was seen, and the class is p(x) as well.
        """
        return 0 if self.num_embeds_ada_norm == 1 else self.num_embeds_ada_norm


class PatchEmbedding(eqx.Module):
    """Patches of an image as tokens, by one matrix, with sines and cosines of their places added."""

    proj: eqx.nn.Linear
    settings: DiT2DSettings = eqx.field(static=True)

    def __init__(self, settings: DiT2DSettings, *, key: Key[Array, ""]):
        self.proj = eqx.nn.Linear(settings.in_channels * settings.patch_size**2, settings.width, key=key)
        self.settings = settings

    def __call__(self, x: Float[Array, "c h w"]) -> Float[Array, "tokens width"]:
        patches = to_patches(x, self.settings.patch_size)
        tokens = on_each(self.proj, patches.reshape(-1, patches.shape[-1]))
        return tokens + jnp.asarray(positions(self.settings.places, self.settings.width), tokens.dtype)


class ClassEmbedding(eqx.Module):
    """The embedding of the one class that is kept, a table of one row."""

    embedding_table: eqx.nn.Embedding


class StepEmbedding(eqx.Module):
    """The embedding of the time step, and of the class, added."""

    timestep_embedder: TimeEmbedding
    class_embedder: ClassEmbedding

    def __init__(self, width: int, *, key: Key[Array, ""]):
        time_key, class_key = jax.random.split(key)
        self.timestep_embedder = TimeEmbedding(WAVES, width, flip=True, shift=1, key=time_key)
        self.class_embedder = ClassEmbedding(eqx.nn.Embedding(1, width, key=class_key))

    def __call__(self, timestep: Float[Array, ""]) -> Float[Array, " width"]:
        return self.timestep_embedder(timestep) + self.class_embedder.embedding_table.weight[0]


class Modulation(eqx.Module):
    """Scale, shift and gate of the two branches of a block, of the time step (adaLN-zero)."""

    emb: StepEmbedding
    linear: eqx.nn.Linear

    def __init__(self, width: int, *, key: Key[Array, ""]):
        embed_key, linear_key = jax.random.split(key)
        self.emb = StepEmbedding(width, key=embed_key)
        self.linear = eqx.nn.Linear(width, 6 * width, key=linear_key)

    def __call__(self, timestep: Float[Array, ""]) -> list[Float[Array, " width"]]:
        return jnp.split(self.linear(jax.nn.silu(self.emb(timestep))), 6)


class Expansion(eqx.Module):
    """The first layer of a perceptron, under the name that it has."""

    proj: eqx.nn.Linear


class FeedForward(eqx.Module):
    """A perceptron of one hidden layer on every token; between its layers, a place for dropout, which is none."""

    net: tuple[Expansion, None, eqx.nn.Linear]

    def __init__(self, width: int, *, key: Key[Array, ""]):
        in_key, out_key = jax.random.split(key)
        inner = Expansion(eqx.nn.Linear(width, 4 * width, key=in_key))
        self.net = (inner, None, eqx.nn.Linear(4 * width, width, key=out_key))

    def __call__(self, h: Float[Array, "tokens width"]) -> Float[Array, "tokens width"]:
        return on_each(self.net[2], jax.nn.gelu(on_each(self.net[0].proj, h)))


class TransformerBlock(eqx.Module):
    """Attention among all tokens, then a perceptron on each, both around a skip and modulated by the time step."""

    norm1: Modulation
    attn1: TokenAttention
    norm3: eqx.nn.LayerNorm
    ff: FeedForward

    def __init__(self, settings: DiT2DSettings, *, key: Key[Array, ""]):
        norm_key, attend_key, inner_key = jax.random.split(key, 3)
        width, affine = settings.width, settings.norm_elementwise_affine
        heads, size = settings.num_attention_heads, settings.attention_head_dim
        self.norm1 = Modulation(width, key=norm_key)
        self.attn1 = TokenAttention(width, heads, size, settings.attention_bias, key=attend_key)
        self.norm3 = eqx.nn.LayerNorm(width, settings.norm_eps, affine, affine)
        self.ff = FeedForward(width, key=inner_key)

    def __call__(self, h: Float[Array, "tokens width"], timestep: Float[Array, ""]) -> Float[Array, "tokens width"]:
        shift, gain, gate, shift2, gain2, gate2 = self.norm1(timestep)
        h = h + gate * self.attn1.attend((1 + gain) * normed(h) + shift)
        return h + gate2 * self.ff((1 + gain2) * jax.vmap(self.norm3)(h) + shift2)


class HalfDiT2D(AbstractHalf):
    """The first half of the blocks of a `DiTTransformer2DModel`: the tokens of an image at a time step."""

    pos_embed: PatchEmbedding
    transformer_blocks: list[TransformerBlock]
    settings: DiT2DSettings = eqx.field(static=True)

    def __init__(self, settings: DiT2DSettings, blocks: int | None = None, *, key: Key[Array, ""]):
        check_key(key)
        blocks = (settings.num_layers + 1) // 2 if blocks is None else blocks
        entry_key, *keys = jax.random.split(key, 1 + blocks)
        self.pos_embed = PatchEmbedding(settings, key=entry_key)
        self.transformer_blocks = [TransformerBlock(settings, key=k) for k in keys]
        self.settings = settings

    def features(self, x: Float[Array, "c h w"], timestep: Float[Array, ""]) -> Float[Array, "tokens width"]:
        """The tokens that the last of its blocks puts out."""
        h = self.pos_embed(x)
        for block in self.transformer_blocks:
            h = block(h, timestep)
        return h


class DiT2D(HalfDiT2D, AbstractNetwork):
    """A `DiTTransformer2DModel` told no class, from an image (channels, h, w) and a time step to one of that shape."""

    kinds: ClassVar[tuple[str, ...]] = ("DiTTransformer2DModel", "Transformer2DModel")  # the second in older versions
    Settings: ClassVar[Any] = DiT2DSettings
    Half: ClassVar[Any] = HalfDiT2D
    proj_out_1: eqx.nn.Linear
    proj_out_2: eqx.nn.Linear

    def __init__(self, settings: DiT2DSettings, *, key: Key[Array, ""]):
        super().__init__(settings, settings.num_layers, key=key)
        key1, key2 = jax.random.split(jax.random.fold_in(key, 1))
        self.proj_out_1 = eqx.nn.Linear(settings.width, 2 * settings.width, key=key1)
        self.proj_out_2 = eqx.nn.Linear(settings.width, settings.patch_size**2 * settings.out_channels, key=key2)

    def __call__(self, x: Float[Array, "c h w"], timestep: Float[Array, ""]) -> Float[Array, "c h w"]:
        h = self.features(x, timestep)
        embedding = self.transformer_blocks[0].norm1.emb(timestep)
        shift, gain = jnp.split(self.proj_out_1(jax.nn.silu(embedding)), 2)
        patches = on_each(self.proj_out_2, (1 + gain) * normed(h) + shift)
        places, patch = self.settings.places, self.settings.patch_size
        return from_patches(patches.reshape(*places, -1), patch)[: self.settings.in_channels]

    @staticmethod
    def as_here(settings: DiT2DSettings, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        # Positions are computed; older versions saved them with the weights too.
        found = {name: array for name, array in weights.items() if name != "pos_embed.pos_embed"}
        for name, array in found.items():
            if name == "pos_embed.proj.weight":
                check_shape(array, (settings.width, settings.in_channels, *(settings.patch_size,) * 2), name)
                found[name] = array.transpose(0, 2, 3, 1).reshape(len(array), -1)
            elif name.endswith("class_embedder.embedding_table.weight"):
                found[name] = _row(settings, array, name)
        return found


def normed(h: Float[Array, "tokens width"]) -> Float[Array, "tokens width"]:
    """Every token with mean 0 and variance 1, where no setting says how near to it."""
    centred = h - h.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-6)


def positions(places: tuple[int, int], width: int) -> Float[np.ndarray, "tokens width"]:
    """Sines and cosines of the column of every place, then of its row; their periods grow from 2π to 20,000π."""
    rows, columns = np.meshgrid(*map(np.arange, places), indexing="ij")
    rate = 10000.0 ** -(np.arange(width // 4) / (width // 4))
    parts = [f(side.reshape(-1, 1) * rate) for side in (columns, rows) for f in (np.sin, np.cos)]
    return np.concatenate(parts, -1).astype(np.float32)


def _row(settings: DiT2DSettings, table: np.ndarray, name: str) -> np.ndarray:
    """The row of the class that stands for none, (1, width)."""
    classes = settings.num_embeds_ada_norm
    if len(table) == classes and settings.label == classes:
        raise ValueError(
            f"the network is told one of {classes} classes and knows none that stands for no class ({name} has no row "
            f"{classes}): supported are networks that do, and those of a single class"
        )
    check_shape(table, (classes + 1, settings.width), name)
    return table[settings.label][None]
