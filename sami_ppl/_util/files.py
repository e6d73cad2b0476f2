"""Files and folders that appear when they are complete: an interruption leaves what was there before."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
import re
import shutil
from tempfile import mkdtemp


@contextmanager
def written_aside(target: str | Path) -> Iterator[Path]:
    """A path to write a file or a folder to, put in the place of `target` at the end, where nothing was raised.

    A file takes the place of a file in one step, and whoever has the old one open can go on reading it. A folder that
    is there is moved away first, and back if the new one cannot be put in its place. A process that is killed leaves a
    folder `.<name>.…` beside, which `sweep` takes away.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    # A folder of its own beside: on the same disk, and of a name that is nobody else's.
    aside = Path(mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    new, old = aside / "new" / target.name, aside / "old"
    new.parent.mkdir()
    try:
        yield new
        if new.is_dir() and target.exists():
            target.replace(old)
        new.replace(target)
    finally:
        if old.exists() and not target.exists():
            old.replace(target)
        shutil.rmtree(aside, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Take away what killed processes have left of `written_aside` in a folder, which nobody else may be writing to.

    A folder that was moved away and not replaced yet is moved back.
    """
    for aside in folder.glob(".*"):
        name = re.fullmatch(r"\.(.+)\.[a-z0-9_]{8}", aside.name)
        if name is None or not aside.is_dir() or not {part.name for part in aside.iterdir()} <= {"new", "old"}:
            continue
        old, target = aside / "old", folder / name[1]
        if old.exists() and not target.exists():
            old.replace(target)
        shutil.rmtree(aside, ignore_errors=True)
