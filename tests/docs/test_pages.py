"""The Python of the pages runs as printed, and the pictures are what the code draws."""

import re
import runpy
import sys

import pytest
from pages import DOCS, PAGES, TEXTS, relative

pytestmark = pytest.mark.source
WITH_PYTHON = [page for page in PAGES if "```python" in page.read_text()]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=relative)
def test_the_python_of_a_page_runs_as_printed(page, tmp_path):
    file = tmp_path / "page.py"
    file.write_text("\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)))
    runpy.run_path(str(file))


def test_the_pictures_are_what_the_code_draws(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS / "pictures"))
    drawn = runpy.run_path(str(DOCS / "pictures" / "make.py"))["PICTURES"]
    for name in ("canvas", "draw_balance", "draw_experts", "draw_layout", "draw_ring"):
        sys.modules.pop(name)
    assert {f"{name}.svg" for name in drawn} == {file.name for file in (DOCS / "pictures").glob("*.svg")}
    for name, draw in drawn.items():
        assert draw().svg() == (DOCS / "pictures" / f"{name}.svg").read_text(), f"{name}: run docs/pictures/make.py"


def test_every_picture_is_shown_with_words_for_who_cannot_see_it():
    shown = {name for page in PAGES for name in re.findall(r"!\[[^\]]{20,}\]\([^)]*?(\w+\.svg)\)", page.read_text())}
    assert shown == {file.name for file in (DOCS / "pictures").glob("*.svg")}


@pytest.mark.parametrize("page", TEXTS, ids=relative)
def test_every_row_of_a_table_has_a_cell_for_each_column(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for table in re.findall(r"(?:^ *\|.*\n)+", text, flags=re.MULTILINE):
        cells = [len(re.findall(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", row))) for row in table.splitlines()]
        assert set(cells) == {cells[0]}, table.splitlines()[0]
