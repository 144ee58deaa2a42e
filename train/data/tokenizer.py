"""Text to numbers and back: a given `tokenizer.json`, or a byte-level BPE trained on the corpus itself.

Byte-level BPE begins with the 256 bytes, so that any text can be written, and joins the most frequent neighbours until
the vocabulary is full. With the default of 1024 tokens the embedding of a tiny model stays small, and a token is still
about 2.7 characters of the default corpus. The same text gives the same tokenizer.

Whatever the tokenizer, two rules hold here:

- it has an *end-of-document* token: a model must learn where texts end, and that id closes every document in the store;
- such special tokens are never read out of the text: "<|endoftext|>" inside a document is thirteen characters.
"""

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from zigzag_jax.models.tokenizer import read_tokenizer
from zigzag_jax.train.data.digest import text_digest
from zigzag_jax.train.errors import UserError

END_OF_DOCUMENT = "<|endoftext|>"
_ENDS = (END_OF_DOCUMENT, "<｜end▁of▁sentence｜>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]")
_SEGMENT = 1 << 16  # characters encoded at once: an Encoding takes some 100 bytes a token, a book would take gigabytes
_SEGMENTS = 256  # of which as many are held at once, for the same reason
_SAMPLE = 32_000_000  # characters that are plenty to train a BPE on


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json, or of the folder that holds one.

    Raises UserError("tokenizer", ...): no such file, not a tokenizer, or one without an end-of-document token.
    """
    tokenizer = read_tokenizer(path)
    if not any(tokenizer.token_to_id(end) is not None for end in _ENDS):
        raise UserError("tokenizer", f"must have an end-of-document token, one of {', '.join(_ENDS)}", path)
    return _plain(tokenizer)


def train_tokenizer(texts: Iterable[str], *, characters: int, vocab_size: int = 1024) -> Tokenizer:
    """A byte-level BPE of `vocab_size` tokens at most (a short text has fewer pairs to join), id 0 the document's end.

    `characters` is the length of `texts` together: of a large corpus every n-th segment is looked at, evenly spread.
    Raises UserError("vocab-size", ...) when the 256 bytes and the end of a document do not fit.
    """
    if vocab_size < 257:
        raise UserError("vocab-size", "must be at least 257 (256 bytes and the end of a document)", vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    segments = itertools.chain.from_iterable(map(_segments, texts))
    step = -(-max(characters, 1) // _SAMPLE)
    tokenizer.train_from_iterator(itertools.islice(segments, 0, None, step), trainer)
    return _plain(tokenizer)


def id_count(tokenizer: Tokenizer) -> int:
    """One more than the largest id: ids may have holes, and a model's table is indexed by id."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def end_of_document(tokenizer: Tokenizer) -> int:
    """The id that closes every document. Raises ValueError for a tokenizer that `load_tokenizer` refuses."""
    ids = (tokenizer.token_to_id(end) for end in _ENDS)
    found = next((i for i in ids if i is not None), None)
    if found is None:
        raise ValueError(f"the tokenizer must have one of {_ENDS}")
    return found


def same_ids(tokenizer: Tokenizer) -> str:
    """Hex digest of all that decides which ids a text gets: equal for two files of one tokenizer."""
    parts = json.loads(tokenizer.to_str())
    what = {name: parts[name] for name in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
    return text_digest(json.dumps(what))


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    """One int64 array [tokens] a text, without any special token."""
    parts = [_segments(text) for text in texts]
    encoded = itertools.chain.from_iterable(
        tokenizer.encode_batch_fast(list(some), add_special_tokens=False)
        for some in itertools.batched((s for part in parts for s in part), _SEGMENTS)
    )
    ids = [[np.array(next(encoded).ids, np.int64) for _ in part] for part in parts]
    return [np.concatenate(part) if part else np.zeros(0, np.int64) for part in ids]


def _segments(text: str) -> list[str]:
    """The text in pieces of about _SEGMENT characters, cut at line ends where there are any."""
    return list(_cut(text)) if len(text) > _SEGMENT else [text] * bool(text)


def _cut(text: str) -> Iterator[str]:
    begin = 0
    while begin < len(text):
        end = begin + _SEGMENT
        line = text.rfind("\n", begin, end) + 1
        end = line if line and end < len(text) else end
        yield text[begin:end]
        begin = end


def _plain(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.encode_special_tokens = True  # "encode them like other text"
    return tokenizer
