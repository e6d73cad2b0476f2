"""The folder of results: what a run leaves, keeps and never touches, with an inference that only looks at it."""

import json
import os
from pathlib import Path
import subprocess
import sys

from commands import FREE, SMALL, refused, sets
import jax
import numpy as np
from PIL import Image
import pytest

from sami_ppl.fitting.checkpoint import CheckpointError
from sami_ppl.runs import reading
from sami_ppl.runs import run as running
from sami_ppl.saving import files as programs
from sami_ppl.saving.save import save


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
    monkeypatch.setattr(reading, "read_data", lambda path: pytest.fail("the data need not be read"))
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


@pytest.mark.slow
@pytest.mark.filterwarnings("always:.*images left out")
def test_images_are_read_again_as_they_were(sami, tmp_path, looked):
    """Resized, what cannot be read left out: of the run's own when it is opened; other observations are resized."""
    (tmp_path / "photographs").mkdir()
    for i, size in enumerate([(30, 20), (16, 16), (20, 40), (12, 12), (13, 12)]):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, size, np.uint8)).save(f"photographs/{i}.png")
    Path("photographs/torn.png").touch()
    command = ["run", "images", "--data", "photographs", "--out", "out", "--resize", "12", *sets("latents=2")]
    assert "torn.png cannot be read as an image" in refused(sami(*command, "--quiet"))
    looked(["log.jsonl"], KeyboardInterrupt())
    code, _, err = sami(*command, "--skip-unreadable")
    assert code == 130
    assert "5 images of 5 sizes, 12×12 to 40×20: the shorter side is resized to 12, the centre cropped" in err
    assert "1 of 6 images left out" in err
    assert json.loads(Path("out/config.json").read_text())["reading"] == {"resize": 12, "skip_unreadable": True}
    assert "reading.resize: 12 there, 16 here" in refused(
        sami(*[("16" if word == "12" else word) for word in command], "--skip-unreadable", "--quiet", "--resume")
    )
    save(looked.programs[0], tmp_path / "out" / "model")
    for name in ("posterior.nc", "metrics.json"):
        Path("out", name).touch()
    with pytest.warns(UserWarning, match="left out"):
        assert running.open_run(Path("out")).data.x.shape == (5, 1, 12, 12)
    assert reading.read_as(Path("out")) == {"resize": 12}
    assert reading.read_as(Path("none")) == {}


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
