"""The log of a fit, as it is read: a short table, a picture, one line of a bar; and pictures in notebooks."""

from pathlib import Path

import numpy as np
import pytest

from sami_ppl import plots
from sami_ppl._util.history import History, summary_line


def filled(stage, losses, kl=None):
    log = History(stage=stage)
    for i, loss in enumerate(losses, start=1):
        log.add(
            {"step": 100 * i, "loss": loss, "bound": loss - 1, "train_loss": loss, "seconds": 2.0 * i, "kl": kl or {}}
        )
    return log


def test_stages_print_as_one_table():
    """Of each stage the first, the best and the last record."""
    log = History.joined(
        [filled("denoiser", [9.0, 3.0, 5.0, 7.0]), filled("encoder", [4.0], {"z": np.array([1.5, 0.25])})]
    )
    lines = [line.split() for line in repr(log).splitlines()]
    assert lines[1] == ["stage", "step", "loss", "bound", "KL", "seconds"]
    assert lines[2:] == [
        ["denoiser", "100", "9.0", "8.0", "2"],
        ["denoiser", "200", "3.0", "2.0", "4"],
        ["denoiser", "400", "7.0", "6.0", "8"],
        ["encoder", "100", "4.0", "3.0", "1.75", "2"],
    ]
    assert "<pre" in log._repr_html_()
    assert repr(History()) == "History of fit: no records"


def test_the_log_draws_itself():
    log = History.joined([filled("denoiser", [9.0, 3.0]), filled("encoder", [4.0, 2.0], {"z": [1.5, 0.25]})])
    figure = log.plot()
    assert len(figure.axes) == 3
    titles = [panel.get_title(loc="left") for panel in figure.axes]
    assert titles[0] == "denoiser: loss, nats per observation"
    with pytest.raises(ValueError, match="no records"):
        History().plot()


def test_notebooks_show_pictures():
    """IPython takes `_repr_png_` where no pyplot has told it of figures."""
    picture = plots.image_grid(np.zeros((2, 1, 4, 4)))
    assert picture._repr_png_().startswith(b"\x89PNG")


def test_the_bar_names_the_sites():
    record = {"loss": 1.0, "bound": 2.0, "kl": {"place": [0.5, 0.25], "light": [1.0]}, "unguided": [3.0]}
    assert summary_line(record) == "loss 1.0 · bound 2.0 · kl place 0.50 0.25, light 1.00 · error 3.0"


def test_a_kill_while_the_log_is_cut_leaves_it_whole(tmp_path, monkeypatch):
    """The records of the stage before are lost with nothing else: no checkpoint has them."""
    file = tmp_path / "log.jsonl"
    first = History(file, stage="denoiser")
    first.add({"step": 2, "loss": 1.0})
    file.write_text(file.read_text() + '{"stage": "encoder", "st')
    before = file.read_text()

    def killed(self, text, *more, **options):
        self.open("w").close()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            History(file, stage="encoder")
    assert file.read_text() == before
    History(file, stage="encoder")
    assert file.read_text() == before.splitlines(keepends=True)[0]
