"""What is never trained on: a few per cent of the documents, chosen by what they say.

A document is held out when the hash of its text falls under a threshold. So the choice needs no random state, does not
move when other documents are added or files are renamed, and two copies of one text never land on both sides.

A corpus of a few documents (a single book, say) has none to spare, or the hash picks none. There the *end* of each
document is held out, cut at a line end: the model is then asked to go on with a text whose beginning it knows.

`survey` reads the text once, to know which of the two rules holds and what the text's digest is; `split` reads it
again. In between nothing is kept but the `Survey`, whatever the size of the corpus.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from zigzag_jax.train.errors import UserError

HELD_OUT = 0.03  # the share of documents, or of each document
FEW = 50  # fewer documents than this: hold out ends, since 3 per cent of them would be none or a third of the text


@dataclass(frozen=True)
class Survey:
    """What one reading of a corpus tells."""

    documents: int
    """How many there are."""
    characters: int
    """Their length together, in characters."""
    digest: str
    """Hex digest of all the texts in order."""
    ends: bool
    """Whether the end of each document is held out, instead of whole documents."""


def survey(texts: Iterable[str]) -> Survey:
    """Read all documents once. Raises UserError("data", ...) when there is no text to train on and to hold out."""
    total, characters, held, count = hashlib.blake2b(digest_size=16), 0, 0, 0
    for text in texts:
        digest = _digest(text)
        total.update(digest)
        held += _is_held_out(digest)
        characters += len(text)
        count += 1
    if characters < 2 * max(count, 1):
        raise UserError("data", "must hold text to train on and text to hold out", f"{characters} characters")
    return Survey(count, characters, total.hexdigest(), ends=count < FEW or held in {0, count})


def split(texts: Iterable[str], found: Survey) -> Iterator[tuple[bool, str]]:
    """Pairs (held out?, text), in order; with `found.ends` each document gives one of either kind.

    Raises UserError("data", ...) after the last one, when the texts are not those that `found` describes.
    """
    total = hashlib.blake2b(digest_size=16)
    for text in texts:
        digest = _digest(text)
        total.update(digest)
        if not found.ends:
            yield _is_held_out(digest), text
        else:
            cut = _cut(text)
            yield from ((held, part) for held, part in ((False, text[:cut]), (True, text[cut:])) if part)
    if total.hexdigest() != found.digest:
        raise UserError("data", "must not change while it is read", "other text at the second reading")


def _cut(text: str) -> int:
    """Where the held-out end begins: after a line end if one is near, and never at 0 for two characters or more."""
    cut = min(int(len(text) * (1 - HELD_OUT)), len(text) - 1)
    line = text.rfind("\n", cut // 2, cut) + 1
    return line or cut


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _is_held_out(digest: bytes) -> bool:
    return int.from_bytes(digest[:8], "big") < HELD_OUT * 2**64
