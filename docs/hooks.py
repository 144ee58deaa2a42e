"""Pages link to files outside of docs/ (examples, notebooks): the site carries these files beside its pages.

So one link serves a reader of the repository and a reader of the site. And what GitHub shows as a list and Markdown
does not, for want of an empty line before it, is an error: docstrings are pages here, too.
"""

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_FOLDER = "repository"  # of the site
_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)]*)?\)")
_CODE = re.compile(r"<pre.*?</pre>", re.DOTALL)
_LOST_LIST = re.compile(r"^(.*)\n- ", re.MULTILINE)


def _outside(page: str, target: str) -> str | None:
    """Path from the repository's root where `target`, as the page `page` (a path in docs/) links to it, is no page."""
    path = normpath(PurePosixPath("docs", page).parent / target) if "://" not in target else "docs"
    return None if path.startswith(("docs/", "..")) or path == "docs" else path


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what the pages link to."""
    root = Path(config.docs_dir).parent
    linked = {
        path
        for file in files.documentation_pages()
        for match in _LINK.finditer(file.content_string)
        if (path := _outside(file.src_uri, match[2])) and (root / path).is_file()
    }
    for path in sorted(linked):
        files.append(File.generated(config, f"{_FOLDER}/{path}", abs_src_path=str(root / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let the links lead there. A file that is not there stays a broken link, which --strict refuses."""
    del config, files
    here = page.file.src_uri

    def lead(match: re.Match) -> str:
        path = _outside(here, match[2])
        if path is None:
            return match[0]
        return f"{match[1]}{relpath(f'{_FOLDER}/{path}', PurePosixPath(here).parent)}{match[3] or ''})"

    return _LINK.sub(lead, markdown)


def _lost_list(html: str) -> str | None:
    r"""The line before a list that came out as text.

    >>> _lost_list("<p>Two rules:\n- one</p>"), _lost_list("<p>Two rules:</p>\n<pre>a\n- b</pre>")
    ('<p>Two rules:', None)
    """
    lost = _LOST_LIST.search(_CODE.sub("", html))
    return lost and lost[1]


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Refuse a page with a list that came out as text."""
    del config, files
    if before := _lost_list(html):
        raise PluginError(f"{page.file.src_uri}: a list needs an empty line before it, behind {before!r}")
    return html
