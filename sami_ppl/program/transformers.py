"""Transformers for a program of images: which sizes suit an image, and the networks of each decoder."""

from collections.abc import Callable, Mapping
import math
from typing import Any

from jaxtyping import Array, Key

from sami_ppl.nn import AscendingDiT, DiT, ViT

SIZES = ((20, 2, 48, 4), (72, 4, 64, 6), (160, 8, 192, 4), (math.inf, 16, 192, 4))
"""Up to this many pixels a side: pixels of a patch, width, depth. Steps then cost about what those of the U-Net do."""


def transformer_size(shape: tuple[int, ...]) -> dict[str, Any]:
    """Width, depth and patch for images (channels, rows, columns); of unequal sides their geometric mean counts.

    Raises ValueError for observations that are no images.
    """
    if len(shape) != 3:
        raise ValueError(
            f"network='dit' takes images (obs, channels, rows, columns), one of these has shape {shape}: write "
            "network='mlp', or reshape the data"
        )
    _, patch, width, depth = next(row for row in SIZES if math.sqrt(shape[1] * shape[2]) <= row[0])
    return {"width": width, "depth": depth, "patch": patch}


def transformers(
    shape: tuple[int, ...], inner: tuple[int, ...], size: Mapping[str, Any], features: int, *, decoder: str, code: int,
    sees: bool, keys: tuple[Key[Array, ""], Key[Array, ""]],
) -> tuple[tuple[Callable, Callable], dict[str, Any]]:  # fmt: skip
    """A pair (denoiser network, encoder trunk) for a kind of decoder, and the sizes that it has.

    The encoder has a third as many blocks, rounded up: a guided step passes it nine times. Warm starts give it the
    denoiser's first ones. `inner`: the shape that networks are given, with channels that say what is seen where there
    are such. `code`: how many numbers it has; `sees`: whether the encoder knows the noise level.

    Raises ValueError for sizes that transformers do not take, and what `transformer_size` raises.
    """
    chosen = {**transformer_size(shape), **size}
    condition: Any = {"condition": code} if decoder == "conditioned" else {}
    try:
        denoiser = (
            AscendingDiT(code, shape, **chosen, key=keys[0])
            if decoder == "gaussian"
            else DiT(inner, **chosen, **condition, out_channels=shape[0], key=keys[0])
        )
        fewer = {**chosen, "depth": -(-chosen["depth"] // 3)}
        return (denoiser, ViT(inner, (features,), **fewer, noise=sees, key=keys[1])), chosen
    except TypeError as error:
        raise ValueError(
            f"size holds {', '.join(size)}, a transformer takes width, depth, heads and patch: {error}"
        ) from error
