"""Where a program came from."""

from typing import NamedTuple


class Origin(NamedTuple):
    """The program file that built a program, its configuration as JSON text, and its text as it was then."""

    file: str
    config: str
    source: str
