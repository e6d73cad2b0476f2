"""Where a program came from."""

from typing import NamedTuple


class Origin(NamedTuple):
    """The program file that built a program, its configuration as JSON text, its text as it was then, and the data.

    Of the data it holds, as JSON text, what `outline` keeps.
    """

    file: str
    config: str
    source: str
    data: str
