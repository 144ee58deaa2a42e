"""Where text comes from: a path on disk, or Python's own standard library, as a stream of documents.

A *document* is one string that was written as a whole; packing and attention keep documents apart, so the cut matters.

    a file                    text, .jsonl, .jsonl.gz or .parquet; what a document is: `formats.py`
    a folder                  every file below it, sorted by its path; hidden files and `__pycache__` are passed over
    nothing (None)            the .py files of the running interpreter's standard library and the topics of `help()`

The default needs no download and is real text: about 9 MB of code by many hands and 0.5 MB of English prose, 560
documents. Indentation, keywords and docstrings are learnt within minutes by a model of a few million weights on a CPU.
The same interpreter gives the same documents in the same order; another Python version has other text, which the digest
of `zigzag_jax.train.data.store` notices.

Documents stream: nothing here holds more than one file (JSONL: one line) in memory.
"""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

from zigzag_jax.train.data.formats import Piece, read
from zigzag_jax.train.errors import UserError

# Not text to learn from: other people's packages, tests (odd encodings on purpose), tables of code points, a folder
# that newer Pythons lack, and pydoc_data (its one file is the repr of prose that `_standard_library` yields as such).
_NOT_PROSE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "lib2to3", "pydoc_data"}


def documents(path: str | Path | None) -> Iterator[str]:
    """The documents under `path` in a fixed order; blank ones are left out.

    Raises UserError at the first document (never at the call) for what `files` and `read` refuse.
    """
    if path is None:
        yield from (text for text in _standard_library() if text.strip())
        return
    for file in files(Path(path).expanduser()):
        yield from read(Piece(file))


def files(path: Path) -> list[Path]:
    """The file `path`, or those of the folder `path` in a fixed order. Raises UserError("data", ...) where none is."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError("data", "must be a file or a folder that exists", path)
    # compared by parts, as strings: the order is the same under every locale and file system
    found = sorted((p for p in path.rglob("*") if _is_data(p.relative_to(path)) and p.is_file()), key=lambda p: p.parts)
    if not found:
        raise UserError("data", "must be a folder that holds text files", path)
    return found


def _is_data(relative: Path) -> bool:
    return not any(part.startswith(".") or part == "__pycache__" for part in relative.parts)


def _standard_library() -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    names = (p.relative_to(root) for p in root.rglob("*.py"))
    files = sorted((p for p in names if _is_prose(p)), key=lambda p: p.parts)
    if not files:
        raise UserError("data", "must be given: this Python keeps no .py files of its standard library", root)
    for file in files:
        yield (root / file).read_bytes().decode("utf-8")
    from pydoc_data.topics import topics  # half a megabyte of the language reference: not at import

    for name in sorted(topics):
        yield topics[name]


def _is_prose(relative: Path) -> bool:
    made_by_the_build = any(part.startswith(("config-", "_sysconfigdata")) for part in relative.parts)
    return not made_by_the_build and _is_data(relative) and not _NOT_PROSE & set(relative.parts)
