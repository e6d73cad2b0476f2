"""What people see while they wait: a line for every phase, with the time it took, and bars where a loop has steps.

Who begins something long opens `telling`; within it `say` and `phase` write, in whatever function they stand, and
elsewhere they are silent. All of it goes to stderr, so that stdout has results alone.
"""

from collections.abc import Iterator
import contextlib
from contextvars import ContextVar
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm

_TELLING: ContextVar[bool] = ContextVar("telling", default=False)
COMPILING = "compiling"
SHARES_EVERY = 10.0
"""Seconds between two shares that a phase writes of what it has done."""


class _Line:
    """The line of a phase that is not finished. `broken`: something else was written after it."""

    def __init__(self, text: str):
        self.text, self.broken, self.began = text, False, time.monotonic()
        self.share, self.share_at = 0.0, self.began + SHARES_EVERY


_unfinished: list[_Line] = []


@contextlib.contextmanager
def telling(show: bool) -> Iterator[None]:
    """Within this context it is said what is done, or, with `show` False, nothing is, wherever it stands."""
    token = _TELLING.set(show)
    try:
        yield
    finally:
        _TELLING.reset(token)


def say(text: str) -> None:
    """Write a line."""
    if _TELLING.get():
        _write(f"{fresh_line()}{text}\n")


@contextlib.contextmanager
def phase(text: str) -> Iterator[None]:
    """Say what is done when it begins, and how long it took when it ends, in one line: `reading data … 12 s`.

    Where something is written in between, such as a warning or a bar, the time has a line of its own.
    """
    if not _TELLING.get():
        yield
        return
    _write(f"{fresh_line()}{text} … ")
    line = _Line(text)
    _unfinished.append(line)
    try:
        yield
    except BaseException:
        _unfinished.remove(line)
        if not line.broken:
            _write("\n")
        raise
    _unfinished.remove(line)
    took = duration(time.monotonic() - line.began)
    _write(f"{fresh_line()}{text}: {took}\n" if line.broken else f"{took}\n")


def advance(done: int, total: int) -> None:
    """Add to the line of the phase under way how much of it is done, where it has taken a while.

    Of several loops in one phase, a share that is less than one already written is left out.
    """
    line, now = _unfinished[-1] if _unfinished else None, time.monotonic()
    if line is not None and not line.broken and line.share < done / total < 1 and now > line.share_at:
        line.share, line.share_at = done / total, now + SHARES_EVERY
        _write(f"{line.share:.0%} ")


def fresh_line() -> str:
    """What to write before a line of one's own: a line break where the line of a phase is not finished."""
    if not _unfinished or _unfinished[-1].broken:
        return ""
    _unfinished[-1].broken = True
    return "\n"


def duration(seconds: float) -> str:
    """A time in words that are as exact as anyone wants: `0.3 s`, `12 s`, `3 min 20 s`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


@contextlib.contextmanager
def progress_bar(total: int, label: str, *, show: bool | None = None, unit: str = "obs") -> "Iterator[tqdm]":
    """A bar over `total` of a unit; `show`: whether it is seen, default as `telling` says.

    Terminals and notebooks see it move, files get a line every twenty seconds. Up to the first update it says that
    something is compiled, which is what takes so long.
    """
    from tqdm.auto import tqdm

    class Bar(tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            if not self.disable and self.postfix == COMPILING:
                self.postfix = None
                self.unpause()  # else a step would seem to take as long as its compilation
            return super().update(n)

    shown = _TELLING.get() if show is None else show
    if shown:
        sys.stderr.write(fresh_line())
    bar = Bar(total=total, desc=label, disable=not shown, file=sys.stderr, dynamic_ncols=True, unit=unit,
              postfix=COMPILING, mininterval=1.0 if sys.stderr.isatty() or in_notebook() else 20.0)  # fmt: skip
    try:
        yield bar
    finally:
        bar.close()


def in_notebook() -> bool:
    """Whether a notebook's kernel runs this: its bars move in place, as those of a terminal do."""
    return "ipykernel" in sys.modules


def _write(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
