"""Random keys that users hand over."""

from typing import Any

import jax
import jax.numpy as jnp


def check_key(key: Any) -> None:
    """Raise TypeError unless `key` is one random key, `jax.random.key(0)` or the older `PRNGKey(0)`."""
    dtype, shape = getattr(key, "dtype", None), jnp.shape(key) if hasattr(key, "shape") else None
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if (typed and shape == ()) or (dtype == jnp.uint32 and shape is not None and len(shape) == 1):
        return
    if typed:
        raise TypeError(f"key must be one random key, got {shape} of them: write key=keys[0]")
    seed = key if isinstance(key, int) and not isinstance(key, bool) else 0
    raise TypeError(f"key must be a random key, got {key!r}: write key=jax.random.key({seed})")
