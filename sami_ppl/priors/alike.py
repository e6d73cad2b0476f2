"""Priors that are written alike are one: a notebook's cell that is run again compiles nothing again.

Compiled functions are kept by the prior that they are of. A function that is defined anew is another object, though
nothing of it has changed; here the first one with the same code and the same values stands for it.
"""

import functools
from types import CodeType, FunctionType
from typing import Any

import jax
from jax.core import Tracer
import numpy as np

LARGEST = 2**20
"""Bytes of an array that is compared by its numbers; larger ones are the same if they are one object."""


def first_alike(prior: Any) -> Any:
    """The first of the functions, defined in one place, that have the code and values of `prior`; else itself."""
    if not isinstance(prior, FunctionType):
        return prior
    content = _Content(prior)
    first = _first(content)
    # Of the first one a variable of the function around it may have changed since.
    return first if first is prior or _Content(first) == content else prior


class _Content:
    """What a function is made of, to be compared."""

    def __init__(self, function: FunctionType):
        self.function, self.parts = function, _parts(function, function.__globals__, ())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Content) and self.parts == other.parts

    def __hash__(self) -> int:
        return hash(self.parts)


@functools.lru_cache(maxsize=128)
def _first(content: _Content) -> FunctionType:
    return content.function


class _Object:
    """A value that is equal to itself alone."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Object) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _parts(value: Any, place: dict[str, Any], inside: tuple[Any, ...]) -> Any:
    """A value as something that is equal where it is alike; `place`: the globals of functions that are looked into."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return type(value), repr(value)
    if isinstance(value, tuple | list):
        return type(value), tuple(_parts(part, place, inside) for part in value)
    if isinstance(value, dict):
        return dict, tuple((_parts(k, place, inside), _parts(v, place, inside)) for k, v in value.items())
    if _is_small_array(value):
        return np.ndarray, type(value), value.shape, str(value.dtype), np.asarray(value).tobytes()
    if isinstance(value, FunctionType) and value.__globals__ is place:
        if value in inside:
            return "recursive", inside.index(value)
        inside = (*inside, value)
        used = {name: place[name] for name in _names(value.__code__) if name in place}
        held = (_cells(value), value.__defaults__, value.__kwdefaults__, used)
        return value.__code__, _Object(place), *(_parts(part, place, inside) for part in held)
    return _Object(value)


def _is_small_array(value: Any) -> bool:
    array = isinstance(value, np.ndarray | jax.Array) and not isinstance(value, Tracer)
    return array and value.dtype.kind in "biufc" and value.nbytes <= LARGEST


def _cells(function: FunctionType) -> tuple[Any, ...]:
    """Values of the function around; a variable that has none yet is only like itself."""
    cells = []
    for cell in function.__closure__ or ():
        try:
            cells.append(cell.cell_contents)
        except ValueError:
            cells.append(cell)
    return tuple(cells)


def _names(code: CodeType) -> tuple[str, ...]:
    inner = [name for part in code.co_consts if isinstance(part, CodeType) for name in _names(part)]
    return tuple(dict.fromkeys([*code.co_names, *inner]))
