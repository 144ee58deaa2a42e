"""A tokenised corpus, built once and found again.

Tokenising takes seconds for the default corpus and hours for a large one, so the result lies in a cache, under the hash
of all that decides it: the text, the tokenizer (or the size of the one to train) and the format of the files.

    $ZIGZAG_CACHE (default ~/.cache/zigzag_jax) / KEY / train.tokens  train.offsets  held_out.tokens  held_out.offsets
                                                        tokenizer.json  meta.json

It is written under a temporary name, flushed, and renamed as the last act. So a folder with the final name is whole,
whoever was killed meanwhile, and of two builders at once one wins and the other's work is dropped. Process 0 builds;
the others wait for the name to appear, which needs a cache that all hosts see. While texts go by, the builder keeps the
date of its temporary folder fresh: the others wait for as long as it moves, hours if need be.

A later start reads the text once to know its key (a second for a gigabyte or so) and tokenises nothing.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tokenizers import Tokenizer

from zigzag_jax.train.data.corpus import documents
from zigzag_jax.train.data.dataset import FORMAT, Dataset, add_documents, finish, read_dataset, write_sides
from zigzag_jax.train.data.digest import text_digest
from zigzag_jax.train.data.split import Survey, split, survey
from zigzag_jax.train.data.token_file import TokenStore
from zigzag_jax.train.data.tokenizer import id_count, load_tokenizer, train_tokenizer
from zigzag_jax.train.errors import UserError, refusal

_ABANDONED = 3600.0  # seconds without a write after which an unfinished folder counts as a killed builder's
_FRESH = 1.0  # seconds between two dates that a builder gives its folder

Say = Callable[[str], None]
Working = Callable[[], None]
"""Called again and again by what takes long and moves; what hangs does not call it."""


def open_dataset(
    data: str | Path | None,
    tokenizer: str | Path | None,
    *,
    vocab_size: int = 1024,
    process_index: int = 0,
    say: Say = lambda text: None,
    working: Working = lambda: None,
    wait_s: float = 3000.0,
) -> Dataset[TokenStore]:
    """Find the tokens of `data` (None: the default corpus) in the cache, or build them.

    `tokenizer` is a tokenizer.json, None trains one of `vocab_size` tokens. Only process 0 builds; the others wait
    until nobody has worked there for `wait_s` seconds. `say` gets lines of progress; `working` is called at each
    document and each look of those that wait. Raises UserError: "data" and "tokenizer" for what `documents`, `survey`
    and `load_tokenizer` refuse, "ZIGZAG_CACHE" for a cache that cannot be written, is damaged, or not shared.
    """
    texts = lambda: _passing(documents(data), working)
    found = survey(texts())
    given = None if tokenizer is None else load_tokenizer(tokenizer)
    how = f"train {vocab_size}" if given is None else given.to_str()
    key = text_digest("\n".join((FORMAT, found.digest, how)))
    folder = cache_folder() / key
    if not folder.exists():
        if process_index == 0:
            _build(folder, lambda: split(texts(), found), found, given or vocab_size, say)
        else:
            _wait(folder, wait_s, say, working)
    return read_dataset(folder, field="ZIGZAG_CACHE", remedy="delete that folder")


def cache_folder() -> Path:
    """$ZIGZAG_CACHE, or ~/.cache/zigzag_jax; read at the call, not at import."""
    return Path(os.environ.get("ZIGZAG_CACHE") or "~/.cache/zigzag_jax").expanduser().absolute()


def _passing[T](items: Iterator[T], call: Callable[[], None]) -> Iterator[T]:
    """The items, with a call before each."""
    for item in items:
        call()
        yield item


def _wait(folder: Path, wait_s: float, say: Say, working: Working) -> None:
    say(f"waiting for process 0 to build the tokens in {folder}")
    begin, written = time.monotonic(), 0.0
    while not folder.exists():
        working()
        if (newest := max(map(_last_write, _unfinished(folder)), default=0.0)) != written:
            begin, written = time.monotonic(), newest
        if time.monotonic() - begin > wait_s:
            rule = f"must be a folder that all processes share: process 0 built nothing there in {wait_s:g} s"
            raise UserError("ZIGZAG_CACHE", rule, folder)
        time.sleep(0.2)


Pairs = Callable[[], Iterator[tuple[bool, str]]]  # each call reads the corpus again: (held out?, text)


def _build(folder: Path, pairs: Pairs, found: Survey, tokenizer: Tokenizer | int, say: Say) -> None:
    """Tokenise everything into `folder`; an int is the size of the tokenizer to train first."""
    work = _work_folder(folder)
    moving = lambda: _passing(pairs(), _freshener(work))
    try:
        begin = time.monotonic()
        say(f"building the tokens of {found.documents} documents ({found.characters / 1e6:.1f} MB), once, in {folder}")
        if isinstance(tokenizer, int):
            texts = (text for held_out, text in moving() if not held_out)
            tokenizer = train_tokenizer(texts, characters=found.characters, vocab_size=tokenizer)
            say(f"trained a tokenizer of {id_count(tokenizer)} tokens in {time.monotonic() - begin:.1f} s")
        sizes = _write(work, moving(), found, tokenizer, say)
        _publish(work, folder)
        say(
            f"built {sizes['train']} tokens to train on, {sizes['held_out']} held out, {time.monotonic() - begin:.1f} s"
        )
    except OSError as error:
        rule = f"must be a folder with room to write in ({error.strerror})"
        raise refusal(error, "ZIGZAG_CACHE", rule, folder) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _work_folder(folder: Path) -> Path:
    """A new temporary folder beside the final one; what killed builders left of the same tokens goes away."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for old in _unfinished(folder):
            if time.time() - _last_write(old) > _ABANDONED:
                shutil.rmtree(old, ignore_errors=True)
        return Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        rule = f"must be a folder to write in ({error.strerror})"
        raise refusal(error, "ZIGZAG_CACHE", rule, folder.parent) from None


def _unfinished(folder: Path) -> Iterator[Path]:
    """The temporary folders of all builders, killed ones too."""
    return folder.parent.glob(f".{folder.name}-*")


def _freshener(work: Path) -> Callable[[], None]:
    """What gives a folder the present date, once in a while."""
    last = -_FRESH

    def call() -> None:
        nonlocal last
        if time.monotonic() - last >= _FRESH:
            last = time.monotonic()
            os.utime(work)

    return call


def _last_write(folder: Path) -> float:
    try:
        return max(p.stat().st_mtime for p in (folder, *folder.glob("*")))
    except FileNotFoundError:  # its builder finished between the two looks
        return time.time()


def _publish(work: Path, folder: Path) -> None:
    """The one moment at which the tokens come to be."""
    try:
        os.rename(work, folder)
    except OSError:
        if not folder.exists():  # else another builder was faster: the same key, so the same tokens
            raise


def _write(work: Path, pairs: Iterator[tuple[bool, str]], found: Survey, tokenizer: Tokenizer, say: Say) -> dict:
    """Write all files into `work`; returns {side: tokens}."""
    done, told = 0, time.monotonic()
    with write_sides(work, tokenizer) as writers:
        for _, characters in add_documents(writers, tokenizer, pairs):
            done += characters
            if time.monotonic() - told > 2:
                told = time.monotonic()
                say(f"tokenised {done / 1e6:.1f} of {found.characters / 1e6:.1f} MB")
    return finish(work, tokenizer, writers, found.digest)["tokens"]
