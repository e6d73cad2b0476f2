"""The settings of a program or an inference, read from its file without running it: nothing waits for JAX."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
import re

from sami_ppl._util.errors import UserError
from sami_ppl._util.tables import table
from sami_ppl.saving.files import find_any

PACKAGE = Path(__file__).resolve().parents[1]


def settings_table(name: str) -> str:
    """Every setting of a program or inference file, by name or path, with type, default and one line of meaning.

    Settings of a nested class of the library, such as `Stage`, are listed with those that the file gives it. Raises
    UserError for an unknown name, and for a file that is not valid Python or has no `Config`.
    """
    file = find_any(name)
    try:
        module = ast.parse(file.read_text())
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{file} is not valid Python: {error}") from error
    config = _class(module, "Config")
    if config is None:
        raise UserError(f"{file} has no class Config with its settings: see `sami cp disks my.py` for an example")
    rows = [("setting", "type", "default", "meaning"), *_settings(config, _assigned(module), {})]
    title = (ast.get_docstring(module) or "").split("\n")[0]
    lines = [f"{file.stem}: {title}" if title else file.stem, table(rows, indent="  ")]
    if any(row[0].endswith((".steps", ".batch", ".beta")) and row[2] == "None" for row in rows):
        lines.append("None in a stage: what suits program and data, which a run says when it begins")
    if recommended := _assigned(module).get("RECOMMENDED"):
        text = ast.unparse(recommended)
        lines.append(f"Settings of inferences that suit it, and are taken unless others are set: {text}")
    return "\n".join([*lines, "Another value: sami run ... --set SETTING=VALUE"])


def _settings(
    config: ast.ClassDef, names: dict[str, ast.expr], given: dict[str, ast.expr], prefix: str = ""
) -> Iterator[tuple[str, str, str, str]]:
    """Rows of the table; `names`: what names of the file stand for, `given`: defaults that replace the class's own."""
    docstring = ast.get_docstring(config) or ""
    like = re.search(r"The settings are those of `(\w+)`", docstring)
    named = _library_class(like[1]) if like else None  # another class says what they mean
    meaning = _meanings(docstring if named is None else ast.get_docstring(named[0]) or "")
    for field in config.body:
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        name, value = field.target.id, field.value
        if isinstance(value, ast.Call) and (nested := _library_class(ast.unparse(value.func))) is not None:
            inner = {part.arg: part.value for part in value.keywords if part.arg}
            yield from _settings(*nested, inner, f"{prefix}{name}.")
            continue
        default = given.get(name, value)
        default = "" if default is None else ast.unparse(_meant(default, names))
        kind, choices = _kind(_meant(field.annotation if named is None else _without_none(field.annotation), names))
        told = "; ".join(part for part in (choices, meaning(name)) if part)
        yield prefix + name, kind, default.replace("field(default_factory=dict)", "{}"), told


def _meant(expression: ast.expr, names: dict[str, ast.expr]) -> ast.expr:
    return names.get(expression.id, expression) if isinstance(expression, ast.Name) else expression


def _without_none(annotation: ast.expr) -> ast.expr:
    """X of `X | None`: that None is taken too is plain from the default."""
    if isinstance(annotation, ast.BinOp) and ast.unparse(annotation.right) == "None":
        return annotation.left
    return annotation


def _kind(annotation: ast.expr) -> tuple[str, str]:
    """A type, and the choices that it leaves."""
    if not isinstance(annotation, ast.Subscript) or ast.unparse(annotation.value) != "Literal":
        return ast.unparse(annotation), ""
    options = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
    return "str", "one of " + ", ".join(ast.unparse(option).strip("'") for option in options)


def _meanings(docstring: str) -> Callable[[str], str]:
    """What a class's docstring says of each of its fields: an entry of `Args:`, or the sentence that names it."""
    prose, _, listed = re.sub(r"^Settings[;.]?\s", "", docstring).partition("Args:\n")
    entries = dict(re.findall(r"^    (\w+): (.*?)(?=^    \w|^$|\Z)", listed, re.MULTILINE | re.DOTALL))
    sentences = re.split(r"\.(?:\s|$)", prose)

    def meaning(name: str) -> str:
        said = entries.get(name) or next((sentence for sentence in sentences if f"`{name}`" in sentence), "")
        line = re.split(r"[.;] ", " ".join(said.split()))[0]
        return line.removeprefix(f"`{name}`: ").replace("`", "").rstrip(".")

    return meaning


def _class(module: ast.Module, name: str) -> ast.ClassDef | None:
    return next((part for part in module.body if isinstance(part, ast.ClassDef) and part.name == name), None)


def _assigned(module: ast.Module) -> dict[str, ast.expr]:
    return {
        target.id: part.value
        for part in module.body if isinstance(part, ast.Assign)
        for target in part.targets if isinstance(target, ast.Name)
    }  # fmt: skip


def _imported(module: ast.Module) -> Iterator[tuple[str, Path]]:
    """Names that a file of the library takes from others, and where these are."""
    for part in module.body:
        if isinstance(part, ast.ImportFrom) and part.module:
            file = PACKAGE.joinpath(*part.module.removeprefix("sami_ppl.").split(".")).with_suffix(".py")
            yield from ((alias.name, file) for alias in part.names if file.exists())


def _library_class(name: str) -> tuple[ast.ClassDef, dict[str, ast.expr]] | None:
    """A public class of the library, such as `Stage` or `sp.Stage`, from its source; and what names there stand for."""
    name = name.rpartition(".")[2]
    public = dict(_imported(ast.parse((PACKAGE / "__init__.pyi").read_text())))
    if name not in public:
        return None
    module = ast.parse(public[name].read_text())
    others = {file: _assigned(ast.parse(file.read_text())) for _, file in _imported(module)}
    names = {taken: others[file][taken] for taken, file in _imported(module) if taken in others[file]}
    found = _class(module, name)
    return None if found is None else (found, names | _assigned(module))
