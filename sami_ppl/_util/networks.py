"""Networks that users hand over: called without computing anything, for the shape of what they put out."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def output_shape(
    network: Callable, *shapes: tuple[int, ...] | None, of: str, call: str = "network(x, log_snr)"
) -> tuple[int, ...]:
    """Shape of a network's output for inputs of these shapes, None for an input that is None.

    `of`: the part of the program that it is of, and `call`, how it is called, for messages. Raises ValueError where the
    network fails, or puts out anything but one array.
    """
    inputs = [None if shape is None else jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    asked = f"inputs of shape {', '.join(map(str, shapes))}"
    try:
        out = jax.eval_shape(lambda *inputs: network(*inputs), *inputs)
    except Exception as error:
        raise ValueError(
            f"the {of} network failed on {asked}: {error}\nIt is called as {call}, for a single observation"
        ) from error
    if not isinstance(out, jax.ShapeDtypeStruct):
        raise ValueError(f"the {of} network must put out one array for {asked}, got {type(out).__name__}: take it out")
    return out.shape
