"""Settings, key and value as text, applied to configurations."""

import ast
from collections.abc import Iterable
import dataclasses
import difflib
from types import ModuleType
import typing
from typing import Any

import jax

from sami_ppl._util.errors import UserError, mistakes


def seed_key(seed: int) -> jax.Array:
    """The random key of a seed. Raises UserError for one that JAX would refuse, or cut to 32 bits."""
    if not 0 <= seed < 2**32:
        raise UserError(f"seed={seed}: must be at least 0 and below 2³² = {2**32}")
    return jax.random.key(seed)


def key_values(items: Iterable[str]) -> dict[str, str]:
    """Settings as the command line has them, KEY=VALUE. Raises UserError for what is none."""
    settings = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"--set {item}: write KEY=VALUE, for instance --set latents=6")
        settings[key.strip()] = value.strip()
    return settings


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
    """Apply settings, key → value, to the configurations of model and inference.

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
        raise UserError(f"setting {key}: ambiguous, write {' or '.join(f'{o}.{key}' for o in owners)}")
    known = {name: told for config in configs.values() for name, told in _leaves(config).items()}
    near = [f"{name} ({known[name]})" for name in difflib.get_close_matches(key, known, n=3, cutoff=0.5)]
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise UserError(f"setting {key}: there is no such setting; {hint}Known: {', '.join(known)}")


def _has(config: Any, path: list[str]) -> bool:
    for part in path:
        if not dataclasses.is_dataclass(config) or part not in {f.name for f in dataclasses.fields(config)}:
            return False
        config = getattr(config, part)
    return not dataclasses.is_dataclass(config)


def _leaves(config: Any, prefix: str = "") -> dict[str, str]:
    """Names of all settings, with type and value as they are."""
    found, hints = {}, typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        hint = hints[field.name]
        told = f"{hint.__name__ if type(hint) is type else str(hint).replace('typing.', '')}, {value!r}"
        found |= _leaves(value, name + ".") if dataclasses.is_dataclass(value) else {name: told}
    return found


def _replace(config: Any, path: list[str], text: str, key: str) -> Any:
    name, *rest = path
    if rest:
        value = _replace(getattr(config, name), rest, text, key)
    else:
        value = _parse(text, typing.get_type_hints(type(config))[name], key)
    with mistakes(ValueError, prefix=f"setting {key}={text}: "):
        return dataclasses.replace(config, **{name: value})


def _parse(text: str, hint: Any, key: str) -> Any:
    allowed = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, type(int | str)) else (hint,)
    if str in allowed or any(typing.get_origin(a) is typing.Literal for a in allowed):
        choices = [c for a in allowed if typing.get_origin(a) is typing.Literal for c in typing.get_args(a)]
        if choices and text not in choices:
            raise UserError(f"setting {key}={text}: expected one of {', '.join(map(str, choices))}")
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # the last two: brackets in brackets
        value = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    if float in allowed and type(value) is int:
        with mistakes(OverflowError, prefix=f"setting {key}={text}: "):
            value = float(value)
    if not any(_is_a(value, allow) for allow in allowed):
        expected = " or ".join(getattr(a, "__name__", str(a)) for a in allowed)
        raise UserError(f"setting {key}={text}: expected {expected}")
    return value


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a value is of a plain type or a tuple of one; True and False are no numbers here."""
    if typing.get_origin(hint) is dict:
        inner = typing.get_args(hint)[1]
        named, number = isinstance(value, dict) and all(isinstance(k, str) for k in value), inner is float
        number = number or float in typing.get_args(inner)
        return named and all(_is_a(v, inner) or (number and _is_a(v, int)) for v in value.values())
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_is_a(element, typing.get_args(hint)[0]) for element in value)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
