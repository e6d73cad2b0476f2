"""One process at a time in a folder: a lock of the operating system, which ends with the process that holds it."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
import errno
import os
from pathlib import Path
import stat
import sys

from sami_ppl._util.errors import UserError
from sami_ppl._util.files import sweep

LOCK = ".lock"
"""Name of the file that is locked, inside the folder; it is there while the folder is held."""
UNKNOWN = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
"""What file systems without locks answer."""


if sys.platform == "win32":
    import msvcrt

    def _lock(file: int) -> None:
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)

else:
    from fcntl import LOCK_EX, LOCK_NB, flock

    def _lock(file: int) -> None:
        flock(file, LOCK_EX | LOCK_NB)


@contextmanager
def held(folder: str | Path, name: str = "out") -> Iterator[Path]:
    """The folder, made where it is not there, held by this caller alone; a killed process holds nothing.

    What killed processes have left aside in it goes (`files.sweep`). Folders that were made and stay empty go again.
    `name`: of the argument, for the message. On file systems that know no locks, nothing is held. Raises UserError
    where another process, or another call in this one, holds the folder.
    """
    folder = Path(folder)
    made = [part for part in (folder, *folder.parents) if not part.exists()]
    file = _take(folder, name)
    try:
        sweep(folder)
        yield folder
    finally:
        # While it is held: whoever has opened it meanwhile finds that it is gone, and takes a new one.
        with suppress(OSError):
            (folder / LOCK).unlink(missing_ok=True)
        os.close(file)
        with suppress(OSError):  # up to the first that something was written to
            for part in made:
                part.rmdir()


def _make(folder: Path) -> None:
    """As mkdir, but a folder that another removes while mkdir looks at it is FileNotFoundError, to be tried again."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        if not stat.S_ISDIR(os.lstat(folder).st_mode):  # a file, a device or a link to nothing
            raise


def _take(folder: Path, name: str) -> int:
    path = folder / LOCK
    while True:
        with suppress(FileNotFoundError):  # removed by who held it, between two lines
            _make(folder)
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                _lock(file)
                if os.path.samestat(os.fstat(file), os.stat(path)):
                    return file
                os.close(file)
            except FileNotFoundError:
                os.close(file)
            except OSError as error:
                if error.errno in UNKNOWN:
                    return file
                os.close(file)
                raise UserError(
                    f"{name}={folder} is in use, another process is fitting into it: wait until it has ended, or "
                    f"choose another {name}="
                ) from error
