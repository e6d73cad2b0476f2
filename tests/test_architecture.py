"""Who may import whom, how long a file may be, and that importing the library does nothing; read from syntax trees."""

import ast
import importlib
import json
from pathlib import Path
import re
import subprocess
import sys

import pytest

import sami_ppl

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = sorted((ROOT / "sami_ppl").rglob("*.py"))
PROGRAMS = sorted([*(ROOT / "models").glob("*.py"), *(ROOT / "inference").glob("*.py")])


# From the bottom up: a folder imports only from those before it, and those of one line do not know each other.
LAYERS = (
    ("_util",),
    ("data", "nn", "metrics", "plots", "distributions"),
    ("diffusion",),
    ("priors",),
    ("encoders",),
    ("decoders",),
    ("program",),
    ("saving", "diagnostics"),
    ("evidence",),
    ("posteriors", "fitting"),
    ("calibration", "refinement"),
    ("analyses",),
    ("runs",),
    ("__main__",),
)


# What holds beyond the layers: these files stand on nothing of the library that knows of its subject.
ALONE = ("diffusion/schedule.py", "fitting/checkpoint.py", "plots.py")


# Conveniences that call what stands above, when they are called: inside a function only.
UPWARD = {
    ("_util/history.py", "plots"),  # the log of a fit draws itself
    ("program/posterior.py", "posteriors"),  # `Program.posterior`
    ("program/summary.py", "diagnostics"),  # `repr(program)` says if it was never fitted
}


# The package itself, whose public names are imported from everywhere when they are used: __init__.pyi has them.
FRONT = ("__init__",)
STUB = ROOT / "sami_ppl" / "__init__.pyi"


def imports(file):
    """Pairs of an imported module and whether it is imported inside a function."""
    tree = ast.parse(file.read_text())
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) not in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: relative import"
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "sami_ppl" else [node.module]
            )
            yield from ((name, id(node) not in top) for name in names)


def module(file):
    """`sami_ppl/nn/mlp.py` → `nn`."""
    return file.relative_to(ROOT / "sami_ppl").parts[0].removesuffix(".py")


def own(name):
    """`sami_ppl.nn.mlp` → `nn`; None for other packages."""
    parts = name.split(".")
    return parts[1] if parts[0] == "sami_ppl" and len(parts) > 1 else None


def test_every_module_is_in_a_folder_with_a_place():
    """Nothing is left on the shelf; what is new is given a place, and a place that is gone is struck off."""
    places = {name for names in LAYERS for name in names}
    assert {module(file) for file in LIBRARY} - set(FRONT) == places


@pytest.mark.parametrize("file", PROGRAMS, ids=lambda f: f.stem)
def test_programs_import_the_library_and_third_parties_only(file):
    forbidden = {"models", "inference", *(f.stem for f in PROGRAMS)}
    assert not {name for name, _ in imports(file) if name.split(".")[0] in forbidden}


def test_library_imports_no_programs():
    for file in LIBRARY:
        found = {name for name, _ in imports(file)}
        assert not {name for name in found if name.split(".")[0] in ("models", "inference")}, file
        assert not {name for name in found if name.startswith(("sami_ppl.models", "sami_ppl.inference"))}, file
    assert not (ROOT / "sami_ppl" / "models").exists()
    assert not (ROOT / "sami_ppl" / "inference").exists()


@pytest.mark.parametrize(
    "file",
    [f for f in LIBRARY if module(f) not in FRONT],
    ids=lambda f: f.relative_to(ROOT / "sami_ppl").with_suffix("").as_posix(),
)
def test_imports_go_down(file):
    layer = {name: i for i, names in enumerate(LAYERS) for name in names}
    here, path = module(file), file.relative_to(ROOT / "sami_ppl").as_posix()
    assert here in layer, f"{path} is new: give it a place in the order of folders"
    for name, inside_function in imports(file):
        other = own(name)
        if other is None:
            continue
        assert path not in ALONE or other == "_util", f"{path} stands on nothing of the library, yet imports {name}"
        if other == here:
            continue
        if (path, other) in UPWARD:
            assert inside_function, f"{path} imports {name} at its top: only a function may, when it is called"
            continue
        assert other in layer, f"{path} imports {name} from the package: import it from the module that defines it"
        assert layer[other] < layer[here], f"{path} imports {name}: {other} does not stand below {here}"


def public_names():
    """Pairs of the module that defines a public name, None for a folder, and the name."""
    for node in ast.parse(STUB.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            yield from ((node.module, alias.name) for alias in node.names)


def test_no_public_name_hides_a_folder():
    """`sp.posterior` is a function, and what stands behind it can be reached by its own name."""
    found = {name for source, name in public_names() if source}
    assert "posterior" in found
    assert not found & {module(file) for file in LIBRARY}


def modules_of_folders():
    """Dotted name → file, without the package itself."""
    for file in LIBRARY:
        parts = file.relative_to(ROOT).with_suffix("").parts
        if file.parent != ROOT / "sami_ppl" or file.stem not in FRONT:
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), file


