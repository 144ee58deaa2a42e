"""A tokenised corpus in a folder: the files of both sides, the tokenizer, and a meta.json that says what must be there.

    train.tokens  train.offsets  held_out.tokens  held_out.offsets      zigzag_jax.train.data.token_file
    tokenizer.json
    meta.json      format, dtype, tokens and documents of each side, vocab_size, end_of_document, digest, source

Such folders come out of the cache (`zigzag_jax.train.data.store`) and of `python -m zigzag_jax.train.tokenize`, and are
opened alike: the sizes of the files are compared with meta.json, and nothing is read or hashed.
"""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from zigzag_jax.train.data.digest import text_digest
from zigzag_jax.train.data.token_file import Tokens, TokenStore, TokenWriter, read_store, token_dtype
from zigzag_jax.train.data.tokenizer import encode, end_of_document, id_count, load_tokenizer
from zigzag_jax.train.errors import may_come_back, refusal

FORMAT = "zigzag_jax tokens 2"  # another layout of the files, split rule or encoding gets another number
SIDES = ("train", "held_out")
META = "meta.json"
TOKENIZER = "tokenizer.json"
_BATCH = 4_000_000  # characters tokenised at once


@dataclass(frozen=True, eq=False)
class Dataset[S: Tokens]:
    """A tokenised corpus."""

    train: S
    """What the model sees."""
    held_out: S
    """What it is scored on and never trained on; a few per cent, see `zigzag_jax.train.data.split`."""
    tokenizer: Tokenizer
    """The one that was given or trained."""
    vocab_size: int
    """Rows that an embedding table needs."""
    end_of_document: int
    """The id that closes each document."""
    digest: str
    """Hex digest of the tokens of both sides and their offsets: equal digests, equal batches."""
    folder: Path
    """Where it lies, tokenizer.json beside the tokens."""


def is_dataset(folder: Path) -> bool:
    """Whether a folder holds tokens, whole or damaged, and no text. MachineError where storage does not answer."""
    try:
        meta = (folder / META).read_bytes()
    except OSError as error:
        if may_come_back(error):  # tokens would be taken for text
            raise refusal(error, "data", "must be there", folder) from None
        meta = b""
    return FORMAT[:-1].encode() in meta or any((folder / f"{side}.tokens").is_file() for side in SIDES)


def unfinished(folder: Path) -> Path:
    """Where `zigzag_jax.train.tokenize` works until `folder` is whole."""
    return folder.with_name(f"{folder.name}.unfinished")


def read_meta(folder: Path) -> dict[str, Any]:
    """What meta.json says. Raises OSError or ValueError: not there, damaged, or of another format."""
    try:
        meta = json.loads((folder / META).read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{META}: {error}") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise ValueError(f"{META} must say format {FORMAT!r}")
    return meta


def read_dataset(folder: Path, *, field: str, remedy: str) -> Dataset[TokenStore]:
    """Open a folder of tokens. UserError(field, ...), ending with `remedy`, for what is missing or damaged."""
    try:
        meta = read_meta(folder)
        sizes = {side: {name: int(meta[name][side]) for name in ("tokens", "documents")} for side in SIDES}
        sides = {side: read_store(folder, side, dtype=meta["dtype"], **sizes[side]) for side in SIDES}
        tokenizer = load_tokenizer(folder)
        rest = {name: meta[name] for name in ("vocab_size", "end_of_document", "digest")}
        if (ids := id_count(tokenizer)) != rest["vocab_size"]:
            raise ValueError(f"{TOKENIZER} must have {rest['vocab_size']} tokens, got {ids}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise refusal(error, field, f"must hold whole tokens ({error}); {remedy}", folder) from None
    return Dataset(train=sides["train"], held_out=sides["held_out"], tokenizer=tokenizer, folder=folder, **rest)


@contextlib.contextmanager
def write_sides(folder: Path, tokenizer: Tokenizer) -> Iterator[list[TokenWriter]]:
    """Writers for the files of both sides, [train, held_out]: index them by "is it held out?"."""
    how = {"dtype": token_dtype(id_count(tokenizer)), "end_of_document": end_of_document(tokenizer)}
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(TokenWriter(folder, side, **how)) for side in SIDES]
        yield writers
        for writer in writers:
            writer.sync()


def add_documents(
    writers: Sequence[TokenWriter], tokenizer: Tokenizer, pairs: Iterable[tuple[bool, str]]
) -> Iterator[tuple[int, int]]:
    """Tokenise pairs (held out?, text) batch by batch; yields (texts, characters) of each batch when it is written."""
    for batch in _batches(pairs):
        for (held_out, _), ids in zip(batch, encode(tokenizer, [text for _, text in batch]), strict=True):
            writers[held_out].add(ids)
        yield len(batch), sum(len(text) for _, text in batch)


def _batches(pairs: Iterable[tuple[bool, str]]) -> Iterator[list[tuple[bool, str]]]:
    """The pairs in lists of about _BATCH characters."""
    batch, size = [], 0
    for pair in pairs:
        batch.append(pair)
        size += len(pair[1])
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def finish(folder: Path, tokenizer: Tokenizer, writers: Sequence[TokenWriter], source: str) -> dict[str, Any]:
    """Write what stands beside the tokens, and return meta.json; `source` is a digest of what they were made of."""
    meta = {
        "format": FORMAT,
        "dtype": writers[0].dtype,
        "tokens": {side: writer.size for side, writer in zip(SIDES, writers, strict=True)},
        "documents": {side: writer.documents for side, writer in zip(SIDES, writers, strict=True)},
        "vocab_size": id_count(tokenizer),
        "end_of_document": writers[0].end,
        "digest": text_digest("".join(writer.digest for writer in writers)),
        "source": source,
    }
    write_whole(folder / TOKENIZER, tokenizer.to_str(pretty=True))
    write_whole(folder / META, json.dumps(meta, indent=1))
    return meta


def write_whole(file: Path, text: str) -> None:
    """Write a small file that is there whole or not at all, whenever the process is killed."""
    work = file.with_name(f".{file.name}.{os.getpid()}")
    with work.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    work.rename(file)
