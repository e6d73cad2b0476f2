"""Who may import whom, how long a file may be, and that importing the library does nothing; read from syntax trees."""

import ast
import json
from pathlib import Path
import subprocess
import sys

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = sorted((ROOT / "sami_ppl").rglob("*.py"))
PROGRAMS = sorted([*(ROOT / "models").glob("*.py"), *(ROOT / "inference").glob("*.py")])

# From the bottom up: a module imports modules of lower layers and of its own. Packages count as one.
LAYERS = (
    (
        "nn",
        "schedule",
        "supports",
        "discrete",
        "factors",
        "latents",
        "dependence",
        "flows",
        "processes",
        "relaxed",
        "prior",
        "versions",
        "history",
        "checkpoint",
        "chunks",
        "parallel",
        "plots",
        "tables",
        "data",
        "metrics",
    ),
    ("denoiser", "encoder", "families", "framewise", "guide", "stage", "objective", "turning"),
    ("guidance", "sampler"),
    ("bound", "exact", "inversion"),
    ("decoder", "summary", "tabulated"),
    ("program",),
    ("over_time",),
    ("causal", "diagnostics", "encode", "evidence", "gauge", "generate", "posterior", "programs", "signature"),
    ("analyses", "calibration", "fit", "io", "evaluation", "refinement", "report", "warm_prior", "warm_start"),
    ("build", "plans", "results", "running"),
    ("calibrating", "comparing", "evaluating", "refining"),
    ("cli",),
    ("__main__",),
)
# What holds beyond the layers: these files stand on nothing of the library at all.
ALONE = ("chunks", "parallel", "schedule", "checkpoint", "versions", "plots", "tables")


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


@pytest.mark.parametrize("file", [f for f in LIBRARY if f.name != "__init__.py"], ids=module)
def test_imports_go_down(file):
    layer = {name: i for i, names in enumerate(LAYERS) for name in names}
    here = module(file)
    assert here in layer, f"{file.name} is new: give it a layer"
    for name, inside_function in imports(file):
        other = own(name)
        if other in (None, here):
            continue
        # `Program.posterior` and `repr(program)` call what is built upon programs, when they are called.
        if (here, other) in {("program", "posterior"), ("summary", "diagnostics")}:
            assert inside_function
            continue
        assert other in layer, f"{name} is new: give it a layer"
        assert layer[other] <= layer[here], f"{here} imports {other}, which stands above it"
        assert here not in ALONE, f"{here} stands on nothing of the library, yet imports {other}"


def test_no_circle_of_modules():
    graph = {}
    for file in LIBRARY:
        if file.parent == ROOT / "sami_ppl" and file.name == "__init__.py":
            continue
        found = {own(name) for name, inside_function in imports(file) if not inside_function}
        graph.setdefault(module(file), set()).update(found - {None, module(file)})
    done = set()
    while ready := {name for name in graph.keys() - done if graph[name] <= done}:
        done |= ready
    assert done == graph.keys(), f"these import each other: {sorted(graph.keys() - done)}"


@pytest.mark.parametrize("file", [*LIBRARY, *PROGRAMS], ids=lambda f: f"{f.parent.name}/{f.stem}")
def test_no_file_is_long(file):
    assert len(file.read_text().splitlines()) <= 400


@pytest.mark.parametrize("file", [*LIBRARY, *PROGRAMS], ids=lambda f: f"{f.parent.name}/{f.stem}")
def test_every_file_says_what_it_is(file):
    assert (ast.get_docstring(ast.parse(file.read_text())) or "").strip()


def test_package_init_only_reexports():
    """Explicit re-exports (`as` the same name) and the version; nothing else happens on import."""
    body = ast.parse((ROOT / "sami_ppl" / "__init__.py").read_text()).body
    rest = [node for node in body[1:] if not isinstance(node, ast.ImportFrom)]
    assert [ast.unparse(node).split(" =")[0] for node in rest] == ["__version__"]
    for node in body[1:]:
        for alias in getattr(node, "names", []):
            assert alias.asname in (alias.name, f"_{alias.name}"), ast.unparse(node)


IMPORT = """
import json
import sami_ppl
import sami_ppl.running
import sys
import jax
from jax._src import xla_bridge
backends = list(xla_bridge._backends)
arrays = len(jax.live_arrays()) if backends else 0
print(json.dumps({"backends": backends, "arrays": arrays, "x64": jax.config.jax_enable_x64,
    "slow": [name for name in ("arviz", "diffrax", "scipy.stats", "sklearn", "zarr") if name in sys.modules]}))
"""


def test_import_does_nothing(tmp_path):
    """No device, no array, no setting, no file, and none of the packages that double its time."""
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    # Matplotlib keeps a list of fonts.
    environment = {"HOME": str(home), "MPLCONFIGDIR": str(tmp_path / "matplotlib"), "PYTHONDONTWRITEBYTECODE": "1"}
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", IMPORT], cwd=work, env=environment, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout) == {"backends": [], "arrays": 0, "x64": False, "slow": []}
    assert found.stderr == ""
    assert not [*home.rglob("*"), *work.rglob("*")]
