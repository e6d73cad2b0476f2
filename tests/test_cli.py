"""The command line: what it prints, and that a mistake is one message, exit code 2 and no trace of it on disk."""

import os
from pathlib import Path
import subprocess
import sys

from commands import LATE, SMALL, refused, sets, stages
import numpy as np
import pytest

from sami_ppl.runs import cli
from sami_ppl.runs.words import in_options
from sami_ppl.saving import files as programs

pytestmark = pytest.mark.filterwarnings("ignore:Cyclopts application invoked without tokens")


# ls and cp


def test_ls_lists_everything(sami):
    code, out, _ = sami("ls")
    assert code == 0
    for kind in programs.KINDS:
        assert f"{kind}/\n" in out
        for name, (_, description) in programs.list_files(kind).items():
            assert any(line.split(maxsplit=1) == [name, description] for line in out.splitlines())


def test_cp_says_what_to_do_next(sami, tmp_path):
    assert "sami run mine.py --out DIR" in sami("cp", "disks", "mine.py")[1]
    assert "sami run MODEL --with other.py --out DIR" in sami("cp", "joint", "other.py")[1]
    (tmp_path / "folder").mkdir()
    assert "sami run folder/disks.py --out DIR" in sami("cp", "disks", "folder")[1]
    assert "not overwritten" in refused(sami("cp", "digits", "mine.py"))
    assert (tmp_path / "mine.py").read_bytes() == programs.find("disks", "models").read_bytes()


def test_version(sami):
    code, out, _ = sami("--version")
    assert code == 0
    assert out.strip()[0].isdigit()


LIGHT = """
import sys
from sami_ppl.runs import cli
from sami_ppl.runs.words import in_options
for command in ("--help", "run --help", "evidence --help", "ls", "show joint", "cp disks mine.py", "cp disk other.py"):
    sys.argv = ["sami", *command.split()]
    try:
        cli.main()
    except SystemExit:
        pass
command, bound, _ = cli.app.parse_args(["run", "disks", "--out", "out"])
assert command is cli.run
print("heavy", [name for name in ("jax", "numpyro", "numpy", "xarray", "arviz", "matplotlib") if name in sys.modules])
"""


