"""What is written aside: complete or not there, and the old one until then."""

from pathlib import Path

import pytest

from sami_ppl._util.files import written_aside


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
