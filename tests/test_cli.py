"""The command line: what it prints, and that a mistake is one message, exit code 2 and no trace of it on disk."""

import json
import os
from pathlib import Path
import subprocess
import sys

import equinox as eqx
import jax
import numpy as np
import pytest
import xarray as xr

from sami_ppl.fitting.checkpoint import CheckpointError
from sami_ppl.runs import cli
from sami_ppl.runs import run as running
from sami_ppl.saving import files as programs
from sami_ppl.saving import save as io

SMALL = (
    "observations=60", "resolution=8", "width=8", "depth=1", "posterior_obs=3", "draws=4", "model.log_snr_min=-4",
)  # fmt: skip


FREE = tuple(setting for setting in SMALL if not setting.startswith("resolution"))


pytestmark = pytest.mark.filterwarnings("ignore:Cyclopts application invoked without tokens")


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    """The compilation cache is for users: nothing is written into their folder here, no setting stays behind."""
    monkeypatch.setattr(running, "use_compilation_cache", lambda: None)
    monkeypatch.delenv("SAMI_TRACE", raising=False)


@pytest.fixture
def sami(monkeypatch, capsys, tmp_path):
    """`sami(*arguments)` in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["sami", *map(str, arguments)])
        try:
            code = cli.main() or 0
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return call


def sets(*settings):
    return [part for setting in settings for part in ("--set", setting)]


def stages(*names, steps=2, batch=8):
    return [f"{n}.{k}={v}" for n in names for k, v in {"steps": steps, "batch": batch, "validate_every": 2}.items()]


LATE = (*SMALL, *stages("denoiser", "encoder"), "warm_steps=2")


def refused(result):
    """The message of a command that must end as the user's mistake does."""
    code, out, err = result
    assert code == 2, err
    assert out == ""
    assert "Traceback" not in err
    _, found, message = f"\n{err}".rpartition("\nsami: ")  # after what was being done
    assert found, err
    return f"sami: {message}"


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
        ("log_out=3 is no option, nor is program.out=3", "log_out=3 is no option, nor is program.out=3"),
    ],
)  # fmt: skip
def test_arguments_are_named_as_options(python, shell):
    assert cli.in_options(python) == shell


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
        (
            ["run", "images", "--data", "vectors.npz"],
            "in_shape must be (channels, size, size), a square image, got (5,)",
        ),
        (
            ["run", "disks", "--data", "whole.npz", *sets(*SMALL)],
            "x must be floating point of about unit scale, got int",
        ),
        (["run", "broken.py"], "broken.py, line 2: ModuleNotFoundError: No module named 'there_is_no_such_package'"),
        (["run", "unclosed.py"], "unclosed.py, line 3: SyntaxError: '(' was never closed"),
        (["run", "misspelt.py"], "misspelt.py, line 9: NameError: name 'mised' is not defined"),
        (["run", "disks", "--seed", "4294967296", *sets(*SMALL)], "--seed 4294967296: must be at least 0 and below"),
        (["run", "disks", "--seed", str(10**30), *sets(*SMALL)], f"--seed {10**30}: must be at least 0 and below"),
        (["run", "images", "--data", "wide.npz"], "in_shape must be (channels, size, size)"),
        (["run", "disks", "--data", "nan.npz", *sets(*SMALL)], "NaN or infinite"),
        (["run", "images", "--data", "odd.npz", *sets("widths=4,4")], "image size 9"),
        (["run", "disks", *sets(*SMALL)], "a batch of 256 needs at least as many observations for training, got 48"),
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
    np.savez(tmp_path / "vectors.npz", x=rng.normal(size=(20, 5)))
    np.savez(tmp_path / "wide.npz", x=rng.normal(size=(20, 1, 8, 12)))
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


# The folder of results, with an inference that only looks at it


@pytest.fixture
def looked(monkeypatch):
    """Stands in for fitting: notes the folder, writes what it is told to, then stops as a user would."""

    def stand_in(write, error):
        def load_file(file):
            module = right(file)
            if hasattr(module, "run"):
                module.run = inference
            return module

        def inference(program, data, config, *, key, out, **rest):
            stand_in.programs.append(program)
            assert (out / "config.json").exists()
            for name in write:
                (out / name).write_text("{}")
            raise error

        right = programs.load_file
        monkeypatch.setattr(programs, "load_file", load_file)

    stand_in.programs = []
    return stand_in


COMMAND = ["run", "disks", "--out", "out", *sets(*SMALL)]