def test_help_waits_for_nothing_heavy(tmp_path):
    """The parser, help, lists, copies and a mistake in them import none of what computes."""
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[2])}
    found = subprocess.run(
        [sys.executable, "-c", LIGHT], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    assert "--resume" in found.stdout
    assert "did you mean disks" in found.stderr
    assert found.stdout.splitlines()[-1] == "heavy []"


def test_evidence_has_an_old_name(sami):
    """`sami evaluate` works and is not shown: `sp.evaluate` is another thing."""
    code, out, _ = sami("--help")
    assert code == 0
    assert "evidence" in out
    assert "evaluate" not in out
    assert sami("evaluate", "--help")[1].replace("evaluate", "evidence") == sami("evidence", "--help")[1]


@pytest.mark.parametrize(
    ("python", "shell"),
    [
        ("continue with resume=True, or choose another out=", "continue with --resume, or choose another --out"),
        ("setting encoder.steps=0: steps must be positive", "--set encoder.steps=0: steps must be positive"),
        ("setting draws=0: must be at least 1", "--set draws=0: must be at least 1"),
        ("setting latent: there is no such setting; did", "--set latent: there is no such setting; did"),
        ("method=hmc: refinement is by nuts or svi", "--with hmc: refinement is by nuts or svi"),
        ("obs=1,1: an observation is named twice", "--obs 1,1: an observation is named twice"),
        ("set batch=48, or write np.savez(path, x=array)", "set batch=48, or write np.savez(path, x=array)"),
        ("or leave them out: skip_unreadable=True", "or leave them out: --skip-unreadable"),
        ("crop the centre of all by resize=64", "crop the centre of all by --resize 64"),
        ("log_out=3 is no option, nor is program.out=3", "log_out=3 is no option, nor is program.out=3"),
    ],
)  # fmt: skip
def test_arguments_are_named_as_options(python, shell):
    assert in_options(python, cli.COMPUTING) == shell


# Mistakes


OLD = '''
"""An inference of its own, which returns what it should not."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    posterior_obs: int = 1
    draws: int = 1


def run(program, data, config, *, key, out, resume=False, progress=True):
    return {}
'''


MISSPELT = '''"""A program."""
from dataclasses import dataclass

@dataclass(frozen=True)
class Config:
    pass

def load(config, *, key):
    return mised(key)
'''


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "disk"], "did you mean disks"),
        (["run", "disks", "--with", "to_stage"], "did you mean two_stage"),
        (["run", "disks", *sets("latent=3")], "did you mean latents"),
        (["run", "disks", *sets("encoder.batsh=3")], "did you mean encoder.batch"),
        (["run", "disks", *sets("latents=many")], "--set latents=many: expected int"),
        (["run", "disks", *sets("latents")], "write KEY=VALUE"),
        (["run", "disks", *sets("network=cnn")], "expected one of mlp, unet"),
        (["run", "disks", *sets("encoder.steps=0")], "steps must be positive"),
        (["run", "disks", *sets(*SMALL, "resolution=1")], "resolution must be at least 2"),
        (["run", "disks", "--data", "none.npz"], "no data at none.npz"),
        (["run", "disks", "--data", "bad.npz"], "no array 'x'"),
        (["run", "disks", "--resize", "8"], "--resize, --skip-unreadable and --stream say how --data is"),
        (["run", "disks", "--resize", "0", "--data", "odd.npz"], "--resize 0: must be at least 1"),
        (
            ["run", "disks", "--data", "whole.npz", *sets(*SMALL)],
            "x must be floating point of about unit scale, got int",
        ),
        (["run", "broken.py"], "broken.py, line 2: ModuleNotFoundError: No module named 'there_is_no_such_package'"),
        (["run", "unclosed.py"], "unclosed.py, line 3: SyntaxError: '(' was never closed"),
        (["run", "misspelt.py"], "misspelt.py, line 9: NameError: name 'mised' is not defined"),
        (["run", "disks", "--seed", "4294967296", *sets(*SMALL)], "--seed 4294967296: must be at least 0 and below"),
        (["run", "disks", "--seed", str(10**30), *sets(*SMALL)], f"--seed {10**30}: must be at least 0 and below"),
        (["run", "images", "--data", "flat.npz", *sets("network=unet")], "a U-Net takes signals (channels, length)"),
        (["run", "disks", "--data", "nan.npz", *sets(*SMALL)], "all values of observation 0 are missing"),
        (
            ["run", "disks", *sets(*SMALL, "denoiser.batch=256")],
            "a batch of 256 needs at least as many observations for training, got 48",
        ),
        # What only the second stage or the end would find out, hours later:
        (["run", "disks", *sets(*LATE, "encoder.batch=49")], "a batch of 49 needs"),
        (["run", "disks", *sets(*LATE, "encoder.site_beta={'zz': 0.5}")], "name zz, but the prior's sites are z"),
        (["run", "disks", *sets(*LATE, "encoder.free_bits=-1.0")], "free_bits must be at least 0 nats, got -1.0"),
        (["run", "disks", *sets(*LATE, "encoder.patience=0")], "patience must be None or at least 1, got 0"),
        (["run", "disks", *sets(*LATE, "warm_clusters=True")], "clusters is for priors with discrete sites"),
        (["run", "disks", *sets(*LATE, "warm_steps=-1")], "warm_steps must be at least 0, got -1"),
        (["run", "disks", *sets(*LATE, "draws=0")], "--set draws=0: must be at least 1"),
        (
            ["run", "disks", "--with", "joint", *sets(*SMALL, *stages("both"), "posterior_obs=0")],
            "--set posterior_obs=0: must be at least 1",
        ),
        (["run", "disks", *sets(*SMALL, "denoiser.batch=55", "encoder.batch=8")], "batch"),
        (["run", "disks", "--with", "joint", *sets(*SMALL, "both.batch=49")], "batch"),
        (
            ["run", "disks", "--with", "pretrained", *sets(*SMALL)],
            "name the folder of a saved program, --set denoiser=",
        ),
        (
            ["run", "disks", "--with", "pretrained", *sets(*SMALL, *stages("encoder"), "inference.denoiser=none")],
            "none holds no saved program",
        ),
        (["run", "disks", "--devices", "99", *sets(*LATE)], "devices must lie between 1 and"),
        (["run", "disks", "--with", "old.py", *sets(*SMALL)], "return the fitted program, got dict: write"),
        (["report", "folder"], "folder is no finished run (no config.json, model, posterior.nc, metrics.json)"),
        (["report", "none"], "none is no finished run"),
        (["evidence", "none", "--limit", "1"], "--limit 1: must be at least 2"),
        (["evidence", "none", "--draws", "48"], "--draws 48: must be a power of two, at least 32"),
        (["evaluate", "none", "--levels", "0"], "--levels 0: must be at least 2"),
        (["calibrate", "none", "--simulations", "2"], "--simulations 2: must be at least 20"),
        (["refine", "none", "--with", "hmc"], "--with hmc: refinement is by nuts or svi"),
        (["compare", "none", "none/"], "a folder is named twice"),
    ],
    ids=lambda value: None if isinstance(value, list) else value[:24],
)
def test_a_mistake_is_one_message(sami, tmp_path, arguments, message):
    rng = np.random.default_rng(0)
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken.py").write_text('"""A program."""\nimport there_is_no_such_package\n')
    (tmp_path / "unclosed.py").write_text('"""A program."""\nimport math\nprint(math.pi\n')
    (tmp_path / "misspelt.py").write_text(MISSPELT)
    (tmp_path / "old.py").write_text(OLD)
    np.savez(tmp_path / "whole.npz", x=rng.integers(-1, 2, size=(20, 1, 8, 8)).astype(np.int32))
    np.savez(tmp_path / "bad.npz", y=np.zeros(3))
    np.savez(tmp_path / "flat.npz", x=rng.normal(size=(20, 1, 1, 2, 3, 4)))
    np.savez(tmp_path / "odd.npz", x=rng.normal(size=(20, 1, 9, 9)))
    np.savez(tmp_path / "nan.npz", x=np.full((20, 1, 8, 8), np.nan))
    before = sorted(tmp_path.rglob("*"))
    where = ["--out", "out"] if arguments[0] == "run" else []
    assert message in refused(sami(*arguments, *where, *(["--quiet"] if where else [])))
    assert sorted(tmp_path.rglob("*")) == before, "nothing is left behind"


@pytest.mark.parametrize("arguments", [["run", "disks"], ["run"], ["run", "disks", "--out"], ["fly"], ["ls", "--all"]])
def test_the_command_itself_may_be_wrong(sami, arguments, tmp_path):
    code, out, err = sami(*arguments)
    assert code in (1, 2)
    assert (out + err).strip()
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())
