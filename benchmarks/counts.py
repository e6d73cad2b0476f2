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

from sami_ppl.nn import HalfUNet, ResidualMLP, UNet
from sami_ppl.nn.unet import Conv3x3, ConvBlock, Down
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
    if not isinstance(network, UNet | HalfUNet):
        raise TypeError(f"no count for {type(network).__name__}: add its layers here")
    sides = [shape[-1] // network.patch // 2**level for level in range(len(network.down.levels))]
    total = _products(network.embedding) + _down(network.down, sides)
    if isinstance(network, HalfUNet):
        return total + _products(network.exit)
    total += _map(network.middle, sides[-1]) + _map(network.exit, sides[0])
    return total + sum(_map(block, side) for block, side in zip(network.up, reversed(sides), strict=True))


def _down(down: Down, sides: list[int]) -> float:
    blocks = sum(_map(block, side) for level, side in zip(down.levels, sides, strict=True) for block in level)
    return blocks + _map(down.entry, sides[0])


def _map(layer: ConvBlock | Conv3x3, side: int) -> float:
    """Of a layer on a map of side × side places; its modulation by the noise level is one product for all places."""
    if isinstance(layer, Conv3x3):
        return 2 * layer.weight.size * side**2
    skip = 0 if layer.skip is None else 2 * layer.skip.size * side**2
    return _map(layer.conv1, side) + _map(layer.conv2, side) + skip + _products(layer.film)


def _products(tree: Any) -> float:
    """Of every matrix in the tree, applied to one vector."""
    return sum(2 * math.prod(leaf.shape) for leaf in jax.tree.leaves(tree) if eqx.is_array(leaf) and leaf.ndim == 2)
