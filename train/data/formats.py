"""How documents lie in files, and how a large file falls into pieces that can be read apart.

    notes.txt, a.md, x.py    one file, one document (any file that is UTF-8)    one piece
    pages.jsonl              one line, one document: {"text": "..."}            the lines that begin in a range of bytes
    pages.jsonl.gz           the same, compressed                               one piece
    pages.parquet            one row, one document: the column "text"           ranges of row groups

The pieces of a file, read one after another, give the file's documents in their order. Blank documents are left out.
Documents stream: nothing here holds more than one text file, one line or 256 rows of parquet in memory. Parquet needs
pyarrow, which the extra `data` brings.
"""

import gzip
import itertools
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from zigzag_jax.train.errors import RunError, UserError, refusal

TEXT_FIELD = "text"
_ROWS = 256  # of parquet at once


@dataclass(frozen=True)
class Piece:
    """A part of a file; by default all of it."""

    file: Path
    """Where it is."""
    begin: int = 0
    """First byte in which a line may begin (JSONL), or first row group (parquet)."""
    end: int | None = None
    """First byte or row group that is not in it; None: to the end of the file."""
    size: int = 0
    """About how many bytes of the file these are; for progress only."""


def pieces(file: Path, most: int) -> list[Piece]:
    """A file as pieces of about `most` bytes, or as one where it cannot be cut.

    Raises UserError("data", ...) for a file that is not there, or no parquet where its name says so.
    """
    try:
        size = file.stat().st_size
    except OSError as error:
        raise refusal(error, "data", f"must be readable ({error.strerror})", file) from None
    count = max(1, round(size / most))
    if _kind(file) is _jsonl and count > 1:
        bounds = [size * i // count for i in range(count + 1)]
    elif _kind(file) is _parquet and count > 1:
        groups = _open_parquet(file).num_row_groups
        bounds = sorted({groups * i // count for i in range(count + 1)})
    else:
        return [Piece(file, size=size)]
    return [Piece(file, a, b, size * (b - a) // bounds[-1]) for a, b in itertools.pairwise(bounds)]


def read(piece: Piece, field: str = TEXT_FIELD) -> Iterator[str]:
    """The documents of a piece; `field` is the key of a JSON object, the column of a parquet file.

    Raises UserError("data", ...) that names file and line or row: not UTF-8, cannot be read, a line that is no object
    with a string there, a row without one; UserError("text-field", ...) where parquet has no such column of strings.
    """
    try:
        yield from (text for text in _kind(piece.file)(piece, field) if text.strip())
    except UnicodeDecodeError as error:
        raise UserError("data", "must be UTF-8 text", f"{piece.file} (byte {error.start})") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError("data", f"must be a whole gzip file ({error})", piece.file) from None
    except OSError as error:
        raise refusal(error, "data", f"must be readable ({error.strerror or error})", piece.file) from None


def _kind(file: Path) -> Callable[[Piece, str], Iterator[str]]:
    for suffix, reader in {".jsonl": _jsonl, ".jsonl.gz": _gzip, ".parquet": _parquet}.items():
        if file.name.endswith(suffix):
            return reader
    return _whole


def _whole(piece: Piece, field: str) -> Iterator[str]:
    yield piece.file.read_bytes().decode("utf-8-sig")


def _jsonl(piece: Piece, field: str) -> Iterator[str]:
    with piece.file.open("rb") as lines:
        at = piece.begin
        if at:  # a line that began before is the last of the piece before; seen from its last byte, a new one is not
            lines.seek(at - 1)
            at += len(lines.readline()) - 1
        while (piece.end is None or at < piece.end) and (line := lines.readline()):
            if line.strip():
                yield _json_text(line, field, lambda: f"{piece.file}:{_line_number(piece.file, at)}")  # noqa: B023
            at += len(line)


def _gzip(piece: Piece, field: str) -> Iterator[str]:
    with gzip.open(piece.file, "rb") as lines:
        for n, line in enumerate(lines, 1):
            if line.strip():
                yield _json_text(line, field, lambda: f"{piece.file}:{n}")  # noqa: B023


def _json_text(line: bytes, field: str, place: Callable[[], str]) -> str:
    try:
        text = json.loads(line)[field]
        text.encode()  # refuses what is no string, and half a surrogate pair, which JSON can spell and UTF-8 cannot
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError("data", f'each JSONL line must be an object with a string "{field}"', place()) from None
    return text


def _line_number(file: Path, at: int) -> int:
    """Of the line that begins at byte `at`, from 1; read again from the file's begin, since nobody counted so far."""
    with file.open("rb") as lines:
        return 1 + sum(chunk.count(b"\n") for chunk in _chunks(lines, at))


def _chunks(file: BinaryIO, size: int) -> Iterator[bytes]:
    while size > 0 and (chunk := file.read(min(size, 1 << 20))):
        size -= len(chunk)
        yield chunk


def _parquet(piece: Piece, field: str) -> Iterator[str]:
    file = _open_parquet(piece.file)
    import pyarrow as pa

    schema = file.schema_arrow
    names = [name for name, kind in zip(schema.names, schema.types, strict=True) if _is_string(kind)]
    if field not in names:
        rule = f"must name a column of strings of {piece.file.name}, which has {', '.join(names) or 'none'}"
        raise UserError("text-field", rule, field)
    end = file.num_row_groups if piece.end is None else piece.end
    row = sum(file.metadata.row_group(i).num_rows for i in range(piece.begin))
    try:
        for batch in file.iter_batches(_ROWS, list(range(piece.begin, end)), [field], use_threads=False):
            for text in batch.column(0).to_pylist():
                if text is None:
                    raise UserError("data", f'each row must have a string "{field}"', f"{piece.file} row {row}")
                yield text
                row += 1
    except (pa.ArrowException, OSError) as error:  # what it raises for damaged pages
        raise _damaged(error, piece.file) from None


def _is_string(kind: Any) -> bool:
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _open_parquet(file: Path) -> Any:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise UserError("data", "needs pyarrow to read parquet: pip install 'zigzag_jax[data]'", file) from None
    try:
        return parquet.ParquetFile(file)
    except pa.ArrowException as error:
        raise _damaged(error, file) from None


def _damaged(error: Exception, file: Path) -> RunError | UserError:
    return refusal(error, "data", f"must be a whole parquet file ({' '.join(str(error).split())})", file)
