"""Trials and how they end: the right result, an error that says what is wrong, or a failure."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
import faulthandler
import json
import os
from pathlib import Path
import select
import signal
import subprocess
import sys
import traceback
from typing import Any
import warnings

import sami_ppl
from sami_ppl._util.errors import UserError
from sami_ppl.fitting.checkpoint import CheckpointError
from sami_ppl.saving.save import LoadError

LIMIT = 60
"""Seconds from which a trial hangs."""
TOLD = 500
"""Trials from one line of progress to the next."""
DOCUMENTED = (UserError, ValueError, TypeError, FileNotFoundError, FileExistsError, LoadError, CheckpointError)
PACKAGE = str(Path(sami_ppl.__file__).parent)


class Wrong(AssertionError):
    """A result that is not the right one."""


class Refused(Exception):
    """A clear error that was given in another way than by an exception, such as a message of a command."""


class Hang(BaseException):
    """A trial that takes too long."""


@dataclass
class Tally:
    """The trials of one kind. `seen`: how often each sort of error was met, by its first words."""

    kind: str
    right: int = 0
    refused: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)
    seen: Counter = field(default_factory=Counter)

    @property
    def trials(self) -> int:
        return self.right + self.refused + len(self.failures)

    def as_dict(self) -> dict[str, Any]:
        counts = {"trials": self.trials, "right": self.right, "refused": self.refused}
        return {"kind": self.kind, **counts, "failures": self.failures, "seen": dict(self.seen.most_common(40))}

    def fail(self, what: Any, why: str) -> None:
        self.failures.append({"what": what, "why": why})

    def take(
        self, what: Any, call: Callable[[], Any], names: Sequence[str], own: str = "", limit: float = LIMIT
    ) -> None:
        """One trial in this process. `call` returns, or raises Wrong, or an error that must name one of `names`.

        `own`: a file whose lines stand for a user's own function; their errors come out as they are. `limit`: seconds.
        """
        if self.trials % TOLD == TOLD - 1:
            print(f"{self.kind}: {self.trials + 1:,}, {len(self.failures):,} failures", flush=True)
        try:
            with watched(limit), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                call()
            self.right += 1
        except (Exception, Hang) as error:
            last = traceback.extract_tb(error.__traceback__)[-1].filename
            if isinstance(error, Refused) or (last == own and not isinstance(error, Wrong)):
                why = None
            else:
                why = unclear(error, names)
            if why is None:
                self.refused += 1
                self.seen[f"{type(error).__name__}: {str(error)[:40]}"] += 1
            else:
                self.fail(what, why)

    def take_apart(self, what: Any, call: Callable[[], Any], names: Sequence[str]) -> None:
        """As `take`, in a process of its own: of what happens in C, Python is told too late, or never."""
        reading, writing = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            child = os.fork()
        if child == 0:
            tally = Tally(self.kind)
            tally.take(what, call, names)
            os.write(writing, json.dumps([tally.right, [f["why"] for f in tally.failures]]).encode())
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as told:
            in_time = bool(select.select([told], [], [], LIMIT + 5)[0])
            if not in_time:
                os.kill(child, signal.SIGKILL)
            said = told.read()
        _, status = os.waitpid(child, 0)
        if not said:
            how = f"ended with status {status}" if in_time else f"took more than {LIMIT} s"
            self.fail(what, f"the process that read it {how}")
            return
        right, failures = json.loads(said)
        self.right += right
        self.refused += not right and not failures
        for why in failures:
            self.fail(what, why)


def unclear(error: BaseException, names: Sequence[str]) -> str | None:
    """Why an error is none that the documentation knows: of another kind, from elsewhere, or without the argument."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename.startswith(PACKAGE)]
    where = f"{own[-1].filename.removeprefix(PACKAGE)}:{own[-1].lineno}" if own else "outside the library"
    told = f"{type(error).__name__} at {where}: {str(error)[:300]}"
    if not isinstance(error, DOCUMENTED):
        return told
    if frames[-1].filename.startswith(PACKAGE):  # raised on purpose
        return None if any(name in str(error) for name in names) else f"names none of {list(names)}: {told}"
    return f"raised in {frames[-1].filename}: {told}"


@contextmanager
def watched(limit: float = LIMIT) -> Iterator[None]:
    """Hang is raised after so many seconds; where Python gets no chance to, the process ends with its stack."""

    def stop(*_: Any) -> None:
        raise Hang(f"more than {limit:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    faulthandler.dump_traceback_later(2 * limit, exit=True)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Every path below a folder, with its size and time: what must not change where nothing may be written."""
    found = {}
    for path in folder.rglob("*"):
        if not path.is_dir():
            status = path.lstat()
            found[str(path.relative_to(folder))] = status.st_size, status.st_mtime_ns
    return found


@dataclass(frozen=True)
class Sandbox:
    """Folders that stand for a user's home and working directory, with something in each that must stay."""

    home: Path
    cwd: Path

    @classmethod
    def make(cls, folder: Path) -> "Sandbox":
        box = cls(folder / "home", folder / "cwd")
        for part in (box.home, box.cwd):
            part.mkdir(parents=True)
            (part / "mine.txt").write_text("a user's own file\n")
        return box

    def start(self, *words: str, before: Callable[[], Any] | None = None, **more: str) -> subprocess.Popen:
        """`sami` with these words, in the sandbox, what it prints in pipes; `before` is called in the new process."""
        environment = {**os.environ, "HOME": str(self.home), "PYTHONPATH": str(Path(PACKAGE).parent), **more}
        environment.pop("SAMI_TRACE", None)
        return subprocess.Popen(
            [sys.executable, "-m", "sami_ppl", *words], cwd=self.cwd, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, preexec_fn=before,
        )  # fmt: skip

    def untouched(self) -> str | None:
        """What there is in home, but for its cache, and working directory that was not there, or None."""
        found = [str(Path(part.name, path)) for part in (self.home, self.cwd) for path in contents(part)]
        found = sorted(path for path in found if not path.startswith("home/.cache/"))
        return None if found == ["cwd/mine.txt", "home/mine.txt"] else f"home and cwd hold {found}"


def command_error(code: int, printed: str) -> str | None:
    """Why the end of a command is no clear error: exit code 2 and one message, no trace."""
    if code != 2:
        return f"exit code {code}: {printed[-500:]}"
    if "Traceback (most recent call last)" in printed:
        return f"a trace: {printed[-500:]}"
    return None if printed.strip() else "no message"
