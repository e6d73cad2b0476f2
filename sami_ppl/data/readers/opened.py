"""What a reader opens without reading it: the source of a stream, and files that must stay as they are."""

from collections.abc import Iterable
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sami_ppl.data.stream import Source


class Opened(NamedTuple):
    """A source, how its rows lie together, which are for testing, and which of them are taken; None, all."""

    source: Source
    chunks: int | list[int] = 1
    test: np.ndarray | None = None
    kept: np.ndarray | None = None


Stamp = tuple[int, int]


def stamp(file: str | Path) -> Stamp | None:
    """When a file was written, in nanoseconds, and how many bytes it has; None where there is none."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


class Files:
    """Files as they are when they are opened, by their names in a folder."""

    def __init__(self, folder: Path, names: Iterable[str]):
        self.folder = str(folder)
        self.stamps = {name: found for name in names if (found := stamp(os.path.join(self.folder, name))) is not None}

    def check(self, names: Iterable[str]) -> None:
        """Raise ValueError where one of these files is not what it was, by name."""
        for name in names:
            if (found := stamp(os.path.join(self.folder, name))) != self.stamps.get(name):
                what = "is gone" if found is None else "has been written to"
                raise ValueError(
                    f"{name} in {self.folder} {what} since it was opened: put back what was there, then go on with "
                    "resume=True; or begin another fit"
                )
