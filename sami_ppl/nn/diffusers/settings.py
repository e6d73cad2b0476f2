"""Settings of networks of Hugging Face diffusers, and which of them are supported."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol

# Block type → whether it has attention, and how it changes the resolution; None: as the settings say.
DOWN = {
    "DownBlock2D": (False, "conv"), "AttnDownBlock2D": (True, None), "ResnetDownsampleBlock2D": (False, "resnet")
}  # fmt: skip
UP = {"UpBlock2D": (False, "conv"), "AttnUpBlock2D": (True, None), "ResnetUpsampleBlock2D": (False, "resnet")}
# Settings that change nothing of a trained network as it is used here.
IDLE = {"dropout", "num_train_timesteps"}


class BlockSettings(Protocol):
    """What the blocks of a U-Net are told, with the names that diffusers has for it. `embedding`: None for none."""

    @property
    def block_out_channels(self) -> tuple[int, ...]: ...
    @property
    def layers_per_block(self) -> int: ...
    @property
    def down_block_types(self) -> tuple[str, ...]: ...
    @property
    def downsample_padding(self) -> int: ...
    @property
    def downsample_type(self) -> str: ...
    @property
    def norm_num_groups(self) -> int: ...
    @property
    def norm_eps(self) -> float: ...
    @property
    def attn_norm_num_groups(self) -> int | None: ...
    @property
    def attention_head_dim(self) -> int | None: ...
    @property
    def add_attention(self) -> bool: ...
    @property
    def mid_block_scale_factor(self) -> float: ...
    @property
    def resnet_time_scale_shift(self) -> str: ...
    @property
    def embedding(self) -> int | None: ...


@dataclass(frozen=True)
class UNet2DSettings:
    """Settings of a `UNet2DModel`, with the names, meanings and defaults of diffusers; `sample_size` as (h, w)."""

    sample_size: tuple[int, int]
    in_channels: int = 3
    center_input_sample: bool = False
    time_embedding_dim: int | None = None
    freq_shift: float = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    mid_block_scale_factor: float = 1.0
    downsample_padding: int = 1
    downsample_type: Literal["conv", "resnet"] = "conv"
    upsample_type: Literal["conv", "resnet"] = "conv"
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    add_attention: bool = True

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "UNet2DSettings":
        """The settings of a `config.json`. Raises ValueError, with its name, for what is not supported."""
        fixed = {
            "time_embedding_type": ("positional",), "act_fn": ("silu", "swish"), "class_embed_type": (None,),
            "num_class_embeds": (None,), "mid_block_type": ("UNetMidBlock2D", None),
            "resnet_time_scale_shift": ("default", "scale_shift"), "downsample_type": ("conv", "resnet"),
            "upsample_type": ("conv", "resnet"), "downsample_padding": (0, 1),
            "out_channels": (config.get("in_channels", 3),),
        }  # fmt: skip
        found = supported(cls, config, fixed, IDLE)
        for name in ("down_block_types", "up_block_types"):  # with a prefix in the oldest checkpoints
            found[name] = tuple(block.removeprefix("UNetRes") for block in found.get(name, getattr(cls, name)))
        size = found.get("sample_size")
        if size is None:
            raise ValueError(
                'the network names no size of its images: write "sample_size": 32, or another, in its config.json'
            )
        found["sample_size"] = size if isinstance(size, tuple) else (size, size)
        settings = cls(**found)
        settings._check()
        return settings

    def _check(self) -> None:
        for name, blocks, table in (("down", self.down_block_types, DOWN), ("up", self.up_block_types, UP)):
            if unknown := [block for block in blocks if block not in table]:
                raise ValueError(f"the network has the {name} block {unknown[0]}, supported is {_options(table)}")
            if len(blocks) != len(self.block_out_channels):
                raise ValueError(
                    f"the network has {len(blocks)} {name} blocks of {len(self.block_out_channels)} widths"
                )
        unit = 2 ** (len(self.block_out_channels) - 1)
        if any(side % unit for side in self.sample_size):
            raise ValueError(f"the network halves images of {self.sample_size} pixels, no multiples of {unit}")
        if not isinstance(self.norm_num_groups, int):
            raise ValueError(f"the network has norm_num_groups = {self.norm_num_groups!r}, supported is a number")

    @property
    def embedding(self) -> int:
        """Length of the embedding of the time step."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]


def supported(cls: Any, config: Mapping[str, Any], fixed: Mapping[str, tuple], idle: set[str]) -> dict[str, Any]:
    """The values of a `config.json` that a class of settings has, lists as tuples.

    Raises ValueError, with its name, for a value that is none of those that `fixed` allows, and for a setting that is
    neither known nor among the `idle` ones, unless it is turned off.
    """
    for name, allowed in fixed.items():
        if name in config and config[name] not in allowed:
            raise ValueError(f"the network has {name} = {config[name]!r}, supported is {_options(allowed)}")
    known = {field.name for field in fields(cls)}
    for name, value in config.items():
        if name not in known and name not in fixed and name not in idle and name[0] != "_" and value:
            raise ValueError(f"the network has the setting {name} = {value!r}, which is not known here")
    return {name: tuple(v) if isinstance(v := config[name], list) else v for name in known & config.keys()}


def _options(allowed: Any) -> str:
    return " or ".join(map(repr, allowed))
