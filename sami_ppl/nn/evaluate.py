"""How a training step evaluates networks: blocks computed again for their gradient, products in half precision.

Both are of a step, not of a network: weights stay where they are, in float32, and take their gradients there. What is a
network is the field `network` of denoisers and encoders.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from sami_ppl.nn.embed import AbstractBlock, AbstractEmbedding

Compute = Literal["float32", "bfloat16"]
COMPUTE = get_args(Compute)


def rematerialised(network: Callable) -> Callable:
    """The network, of every block of which only what goes in is held until its gradient is taken: the rest is computed
    again then (Chen et al. 2016, *Training Deep Nets with Sublinear Memory Cost*).

    Blocks are `AbstractBlock`; a network without any is one block.
    """
    whole = not any(isinstance(node, AbstractBlock) for node in jax.tree.leaves(network, is_leaf=_is_block))
    if whole:
        return _Again(network)
    return jax.tree.map(lambda node: _Again(node) if _is_block(node) else node, network, is_leaf=_is_block)


def in_bfloat16(network: Callable) -> Callable:
    """The network with weights and observation rounded to bfloat16, and an output of the type of its input.

    Noise level and code are embedded in float32 (`AbstractEmbedding`), and the embedding is rounded; a network that has
    its own way with them is given them as they are. Casts have gradients, so that the gradient in the observation,
    guidance, and those of the weights are of the types of these.
    """
    return _Rounded(network)


def evaluated[Part](part: Part, *, remat: bool, compute: Compute) -> Part:
    """A denoiser or an encoder with its networks evaluated so."""

    def change(path: tuple, node: Any) -> Any:
        if not _is_network(path, node):
            return node
        node = rematerialised(node) if remat else node
        return in_bfloat16(node) if compute == "bfloat16" else node

    if not remat and compute == "float32":
        return part
    return jax.tree_util.tree_map_with_path(change, part, is_leaf=_is_network, is_leaf_takes_path=True)


def has_network(part: Any) -> bool:
    """Whether a denoiser or an encoder has a network."""
    found = jax.tree_util.tree_leaves_with_path(part, is_leaf=_is_network, is_leaf_takes_path=True)
    return any(_is_network(path, node) for path, node in found)


def _is_network(path: tuple, node: Any) -> bool:
    return bool(path) and getattr(path[-1], "name", None) == "network"


def _is_block(node: Any) -> bool:
    return isinstance(node, AbstractBlock)


class _Again(eqx.Module):
    """A function that is computed again for its gradient."""

    function: Callable

    def __call__(self, *inputs: Any) -> Any:
        return eqx.filter_checkpoint(self.function)(*inputs)


class _Rounded(eqx.Module):
    """A network in bfloat16."""

    network: Callable

    def __call__(self, x: Array, *others: Any) -> Array:
        def is_embedding(node: Any) -> bool:
            return isinstance(node, AbstractEmbedding)

        def rounded(node: Any) -> Any:
            if is_embedding(node):
                return _RoundedEmbedding(node)
            inexact = eqx.is_array(node) and jnp.issubdtype(node.dtype, jnp.floating)
            return node.astype(jnp.bfloat16) if inexact else node

        network = jax.tree.map(rounded, self.network, is_leaf=is_embedding)
        return network(x.astype(jnp.bfloat16), *others).astype(x.dtype)


class _RoundedEmbedding(eqx.Module):
    """An embedding of which the result alone is rounded."""

    embedding: Callable

    def __call__(self, *inputs: Any) -> Array:
        return self.embedding(*inputs).astype(jnp.bfloat16)
