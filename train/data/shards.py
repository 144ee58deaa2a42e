"""A corpus as shards: parts of about 8 MB that are tokenised apart, by whoever is free, and joined in their order.

    WORK/tokenizer.json             the one that all shards are encoded with
    WORK/shards/3f0c../             a shard that is done: train.tokens  train.offsets  held_out.tokens  held_out.offsets
    WORK/shards/.91ab..-xyz/        a shard at work; renamed as the last act

Which tokens a shard holds depends on its documents, the tokenizer and which rule holds for what is held out
(split.py), on nothing that another process knows. A digest of all that is the shard's name. So whoever writes a shard,
and whenever, writes the same bytes; two that do it at once do no harm; and where a file has changed since, only shards
with a piece of it have other names and are written again.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zigzag_jax.train.data.dataset import SIDES, TOKENIZER, add_documents, finish, write_sides
from zigzag_jax.train.data.digest import text_digest
from zigzag_jax.train.data.formats import Piece, pieces, read
from zigzag_jax.train.data.split import parts
from zigzag_jax.train.data.tokenizer import load_tokenizer
from zigzag_jax.train.errors import refusal

SHARD = 8_000_000  # bytes of files: seconds of work, which is what a kill may cost
_FOLDER = "shards"


@dataclass(frozen=True)
class Shard:
    """Pieces of files that stand one after another in the corpus."""

    pieces: tuple[Piece, ...]
    """What it is made of."""
    name: str
    """Of its folder: a digest of all that decides its tokens."""

    @property
    def size(self) -> int:
        """About how many bytes of files these are."""
        return sum(piece.size for piece in self.pieces)

    def folder(self, work: Path) -> Path:
        """Where its tokens are, once they are whole."""
        return work / _FOLDER / self.name


Stats = Mapping[str, tuple[int, int]]  # path of a file -> its bytes, and when it was changed (ns)


def cut(files: Iterable[Path], stats: Stats, how: str, sizes: Mapping[str, int], most: int = SHARD) -> list[Shard]:
    """The files as shards of about `most` bytes; large files by themselves, small ones together.

    `how` stands for all that decides the tokens beside the files. Small files are put together by their `sizes`, which
    stay what they were when the work began: one that changes does not move the others to other shards.
    Raises UserError("data", ...) as `pieces` does.
    """
    found: list[tuple[Piece, ...]] = []
    together: list[Piece] = []
    size = 0
    for file in files:
        own = pieces(file, most)
        if together and (len(own) > 1 or size + sizes[str(file)] > most):
            found.append(tuple(together))
            together, size = [], 0
        if len(own) > 1:
            found += [(piece,) for piece in own]
        else:
            together += own
            size += sizes[str(file)]
    found += [tuple(together)] if together else []
    return [Shard(those, _name(those, stats, how)) for those in found]


def _name(those: tuple[Piece, ...], stats: Stats, how: str) -> str:
    what = [(str(piece.file), *stats[str(piece.file)], piece.begin, piece.end) for piece in those]
    return text_digest(json.dumps([how, what]))


def stats_of(files: Iterable[Path]) -> Stats:
    """Bytes and date of files. UserError for one that is not there, MachineError where storage does not answer."""
    try:
        return {str(file): (stat.st_size, stat.st_mtime_ns) for file in files for stat in [file.stat()]}
    except OSError as error:
        raise refusal(error, "data", f"must be readable ({error.strerror})", error.filename) from None


def changed(old: Mapping[str, Sequence[int]], new: Stats) -> str:
    """Which files are others than before, as words; empty where none is."""
    names = [file for file in {**old, **new} if tuple(old.get(file, ())) != new.get(file)]
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"; changed since: {', '.join(names[:4])}{more}" if names else ""


class ShardWriter:
    """Tokenises shards into WORK; made once in each worker."""

    def __init__(self, work: Path, field: str, ends: bool) -> None:
        """`field` of JSONL and parquet holds the text; `ends` as `zigzag_jax.train.data.split.parts` takes it."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for every core
        self.work, self.field, self.ends = work, field, ends
        self.tokenizer = load_tokenizer(work)
        (work / _FOLDER).mkdir(exist_ok=True)

    def __call__(self, shard: Shard) -> Iterator[tuple[int, int, int]]:
        """Write the shard; yields (documents, characters, bytes of files) as they are done."""
        folder = shard.folder(self.work)
        mine = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        texts = (text for piece in shard.pieces for text in read(piece, self.field))
        pairs = (pair for text in texts for pair in parts(text, self.ends))
        with write_sides(mine, self.tokenizer) as writers:
            for documents, characters in add_documents(writers, self.tokenizer, pairs):
                yield documents, characters, 0
        try:
            mine.rename(folder)
        except OSError:
            if not folder.is_dir():  # else a worker that outlived its killed parent for a moment was faster
                raise
        yield 0, 0, shard.size


def clean(work: Path, shards: Sequence[Shard]) -> None:
    """Drop what killed workers left, and all that is none of these shards."""
    wanted = {shard.name for shard in shards}
    for folder in (work / _FOLDER).glob("*"):  # pathlib's * finds hidden ones too
        if folder.name not in wanted:
            shutil.rmtree(folder, ignore_errors=True)


def join(shards: Sequence[Shard], work: Path, target: Path, source: str) -> dict[str, Any]:
    """Put all shards, which must be done, together in the new folder `target`; returns its meta.json."""
    tokenizer = load_tokenizer(work / TOKENIZER)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(target)  # of a join that was killed
    target.mkdir()
    with write_sides(target, tokenizer) as writers:
        for shard in shards:
            for writer, side in zip(writers, SIDES, strict=True):
                writer.extend(shard.folder(work), side)
    return finish(target, tokenizer, writers, source)
