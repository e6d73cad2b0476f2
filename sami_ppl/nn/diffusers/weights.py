"""Weights of a checkpoint of diffusers as those of a network here, by the names that both have."""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np


def with_weights[T: eqx.Module](network: T, weights: Mapping[str, np.ndarray]) -> T:
    """The network with the weights of a checkpoint, in float32. Kernels (out, in, 3, 3) are (9 in, out) here.

    Raises ValueError for weights that are missing, left over, or of another shape.
    """
    wanted = _named(network)
    if different := sorted(wanted.keys() ^ weights.keys()):
        missing = [name for name in different if name in wanted]
        what = "lacks" if missing else "has, beside those of the network,"
        raise ValueError(
            f"the checkpoint {what} {', '.join((missing or different)[:3])}"
            + (", …" if len(missing or different) > 3 else "")
            + ": its config.json is of another network"
        )
    return _filled(network, {name: _as_leaf(weights[name], leaf.shape, name) for name, leaf in wanted.items()})


def with_copies[T: eqx.Module](network: T, of: eqx.Module) -> T:
    """The network with copies of those weights of another that it has too."""
    arrays = _named(of)
    return _filled(network, {name: jnp.array(arrays[name], copy=True) for name in _named(network)})


def check_shape(array: np.ndarray, shape: tuple[int, ...], name: str) -> None:
    """Raise ValueError, with its name, for a weight of another shape than the settings want."""
    if array.shape != shape:
        raise ValueError(f"the checkpoint has {name} of shape {array.shape}, its config.json wants {shape}")


def _as_leaf(array: np.ndarray, shape: tuple[int, ...], name: str) -> Array:
    array = np.asarray(array, np.float32)
    if array.ndim == 4 and array.shape[-1] == 3:
        array = array.transpose(2, 3, 1, 0).reshape(-1, len(array))
    elif array.ndim == 4 and array.shape[-2:] == (1, 1):
        array = array[..., 0, 0]
    check_shape(array, shape, name)
    return jnp.asarray(array)


def _name(path: tuple) -> str:
    """The name in a checkpoint, where gains are weights too."""
    return jax.tree_util.keystr(path, simple=True, separator=".").replace(".gain", ".weight")


def _named(network: eqx.Module) -> dict[str, Any]:
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(network) if hasattr(leaf, "shape")}


def _filled[T: eqx.Module](network: T, arrays: Mapping[str, Array]) -> T:
    def fill(path: tuple, leaf: Any) -> Any:
        return arrays[_name(path)] if hasattr(leaf, "shape") else leaf

    return jax.tree_util.tree_map_with_path(fill, network)
