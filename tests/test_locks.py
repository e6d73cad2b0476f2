"""One at a time in a folder."""

import subprocess
import sys
import threading

import pytest

from sami_ppl._util.errors import UserError
from sami_ppl._util.locks import held


@pytest.mark.slow
def test_of_two_that_start_together_exactly_one_wins(tmp_path):
    """The winner stays until the other has tried: 1,000 times, on folders that nobody has made yet."""
    for i in range(1000):
        start, tried, won = threading.Barrier(2), threading.Barrier(2), []

        def take(who, folder=tmp_path / f"{i}" / "run", start=start, tried=tried, won=won):
            start.wait()
            try:
                with held(folder):
                    won.append(who)
                    tried.wait()
            except UserError:
                tried.wait()

        threads = [threading.Thread(target=take, args=(who,)) for who in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1


def test_one_after_another_and_never_two(tmp_path):
    """Four threads take and give back the same folder, which is removed and made again under their hands."""
    inside, most, entered = [], [], []

    def take():
        for _ in range(200):
            try:
                with held(tmp_path / "run"):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
                    entered.append(1)
            except UserError:
                pass

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert len(entered) >= 200


HOLDING = """
import sys, time
from sami_ppl._util.locks import held
with held(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_folders_in_which_nothing_was_written_go_again(tmp_path):
    with held(tmp_path / "a" / "b") as folder:
        assert folder.is_dir()
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    with held(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").is_dir()


def test_a_killed_process_holds_nothing(tmp_path):
    folder = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", HOLDING, str(folder)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=r"^out=.*run is in use, another process is fitting into it"), held(folder):
            pass
        other.kill()
    with held(folder):
        (folder / "result").touch()
    assert [p.name for p in folder.iterdir()] == ["result"]


def test_what_is_no_folder_is_said_at_once(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for name in ("file", "link"):
        with pytest.raises(FileExistsError), held(tmp_path / name):
            pass
