"""Finds, lists, copies and loads program files (`models/`) and inference files (`inference/`).

A name is looked up as a path, then in the checkout beside this package, then among the copies inside the wheel.
Files are listed by their docstrings without being run, and loaded by path: programs import nothing but the library,
so that each can be copied and edited.
"""

import ast
import dataclasses
import difflib
import hashlib
import importlib.util
import json
from pathlib import Path
import shutil
import sys
import tomllib
from types import ModuleType
import typing
from typing import Any

from jaxtyping import Array, Key

from sami_ppl.program import Origin, Program

KINDS = ("models", "inference")


class UserError(ValueError):
    """A mistake in what the user asked for: reported as one message, without a stack trace."""


def folders(kind: str) -> list[Path]:
    """Where files of a kind are looked for, the nearest first."""
    package = Path(__file__).resolve().parent
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


def copy(name: str, target: str | Path) -> Path:
    """Copy a model or inference file for editing; returns the copy.

    Raises UserError for an unknown name, an existing target, one that is no .py file, and a folder that is not there.
    """
    inferences = list_files("inference").keys() - list_files("models").keys()
    source = find(name, "inference" if Path(name).stem in inferences else "models")
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
    """Run a program or inference file as a module of its own. Raises UserError where it breaks its contract."""
    file = Path(file).resolve()
    # Dataclasses look their module up by name, so it must be registered; the path keeps equal names apart.
    name = f"sami_program_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception:
        del sys.modules[name]
        raise
    if not dataclasses.is_dataclass(getattr(module, "Config", None)):
        raise UserError(f"{file} has no dataclass Config with its settings: see `sami cp disks my.py` for an example")
    return module


def make_config(config_class: type, values: dict[str, Any]) -> Any:
    """A configuration from plain values as JSON gives them: lists become tuples, nested dicts nested dataclasses."""
    hints = typing.get_type_hints(config_class)
    plain = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints.get(name)) and isinstance(value, dict):
            value = make_config(hints[name], value)
        plain[name] = tuple(value) if isinstance(value, list) else value
    return config_class(**plain)


def build_program(file: Path, config: Any, *, key: Key[Array, ""]) -> Program:
    """Build the program of a file, with a configuration or its plain values; it remembers where it came from."""
    file = Path(file).resolve()
    module, source = load_file(file), file.read_text()
    if isinstance(config, dict):
        config = make_config(module.Config, config)
    program = module.build(config, key=key)
    return program.replace(origin=Origin(str(file), json.dumps(dataclasses.asdict(config)), source))


def default_configs(model: ModuleType, inference: ModuleType, settings: dict[str, str]) -> dict[str, Any]:
    """The two configurations of a run: defaults, then what the model recommends, then the user's settings.

    `RECOMMENDED` in a model file holds settings of inferences, `{"encoder.steps": 3000}`; those that the inference in
    use does not have are left out.
    """
    configs = {"model": model.Config(), "inference": inference.Config()}
    recommended = {
        f"inference.{key}": repr(value) if not isinstance(value, str) else value
        for key, value in getattr(model, "RECOMMENDED", {}).items()
        if _has(configs["inference"], key.split("."))
    }
    return configure(settings, configure(recommended, configs))


def configure(settings: dict[str, str], configs: dict[str, Any]) -> dict[str, Any]:
    """Apply `--set` settings to the configurations of model and inference.

    A key is a field's name, `stage.field` for a nested dataclass, prefixed by `model.` or `inference.` where both have
    the field. Values are read as Python literals of the field's type. Raises UserError for unknown or ambiguous keys.
    """
    configs = dict(configs)
    for key, text in settings.items():
        owner, path = _owner(key, configs)
        configs[owner] = _replace(configs[owner], path, text, key)
    return configs


def _owner(key: str, configs: dict[str, Any]) -> tuple[str, list[str]]:
    parts = key.split(".")
    if parts[0] in configs and len(parts) > 1:
        owners = [parts[0]] if _has(configs[parts[0]], parts[1:]) else []
        parts = parts[1:]
    else:
        owners = [owner for owner, config in configs.items() if _has(config, parts)]
    if len(owners) == 1:
        return owners[0], parts
    if owners:
        raise UserError(f"--set {key} is ambiguous: write {' or '.join(f'{o}.{key}' for o in owners)}")
    known = [name for config in configs.values() for name in _leaves(config)]
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise UserError(f"--set {key}: there is no such setting; {hint}Known: {', '.join(known)}")


def _has(config: Any, path: list[str]) -> bool:
    for part in path:
        if not dataclasses.is_dataclass(config) or part not in {f.name for f in dataclasses.fields(config)}:
            return False
        config = getattr(config, part)
    return not dataclasses.is_dataclass(config)


def _leaves(config: Any, prefix: str = "") -> list[str]:
    names = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        name = prefix + field.name
        names += _leaves(value, name + ".") if dataclasses.is_dataclass(value) else [name]
    return names


def _replace(config: Any, path: list[str], text: str, key: str) -> Any:
    name, *rest = path
    if rest:
        value = _replace(getattr(config, name), rest, text, key)
    else:
        value = _parse(text, typing.get_type_hints(type(config))[name], key)
    try:
        return dataclasses.replace(config, **{name: value})
    except ValueError as error:
        raise UserError(f"--set {key}={text}: {error}") from error


def _parse(text: str, hint: Any, key: str) -> Any:
    allowed = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, type(int | str)) else (hint,)
    if str in allowed or any(typing.get_origin(a) is typing.Literal for a in allowed):
        choices = [c for a in allowed if typing.get_origin(a) is typing.Literal for c in typing.get_args(a)]
        if choices and text not in choices:
            raise UserError(f"--set {key}={text}: expected one of {', '.join(map(str, choices))}")
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    if float in allowed and type(value) is int:
        value = float(value)
    if not any(_is_a(value, allow) for allow in allowed):
        expected = " or ".join(getattr(a, "__name__", str(a)) for a in allowed)
        raise UserError(f"--set {key}={text}: expected {expected}")
    return value


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a value is of a plain type or a tuple of one; True and False are no numbers here."""
    if typing.get_origin(hint) is dict:
        inner = typing.get_args(hint)[1]
        numbers = isinstance(value, dict) and all(isinstance(k, str) for k in value)
        return numbers and all(_is_a(v, inner) or (inner is float and _is_a(v, int)) for v in value.values())
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_is_a(element, typing.get_args(hint)[0]) for element in value)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
