"""Mistakes of the user's, told from bugs: what a command answers with one message, and what with a trace."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
import gc
import logging
import sys


class UserError(ValueError):
    """What was asked for cannot be done; the message names the argument and what to write instead.

    Arguments are named as in Python, `limit=1`, `resume=True`; the command line says `--limit 1`, `--resume`.
    """


@contextmanager
def mistakes(*kinds: type[Exception], prefix: str = "") -> Iterator[None]:
    """Where what the user gave is read or checked: errors of these kinds come out as UserError, in the same words."""
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        raise UserError(f"{prefix}{error}") from error


def attempt[T](call: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """What a call of another library returns, or the error that it raises, without all that is printed beside it.

    Of files that are damaged or cannot be written, readers raise nearly anything, and their threads, event loops and
    half-made objects complain on stderr too, when they are thrown away. The error comes without the frames that would
    keep these.
    """
    logs, hook = [logging.getLogger(name) for name in ("absl", "asyncio")], sys.unraisablehook
    before = [log.disabled for log in logs]
    try:
        for log in logs:
            log.disabled = True
        sys.unraisablehook = lambda unraisable: None
        try:
            return call(), None
        except Exception as error:
            found = error
        link: BaseException | None = found
        while link is not None:
            link.__traceback__ = None
            link = link.__cause__ or link.__context__
        gc.collect(1)  # what was made lately: a whole collection takes long
        return None, found
    finally:
        sys.unraisablehook = hook
        for log, disabled in zip(logs, before, strict=True):
            log.disabled = disabled
