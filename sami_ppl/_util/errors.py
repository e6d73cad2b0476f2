"""Mistakes of the user's, told from bugs: what a command answers with one message, and what with a trace."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
import gc
import logging
import sys
import threading
import time

LATE = 0.3
"""Seconds that threads of a call that has failed are given to end."""


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

    Of files that are damaged or cannot be written, readers and writers raise nearly anything, and their threads, event
    loops and half-made objects complain on stderr too, when they are given up. The error comes without the frames that
    would keep these.
    """
    logs, hooks = [logging.getLogger(name) for name in ("absl", "asyncio")], (sys.unraisablehook, sys.excepthook)
    before, threads = [log.disabled for log in logs], set(threading.enumerate())
    try:
        for log in logs:
            log.disabled = True
        sys.unraisablehook = lambda unraisable: None
        sys.excepthook = lambda *error: None  # C++ calls it in its threads
        try:
            return call(), None
        except Exception as error:
            found = error
        link: BaseException | None = found
        while link is not None:
            link.__traceback__ = None
            link = link.__cause__ or link.__context__
        if late := set(threading.enumerate()) - threads:
            for thread in late:
                threading.Thread.join(thread, LATE)  # those of orbax raise what they have met in their own
            time.sleep(LATE)  # those of C++ cannot be waited for
        gc.collect(1)  # what was made lately: a whole collection takes long
        return None, found
    finally:
        sys.unraisablehook, sys.excepthook = hooks
        for log, disabled in zip(logs, before, strict=True):
            log.disabled = disabled
