"""Finds, lists, copies and loads program files (`models/`) and inference files (`inference/`).

A name is looked up as a path, then in the checkout beside this package, then among the copies inside the wheel.
Files are listed by their docstrings without being run, and loaded by path: programs import nothing but the library,
so that each can be copied and edited.

Nothing heavy is imported here before a file is run: `sami ls` and `sami cp` take no JAX.
"""

import ast
import dataclasses
import difflib
import hashlib
import importlib.util
import inspect
import json
from pathlib import Path
import shutil
import sys
import tomllib
import traceback
from types import ModuleType
import typing
from typing import TYPE_CHECKING, Any

from sami_ppl._util.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Array, Key
    import xarray as xr

    from sami_ppl.program.program import Program

KINDS = ("models", "inference")
PREFIX = "sami_program_"
"""Of the names under which program files are loaded as modules."""


def folders(kind: str) -> list[Path]:
    """Where files of a kind are looked for, the nearest first."""
    package = Path(__file__).resolve().parents[1]
    found = []
    pyproject = package.parent / "pyproject.toml"
    if pyproject.exists() and tomllib.loads(pyproject.read_text()).get("project", {}).get("name") == "sami_ppl":
        found.append(package.parent / kind)
    found.append(package / "_programs" / kind)
    return [folder for folder in found if folder.is_dir()]


def list_files(kind: str) -> dict[str, tuple[Path, str]]:
    """Name → (file, first line of its docstring)."""
    listed: dict[str, tuple[Path, str]] = {}
    for folder in folders(kind):
        for file in sorted(folder.glob("*.py")):
            if not file.stem.startswith("_"):
                listed.setdefault(file.stem, (file, _first_line(file)))
    return listed


def _first_line(file: Path) -> str:
    try:
        docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
    except (SyntaxError, ValueError) as error:
        return f"(not valid Python: {error})"
    return docstring.splitlines()[0] if docstring else "(no description)"


def find(name: str, kind: str) -> Path:
    """The file of a name or path. Raises UserError with the near names if there is none."""
    path = Path(name)
    if path.suffix == ".py" and path.exists():
        return path
    listed = list_files(kind)
    stem = path.stem if path.suffix == ".py" else name
    if stem in listed and (path.suffix != ".py" or len(path.parts) == 1 or path.parts[:-1] == (kind,)):
        return listed[stem][0]
    near = difflib.get_close_matches(stem, listed, n=3, cutoff=0.4)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise UserError(
        f"there is no {kind} file {name!r}{hint} Known: {', '.join(listed) or 'none'}. Give one of these names or the "
        "path of a file ending in .py"
    )


def find_any(name: str) -> Path:
    """The file of a program or an inference, by name or path. Raises UserError as `find` does."""
    inferences = list_files("inference").keys() - list_files("models").keys()
    return find(name, "inference" if Path(name).stem in inferences else "models")


def copy(name: str, target: str | Path) -> Path:
    """Copy a model or inference file for editing; returns the copy.

    Raises UserError for an unknown name, an existing target, one that is no .py file, and a folder that is not there.
    """
    source = find_any(name)
    target = Path(target)
    if target.is_dir():
        target = target / source.name
    if target.suffix != ".py":
        raise UserError(f"{target} would not be found as a program: give a name ending in .py")
    if target.exists():
        raise UserError(f"{target} exists already and is not overwritten: give another name")
    if not target.parent.is_dir():
        raise UserError(f"there is no folder {target.parent}: make it first")
    shutil.copyfile(source, target)
    return target


def load_file(file: Path) -> ModuleType:
    """Run a program or inference file as a module of its own.

    Raises UserError where the file cannot be run, with the line, or has no `Config`.
    """
    file = Path(file).resolve()
    # Dataclasses look their module up by name, so it must be registered; the path keeps equal names apart.
    name = f"{PREFIX}{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UserError(f"{file}{_line(error, file)}: {type(error).__name__}: {error}") from error
    if not dataclasses.is_dataclass(getattr(module, "Config", None)):
        raise UserError(f"{file} has no dataclass Config with its settings: see `sami cp disks my.py` for an example")
    build = getattr(module, "build", None)
    if hasattr(module, "adapt") or (build is not None and "data" not in inspect.signature(build).parameters):
        raise UserError(
            f"{file} has no build(config, data, *, key): size, mean and standard deviation follow from the data there, "
            "and no function adapt is called; write for instance `return sp.autoencoder(prior, data, key=key)`"
        )
    return module


def _line(error: Exception, file: Path) -> str:
    """The last line of the file that was run before an error, or the one that is not valid Python."""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return f", line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return f", line {lines[-1]}" if lines else ""


def slip(error: Exception) -> str | None:
    """File, line and error, where the line that failed is of a program file that was loaded and not of what it calls.

    A mistake in a user's file, such as a misspelt name; an error of the library that it calls is another's.
    """
    frames = traceback.extract_tb(error.__traceback__)
    files = {getattr(module, "__file__", None) for name, module in sys.modules.items() if name.startswith(PREFIX)}
    if not frames or frames[-1].filename not in files:
        return None
    return f"{frames[-1].filename}, line {frames[-1].lineno}: {type(error).__name__}: {error}"


def make_config(config_class: type, values: dict[str, Any]) -> Any:
    """A configuration from plain values as JSON gives them: lists become tuples, nested dicts nested dataclasses."""
    hints = typing.get_type_hints(config_class)
    plain = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints.get(name)) and isinstance(value, dict):
            value = make_config(hints[name], value)
        plain[name] = tuple(value) if isinstance(value, list) else value
    return config_class(**plain)


def build_program(file: Path, config: Any, data: "xr.Dataset", *, key: "Key[Array, '']") -> "Program":
    """Build the program of a file for data, with a configuration or its plain values; it remembers where it came from.

    Raises what `load_file` raises, and what the file raises.
    """
    from sami_ppl.program.origin import Origin
    from sami_ppl.saving.outline import outline

    file = Path(file).resolve()
    module, source = load_file(file), file.read_text()
    if isinstance(config, dict):
        config = make_config(module.Config, config)
    program = module.build(config, data, key=key)
    plain = json.dumps(dataclasses.asdict(config)), source, json.dumps(outline(program, data))
    return program.replace(origin=Origin(str(file), *plain))
