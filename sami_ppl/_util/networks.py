"""Networks that users hand over: called without computing anything, for the shape of what they put out."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def output_shape(
    network: Callable, event_shape: tuple[int, ...], *, of: str, sees_noise: bool = True
) -> tuple[int, ...]:
    """Shape of a network's output for one observation and its log signal-to-noise ratio, None with `sees_noise=False`.

    `of`: the part of the program that it is of, for messages. Raises ValueError where the network fails, or puts out
    anything but one array.
    """
    x = jax.ShapeDtypeStruct(event_shape, jnp.float32)
    log_snr = jax.ShapeDtypeStruct((), jnp.float32) if sees_noise else None
    call = f"one observation of shape {event_shape}{'' if sees_noise else ' with log_snr=None'}"
    try:
        out = jax.eval_shape(lambda x, log_snr: network(x, log_snr), x, log_snr)
    except Exception as error:
        raise ValueError(
            f"the {of} network failed on {call}: {error}\nIt is called as network(x, log_snr), for a single observation"
        ) from error
    if not isinstance(out, jax.ShapeDtypeStruct):
        raise ValueError(f"the {of} network must put out one array for {call}, got {type(out).__name__}: take it out")
    return out.shape