@pytest.mark.slow
def test_interrupted_run_keeps_its_folder(sami, tmp_path, looked):
    looked(["log.jsonl"], KeyboardInterrupt())
    code, _, err = sami(*COMMAND)
    assert code == 130
    assert "--resume continues" in err
    assert "continue it with --resume or choose another --out" in refused(sami(*COMMAND, "--quiet"))
    assert sami(*COMMAND, "--resume")[0] == 130
    assert sami(*COMMAND, "--resume", *sets("draws=9", "posterior_obs=2"))[0] == 130, "no checkpoint depends on them"
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["settings"]["inference"]
    assert (settings["draws"], settings["posterior_obs"]) == (9, 2)
    other = refused(sami(*COMMAND, "--quiet", "--resume", "--set", "latents=2", "--seed", "4"))
    assert "settings.model.latents: 3 there, 2 here" in other
    assert "seed: 0 there, 4 here" in other
    assert "width" not in other
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "log.jsonl"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["settings"]["model"]["latents"] == 3
    assert config["versions"]["jax"] == jax.__version__


@pytest.mark.slow
def test_a_run_may_be_made_longer(sami, tmp_path, looked):
    """The checkpoints say whether it is: where they do not let it, the folder is the run that it was."""
    looked(["log.jsonl"], KeyboardInterrupt())
    assert sami(*COMMAND)[0] == 130
    assert sami(*COMMAND, "--resume", *sets("encoder.steps=4000"))[0] == 130
    steps = lambda: json.loads((tmp_path / "out" / "config.json").read_text())["settings"]["inference"]["encoder"]  # noqa: E731
    assert steps()["steps"] == 4000
    looked(["log.jsonl"], CheckpointError("steps: 4000 there, 2 here"))
    assert "4000 there" in refused(sami(*COMMAND, "--resume", "--quiet", *sets("encoder.steps=2")))
    assert steps()["steps"] == 4000


@pytest.mark.slow
def test_a_run_goes_on_after_an_upgrade_if_told_to(sami, tmp_path, looked):
    looked(["log.jsonl"], KeyboardInterrupt())
    sami(*COMMAND)
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    begun = config["versions"] | {"jax": "0.1.2"}
    file.write_text(json.dumps(config | {"versions": begun}))
    message = refused(sami(*COMMAND, "--resume", "--quiet"))
    assert f"begun with other versions:\n  versions.jax: '0.1.2' there, '{jax.__version__}' here\n" in message
    assert "by --upgraded" in message
    assert "continue it with --resume" in refused(sami(*COMMAND, "--quiet", "--upgraded"))
    for _ in range(2):
        assert sami(*COMMAND, "--resume", "--upgraded")[0] == 130
    config = json.loads(file.read_text())
    assert (config["versions"]["jax"], config["upgraded_from"]) == (jax.__version__, [begun])
    assert sami(*COMMAND, "--resume")[0] == 130, "it is a run of these versions now"


def test_a_full_disk_is_one_message(sami, tmp_path, looked):
    looked(["log.jsonl"], CheckpointError("the checkpoint of step 3 cannot be written: go on with resume=True"))
    message = refused(sami(*COMMAND, "--quiet"))
    assert message == "sami: the checkpoint of step 3 cannot be written: go on with --resume\n"
    looked(["log.jsonl"], OSError(28, "No space left on device"))
    assert refused(sami(*COMMAND, "--quiet", "--resume")) == "sami: [Errno 28] No space left on device\n"


def test_a_folder_that_cannot_be_made_is_said_first(sami, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "read_data", lambda path: pytest.fail("the data need not be read"))
    (tmp_path / "file").touch()
    command = ["run", "disks", "--data", "large.npz", "--out"]
    assert refused(sami(*command, "file/out")) == f"sami: --out file/out: {tmp_path / 'file'} is no folder\n"
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # of root, nothing is refused
    assert refused(sami(*command, "out")) == f"sami: --out out: {tmp_path} cannot be written to, choose another --out\n"


def test_a_backend_of_pictures_that_is_not_installed_does_no_harm(sami, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.not_installed")
    assert "no finished run" in refused(sami("report", "none", "--quiet"))
    assert os.environ["MPLBACKEND"] == "agg"


def test_run_that_fails_late_keeps_what_it_has(sami, tmp_path, looked):
    looked(["log.jsonl"], programs.UserError("late, for resume=True"))
    assert refused(sami(*COMMAND, "--quiet")) == "sami: late, for --resume\n"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "log.jsonl"]


