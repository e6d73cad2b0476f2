"""The machine's own float32 ceilings in GFLOP/s, as XLA reaches them: `python -m benchmarks.ceilings`.

Matrix products: a large square one, the ceiling that shares are taken of, and one as narrow as those of a U-Net's
finest level. Convolutions: 3×3, XLA's own, forward, and backward for input and weight.
"""

import argparse
from collections.abc import Callable
import json
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.timing import interleaved, spread

SQUARE = 1536
ROWS, TAPS, WIDTH = 16384, 288, 32
BATCH, SIDE, CHANNELS = 64, 16, 64


def calls() -> dict[str, tuple[Callable[[], Any], float]]:
    """Name → (blocking call, floating-point operations)."""
    keys = jax.random.split(jax.random.key(0), 7)
    numbers = ("NHWC", "HWIO", "NHWC")

    def convolve(h: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(h, kernel, (1, 1), "SAME", dimension_numbers=numbers)

    def backward(h: jax.Array, kernel: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, ...]:
        return jax.vjp(convolve, h, kernel)[1](cotangent)

    square = jax.random.normal(keys[0], (2, SQUARE, SQUARE))
    tall, narrow = jax.random.normal(keys[1], (ROWS, TAPS)), jax.random.normal(keys[2], (TAPS, WIDTH))
    h = jax.random.normal(keys[3], (BATCH, SIDE, SIDE, CHANNELS))
    kernel = jax.random.normal(keys[4], (3, 3, CHANNELS, CHANNELS))
    cotangent = jax.random.normal(keys[5], h.shape)
    product = 2 * 9 * CHANNELS * h.size
    table = {
        "matrix product": (jnp.matmul, (square[0], square[1]), 2 * SQUARE**3),
        "narrow matrix product": (jnp.matmul, (tall, narrow), 2 * ROWS * TAPS * WIDTH),
        "3x3 convolution, forward": (convolve, (h, kernel), product),
        "3x3 convolution, backward": (backward, (h, kernel, cotangent), 2 * product),
    }

    def call(function: Callable, arguments: tuple) -> Callable[[], Any]:
        compiled = jax.jit(function).lower(*arguments).compile()
        return lambda: jax.block_until_ready(compiled(*arguments))

    return {name: (call(function, arguments), count) for name, (function, arguments, count) in table.items()}


def measure(rounds: int = 20) -> dict[str, dict[str, float]]:
    """GFLOP/s of each, median and quartiles over the rounds."""
    table = calls()
    seconds = interleaved({name: call for name, (call, _) in table.items()}, rounds)
    return {name: spread(table[name][1] / taken / 1e9) for name, taken in seconds.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    print(json.dumps(measure(parser.parse_args().rounds), indent=1))