def test_no_circle_of_modules():
    """Inside the folders too: no two files need each other to be imported."""
    known = dict(modules_of_folders())
    graph = {}
    for name, file in known.items():
        found = set()
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "sami_ppl":
                members = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= {member if member in known else node.module for member in members}
        graph[name] = found & known.keys() - {name}
    done = set()
    while ready := {name for name in graph.keys() - done if graph[name] <= done}:
        done |= ready
    assert done == graph.keys(), f"these import each other: {sorted(graph.keys() - done)}"


def test_the_page_says_what_there_is():
    """docs/architecture.md has the folders in the order that holds, and names no file or function that is gone."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    table = re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE)
    assert table == [name for names in LAYERS for name in names if name != "__main__"]
    known = dict(modules_of_folders())
    named = re.findall(r"`((?:\w+\.)+\w+)`", page)
    named = [name for name in named if name.split(".")[0] in table and not name.endswith(".json")]
    assert len(named) > 20
    for name in named:
        if f"sami_ppl.{name}" in known:
            continue
        where, _, what = f"sami_ppl.{name}".rpartition(".")
        assert where in known, name
        defined = {getattr(node, "name", None) for node in ast.parse(known[where].read_text()).body}
        assert what in defined, f"{where} does not define {what}"
    for path in re.findall(r"`(\w+/[\w/]*(?:\.py)?)`", page):
        assert any((base / path).exists() for base in (ROOT, ROOT / "sami_ppl")), path


@pytest.mark.parametrize("file", [*LIBRARY, *PROGRAMS], ids=lambda f: f"{f.parent.name}/{f.stem}")
def test_no_file_is_long(file):
    assert len(file.read_text().splitlines()) <= 400


@pytest.mark.parametrize("file", [*LIBRARY, *PROGRAMS], ids=lambda f: f"{f.parent.name}/{f.stem}")
def test_every_file_says_what_it_is(file):
    assert (ast.get_docstring(ast.parse(file.read_text())) or "").strip()


def test_package_init_only_reexports():
    """The version, and the names of the stub, which are explicit re-exports; nothing else happens on import."""
    body = [ast.unparse(node) for node in ast.parse((ROOT / "sami_ppl" / "__init__.py").read_text()).body[1:]]
    assert body == [
        "from importlib.metadata import version as _version",
        "import lazy_loader as _lazy",
        "__version__ = _version('sami_ppl')",
        "__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)",
    ]
    *stub, last = ast.parse(STUB.read_text()).body[1:]
    assert ast.unparse(last) == "__version__: str"
    for node in stub:
        assert isinstance(node, ast.ImportFrom), ast.unparse(node)
        assert node.level == 1, ast.unparse(node)
        assert all(alias.asname == alias.name for alias in node.names), ast.unparse(node)


def test_every_public_name_is_where_the_stub_says():
    """Type checkers read the stub, Python imports by it: each name is there, is listed, and no other is."""
    names = [name for _, name in public_names()]
    assert len(set(names)) == len(names) > 60
    assert dir(sami_ppl) == sorted(sami_ppl.__all__) == sorted(names)
    for where, name in public_names():
        of = importlib.import_module(f"sami_ppl.{where or name}")
        assert getattr(sami_ppl, name) is (getattr(of, name) if where else of)
    with pytest.raises(AttributeError, match="no_such_name"):
        sami_ppl.no_such_name  # noqa: B018


IMPORT = """
import json
import sami_ppl
import sys
early = [name for name in ("jax", "numpyro", "numpy", "xarray") if name in sys.modules]
for name in dir(sami_ppl):
    getattr(sami_ppl, name)
import sami_ppl.runs.run
import jax
from jax._src import xla_bridge
backends = list(xla_bridge._backends)
arrays = len(jax.live_arrays()) if backends else 0
print(json.dumps({"early": early, "backends": backends, "arrays": arrays, "x64": jax.config.jax_enable_x64,
    "slow": [name for name in ("arviz", "diffrax", "scipy.stats", "sklearn", "zarr") if name in sys.modules]}))
"""


@pytest.mark.slow
def test_import_does_nothing(tmp_path):
    """Nothing heavy before a name is used; then no device, array, setting, file, or package that doubles its time."""
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    # Matplotlib keeps a list of fonts.
    environment = {"HOME": str(home), "MPLCONFIGDIR": str(tmp_path / "matplotlib"), "PYTHONDONTWRITEBYTECODE": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", IMPORT], cwd=work, env=environment, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout) == {"early": [], "backends": [], "arrays": 0, "x64": False, "slow": []}
    assert found.stderr == ""
    assert not [*home.rglob("*"), *work.rglob("*")]
