"""The library's networks in PyTorch, written as PyTorch is written: channels first, batched, its own layers.

Parameters carry the names of the library's, so that weights go back and forth by name. It needs PyTorch and NumPy only.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

UNIT = 64
"""Weights stored as integers are in units of 1/64."""


class NoiseEmbedding(nn.Module):
    def __init__(self, features: int, size: int):
        super().__init__()
        frequencies = 2 * np.pi / np.geomspace(120.0, 3.0, features // 2)
        self.register_buffer("frequencies", torch.tensor(frequencies))
        self.hidden, self.out = nn.Linear(features, size), nn.Linear(size, size)

    def forward(self, log_snr: Tensor) -> Tensor:
        phase = log_snr[:, None] * self.frequencies
        features = torch.cat([phase.sin(), phase.cos()], -1)
        return functional.silu(self.out(functional.silu(self.hidden(features))))


def group_norm(channels: int) -> nn.GroupNorm:
    groups = next(g for g in range(min(8, channels), 0, -1) if channels % g == 0)
    return nn.GroupNorm(groups, channels, eps=1e-5)


def conv3x3(c_in: int, c_out: int) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, padding=1)


class ConvBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, embedding: int):
        super().__init__()
        self.norm1, self.norm2 = group_norm(c_in), group_norm(c_out)
        self.conv1, self.conv2 = conv3x3(c_in, c_out), conv3x3(c_out, c_out)
        self.film = nn.Linear(embedding, 2 * c_out)
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1, bias=False)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        inner = self.norm2(self.conv1(functional.silu(self.norm1(h))))
        gain, bias = self.film(embedding)[:, :, None, None].chunk(2, 1)
        return self.skip(h) + self.conv2(functional.silu((1 + gain) * inner + bias))


class Down(nn.Module):
    def __init__(self, c_in: int, widths: list[int], embedding: int):
        super().__init__()
        self.entry = conv3x3(c_in, widths[0])
        before = [widths[0], *widths[:-1]]
        self.levels = nn.ModuleList(
            nn.ModuleList([ConvBlock(a, b, embedding)]) for a, b in zip(before, widths, strict=True)
        )

    def forward(self, h: Tensor, embedding: Tensor) -> list[Tensor]:
        h, maps = self.entry(h), []
        for i, level in enumerate(self.levels):
            h = functional.avg_pool2d(h, 2) if i else h
            for block in level:
                h = block(h, embedding)
            maps.append(h)
        return maps


def to_patches(x: Tensor, p: int) -> Tensor:
    b, c, h, w = x.shape
    return x.reshape(b, c, h // p, p, w // p, p).permute(0, 3, 5, 1, 2, 4).reshape(b, p * p * c, h // p, w // p)


def from_patches(x: Tensor, p: int) -> Tensor:
    b, ppc, h, w = x.shape
    return x.reshape(b, p, p, ppc // p**2, h, w).permute(0, 3, 4, 1, 5, 2).reshape(b, ppc // p**2, h * p, w * p)


class UNet(nn.Module):
    def __init__(self, shape: list[int], widths: list[int], patch: int, embedding: int = 128):
        super().__init__()
        channels, self.patch = shape[0] * patch**2, patch
        self.embedding = NoiseEmbedding(32, embedding)
        self.down = Down(channels, widths, embedding)
        self.middle = ConvBlock(widths[-1], widths[-1], embedding)
        below = [*widths[1:], widths[-1]]
        self.up = nn.ModuleList(
            ConvBlock(below[i] + widths[i], widths[i], embedding) for i in reversed(range(len(widths)))
        )
        self.norm, self.exit = group_norm(widths[0]), conv3x3(widths[0], channels)

    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        embedding = self.embedding(log_snr)
        maps = self.down(to_patches(x, self.patch), embedding)
        h = self.middle(maps[-1], embedding)
        for i, (block, skip) in enumerate(zip(self.up, reversed(maps), strict=True)):
            h = functional.interpolate(h, scale_factor=2, mode="nearest") if i else h
            h = block(torch.cat([h, skip], 1), embedding)
        return from_patches(self.exit(functional.silu(self.norm(h))), self.patch)


class HalfUNet(nn.Module):
    def __init__(self, shape: list[int], out: int, widths: list[int], patch: int, embedding: int = 128):
        super().__init__()
        self.patch = patch
        self.embedding = NoiseEmbedding(32, embedding)
        self.down = Down(shape[0] * patch**2, widths, embedding)
        self.norm = group_norm(widths[-1])
        side = shape[-1] // patch // 2 ** (len(widths) - 1)
        self.exit = nn.Linear(widths[-1] * side**2, out)

    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        bottom = self.down(to_patches(x, self.patch), self.embedding(log_snr))[-1]
        return self.exit(functional.silu(self.norm(bottom)).permute(0, 2, 3, 1).flatten(1))


class ResidualBlock(nn.Module):
    def __init__(self, width: int, embedding: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width)
        self.film = nn.Linear(embedding, 2 * width)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        gain, bias = self.film(embedding).chunk(2, -1)
        return h + self.outer(functional.silu((1 + gain) * self.inner(self.norm(h)) + bias))


class ResidualMLP(nn.Module):
    def __init__(self, shape: list[int], out: list[int], width: int, depth: int, embedding: int = 128):
        super().__init__()
        self.out_shape = out
        self.embedding = NoiseEmbedding(32, embedding)
        self.entry, self.exit = nn.Linear(math.prod(shape), width), nn.Linear(width, math.prod(out))
        self.blocks = nn.ModuleList(ResidualBlock(width, embedding) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        embedding, h = self.embedding(log_snr), self.entry(x.flatten(1))
        for block in self.blocks:
            h = block(h, embedding)
        return self.exit(functional.silu(self.norm(h))).reshape(-1, *self.out_shape)


class TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int, embedding: int, fused: bool):
        super().__init__()
        self.modulate = nn.Linear(embedding, 6 * width)
        self.attend, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.inner, self.outer = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads, self.fused = heads, fused

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        gain, shift, gate, gain2, shift2, gate2 = self.modulate(embedding)[:, None].chunk(6, -1)
        h = h + gate * self.attention((1 + gain) * token_norm(h) + shift)
        inner = self.inner((1 + gain2) * token_norm(h) + shift2)
        return h + gate2 * self.outer(functional.gelu(inner, approximate="tanh"))

    def attention(self, h: Tensor) -> Tensor:
        """PyTorch's fused attention has no second derivative: the encoder's is written out."""
        batch, tokens, width = h.shape
        queries, keys, values = self.attend(h).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.fused:
            found = functional.scaled_dot_product_attention(queries, keys, values)
        else:
            scaled = queries * (width // self.heads) ** -0.5
            found = torch.softmax(scaled @ keys.transpose(-1, -2), -1) @ values
        return self.out(found.transpose(1, 2).reshape(batch, tokens, width))


def token_norm(h: Tensor) -> Tensor:
    return functional.layer_norm(h, h.shape[-1:], eps=1e-5)


class TransformerExit(nn.Module):
    def __init__(self, width: int, out: int, embedding: int):
        super().__init__()
        self.modulate, self.linear = nn.Linear(embedding, 2 * width), nn.Linear(width, out)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        gain, shift = self.modulate(embedding)[:, None].chunk(2, -1)
        return self.linear((1 + gain) * token_norm(h) + shift)


class DiT(nn.Module):
    def __init__(self, shape: list[int], width: int, depth: int, heads: int, patch: int, *, fused: bool = True):
        super().__init__()
        channels, self.patch, self.embedding = shape[0] * patch**2, patch, NoiseEmbedding(32, 128)
        self.entry, self.places = nn.Linear(channels, width), [side // patch for side in shape[1:]]
        self.positions = nn.Parameter(torch.zeros(math.prod(self.places), width))
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, 128, fused) for _ in range(depth))
        self.exit: nn.Module = TransformerExit(width, channels, 128)

    def tokens(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.entry(to_patches(x, self.patch).flatten(2).transpose(1, 2)) + self.positions
        for block in self.blocks:
            h = block(h, embedding)
        return h

    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        embedding = self.embedding(log_snr)
        found = self.exit(self.tokens(x, embedding), embedding)
        return from_patches(found.transpose(1, 2).reshape(len(x), -1, *self.places), self.patch)


class ViT(DiT):
    def __init__(self, shape: list[int], out: int, width: int, depth: int, heads: int, patch: int):
        super().__init__(shape, width, depth, heads, patch, fused=False)
        self.narrow, self.exit = nn.Linear(width, 32), nn.Linear(len(self.positions) * 32, out)

    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        narrow = self.narrow(token_norm(self.tokens(x, self.embedding(log_snr))))
        return self.exit(functional.gelu(narrow, approximate="tanh").flatten(1))


def network(size: dict[str, Any]) -> nn.Module:
    """From what `export_weights` writes down of a network."""
    size = dict(size)
    kinds = {"UNet": UNet, "HalfUNet": HalfUNet, "ResidualMLP": ResidualMLP, "DiT": DiT, "ViT": ViT}
    return kinds[size.pop("kind")](**size)


def named(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the library's names."""
    found = {}
    for owner, part in module.named_modules():
        for leaf, parameter in part.named_parameters(recurse=False):
            leaf = "gain" if isinstance(part, nn.GroupNorm) and leaf == "weight" else leaf
            found[owner if owner.endswith("skip") else f"{owner}.{leaf}"] = parameter
    return found


def load(module: nn.Module, arrays: dict[str, np.ndarray], dtype: torch.dtype) -> nn.Module:
    """The module with the library's arrays in place of its parameters; every name must match."""
    module = module.to(dtype)
    parameters = named(module)
    if parameters.keys() != arrays.keys():
        raise KeyError(f"parameters that do not match: {sorted(parameters.keys() ^ arrays.keys())}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            array = arrays[name] / UNIT if arrays[name].dtype == np.int8 else arrays[name]
            parameter.copy_(_to_theirs(torch.tensor(array, dtype=dtype), parameter.shape))
    return module


def _to_theirs(array: Tensor, shape: torch.Size) -> Tensor:
    """A convolution's kernel from (rows · columns · in, out) to (out, in, rows, columns)."""
    return array if len(shape) < 4 else array.reshape(*shape[2:], *shape[1::-1]).permute(3, 2, 0, 1)


def to_ours(array: Tensor) -> Tensor:
    """The inverse: (out, in, rows, columns) to (rows · columns · in, out)."""
    return array if array.ndim < 4 else array.permute(2, 3, 1, 0).reshape(-1, array.shape[0])
