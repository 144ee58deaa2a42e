"""What is never trained on: a few per cent of the documents, chosen by what they say.

A document is held out when the hash of its text falls under a threshold. So the choice needs no random state, does not
move when other documents are added or files are renamed, and two copies of one text never land on both sides.

A corpus of a few documents (a single book, say) has none to spare, or the hash picks none. There the *end* of each
document is held out, cut at a line end: the model is then asked to go on with a text whose beginning it knows.

`survey` reads the text once, to know which of the two rules holds and what the text's digest is; `split` reads it
again. In between nothing is kept but the `Survey`, whatever the size of the corpus.

Which rule holds needs no whole reading as a rule: once FEW documents are seen, one of them held out and one not, no
later document changes it. `ends_held_out` stops there, after some 50 to 150 documents, and from then on `parts` decides
each document by itself, in whichever process reads it.
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
    _check(count, characters)
    return Survey(count, characters, total.hexdigest(), ends=not _whole(count, held))


def ends_held_out(texts: Iterable[str]) -> bool:
    """`survey(texts).ends`, read no further than needed. Raises UserError("data", ...) as `survey` does."""
    characters, held, count = 0, 0, 0
    for text in texts:
        held += _is_held_out(_digest(text))
        characters += len(text)
        count += 1
        if _whole(count, held):
            return False
    _check(count, characters)
    return True


def parts(text: str, ends: bool) -> list[tuple[bool, str]]:
    """Pairs (held out?, text) of one document: itself, or with `ends` what stands before its cut and behind it."""
    return _parts(text, b"" if ends else _digest(text), ends)


def split(texts: Iterable[str], found: Survey) -> Iterator[tuple[bool, str]]:
    """Pairs (held out?, text), in order; with `found.ends` each document gives one of either kind.

    Raises UserError("data", ...) after the last one, when the texts are not those that `found` describes.
    """
    total = hashlib.blake2b(digest_size=16)
    for text in texts:
        digest = _digest(text)
        total.update(digest)
        yield from _parts(text, digest, found.ends)
    if total.hexdigest() != found.digest:
        raise UserError("data", "must not change while it is read", "other text at the second reading")


def _parts(text: str, digest: bytes, ends: bool) -> list[tuple[bool, str]]:
    if not ends:
        return [(_is_held_out(digest), text)]
    cut = _cut(text)
    return [(held, part) for held, part in ((False, text[:cut]), (True, text[cut:])) if part]


def _whole(count: int, held: int) -> bool:
    """Whether whole documents are held out: there are enough, and the hash picks some."""
    return count >= FEW and 0 < held < count


def _check(count: int, characters: int) -> None:
    if characters < 2 * max(count, 1):
        raise UserError("data", "must hold text to train on and text to hold out", f"{characters} characters")


def _cut(text: str) -> int:
    """Where the held-out end begins: after a line end if one is near, and never at 0 for two characters or more."""
    cut = min(int(len(text) * (1 - HELD_OUT)), len(text) - 1)
    line = text.rfind("\n", cut // 2, cut) + 1
    return line or cut


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _is_held_out(digest: bytes) -> bool:
    return int.from_bytes(digest[:8], "big") < HELD_OUT * 2**64
