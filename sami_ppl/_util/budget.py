"""Seconds that several estimates share, so that none of them takes the time of the others."""

import time


class Budget:
    """A time for so many parts, one after another: each may take an equal share of what those before it have left.

    `seconds`: None for as long as it takes.
    """

    def __init__(self, seconds: float | None, parts: int):
        self.end, self.parts = None if seconds is None else time.monotonic() + seconds, parts

    def share(self) -> float | None:
        """Seconds of the next part; None for as long as it takes."""
        self.parts = max(self.parts - 1, 0)
        return None if self.end is None else max(0.0, self.end - time.monotonic()) / (self.parts + 1)

    @property
    def spent(self) -> bool:
        """Whether no time is left."""
        return self.end is not None and time.monotonic() >= self.end