def test_run_that_fails_early_leaves_no_folder(sami, tmp_path, looked):
    looked([], ValueError("early, out=x"))
    assert refused(sami(*COMMAND, "--quiet")) == "sami: early, --out x\n"
    assert not list(tmp_path.iterdir())


def test_foreign_folder_is_not_touched(sami, tmp_path, looked):
    looked([], AssertionError("must not be reached"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("all of it")
    for resume in ([], ["--resume"]):
        assert "holds something else: choose a new folder" in refused(sami(*COMMAND, "--quiet", *resume))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.tex"]
    (tmp_path / "file").write_text("")
    arguments = ["file" if a == "out" else a for a in COMMAND]
    assert "holds something else" in refused(sami(*arguments, "--quiet"))


def test_a_run_keeps_what_it_compiles(sami, looked, monkeypatch):
    looked([], KeyboardInterrupt())
    called = []
    monkeypatch.setattr(running, "use_compilation_cache", lambda: called.append(True))
    sami(*COMMAND)
    assert called == [True]


def test_data_file_is_found_from_anywhere(sami, tmp_path, looked):
    looked(["log.jsonl"], KeyboardInterrupt())
    np.savez(tmp_path / "mine.npz", x=np.random.default_rng(0).normal(size=(20, 1, 8, 8)))
    sami(*COMMAND, "--data", "mine.npz")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["data"] == str(tmp_path / "mine.npz")


def test_the_user_has_the_last_word_over_what_follows_from_the_data(sami, tmp_path, looked):
    looked(["log.jsonl"], KeyboardInterrupt())
    np.savez(tmp_path / "mine.npz", x=np.random.default_rng(0).normal(size=(20, 1, 8, 8)))
    assert sami("run", "disks", "--out", "out", "--data", "mine.npz", *sets(*FREE, "mean=1.0"))[0] == 130
    (program,) = looked.programs
    assert (program.denoiser.mean, program.encoder.mean) == (1.0, 1.0)
    assert 0.9 < program.denoiser.std < 1.1
    assert program.event_shape == (1, 8, 8)


def test_programs_take_the_data_there_are(sami, tmp_path, looked):
    """Settings of data that a program would draw say nothing about those that are given; vectors are no images."""
    looked(["log.jsonl"], KeyboardInterrupt())
    np.savez(tmp_path / "mine.npz", x=np.random.default_rng(0).normal(size=(20, 5)))
    assert sami(*COMMAND, "--data", "mine.npz")[0] == 130
    assert looked.programs[0].event_shape == (5,)


def test_a_reader_that_has_seen_enough_is_no_mistake():
    """As in `sami ls | head`: nothing is said of it."""
    command = [sys.executable, "-m", "sami_ppl", "ls"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_a_bug_is_no_mistake_of_the_users(sami, monkeypatch, tmp_path, looked):
    """A ValueError in the midst of a run shows where it was raised, and that it is a bug."""
    looked(["log.jsonl"], ValueError("late"))
    code, out, err = sami(*COMMAND, "--quiet")
    assert (code, out) == (1, "")
    assert err.startswith("Traceback")
    assert "in inference\n" in err
    assert "ValueError: late\nsami: this is a bug" in err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "log.jsonl"]
    monkeypatch.setenv("SAMI_TRACE", "1")
    with pytest.raises(ValueError, match="late"):
        sami(*COMMAND, "--resume")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "MemoryError"),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore"),
            "RESOURCE_EXHAUSTED: Out of memory",
        ),
    ],
)
def test_too_little_memory_is_no_bug(sami, looked, error, reason):
    looked(["log.jsonl"], error)
    message = refused(sami(*COMMAND))
    assert f"there is not enough memory ({reason}" in message


def test_a_mistake_can_be_traced(sami, monkeypatch, tmp_path):
    (tmp_path / "broken.py").write_text('"""A program."""\nlen(3)\n')
    assert "broken.py, line 2: TypeError: object of type 'int'" in refused(
        sami("run", "broken.py", "--out", "out", "--quiet")
    )
    monkeypatch.setenv("SAMI_TRACE", "1")
    with pytest.raises(programs.UserError) as caught:
        sami("run", "broken.py", "--out", "out")
    assert isinstance(caught.value.__cause__, TypeError)
    with pytest.raises(programs.UserError):
        sami("run", "disk", "--out", "out")


# Whole runs

