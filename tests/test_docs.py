"""The code of the documentation runs as it stands, with its assertions, page by page."""

import os
from pathlib import Path
import re

import arviz as az
import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [page for page in sorted(DOCS.glob("*.md")) if "```python" in page.read_text()]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_runs(page, tmp_path, monkeypatch):
    """The blocks of a page, one after another in one namespace; nothing is left behind where it ran."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(az.rcParams, "plot.backend", "none")
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        exec(compile(block, str(page), "exec"), names)
    assert os.listdir(tmp_path) == []


def test_there_are_pages():
    assert PAGES
