"""Variables of a prior that number the rows of a table, as `means[u]` does: a label outside would take another's row.

JAX takes the last row for a number beyond the end and counts negative ones from behind, so that a class that the table
does not know gets the law of another one, and every figure of it is silently wrong.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal  # pyright: ignore[reportPrivateImportUsage]
import numpy as np

SAME = {"broadcast_in_dim", "convert_element_type", "copy", "reshape", "squeeze", "expand_dims", "transpose"}
"""What hands numbers on as they are."""

Columns = tuple[str | None, ...]
"""Of an index, by column, for `table[u, v]`: the name of a variable; with a `+`, which negative ones get from JAX, the
variable and a number more; None for what is neither."""


def table_rows(function: Callable[[dict[str, Any]], Any], given: Mapping[str, Any]) -> dict[str, int]:
    """The number of rows of the table, the smallest of several, that a variable of `given` is the row of.

    Found in the computation. Variables that are computed with before, as in `means[u + 1]`, number no rows.
    """
    jaxpr = jax.make_jaxpr(lambda given: jax.tree.leaves(function(given)))(dict(given))
    found: dict[str, int] = {}
    _follow(jaxpr.jaxpr, [(name,) for name in sorted(given)], found)
    return found


def check_lookups(given: Mapping[str, Any], rows: Mapping[str, int]) -> None:
    """Raise ValueError for a variable with labels outside its table; values that are being traced are not looked at."""
    for name, count in rows.items():
        if name not in given or isinstance(given[name], Tracer):
            continue
        labels = np.trunc(given[name])
        if len(outside := np.flatnonzero((labels < 0) | (labels >= count))):
            where = tuple(map(int, np.unravel_index(outside[0], labels.shape)))
            raise ValueError(
                f"{name!r}, by which the prior looks up the rows 0 … {count - 1} of a table, is "
                f"{np.asarray(given[name])[where]} at observation {where[0]}, the first of {len(outside)} outside: "
                f"leave these out, data.isel(obs=({name} >= 0) & ({name} < {count})), or give every class a row"
            )


def _follow(jaxpr: Jaxpr, inputs: list[Columns], found: dict[str, int]) -> list[Columns]:
    """What every output is, for that of every input; fills `found`."""
    known: dict[Any, Columns] = dict(zip(jaxpr.invars, inputs, strict=True))

    def columns(value: Any) -> Columns:
        return (None,) if isinstance(value, Literal) else known.get(value, (None,))

    for step in jaxpr.eqns:
        kind, taken = step.primitive.name, [columns(value) for value in step.invars]
        inner = [p for p in step.params.values() if isinstance(p, ClosedJaxpr | Jaxpr)]
        if len(inner) == 1:
            body = inner[0].jaxpr if isinstance(inner[0], ClosedJaxpr) else inner[0]
            if len(body.invars) == len(taken):
                known.update(zip(step.outvars, _follow(body, taken, found), strict=True))
        elif kind in SAME:
            known[step.outvars[0]] = taken[0]
        elif kind == "add":
            known[step.outvars[0]] = _shifted(taken[0])
        elif kind == "select_n" and len(taken) == 3 and taken[2] == _shifted(taken[1]):
            known[step.outvars[0]] = taken[1]
        elif kind == "concatenate":
            known[step.outvars[0]] = tuple(name for part in taken for name in part)
        elif kind == "gather":
            axes = step.params["dimension_numbers"].start_index_map
            _note(taken[1], [_shape(step.invars[0])[axis] for axis in axes], found)
        elif kind == "dynamic_slice":
            _note(tuple(name for part in taken[1:] for name in part), _shape(step.invars[0]), found)
    return [columns(value) for value in jaxpr.outvars]


def _shape(value: Any) -> tuple[int, ...]:
    return value.aval.shape


def _shifted(columns: Columns) -> Columns:
    return tuple(None if name is None or name.endswith("+") else f"{name}+" for name in columns)


def _note(columns: Columns, sizes: Sequence[int], found: dict[str, int]) -> None:
    if len(columns) != len(sizes):
        return
    for name, size in zip(columns, sizes, strict=True):
        if name is not None and not name.endswith("+"):
            found[name] = min(size, found.get(name, size))
