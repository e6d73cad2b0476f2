"""Places and machines that say no: full disks, read-only folders, little memory, two at a time, wrong clocks.

Each trial is a run that meets one of them: it must end well, or with one message; then the place is mended, and the run
resumed, to the results of a run that met nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
import os
from pathlib import Path
import subprocess
import time
from typing import Any

from benchmarks.torture_kills import command, difference, left_over, make_data, results, wait_for
from benchmarks.torture_trials import Sandbox, Tally, command_error

DISKS = ("16k", "48k", "100k", "160k", "300k", "400k", "600k", "900k", "1200k")
"""Of a run that takes about 1.5 MB."""
MEMORY = (1, 2, 3, 4)
"""GiB of address space; the interpreter with all libraries takes about two."""
CLOCK = "import time\nfor _name in ('time', 'time_ns'):\n    _was = getattr(time, _name)\n" + (
    "    setattr(time, _name, lambda was=_was, day=86400 * (1 if _name == 'time' else 10**9): was() - 400 * day)\n"
)
"""A `sitecustomize` that sets the clock of one process back."""


class Trials:
    """Runs in one folder, and what they are compared with."""

    def __init__(self, folder: Path):
        self.folder, self.box = folder, Sandbox.make(folder)
        self.data, self.number = make_data(folder / "data.npz"), 0
        began = time.monotonic()
        code, printed = self.end(self.start(folder / "whole"))
        self.seconds = time.monotonic() - began
        if code:
            raise RuntimeError(printed)
        self.expected = results(folder / "whole")

    def start(self, out: Path, *words: str, before: Callable[[], Any] | None = None, **more: str) -> subprocess.Popen:
        return self.box.start(*command(self.data, out), *words, before=before, **more)

    def end(self, process: subprocess.Popen) -> tuple[int, str]:
        said = "".join(process.communicate(timeout=1200))
        return process.returncode, said

    def resumed(self, out: Path) -> str | None:
        """Why a run that is resumed does not end as one that was left alone, or None."""
        code, printed = self.end(self.start(out, "--resume"))
        if code:
            return f"resumed: exit code {code}: {printed[-600:]}"
        return difference(self.expected, results(out)) or left_over(out) or self.box.untouched()

    def new(self) -> Path:
        self.number += 1
        return self.folder / f"place{self.number}"


@contextmanager
def disk(place: Path, size: str) -> Iterator[Callable[[str], None]]:
    """A small disk at a place, and what changes its options; PermissionError where none may be mounted."""
    place.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)], capture_output=True
    ).returncode:
        raise PermissionError("no disk can be mounted here")
    try:
        yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True) and None
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def places(quick: bool, seed: int, folder: Path) -> list[Tally]:
    """All of them; with `quick` one of each kind."""
    trials = Trials(folder)
    kinds: dict[str, list[Callable[[], tuple[str, str | None]]]] = {
        "disk full": [partial(full_disk, trials, size) for size in DISKS],
        "read-only, or no folder": [
            partial(no_folder, trials, how) for how in ("read-only", "file", "link", "below a file")
        ],
        "little memory": [partial(no_memory, trials, size) for size in (0, *MEMORY)],
        "two at a time": [partial(two, trials, late) for late in (0.0, 0.3)],
        "clock set back": [partial(clock, trials, how) for how in ("clock", "files of tomorrow")],
    }
    tallies = []
    for kind, calls in kinds.items():
        tallies.append(tally := Tally(kind))
        for number, call in enumerate([calls[seed % len(calls)]] if quick else calls):
            try:
                how, why = call()
            except Exception as error:
                how, why = "failed", f"{type(error).__name__}: {error}"
            if how == "right" and why is None:
                tally.right += 1
            elif how == "refused" and why is None:
                tally.refused += 1
            else:
                tally.fail({"number": number}, f"{how}: {why}")
            print(f"{kind} {number}: {how}, {why or 'and resumed to the same'}", flush=True)
    return tallies


def full_disk(trials: Trials, size: str) -> tuple[str, str | None]:
    """A disk that fills up during the run, and has room when it is resumed."""
    place = trials.new()
    with disk(place, size) as remount:
        code, printed = trials.end(trials.start(place / "run"))
        why = command_error(code, printed) if code else None
        remount("size=64m")
        return "refused" if code else "right", why or trials.resumed(place / "run")


def no_folder(trials: Trials, how: str) -> tuple[str, str | None]:
    """An --out that cannot be made or written to."""
    place = trials.new()
    if how == "read-only":
        with disk(place, "64m") as remount:
            remount("ro")
            why = command_error(*trials.end(trials.start(place / "run")))
            remount("rw")
            return "refused", why or trials.resumed(place / "run")
    place.mkdir()
    out = place / "run"
    if how == "link":
        out.symlink_to(place / "nothing")
    else:
        out.write_text("mine")
    before = sorted(place.rglob("*"))
    why = command_error(*trials.end(trials.start(out if how != "below a file" else out / "run")))
    if why is None and (sorted(place.rglob("*")) != before or (how != "link" and out.read_text() != "mine")):
        why = "what was there is not there any more"
    return "refused", why


def no_memory(trials: Trials, size: int) -> tuple[str, str | None]:
    """A process that may take so many GiB of address space; 0, a network that no machine holds."""
    import resource

    out = trials.new()
    # What a machine has is lent more often than it has it: without a limit, the system would end other processes too.
    limit = partial(resource.setrlimit, resource.RLIMIT_AS, ((size or 4) << 30,) * 2)
    if size == 0:
        why = command_error(*trials.end(trials.start(out, "--set", "width=30000", before=limit)))
        return "refused", why or ("a folder is left" if out.exists() else None)
    code, _ = trials.end(trials.start(out, before=limit))
    # Where the libraries below find no memory, while they are imported or end, the process ends in their way: as good
    # as killed, if nothing is lost.
    return "refused" if code else "right", trials.resumed(out)


def two(trials: Trials, late: float) -> tuple[str, str | None]:
    """Two that take the same folder, together or one after the other: one does the run, the other is refused."""
    out = trials.new()
    first = trials.start(out, "--resume")
    time.sleep(late * trials.seconds)
    second = trials.start(out, "--resume")
    ends = [trials.end(process) for process in (first, second)]
    failed = [command_error(*end) for end in ends if end[0]]
    if len(failed) != 1 or failed[0] is not None:
        # Both may do it, one after the other, where one has ended before the other looked.
        return "right", None if not failed and not trials.resumed(out) else f"ends: {ends}"
    return "right", difference(trials.expected, results(out)) or left_over(out)


def clock(trials: Trials, how: str) -> tuple[str, str | None]:
    """A killed run that is resumed when it is earlier, by the clock, than when it began."""
    out = trials.new()
    process = trials.start(out)
    wait_for(process, out, "checkpoints/encoder", 0.5, trials.seconds)
    process.kill()
    trials.end(process)
    if how == "clock":
        (custom := trials.folder / "custom").mkdir(exist_ok=True)
        (custom / "sitecustomize.py").write_text(CLOCK)
        path = os.pathsep.join([str(custom), str(Path(__file__).parents[1])])
        code, printed = trials.end(trials.start(out, "--resume", PYTHONPATH=path))
        if code:
            return "failed", printed[-600:]
        return "right", difference(trials.expected, results(out)) or left_over(out)
    for path in [out, *out.rglob("*")]:
        os.utime(path, (time.time() + 1e6,) * 2)
    return "right", trials.resumed(out)
