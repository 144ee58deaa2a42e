"""A corpus as shards: parts of about 8 MB that are tokenised apart, by whoever is free, and joined in their order.

    WORK/tokenizer.json             the one that all shards are encoded with
    WORK/shards/00000003/           a shard that is done: train.tokens  train.offsets  held_out.tokens  held_out.offsets
    WORK/shards/.00000004-xyz/      a shard at work; renamed as the last act

Which tokens a shard holds depends on its documents, the tokenizer and which rule holds for what is held out
(split.py), on nothing that another process knows. So whoever writes a shard, and whenever, writes the
same bytes; and two that do it at once do no harm.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zigzag_jax.train.data.dataset import SIDES, TOKENIZER, add_documents, finish, write_sides
from zigzag_jax.train.data.formats import Piece, pieces, read
from zigzag_jax.train.data.split import parts
from zigzag_jax.train.data.tokenizer import load_tokenizer

SHARD = 8_000_000  # bytes of files: seconds of work, which is what a kill may cost
_FOLDER = "shards"


@dataclass(frozen=True)
class Shard:
    """Pieces of files that stand one after another in the corpus."""

    number: int
    """Its place among the shards, from 0."""
    pieces: tuple[Piece, ...]
    """What it is made of."""

    @property
    def size(self) -> int:
        """About how many bytes of files these are."""
        return sum(piece.size for piece in self.pieces)

    def folder(self, work: Path) -> Path:
        """Where its tokens are, once they are whole."""
        return work / _FOLDER / f"{self.number:08}"


def cut(files: Iterable[Path], most: int = SHARD) -> list[Shard]:
    """The files as shards of about `most` bytes. Raises UserError("data", ...) as `pieces` does."""
    shards: list[Shard] = []
    mine: list[Piece] = []
    size = 0
    for piece in (piece for file in files for piece in pieces(file, most)):
        if mine and size + piece.size > most:
            shards.append(Shard(len(shards), tuple(mine)))
            mine, size = [], 0
        mine.append(piece)
        size += piece.size
    return [*shards, Shard(len(shards), tuple(mine))] if mine else shards


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


def clean(work: Path) -> None:
    """Drop what killed workers left of shards."""
    for folder in (work / _FOLDER).glob(".*"):
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
