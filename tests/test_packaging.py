"""The wheel: it holds the programs, and from an empty folder, without the checkout, the command finds and runs them."""

import os
from pathlib import Path
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = {kind: sorted(f.name for f in (ROOT / kind).glob("*.py")) for kind in ("models", "inference")}

pytestmark = pytest.mark.slow

# Without `site`, no path file of an editable installation puts the checkout back on the path: the dependencies come by
# the path itself, behind the library installed from the wheel.
SAMI = "import sys, sami_ppl.runs.cli; sys.exit(sami_ppl.runs.cli.main())"


def call(*command, cwd, **environment):
    found = subprocess.run(
        list(map(str, command)), cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy: the checkout stays as it is."""
    folder = tmp_path_factory.mktemp("build")
    for name in ("sami_ppl", *PROGRAMS):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, folder / "source" / name)
    call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, "source", cwd=folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """`sami(*arguments, cwd=...)` of the installed wheel."""
    target = tmp_path_factory.mktemp("installed")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps", "--no-index")
    call(*pip, "--target", target, wheel, cwd=target)
    dependencies = [path for path in sys.path if path.endswith("site-packages")]

    def python(code, *arguments, cwd):
        path = os.pathsep.join([str(target), *dependencies])
        environment = {"PYTHONPATH": path, "HOME": str(target / "home"), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        return call(sys.executable, "-S", "-c", code, *arguments, cwd=cwd, **environment)

    return target, python


@pytest.mark.release
def test_wheel_holds_library_and_programs(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    library = {str(f.relative_to(ROOT)) for f in (ROOT / "sami_ppl").rglob("*.py")}
    copies = {f"sami_ppl/_programs/{kind}/{name}" for kind, files in PROGRAMS.items() for name in files}
    assert copies <= set(names)
    assert {name for name in names if name.endswith(".py")} == library | copies
    assert {name.split("/")[0].split("-")[0] for name in names} == {"sami_ppl"}, "no package called models or inference"
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "sami_ppl/py.typed" in names, "type checkers of users would take nothing from it"
    assert "sami_ppl/__init__.pyi" in names, "the public names are imported by it"


@pytest.mark.release
def test_installed_command_runs_without_the_checkout(installed, tmp_path):
    target, python = installed
    where = python("import sami_ppl; print(sami_ppl.__file__); print(sami_ppl.__version__)", cwd=tmp_path).split()
    assert Path(where[0]).is_relative_to(target), "the checkout is importable"

    listed = python(SAMI, "ls", cwd=tmp_path)
    for files in PROGRAMS.values():
        assert all(f"  {name.removesuffix('.py')} " in listed for name in files)

    python(SAMI, "cp", "disks", "mine.py", cwd=tmp_path)
    assert (tmp_path / "mine.py").read_bytes() == (ROOT / "models" / "disks.py").read_bytes()

    settings = {
        "observations": 60, "resolution": 8, "width": 8, "depth": 1, "posterior_obs": 2, "draws": 2, "both.steps": 2,
        "both.batch": 8, "both.validate_every": 2,
    }  # fmt: skip
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    out = python(SAMI, "run", "mine.py", "--with", "joint", "--out", "out", "--quiet", *sets, cwd=tmp_path)
    assert "report: out/report.html" in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.py", "out"]
    assert (tmp_path / "out" / "posterior.nc").stat().st_size > 0
    loaded = python("import sami_ppl; print(sami_ppl.load('out/model').event_shape)", cwd=tmp_path)
    assert loaded.strip() == "(1, 8, 8)"


def test_the_version_is_in_one_place():
    """And what is cited, and with what style is checked, is what the project says elsewhere."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    stated = [f for f in ROOT.glob("*.*") if f.suffix in (".cff", ".toml") and f'"{version}"' in f.read_text()]
    assert [f.name for f in stated] == ["pyproject.toml"]
    assert version not in (ROOT / "CITATION.cff").read_text()
    (ruff,) = re.findall(r"^ruff==(\S+)", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert f"rev: v{ruff}" in (ROOT / ".pre-commit-config.yaml").read_text()
    assert "2512.17127" in (ROOT / "CITATION.cff").read_text()
