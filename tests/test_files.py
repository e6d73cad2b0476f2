"""What is written aside: complete or not there, and the old one until then."""

from pathlib import Path

import pytest

from sami_ppl._util.files import written_aside
from sami_ppl._util.locks import held


def write(path, text):
    path.write_text(text)


def write_folder(path, text):
    path.mkdir()
    (path / f"{text}.txt").write_text(text)


def read(path):
    return path.read_text() if path.is_file() else [file.name for file in path.iterdir()]


@pytest.mark.parametrize(("write", "new", "old"), [(write, "new", "old"), (write_folder, ["new.txt"], ["old.txt"])])
def test_the_new_takes_the_place_of_the_old(tmp_path, write, new, old):
    target = tmp_path / "there" / "target.nc"
    for text, before in (("old", None), ("new", old)):
        with written_aside(target) as aside:
            assert aside.name == target.name, "writers go by the suffix"
            write(aside, text)
            assert not target.exists() if before is None else read(target) == before
    assert read(target) == new
    assert list(target.parent.iterdir()) == [target], "nothing is left beside"


@pytest.mark.parametrize(("write", "old"), [(write, "old"), (write_folder, ["old.txt"])])
@pytest.mark.parametrize("fails", ["while it is written", "when it is put in its place"])
def test_an_interruption_leaves_the_old(tmp_path, monkeypatch, write, old, fails):
    target = tmp_path / "target"
    write(target, "old")

    def stop(*arguments):
        raise KeyboardInterrupt

    def interrupted():
        with written_aside(target) as aside:
            write(aside, "new")
            if fails == "while it is written":
                stop()
            # What moves the old one away goes on working, and must bring it back.
            monkeypatch.setattr("pathlib.Path.replace", lambda path, to: stop() if path == aside else replace(path, to))

    replace = Path.replace
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert read(target) == old
    assert list(tmp_path.iterdir()) == [target]


def test_what_killed_processes_left_aside_goes(tmp_path):
    """The old folder, moved away by one that was killed before the new one was there, comes back; the rest is junk."""
    aside = {name: tmp_path / f".{name}.a1_b2c3d" for name in ("config.json", "model", "saved")}
    for folder in aside.values():
        (folder / "new").mkdir(parents=True)
    (aside["config.json"] / "new" / "config.json").write_text("{")
    for name in ("model", "saved"):
        (aside[name] / "old").mkdir()
        (aside[name] / "old" / name).write_text("old")
    (tmp_path / "saved").mkdir()
    (tmp_path / ".mine.12345678").mkdir()
    (tmp_path / ".mine.12345678" / "data").touch()
    (tmp_path / ".hidden.12345678").touch()
    with held(tmp_path):
        pass
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".hidden.12345678", ".mine.12345678", "model", "saved"]
    assert (tmp_path / "model" / "model").read_text() == "old"
    assert not list((tmp_path / "saved").iterdir())
