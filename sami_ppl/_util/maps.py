"""Memory maps of the process, of which every compiled function holds some and Linux allows 65,530 by default."""

from pathlib import Path

import jax

MAPS, LIMIT = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")


def forget_if_many(share: float = 0.5) -> bool:
    """Forget what JAX has compiled where the process holds more than this share of the maps that it may have.

    Whole runs of some six programs of different structure would end in a crash of the process without a word; what is
    forgotten is compiled again when it is needed. Returns whether it was; never on systems without such a limit.
    """
    if not (MAPS.exists() and LIMIT.exists()):
        return False
    many = MAPS.read_bytes().count(b"\n") > share * int(LIMIT.read_text())
    if many:
        jax.clear_caches()
    return many
