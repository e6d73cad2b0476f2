"""`sami show`: the settings of a file as they are when it is run, without running it."""

import ast

import pytest

from sami_ppl._util.errors import UserError
from sami_ppl.runs.settings import _leaves
from sami_ppl.runs.show import settings_table
from sami_ppl.saving.files import KINDS, find_any, list_files, load_file

NAMES = [name for kind in KINDS for name in list_files(kind)]


@pytest.mark.parametrize("name", NAMES)
def test_names_and_defaults_are_those_of_the_file_as_it_runs(name):
    lines = [line for line in settings_table(name).splitlines() if line.startswith("  ")]
    heads = [lines[0].index(word) for word in ("setting", "type", "default", "meaning")]
    rows = {line[heads[0] : heads[1]].strip(): line[heads[2] : heads[3]].strip() for line in lines[1:]}
    config = load_file(find_any(name)).Config()
    assert list(rows) == list(_leaves(config))
    for setting, default in rows.items():
        value = config
        for part in setting.split("."):
            value = getattr(value, part)
        assert ast.literal_eval(default) == value


def test_types_choices_and_meanings_are_told(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        '"""Mine: a program."""\nfrom typing import Literal\nimport sami_ppl as sp\n\nclass Config:\n'
        '    """Settings; `size` in pixels. `law`: of z."""\n\n'
        '    size: int = 3\n    law: Literal["normal", "box"] = "box"\n    fit: sp.Stage = sp.Stage(steps=7)\n'
        '    size_of: sp.Sized = sp.Sized(steps=9)\n    path: str\n\nRECOMMENDED = {"align": True}\n'
    )
    lines = [" ".join(line.split()) for line in settings_table(str(file)).splitlines()]
    assert lines[0] == "mine: Mine: a program."
    assert lines[2:5] == ["size int 3 size in pixels", "law str 'box' one of normal, box; of z",
                          "fit.steps int 7 number of steps"]  # fmt: skip
    assert any(line.startswith("fit.target str 'joint' one of marginal, joint; ") for line in lines)
    assert "size_of.steps int 9 number of steps" in lines
    assert "size_of.beta float None weight of the KL" in lines, "said by the class that has the same settings"
    assert any(line.startswith("size_of.target str None one of marginal, joint; ") for line in lines)
    assert "None in a stage: what suits program and data, which a run says when it begins" in lines
    assert "path str" in lines
    assert "taken unless others are set: {'align': True}" in lines[-2]


def test_what_has_no_settings_is_said(tmp_path):
    file = tmp_path / "mine.py"
    with pytest.raises(UserError, match="there is no models file 'disk'; did you mean disks"):
        settings_table("disk")
    file.write_text("x = 1\n")
    with pytest.raises(UserError, match=r"mine\.py has no class Config"):
        settings_table(str(file))
    file.write_text("x = (\n")
    with pytest.raises(UserError, match=r"mine\.py is not valid Python: "):
        settings_table(str(file))
