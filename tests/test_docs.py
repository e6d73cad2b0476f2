"""The documentation: its code runs as it stands, the site builds without a warning, every public name is on it."""

import importlib
import inspect
import os
from pathlib import Path
import pkgutil
import re
import subprocess
import sys

import arviz as az
import pytest

import sami_ppl

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
ALL = sorted(DOCS.glob("*.md"))
PAGES = [page for page in ALL if "```python" in page.read_text()]
REFERENCE = [page.read_text() for page in sorted((DOCS / "api").glob("*.md"))]

# A tutorial's commands are run too, and it may leave files where it runs.
TUTORIALS = {"tutorial_fit": {"mine.npz", "mine.py", "runs"}}

# What a page finds where it runs, in tests/data.
FOUND = {"diffusers": ("diffusers/clothes", "diffusers/latent", "diffusers/images.npz", "psdenoiser")}


@pytest.mark.slow
@pytest.mark.release
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_runs(page, tmp_path, monkeypatch):
    """The blocks of a page, one after another in one namespace; nothing is left behind where it ran."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(az.rcParams, "plot.backend", "none")
    for given in (ROOT / "tests" / "data" / name for name in FOUND.get(page.stem, ())):
        (tmp_path / given.name).symlink_to(given)
    names: dict = {}
    for language, block in re.findall(r"```(python|bash)\n(.*?)```", page.read_text(), flags=re.DOTALL):
        if language == "python":
            exec(compile(block, str(page), "exec"), names)
        elif page.stem in TUTORIALS:
            run_commands(block, tmp_path)
    left = set(os.listdir(tmp_path)) - {Path(name).name for name in FOUND.get(page.stem, ())}
    assert left == TUTORIALS.get(page.stem, set())


def run_commands(block, folder):
    """Commands, `sami` being this checkout's."""
    call = f"{sys.executable} -c 'from sami_ppl.runs.cli import main; main()'"
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XDG_CACHE_HOME": str(folder.parent / "cache")
    }  # fmt: skip
    script = f'sami() {{ {call} "$@"; }}\n{block}'
    found = subprocess.run(["bash", "-e", "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_there_are_pages():
    assert PAGES
    assert TUTORIALS.keys() <= {page.stem for page in PAGES}


def test_every_page_is_in_the_contents():
    """A page that no toctree names is built, and found by nobody."""
    for folder in (DOCS, DOCS / "api"):
        trees = re.findall(r"```{toctree}\n(.*?)```", (folder / "index.md").read_text(), flags=re.DOTALL)
        named = {line.strip() for tree in trees for line in tree.splitlines() if line.strip()}
        missing = {page.stem for page in folder.glob("*.md")} - {"index"} - named
        assert not missing, f"name {missing} in a toctree of {folder.name}/index.md"


def public_names():
    """Names that the package and its public subpackages export: (where, name, object)."""
    packages = ["sami_ppl"] + [m.name for m in pkgutil.walk_packages(sami_ppl.__path__, "sami_ppl.") if m.ispkg]
    for package in packages:
        module = importlib.import_module(package)
        for name, found in ((name, getattr(module, name)) for name in dir(module)):
            own = getattr(found, "__module__", "").startswith("sami_ppl")
            if own and not name.startswith("_") and (inspect.isclass(found) or inspect.isfunction(found)):
                yield package, name, found


def test_every_public_name_is_in_the_reference():
    text = "".join(REFERENCE)
    whole = set(re.findall(r"automodule:: (\S+)\n   :members:\n   :imported-members:", text))
    modules = set(re.findall(r"automodule:: (\S+)\n   :members:", text))
    missing = {
        f"{package}.{name}: add {found.__module__} to a page of docs/api"
        for package, name, found in public_names()
        if found.__module__ not in modules and not any(found.__module__.startswith(f"{w}.") for w in whole)
    }
    assert not missing, "\n".join(sorted(missing))


def test_every_public_name_says_what_it_is():
    assert not {f"{package}.{name}" for package, name, found in public_names() if not inspect.getdoc(found)}


def test_every_error_raised_is_told():
    """The docstring of a public function names the errors that its own body raises."""
    untold = {
        f"{package}.{name} raises {error}"
        for package, name, found in public_names()
        if inspect.isfunction(found)
        for error in re.findall(r"raise ([A-Z]\w+)\(", inspect.getsource(found))
        if error not in (inspect.getdoc(found) or "")
    }
    assert not untold


@pytest.mark.slow
@pytest.mark.release
def test_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("furo", reason="the site takes the extra: pip install -e '.[docs]'")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", DOCS, tmp_path / "site"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    found = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    page = (tmp_path / "site" / "api" / "evidence.html").read_text()
    assert "evidence_bound" in page
    # A shape is shown as it is written, and a docstring's Markdown as Markdown.
    shown = re.sub(r"<[^>]+>", "", page).replace("&#39;", "'")
    assert "Float[Array | np.ndarray, 'obs *event']" in shown
    assert "`" not in shown
    assert ":::" not in (tmp_path / "site" / "index.html").read_text()
