"""Mistakes of the user's, told from bugs: what a command answers with one message, and what with a trace."""

from collections.abc import Iterator
from contextlib import contextmanager


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
