"""Plain tables for terminals, and the same in notebooks."""

from collections.abc import Sequence
import html


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
