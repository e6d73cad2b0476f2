"""Floating-point operations of the matrix products of a network, counted from its layers; a convolution is a product.

The least that each step can do, in passes through a network: one forward; two backward, for weights and inputs. A
guided training step passes the encoder three times at the clean end (the posterior: forward, backward), and six times
at the noisy one: forward and backward for the guidance, and two passes back through each of these two. What a
program does beyond that is waste, and counts against its share of the ceiling.
"""

import math
from typing import Any

import equinox as eqx
import jax

from sami_ppl.nn import DiT, HalfUNet, ResidualMLP, UNet, ViT
from sami_ppl.nn.convolution import Conv
from sami_ppl.nn.unet import ConvBlock, Down
from sami_ppl.program.program import Program

FORWARD, TRAINING, GUIDANCE, GUIDED_TRAINING = 1, 3, 2, 9
PASSES = {  # step → passes through the denoiser and through the encoder
    "plain": (TRAINING, 0),
    "encoder": (FORWARD, GUIDED_TRAINING),
    "decoupled": (TRAINING, GUIDED_TRAINING),
    "joint": (TRAINING, GUIDED_TRAINING),
    "sampling": (FORWARD, 0),
    "guided sampling": (FORWARD, GUIDANCE),
    "encoding": (0, FORWARD),
}


def step_products(program: Program, step: str, batch: int) -> float:
    """Operations in the matrix products of a step, named as in `cases.steps_of`."""
    denoiser, encoder = PASSES[step.split(",")[0]]
    inner, outer = (forward_products(part.network, program.event_shape) for part in (program.denoiser, program.encoder))
    heads = _products(program.encoder.loc) + _products(program.encoder.log_scale)
    return batch * (denoiser * inner + encoder * (outer + heads))


def forward_products(network: Any, shape: tuple[int, ...]) -> float:
    """Operations in the matrix products of one forward pass on one observation."""
    if isinstance(network, ResidualMLP):
        return _products(network)
    if isinstance(network, DiT | ViT):
        return _transformer(network)
    if not isinstance(network, UNet | HalfUNet):
        raise TypeError(f"no count for {type(network).__name__}: add its layers here")
    sides = [shape[-1] // network.patch // 2**level for level in range(len(network.down.levels))]
    total = _products(network.embedding) + _down(network.down, sides)
    if isinstance(network, HalfUNet):
        return total + _products(network.exit)
    total += _map(network.middle, sides[-1]) + _map(network.exit, sides[0])
    return total + sum(_map(block, side) for block, side in zip(network.up, reversed(sides), strict=True))


def _transformer(network: DiT | ViT) -> float:
    """Layers of a token once for each, the two products of attention, and what there is once for all tokens."""
    tokens, width = network.positions.shape
    each = [network.entry, [(block.attend, block.out, block.inner, block.outer) for block in network.blocks]]
    once = [network.embedding, [block.modulate for block in network.blocks]]
    each, once = (
        ([*each, network.narrow], [*once, network.exit])
        if isinstance(network, ViT)
        else ([*each, network.exit.linear], [*once, network.exit.modulate])
    )
    return tokens * _products(each) + len(network.blocks) * 4 * tokens**2 * width + _products(once)


def _down(down: Down, sides: list[int]) -> float:
    blocks = sum(_map(block, side) for level, side in zip(down.levels, sides, strict=True) for block in level)
    return blocks + _map(down.entry, sides[0])


def _map(layer: ConvBlock | Conv, side: int) -> float:
    """Of a layer on a map of side × side places; its modulation by the noise level is one product for all places."""
    if isinstance(layer, Conv):
        return 2 * layer.weight.size * side**2
    skip = 0 if layer.skip is None else 2 * layer.skip.size * side**2
    return _map(layer.conv1, side) + _map(layer.conv2, side) + skip + _products(layer.film)


def _products(tree: Any) -> float:
    """Of every matrix in the tree, applied to one vector."""
    return sum(2 * math.prod(leaf.shape) for leaf in jax.tree.leaves(tree) if eqx.is_array(leaf) and leaf.ndim == 2)
