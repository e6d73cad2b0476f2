"""Ctrl-C and SIGTERM during a fit: the step under way is finished, and what there is so far is kept."""

from collections.abc import Iterator
from contextlib import contextmanager
import signal
import threading
from types import FrameType

from sami_ppl.program.program import Program


class Interrupted(KeyboardInterrupt):
    """A fit was stopped by Ctrl-C or SIGTERM. `program` holds its best state so far, `signal` the signal's number."""

    def __init__(self, message: str, program: Program, number: int = signal.SIGINT):
        super().__init__(message)
        self.program, self.signal = program, int(number)


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """The numbers of the signals that came, SIGINT or SIGTERM: the first is only noted, a second interrupts at once.

    A handler that the caller has set stays; in other threads than the first none can be set, and none is.
    """
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)

    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    main = threading.current_thread() is threading.main_thread()
    replaced = {n: handler for n, handler in usual.items() if main and signal.getsignal(n) == handler}
    for number in replaced:
        signal.signal(number, note)
    try:
        yield came
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)


@contextmanager
def carries(program: Program) -> Iterator[None]:
    """Around what is done between stages: KeyboardInterrupt comes out as Interrupted, with the program before it."""
    try:
        yield
    except Interrupted:
        raise
    except KeyboardInterrupt as stopped:
        raise Interrupted("interrupted between two stages; .program holds the fit up to there", program) from stopped
