"""Where text comes from: a path on disk, or Python's own standard library, as a stream of documents.

A *document* is one string that was written as a whole; packing and attention keep documents apart, so the cut matters.

    notes.txt, a.md, x.py     one file, one document (any file that is UTF-8)
    pages.jsonl               one line, one document: {"text": "..."}
    a folder                  every file below it, sorted by its path; hidden files and `__pycache__` are passed over
    nothing (None)            the .py files of the running interpreter's standard library and the topics of `help()`

The default needs no download and is real text: about 9 MB of code by many hands and 0.5 MB of English prose, 560
documents. Indentation, keywords and docstrings are learnt within minutes by a model of a few million weights on a CPU.
The same interpreter gives the same documents in the same order; another Python version has other text, which the digest
of `zigzag_jax.train.store` notices.

Documents stream: nothing here holds more than one file (JSONL: one line) in memory.
"""

import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from zigzag_jax.train.errors import UserError

# Not text to learn from: other people's packages, tests (odd encodings on purpose), tables of code points, a folder
# that newer Pythons lack, and pydoc_data (its one file is the repr of prose that `_standard_library` yields as such).
_NOT_PROSE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "lib2to3", "pydoc_data"}


def documents(path: str | Path | None) -> Iterator[str]:
    """The documents under `path` in a fixed order; blank ones are left out.

    Raises UserError("data", ...) at the first document (never at the call): the path does not exist, a folder holds no
    file, a file is not UTF-8 or cannot be read, a JSONL line is no object with a string "text" (file and line named).
    """
    texts = _standard_library() if path is None else _files(Path(path).expanduser())
    return (text for text in texts if text.strip())


def _files(path: Path) -> Iterator[str]:
    if path.is_file():
        yield from _read(path)
        return
    if not path.is_dir():
        raise UserError("data", "must be a file or a folder that exists", path)
    # compared by parts, as strings: the order is the same under every locale and file system
    files = sorted((p for p in path.rglob("*") if _is_data(p.relative_to(path)) and p.is_file()), key=lambda p: p.parts)
    if not files:
        raise UserError("data", "must be a folder that holds text files", path)
    for file in files:
        yield from _read(file)


def _is_data(relative: Path) -> bool:
    return not any(part.startswith(".") or part == "__pycache__" for part in relative.parts)


def _read(file: Path) -> Iterator[str]:
    try:
        if file.suffix == ".jsonl":
            with file.open("rb") as lines:
                yield from (_json_text(line, f"{file}:{n}") for n, line in enumerate(lines, 1) if line.strip())
        else:
            yield file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError("data", "must be UTF-8 text", f"{file} (byte {error.start})") from None
    except OSError as error:
        raise UserError("data", f"must be readable ({error.strerror})", file) from None


def _json_text(line: bytes, place: str) -> str:
    try:
        text = json.loads(line)["text"]
        text.encode()  # refuses what is no string, and half a surrogate pair, which JSON can spell and UTF-8 cannot
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError("data", 'each JSONL line must be an object with a string "text"', place) from None
    return text


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
