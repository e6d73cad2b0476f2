"""Times of several calls taken in turn, so that whatever else the machine does falls on all of them alike."""

from collections.abc import Callable
import os
import platform
import time
from typing import Any

import numpy as np


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int, *, warm: int = 2) -> dict[str, np.ndarray]:
    """Seconds of every call in every round, after `warm` rounds that do not count. A call must block until it is done.

    Each round starts with another call, so that none always follows the same neighbour's caches.
    """
    names = list(calls)
    seconds = {name: np.zeros(rounds) for name in names}
    for index in range(-warm, rounds):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            began = time.perf_counter()
            calls[name]()
            if index >= 0:
                seconds[name][index] = time.perf_counter() - began
    return seconds


def spread(values: np.ndarray) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = np.percentile(values, (25, 50, 75)).tolist()
    return {"median": median, "low": low, "high": high, "samples": len(values)}


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> dict[str, float]:
    """Median and quartiles of the ratios round by round: what slows a whole round cancels."""
    return spread(numerator / denominator)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
