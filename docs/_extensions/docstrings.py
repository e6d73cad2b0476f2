"""Docstrings and signatures of the library as Sphinx shows them.

Docstrings are Markdown, parsed by the parser of the pages. Signatures are shown as they are written, so that a shape
reads Float[Array, "obs *event"] and an alias keeps its name; constants are shown by their value.
"""

import ast
from collections.abc import Callable
import inspect
import textwrap
from typing import Any

from docutils import nodes
from docutils.utils import new_document
from myst_parser.parsers.sphinx_ import MystParser
from sphinx.util.docutils import SphinxDirective

import sami_ppl


class Markdown(SphinxDirective):
    """Its content is Markdown. Indented blocks are code where they can be read as such, else formulas."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """The nodes of the content."""
        source, _ = self.get_source_info()
        document = new_document(source, self.state.document.settings)
        MystParser().parse("\n".join(self.content), document)
        for block in document.findall(nodes.literal_block):
            block["language"] = "python" if _is_python(block.astext()) else "text"
        return document.children


def _is_python(text: str) -> bool:
    try:
        return any(not isinstance(s, ast.Expr) or isinstance(s.value, ast.Call) for s in ast.parse(text).body)
    except SyntaxError:
        return False


def written_signature(obj: Any) -> tuple[str, str | None] | None:
    """Arguments and return annotation from the source of a function, or of a class's own `__init__`; None without."""
    is_class = inspect.isclass(obj)
    function = obj.__dict__.get("__init__") if is_class else inspect.unwrap(obj)
    try:
        found = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]  # pyright: ignore
    except (OSError, TypeError, SyntaxError):
        return None
    if not isinstance(found, ast.FunctionDef):
        return None
    arguments, returns = found.args, found.returns
    if arguments.args and arguments.args[0].arg in ("self", "cls"):
        del arguments.args[0]
    for defaults in (arguments.defaults, arguments.kw_defaults):
        defaults[:] = [_constant(default, function) for default in defaults]
    return f"({ast.unparse(arguments)})", None if is_class or returns is None else ast.unparse(returns)


def _constant(default: ast.expr | None, function: Any) -> ast.expr | None:
    value = getattr(function, "__globals__", {}).get(default.id) if isinstance(default, ast.Name) else None
    return ast.Constant(value) if isinstance(value, int | float | str) else default


def process_signature(app: Any, what: str, name: str, obj: Any, options: Any, signature: Any, returns: Any) -> Any:
    """Hook of autodoc."""
    found = written_signature(obj) if what in ("function", "method", "class") else None
    return (signature, None) if found is None and what == "class" else found


def process_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Hook of autodoc; says under which name the package itself has it."""
    short = name.rpartition(".")[2]
    if what in ("function", "class") and getattr(sami_ppl, short, None) is obj:
        lines += ["", f"In the package as `sami_ppl.{short}`."]
    lines[:] = [".. markdown::", "", *(f"   {line}" for line in lines), ""]


def skip_member(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leave out what a NamedTuple says of its fields by itself."""
    return True if type(obj).__name__ == "_tuplegetter" else None


HOOKS: dict[str, Callable] = {
    "autodoc-process-signature": process_signature,
    "autodoc-process-docstring": process_docstring,
    "autodoc-skip-member": skip_member,
}


def setup(app: Any) -> dict[str, Any]:
    """Hook of Sphinx."""
    app.add_directive("markdown", Markdown)
    for event, hook in HOOKS.items():
        app.connect(event, hook)
    return {"parallel_read_safe": True}
