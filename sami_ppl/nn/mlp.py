"""Residual multilayer perceptron, for vectors and small images."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from sami_ppl._util.keys import check_key
from sami_ppl.nn.embed import AbstractResidual, CodeEmbedding, NoiseEmbedding, modulation, zero_init


class ResidualBlock(AbstractResidual):
    """h + W₂ silu((1 + a) ⊙ norm(W₁ norm(h)) + b), where (a, b) come from the embedding (FiLM)."""

    norm: eqx.nn.LayerNorm
    inner: eqx.nn.Linear
    film: eqx.nn.Linear | None
    outer: eqx.nn.Linear

    def __init__(self, width: int, embedding: int | None, *, key: Key[Array, ""]):
        inner_key, film_key, outer_key = jax.random.split(key, 3)
        self.norm = eqx.nn.LayerNorm(width)
        self.inner = eqx.nn.Linear(width, width, key=inner_key)
        self.film = None if embedding is None else zero_init(eqx.nn.Linear(embedding, 2 * width, key=film_key))
        self.outer = zero_init(eqx.nn.Linear(width, width, key=outer_key))

    @property
    def last(self) -> eqx.nn.Linear:
        return self.outer

    def __call__(self, h: Float[Array, " width"], embedding: Float[Array, " e"] | None) -> Float[Array, " width"]:
        inner = self.inner(self.norm(h))
        if self.film is not None and embedding is not None:
            gain, bias = jnp.split(self.film(embedding), 2)
            inner = (1 + gain) * inner + bias
        return h + self.outer(jax.nn.silu(inner))


class ResidualMLP(eqx.Module):
    """Residual multilayer perceptron on the flattened input: `in_shape` → `out_shape`.

    With `noise=True` every block is modulated by an embedding of λ; with `noise=False` the network ignores λ, which
    may then be None. With `condition`, the length of a code z, the embedding of the code is added to that of λ.
    """

    embedding: NoiseEmbedding | None
    code: CodeEmbedding | None
    entry: eqx.nn.Linear
    blocks: list[ResidualBlock]
    norm: eqx.nn.LayerNorm
    exit: eqx.nn.Linear
    in_shape: tuple[int, ...] = eqx.field(static=True)
    out_shape: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        in_shape: tuple[int, ...],
        out_shape: tuple[int, ...],
        *,
        width: int = 512,
        depth: int = 3,
        noise: bool = True,
        condition: int = 0,
        key: Key[Array, ""],
    ):
        check_key(key)
        embed_key, entry_key, exit_key, *block_keys = jax.random.split(key, 3 + depth)
        embedding = 128 if noise or condition else None
        self.embedding = NoiseEmbedding(128, key=embed_key) if noise else None
        self.code = CodeEmbedding(condition, 128, key=jax.random.fold_in(embed_key, 1)) if condition else None
        self.entry = eqx.nn.Linear(math.prod(in_shape), width, key=entry_key)
        self.blocks = [ResidualBlock(width, embedding, key=k) for k in block_keys]
        self.norm = eqx.nn.LayerNorm(width)
        self.exit = eqx.nn.Linear(width, math.prod(out_shape), key=exit_key)
        self.in_shape, self.out_shape = tuple(in_shape), tuple(out_shape)

    def __call__(
        self, x: Float[Array, "*event"], log_snr: Float[Array, ""] | None, z: Float[Array, " D"] | None = None
    ) -> Float[Array, "*out"]:
        embedding = modulation(self.embedding, self.code, log_snr, z)
        h = self.entry(x.reshape(-1))
        for block in self.blocks:
            h = block(h, embedding)
        return self.exit(jax.nn.silu(self.norm(h))).reshape(self.out_shape)
