"""Embeddings of noise levels and codes, and patches: what the networks share."""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpy as np


class AbstractEmbedding(eqx.Module):
    """What tells a network of noise level or code. It is computed in float32 where the network is not (`nn.evaluate`):
    levels of 4 to 8 nats are .03 apart in bfloat16.
    """


class NoiseEmbedding(AbstractEmbedding):
    """Log signal-to-noise ratio → feature vector: fixed sines and cosines, then two dense layers.

    The frequencies cover periods from 3 to 120 nats: the shortest resolves a change of a nat, the longest tells the
    two ends of any usual range apart.
    """

    hidden: eqx.nn.Linear
    out: eqx.nn.Linear
    frequencies: tuple[float, ...] = eqx.field(static=True)

    def __init__(self, size: int, *, features: int = 32, key: Key[Array, ""]):
        hidden_key, out_key = jax.random.split(key)
        self.frequencies = tuple((2 * np.pi / np.geomspace(120.0, 3.0, features // 2)).tolist())
        self.hidden = eqx.nn.Linear(features, size, key=hidden_key)
        self.out = eqx.nn.Linear(size, size, key=out_key)

    def __call__(self, log_snr: Float[Array, ""]) -> Float[Array, " size"]:
        phase = log_snr * jnp.asarray(self.frequencies, dtype=jnp.result_type(float, log_snr))
        features = jnp.concatenate([jnp.sin(phase), jnp.cos(phase)])
        return jax.nn.silu(self.out(jax.nn.silu(self.hidden(features))))


class CodeEmbedding(AbstractEmbedding):
    """Code z → feature vector by two dense layers, normalised, and a learned vector that stands for no code.

    A code that is None, or NaN anywhere, is none. Without the normalisation features are so small at first that
    conditioned decoders learn to do without the code before they learn what it says.
    """

    hidden: eqx.nn.Linear
    out: eqx.nn.Linear
    norm: eqx.nn.LayerNorm
    absent: Float[Array, " size"]

    def __init__(self, codes: int, size: int, *, key: Key[Array, ""]):
        hidden_key, out_key = jax.random.split(key)
        self.hidden = eqx.nn.Linear(codes, size, key=hidden_key)
        self.out = eqx.nn.Linear(size, size, key=out_key)
        self.norm = eqx.nn.LayerNorm(size)
        self.absent = jnp.zeros(size)

    def __call__(self, z: Float[Array, " D"] | None) -> Float[Array, " size"]:
        if z is None:
            return self.absent
        known = ~jnp.isnan(z).any()
        # The inner choice keeps the gradient of what is not chosen from being NaN.
        told = self.norm(self.out(jax.nn.silu(self.hidden(jnp.where(known, z, 0)))))
        return jnp.where(known, told, self.absent)


def embed(embedding: NoiseEmbedding | None, log_snr: Float[Array, ""] | None) -> Float[Array, " size"] | None:
    """The embedding of λ; None for a network that ignores λ. Raises ValueError where λ is needed and None."""
    if embedding is None:
        return None
    if log_snr is None:
        raise ValueError("this network depends on the noise level: give log_snr, or build it with noise=False")
    return embedding(log_snr)


def modulation(
    embedding: NoiseEmbedding | None,
    code: CodeEmbedding | None,
    log_snr: Float[Array, ""] | None,
    z: Float[Array, " D"] | None,
) -> Float[Array, " size"] | None:
    """What modulates the blocks of a network: the embedding of λ and that of the code, added, where it has them.

    Raises ValueError for a code where the network takes none, and what `embed` raises.
    """
    if code is None:
        if z is not None:
            raise ValueError("this network takes no code: build it with condition=, the length of the code")
        return embed(embedding, log_snr)
    noise = embed(embedding, log_snr)
    return code(z) if noise is None else noise + code(z)


class AbstractBlock(eqx.Module):
    """One of the blocks that a network applies one after another: what is inside may be computed again for its gradient
    (`nn.evaluate.rematerialised`).
    """


class AbstractResidual(AbstractBlock):
    """A block that starts as the identity: the last layer of its branch is zero until it is trained."""

    @property
    @abc.abstractmethod
    def last(self) -> eqx.Module:
        """That layer, from which one sees whether a network was ever trained."""


def zero_init[Layer: eqx.Module](layer: Layer) -> Layer:
    """The same layer with every weight and bias at zero, so that a residual block starts as the identity."""
    return jax.tree.map(lambda leaf: jnp.zeros_like(leaf) if eqx.is_inexact_array(leaf) else leaf, layer)


def to_patches(image: Float[Array, "c *sides"], patch: int) -> Float[Array, "*places ppc"]:
    """Fold neighbourhoods of `patch` places a side into channels, channels last: (c, h, w) → (h/p, w/p, p²c)."""
    channels, *sides = image.shape
    k, places = len(sides), tuple(side // patch for side in sides)
    folded = image.reshape(channels, *(n for place in places for n in (place, patch)))
    return folded.transpose(*range(1, 2 * k, 2), *range(2, 2 * k + 1, 2), 0).reshape(*places, patch**k * channels)


def from_patches(patches: Float[Array, "*places ppc"], patch: int) -> Float[Array, "c *sides"]:
    """Inverse of `to_patches`."""
    *places, folded = patches.shape
    k, channels = len(places), folded // patch ** len(places)
    unfolded = patches.reshape(*places, *(patch,) * k, channels)
    order = (2 * k, *(axis for i in range(k) for axis in (i, k + i)))
    return unfolded.transpose(order).reshape(channels, *(place * patch for place in places))


def padded(x: Float[Array, "c *sides"], unit: int) -> Float[Array, "c *multiples"]:
    """Zeros at both ends of every side that is no multiple of `unit`."""
    missing = [-side % unit for side in x.shape[1:]]
    return jnp.pad(x, ((0, 0), *((n // 2, n - n // 2) for n in missing))) if any(missing) else x


def cut(x: Float[Array, "c *multiples"], sides: tuple[int, ...]) -> Float[Array, "c *sides"]:
    """What `padded` has added, taken away."""
    firsts = [(long - side) // 2 for long, side in zip(x.shape[1:], sides, strict=True)]
    return x[(slice(None), *(slice(first, first + side) for first, side in zip(firsts, sides, strict=True)))]
