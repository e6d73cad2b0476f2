"""Plain tables for terminals, and the same in notebooks."""

from collections.abc import Iterator, Mapping, Sequence
import html
from typing import Any


def table(rows: Sequence[Sequence[str]], *, indent: str = "") -> str:
    """Rows of cells, the first one the heads, as lines with aligned columns and no blanks at their ends."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join((indent + line).rstrip() for line in lines)


def few(names: Sequence[str], most: int) -> str:
    """Names joined by commas; of more than `most` the first ones and how many there are."""
    if len(names) <= most:
        return ", ".join(names)
    return ", ".join(names[:most]) + f", … ({len(names)} in all)"


def as_html(text: str) -> str:
    """Plain text as a notebook shows it: escaped, with its columns kept."""
    return f'<pre style="white-space: pre; overflow-x: auto; line-height: 1.3">{html.escape(text)}</pre>'


def readable[T: type](cls: T) -> T:
    """Give a class of results, a named tuple, a short table as what it prints as: a line for each field."""
    printed: Any = cls
    printed.__repr__ = _as_table
    printed._repr_html_ = lambda self: as_html(_as_table(self))
    return cls


def _as_table(result: Any) -> str:
    rows = [row for name in result._fields for row in _rows(name, getattr(result, name))]
    return f"{type(result).__name__}\n{table(rows, indent='  ')}"


def _rows(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _rows(f"{name}[{key}]", inner)
    else:
        yield name, _cell(value)


def _cell(value: Any) -> str:
    """A value in one line: numbers as they are, arrays by shape and range, everything else by its first line."""
    # Here, so that tables of text wait for neither.
    from jax.core import Tracer
    import numpy as np

    if isinstance(value, float):
        return f"{value:.4g}"
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        return repr(value).split("\n")[0]
    text = f"{value.dtype} {tuple(value.shape)}"
    if isinstance(value, Tracer) or value.dtype.kind not in "biuf" or not np.size(value):
        return text
    array = np.asarray(value)
    return f"{text}, mean {array.mean():.4g}, {array.min():.4g} to {array.max():.4g}"
