"""Links in the README and on the pages lead to files, headings and names that are there; the site shows every page."""

import importlib
import re
from pathlib import Path

import pytest
from pages import DOCS, PAGES, ROOT, TEXTS, relative

pytestmark = pytest.mark.source


def headings(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and as the site spell them."""
    found = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found}
    return slugs | {re.sub(r"-+", "-", slug) for slug in slugs}  # the site joins hyphens


def defined(name: str) -> set[str]:
    """What a `::: name` of the reference shows: the name, and the members of a module."""
    path = ROOT / name.replace(".", "/")
    if path.is_dir() or path.with_suffix(".py").is_file():
        return {name, *(f"{name}.{member}" for member in vars(importlib.import_module(name)))}
    module, _, member = name.rpartition(".")
    assert hasattr(importlib.import_module(module), member), name
    return {name}


def anchors(page: Path) -> set[str]:
    text = page.read_text()
    shown = re.findall(r"^::: (\S+)", text, flags=re.MULTILINE)
    return headings(text).union(*map(defined, shown))


@pytest.mark.parametrize("page", TEXTS, ids=relative)
def test_every_link_leads_somewhere(page):
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{relative(page)} links to {target}"
        assert not anchor or anchor in anchors(file), f"{relative(page)} links to {target}"


def test_every_name_of_the_reference_is_there():
    names = [n for page in PAGES for n in re.findall(r"^::: (\S+)", page.read_text(), flags=re.MULTILINE)]
    assert len(names) > 20
    for name in names:
        assert name in defined(name)


def test_every_page_is_in_the_nav_and_every_entry_is_a_page():
    # read as lines: a parser of YAML is no dependency of the tests
    nav = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1].split("\n\n")[0]
    listed = re.findall(r": ([\w/]+\.md)$", nav, flags=re.MULTILINE)
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in PAGES)
