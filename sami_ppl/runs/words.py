"""What the library says, in the words of the command line."""

from collections.abc import Callable, Iterable
import inspect
import re
import sys
import traceback
import warnings

from sami_ppl._util.errors import UserError
from sami_ppl._util.progress import fresh_line
from sami_ppl.saving.files import slip

LESS_MEMORY = (
    "read --data by --stream, give fewer observations by --data or --limit, a smaller network or batch by --set, or "
    "more memory; what was finished is kept"
)
RENAMED = {"inference": "with", "method": "with"}
"""Arguments of Python that are options of another name."""


def in_options(message: str, commands: Iterable[Callable]) -> str:
    """A message of the library in words of the command line.

    `limit=1` becomes `--limit 1`, `resume=True` `--resume`, `setting steps=0` `--set steps=0`. `commands`: those whose
    parameters are options.
    """
    parameters = {name.rstrip("_") for command in commands for name in inspect.signature(command).parameters}
    names = "|".join([*parameters, *RENAMED])

    def option(match: re.Match[str]) -> str:
        setting, name, value = match.groups()
        if setting:
            return f"--set {setting}"
        return f"--{RENAMED.get(name, name).replace('_', '-')}" + ("" if value in ("", "True") else f" {value}")

    return re.sub(rf"\bsetting ([\w.]+)(?=[=:])|(?<![\w.])({names})=(True\b|[^\s=,;]?)", option, message)


def show_warning(
    commands: Iterable[Callable], message: Warning | str, category: type[Warning], file: str, line: int, *_: object
) -> None:
    """Of a warning to the user, its text; of others, where they come from too."""
    text = f"sami: warning: {in_options(str(message), commands)}\n"
    if not issubclass(category, UserWarning):
        text = warnings.formatwarning(message, category, file, line)
    sys.stderr.write(fresh_line() + text)


def answer(error: Exception, commands: Iterable[Callable]) -> int:
    """Tell on stderr what went wrong; returns the exit code, 2 for the user's mistake, 1 for a bug, with its trace."""
    if isinstance(error, UserError | OSError | ImportError):
        print(f"sami: {in_options(str(error), commands)}", file=sys.stderr)
        return 2
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):  # of Python, of a device
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        print(f"sami: there is not enough memory ({reason}): {LESS_MEMORY}", file=sys.stderr)
        return 2
    if (mistake := slip(error)) is not None:
        print(f"sami: {mistake}", file=sys.stderr)
        return 2
    traceback.print_exception(error)
    print(
        "sami: this is a bug, of sami_ppl or of the program file, and no mistake in the command; the lines above say "
        "where: please report them",
        file=sys.stderr,
    )
    return 1