RUNS = {
    "two_stage": [*stages("denoiser", "encoder"), "warm_steps=2", "align=True"],
    "decoupled": stages("both"),
    "joint": stages("both"),
    "vae": [*stages("both"), "decoder=gaussian"],
    "pretrained": [*stages("encoder"), "warm_steps=0"],
    "prior": [*stages("fit"), "prior=flow"],
}
# What they leave as it was fitted.
REUSING = {"pretrained": ("denoiser",), "prior": ("denoiser", "encoder")}
DOCUMENTED = [
    "checkpoints",
    "config.json",
    "figures",
    "log.jsonl",
    "metrics.json",
    "model",
    "posterior.nc",
    "report.html",
]


def small_posterior(tree):
    return tree["posterior"].dataset["z"].values


@pytest.mark.slow
@pytest.mark.release
# Two steps teach nothing, which is said; some measures of constant codes are not defined.
@pytest.mark.filterwarnings("ignore")
def test_every_inference_leaves_what_is_documented(sami, tmp_path):
    assert sorted(RUNS) == sorted(programs.list_files("inference")), "a new inference needs its settings here"
    saved = None
    for name, settings in RUNS.items():
        if name == "pretrained":
            settings = [*settings, f"inference.denoiser={saved}"]
        if name == "prior":
            settings = [*settings, f"inference.program={saved}"]
        seed = "1" if name in REUSING else "0"
        command = ["run", "disks", "--with", name, "--out", name, "--quiet", "--seed", seed, *sets(*SMALL, *settings)]
        code, out, err = sami(*command)
        assert code == 0, err
        folder = tmp_path / name
        assert set(DOCUMENTED) <= {p.name for p in folder.iterdir()}
        assert {p.name for p in folder.iterdir()} <= {*DOCUMENTED, "tensorboard"}
        assert f"report: {name}/report.html" in out
        assert "KL per axis" in out
        metrics = json.loads((folder / "metrics.json").read_text())
        assert np.isfinite(metrics["bound_nats"]["mean"])
        assert metrics["seconds"].keys() >= {"fit", "report", "total"}
        tree = xr.open_datatree(folder / "posterior.nc", engine="h5netcdf").load()
        assert small_posterior(tree).shape == (1, 4, 3, 3)
        program = io.load(folder / "model")
        assert program.event_shape == (1, 8, 8)
        for part in REUSING.get(name, ()):
            # Of other data, whose mean and standard deviation are others.
            assert eqx.tree_equal(getattr(program, part), getattr(io.load(saved), part))
        steps = [(r["stage"], r["step"]) for r in map(json.loads, (folder / "log.jsonl").read_text().splitlines())]
        assert steps == [(stage, 2) for stage in dict.fromkeys(s.split(".")[0] for s in settings if ".steps" in s)]
        if name == "two_stage":
            saved = folder / "model"
            again = sami(*command, "--resume")
            assert again[0] == 0, again[2]
            redrawn = xr.open_datatree(folder / "posterior.nc", engine="h5netcdf").load()
            assert np.array_equal(small_posterior(tree), small_posterior(redrawn))
            assert len((folder / "log.jsonl").read_text().splitlines()) == 2
            (folder / "report.html").unlink()
            code, out, err = sami("report", name)
            assert code == 0, err
            assert (folder / "report.html").exists()


@pytest.mark.slow
@pytest.mark.release
@pytest.mark.filterwarnings("ignore")
def test_three_decoders_make_one_table(sami, tmp_path):
    """One setting swaps the likelihood, and with it the inference; what it does not allow is left out by name."""
    settings = {
        "guided": [*stages("denoiser", "encoder"), "warm_steps=2"],
        "conditioned": [*stages("both")], "gaussian": [*stages("both")],
    }  # fmt: skip
    for name, own in settings.items():
        command = ["run", "disks", "--out", name, "--quiet", *sets(*SMALL, *own, f"decoder={name}")]
        code, _, err = sami(*command)
        assert code == 0, err
        page = (tmp_path / name / "report.html").read_text()
        assert ("need a guided decoder" in page) == (name != "guided")
        assert ("Samples without a code" in page) == (name != "gaussian")
        code, out, err = sami("evidence", name, "--limit", 4, "--levels", 2, "--weighted", 0)
        assert code == 0, err
        assert ("needs a guided decoder" in out) == (name != "guided")
    code, out, err = sami("compare", *settings, "--limit", 4, "--levels", 2)
    assert code == 0, err
    assert all(name in out for name in settings)
    for command in (["run", "disks", "--with", "two_stage"], ["run", "disks", "--with", "decoupled"]):
        said = refused(sami(*command, "--out", "no", "--quiet", *sets(*SMALL, "decoder=gaussian")))
        assert "needs a guided decoder" in said
        assert not (tmp_path / "no").exists()
