"""The baselines against their formulas, computed slowly."""

import collections
import itertools
import math
import time

import numpy as np
import pytest

from zigzag_jax.train.data import ngram
from zigzag_jax.train.data.token_file import TokenStore

V = 12


def make_store(seed=0, documents=40, vocab=V - 1):
    """Documents of a lopsided language (token V - 1 never occurs)."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 30, documents)
    tokens = np.minimum(rng.geometric(0.3, lengths.sum()), vocab) - 1
    return TokenStore(tokens.astype(np.uint16), np.concatenate([[0], np.cumsum(lengths)]))


def neighbours(store):
    for begin, end in zip(store.offsets[:-1], store.offsets[1:], strict=True):
        document = store.tokens[begin:end].tolist()
        yield from itertools.pairwise(document)


def slow(store, tokens, labels):
    pairs = collections.Counter(neighbours(store))
    words = collections.Counter(w for _, w in neighbours(store))
    follow = collections.defaultdict(list)
    for h, w in neighbours(store):
        follow[h].append(w)
    uni, bi = [], []
    for h, w in zip(tokens.ravel().tolist(), labels.ravel().tolist(), strict=True):
        if w >= 0:
            p = (words[w] + 1) / (words.total() + V)
            kinds, count = len(set(follow[h])), len(follow[h])
            uni.append(p)
            bi.append((pairs[h, w] + kinds * p) / (count + kinds) if count else p)
    return -sum(map(math.log, uni)) / len(uni), -sum(map(math.log, bi)) / len(bi)


def test_cross_entropy_is_that_of_the_formulas():
    store, rng = make_store(), np.random.default_rng(1)
    tokens = rng.integers(0, V, (5, 40))  # V - 1 stands among them, which the store never shows
    labels = np.where(rng.random((5, 40)) < 0.2, -1, rng.integers(0, V, (5, 40)))
    got = ngram.fit(store, V).cross_entropy(tokens.astype(np.int32), labels.astype(np.int32))
    np.testing.assert_allclose(got, slow(store, tokens, labels), rtol=1e-12)


def test_probabilities_sum_to_one():
    model = ngram.fit(make_store(), V)
    np.testing.assert_allclose(model.unigram.sum(), 1)
    for h in range(V):
        total = sum(math.exp(-model.cross_entropy(np.array([h]), np.array([w]))[1]) for w in range(V))
        np.testing.assert_allclose(total, 1)


def test_a_place_without_a_label_counts_nowhere():
    model = ngram.fit(make_store(), V)
    tokens, labels = np.array([[1, 2, 3]]), np.array([[2, -1, 1]])
    np.testing.assert_allclose(
        model.cross_entropy(tokens, labels), model.cross_entropy(tokens[:, ::2], labels[:, ::2]), rtol=1e-12
    )
    with pytest.raises(ValueError, match="at least one target"):
        model.cross_entropy(tokens, np.full((1, 3), -1))


def test_no_pair_goes_from_one_document_to_the_next():
    store = TokenStore(np.array([1, 2, 1, 2, 3], np.uint16), np.array([0, 2, 4, 5]))
    model = ngram.fit(store, V)
    np.testing.assert_array_equal(model.pairs, [1 * V + 2])
    np.testing.assert_array_equal(model.counts, [2])


def test_documents_of_one_token_teach_nothing():
    with pytest.raises(ValueError, match="two tokens or more"):
        ngram.fit(TokenStore(np.array([1, 2], np.uint16), np.array([0, 1, 2])), V)


def test_what_repeats_is_known_to_the_bigram():
    tokens = np.tile(np.array([1, 2, 3, 4], np.uint16), 500)
    model = ngram.fit(TokenStore(tokens, np.array([0, 2000])), V)
    uni, bi = model.cross_entropy(tokens[:-1], tokens[1:])
    assert abs(uni - math.log(4)) < 0.01
    assert bi < 0.02


def test_of_a_large_store_evenly_spread_runs_are_counted(monkeypatch):
    monkeypatch.setattr(ngram, "_RUN", 8)
    store = make_store(documents=100)
    whole = ngram.fit(store, V, limit=len(store.tokens))
    assert whole.counts.sum() == sum(1 for _ in neighbours(store))
    part = ngram.fit(store, V, limit=len(store.tokens) // 4)
    expected = collections.Counter()
    document = np.searchsorted(store.offsets, np.arange(len(store.tokens)), "right")
    stride = 8 * -(-len(store.tokens) // (len(store.tokens) // 4))
    for at in range(0, len(store.tokens), stride):
        for i in range(at, min(at + 8, len(store.tokens)) - 1):
            if document[i] == document[i + 1]:
                expected[int(store.tokens[i]) * V + int(store.tokens[i + 1])] += 1
    assert dict(zip(part.pairs.tolist(), part.counts.tolist(), strict=True)) == dict(expected)


def test_five_million_tokens_take_about_a_second():
    tokens = np.random.default_rng(0).integers(0, 1024, 5_000_000).astype(np.uint16)
    store = TokenStore(tokens, np.arange(0, 5_000_001, 5000))
    begin = time.process_time()
    model = ngram.fit(store, 1024)
    model.cross_entropy(tokens[:-1], tokens[1:].astype(np.int32))
    assert (
        time.process_time() - begin < 10
    )  # measured: 2.5 on noise, 0.6 on text; the bar leaves room for a slow machine
