"""What counting gets you: the unigram and bigram baselines that a model has to beat.

A loss of 4.1 says little by itself. Beside it stand two models that need no training, scored on the very targets the
model is scored on (labels >= 0; the token before is the input token at that place), in nats a token:

    unigram   p(w)     = (c(w) + 1) / (N + V)                     how often the token occurs (add-one)
    bigram    p(w | h) = (c(h w) + T(h) p(w)) / (c(h) + T(h))     what follows h, Witten-Bell

T(h) is the number of different tokens seen after h: the more kinds of successors h has had, the likelier is a new one,
and the more weight the unigram gets. A token h never seen has T = c = 0 and takes the unigram.

A model below the unigram has learnt which tokens are frequent; one below the bigram uses more than the last token.
"""

from dataclasses import dataclass

import numpy as np

from zigzag_jax.train.data.token_file import Tokens

_RUN = 1 << 16  # tokens read in one piece when only a part of a large store is counted


@dataclass(frozen=True, eq=False)
class NGram:
    """Counts over pairs of neighbours (h, w) inside documents."""

    unigram: np.ndarray
    """float64 [V]: p(w)."""
    followed: np.ndarray
    """int64 [V]: c(h)."""
    kinds: np.ndarray
    """int64 [V]: T(h)."""
    pairs: np.ndarray
    """int64 [pairs seen]: h * V + w, increasing."""
    counts: np.ndarray
    """int64 [pairs seen]: c(h w)."""

    def cross_entropy(self, tokens: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
        """(unigram, bigram) in nats a target, over the places of int `tokens`, `labels` (same shape) with labels >= 0.

        Raises ValueError when there is no such place.
        """
        here = np.asarray(labels) >= 0
        if not here.any():
            raise ValueError("labels must hold at least one target (>= 0), got none")
        h, w = np.asarray(tokens)[here].astype(np.int64), np.asarray(labels)[here].astype(np.int64)
        p = self.unigram[w]
        pair = h * len(self.unigram) + w
        at = np.minimum(np.searchsorted(self.pairs, pair), len(self.pairs) - 1)
        seen = np.where(self.pairs[at] == pair, self.counts[at], 0)
        followed, kinds = self.followed[h], self.kinds[h]
        known = np.maximum(followed + kinds, 1)  # 0 for an h never seen, where the unigram stands alone
        interpolated = np.where(followed > 0, (seen + kinds * p) / known, p)
        return float(-np.log(p).mean()), float(-np.log(interpolated).mean())


def fit(store: Tokens, vocab_size: int, *, limit: int = 10_000_000) -> NGram:
    """Count the neighbours in `store`, whose ids are below `vocab_size`.

    Of a store of more than `limit` tokens, runs that are evenly spread over it and make up about `limit` tokens: enough
    for a baseline, and a second or two for any corpus. Raises ValueError when no document has two tokens.
    """
    stride = -(-store.size // limit) * _RUN
    run = store.size if stride == _RUN else _RUN
    keys = np.concatenate([_keys(store, at, at + run, vocab_size) for at in range(0, store.size, max(stride, run))])
    if not len(keys):
        raise ValueError("store must hold a document of two tokens or more, got none")
    pairs, counts = np.unique(keys, return_counts=True)
    h, w = np.divmod(pairs, vocab_size)
    sums = lambda of: np.bincount(of, counts, vocab_size).astype(np.int64)
    unigram = (sums(w) + 1) / (counts.sum() + vocab_size)
    return NGram(unigram, sums(h), np.bincount(h, minlength=vocab_size), pairs, counts)


def _keys(store: Tokens, begin: int, end: int, vocab_size: int) -> np.ndarray:
    """Keys h * V + w of the neighbours with both tokens in tokens[begin:end] and in one document."""
    end = min(end, store.size)
    tokens = store.read(begin, end).astype(np.int64)
    keys = tokens[:-1] * vocab_size + tokens[1:]
    # what follows a document's last token is another document: drop those pairs
    inside = slice(*np.searchsorted(store.offsets, [begin + 1, end]))
    lasts = store.offsets[inside] - 1 - begin
    return np.delete(keys, lasts)
