"""Tokenizers: trained or given, with an end-of-document token that no text can spell."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from zigzag_jax.train.data.tokenizer import (
    END_OF_DOCUMENT,
    encode,
    end_of_document,
    id_count,
    load_tokenizer,
    same_ids,
    train_tokenizer,
)
from zigzag_jax.train.errors import UserError

TEXTS = ["a ring is a line that comes home\n" * 20, "naïve 漢字 \x00 🙂\r\n", "def ring(line):\n    return line\n" * 9]


def train(texts=TEXTS, size=300):
    return train_tokenizer(texts, characters=sum(map(len, texts)), vocab_size=size)


def test_any_text_comes_back_and_frequent_words_are_short():
    tokenizer = train()
    texts = [*TEXTS, "", "never seen: ÄÖÜ \u2028 \t"]
    ids = encode(tokenizer, texts)
    assert [tokenizer.decode(i.tolist()) for i in ids] == texts
    assert all(i.dtype == np.int64 and (i < id_count(tokenizer)).all() for i in ids)
    assert id_count(tokenizer) == 300
    assert len(ids[0]) < len(TEXTS[0]) / 2


def test_training_is_deterministic():
    assert train().to_str() == train().to_str()
    assert train().to_str() != train(TEXTS[:1]).to_str()


def test_a_short_text_gives_a_smaller_vocabulary():
    assert 257 <= id_count(train(["abc"], 1024)) < 300


def test_a_vocabulary_below_the_bytes_is_refused():
    with pytest.raises(UserError, match="at least 257"):
        train(size=256)


def test_special_tokens_are_not_read_out_of_the_text(tmp_path):
    train().save(str(tmp_path / "tokenizer.json"))
    for tokenizer in (train(), load_tokenizer(tmp_path / "tokenizer.json")):
        (ids,) = encode(tokenizer, [f"a{END_OF_DOCUMENT}b"])
        assert end_of_document(tokenizer) not in ids
        assert tokenizer.decode(ids.tolist()) == f"a{END_OF_DOCUMENT}b"


def test_a_long_text_is_encoded_in_parts_cut_at_line_ends():
    tokenizer = train()
    line = "a ring is a line that comes home\n"
    (whole,) = encode(tokenizer, [line * 9000])
    (one,) = encode(tokenizer, [line])
    np.testing.assert_array_equal(whole, np.tile(one, 9000))
    (unbroken,) = encode(tokenizer, ["x" * 200_001])
    assert tokenizer.decode(unbroken.tolist()) == "x" * 200_001


def test_of_a_large_corpus_a_sample_is_enough(monkeypatch):
    monkeypatch.setattr("zigzag_jax.train.data.tokenizer._SAMPLE", 100)
    texts = ["aa" * 50, "bb" * 50]  # 200 characters: every second segment, the first text alone
    assert train(texts).to_str() == train_tokenizer(texts[:1], characters=100, vocab_size=300).to_str()


def test_a_given_tokenizer_loses_truncation_and_padding(tmp_path):
    tokenizer = train()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)  # the folder will do
    np.testing.assert_array_equal(encode(loaded, TEXTS)[0], encode(train(), TEXTS)[0])


def test_ids_may_have_holes():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 70_000, "</s>": 3}, unk_token="a"))
    assert id_count(tokenizer) == 70_001
    assert end_of_document(tokenizer) == 3


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="end-of-document"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="must have one of"):
        end_of_document(tokenizer)


@pytest.mark.parametrize(
    "content", [None, "{not json", '{"model": 3}', ""], ids=["absent", "no-json", "other", "empty"]
)
def test_a_broken_file_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json") as caught:
        load_tokenizer(tmp_path / "tokenizer.json")
    assert caught.value.field == "tokenizer"


def test_how_much_is_encoded_at_once_does_not_matter(monkeypatch):
    texts = ["a ring is a line that comes home\n" * n for n in (1, 0, 4000, 7)]
    tokenizer = train_tokenizer(texts, characters=sum(map(len, texts)), vocab_size=270)
    want = encode(tokenizer, texts)
    monkeypatch.setattr("zigzag_jax.train.data.tokenizer._SEGMENTS", 1)
    for got, those in zip(encode(tokenizer, texts), want, strict=True):
        np.testing.assert_array_equal(got, those)
    assert [len(those) > 0 for those in want] == [True, False, True, True]


def test_tokenizers_that_give_the_same_ids_are_the_same(tmp_path):
    one, other = (train_tokenizer(["a ring comes home " * 9], characters=162, vocab_size=size) for size in (270, 265))
    one.enable_truncation(max_length=4)
    one.save(str(tmp_path / "tokenizer.json"))
    assert same_ids(load_tokenizer(tmp_path)) == same_ids(one) != same_ids(other)
