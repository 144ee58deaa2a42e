"""Where documents come from, and which of them are held out."""

import itertools
import json
import os

import pytest

from zigzag_jax.train.data.corpus import documents
from zigzag_jax.train.data.split import FEW, ends_held_out, parts, split, survey
from zigzag_jax.train.errors import UserError


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def test_a_folder_is_read_recursively_in_the_order_of_its_paths(tmp_path):
    write(tmp_path, {"b.txt": "bee", "a/z.md": "zed", "a/b/c.py": "see", "d": "dee", "blank.txt": " \n"})
    write(tmp_path, {"pages.jsonl": '{"text": "p"}\n\n{"text": "q"}\n'})
    write(tmp_path, {".git/config": "no", "a/.hidden": "no", "a/__pycache__/x.pyc": b"\xff"})
    assert list(documents(tmp_path)) == ["see", "zed", "bee", "dee", "p", "q"]
    assert list(documents(str(tmp_path / "b.txt"))) == ["bee"]


def test_a_byte_order_mark_is_no_text_and_line_ends_stay(tmp_path):
    write(tmp_path, {"a.txt": b"\xef\xbb\xbfone\r\ntwo\n"})
    assert list(documents(tmp_path)) == ["one\r\ntwo\n"]


@pytest.mark.parametrize(
    ("line", "place"),
    [
        (b"{not json", "p.jsonl:3"),
        (b'{"txt": "a"}', "p.jsonl:3"),
        (b'{"text": 3}', "p.jsonl:3"),
        (b'["text"]', "p.jsonl:3"),
        (b'{"text": "\\ud800"}', "p.jsonl:3"),
        (b'{"text": "\xff"}', "p.jsonl:3"),
    ],
    ids=["no-json", "no-text", "no-string", "no-object", "half-a-surrogate", "no-utf8"],
)
def test_a_bad_jsonl_line_is_named(tmp_path, line, place):
    (tmp_path / "p.jsonl").write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    stream = documents(tmp_path)
    assert next(stream) == "fine"
    with pytest.raises(UserError, match=place) as caught:
        list(stream)
    assert caught.value.field == "data"


def test_what_is_wrong_with_a_path_is_told_with_the_path(tmp_path):
    (tmp_path / "empty").mkdir()
    write(tmp_path, {"binary/a.txt": bytes(range(128, 256))})
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "empty" / "pipe")  # nothing to read twice
    for name, rule, said in (
        ("nowhere", "exists", "nowhere"),
        ("pipe", "exists", "pipe"),
        ("empty", "text files", "empty"),
        ("binary", "UTF-8", "a.txt"),
    ):
        with pytest.raises(UserError, match=rule) as caught:
            list(documents(tmp_path / name))
        assert caught.value.field == "data"
        assert said in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    write(tmp_path, {"a.txt": "text"})

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(UserError, match=r"Permission denied.*a\.txt"):
        list(documents(tmp_path))


def test_an_interpreter_without_its_sources_asks_for_data(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match=r"^data: must be given: this Python keeps no .py files .*, got "):
        list(documents(None))


def test_the_default_corpus_is_some_megabytes_of_real_text_and_the_same_each_time():
    texts = list(documents(None))
    assert texts == list(documents(None))
    assert 4e6 < sum(map(len, texts)) < 16e6
    assert 300 < len(texts) < 1200
    assert any("def loads(" in t for t in texts)  # json/__init__.py
    assert any(t.lstrip().startswith("The ") for t in texts)  # the language reference
    found = survey(texts)
    held = sum(len(t) for held_out, t in split(texts, found) if held_out)
    assert not found.ends
    assert 0.01 < held / found.characters < 0.08


def texts_of(n):
    return [f"document {i}\n" + "a line of text\n" * (i % 7) for i in range(n)]


def test_many_documents_are_held_out_whole_whatever_their_order_and_company():
    texts = texts_of(2000)
    found = survey(texts)
    pairs = list(split(texts, found))
    held = {t for held_out, t in pairs if held_out}
    assert [t for _, t in pairs] == texts
    assert 0.02 < len(held) / len(texts) < 0.04
    more = [*texts[::-1], *(f"new {i}" for i in range(500))]
    again = {t for held_out, t in split(more, survey(more)) if held_out}
    assert again & set(texts) == held


@pytest.mark.parametrize("texts", [["line of a book\n" * 4000], texts_of(12), ["ab"], ["no line end at all" * 50]])
def test_of_few_documents_the_ends_are_held_out(texts):
    pairs = list(split(texts, survey(texts)))
    assert "".join(t for _, t in pairs) == "".join(texts)
    kept = sum(len(t) for held_out, t in pairs if not held_out)
    held = sum(len(t) for held_out, t in pairs if held_out)
    assert kept > 0
    assert held > 0
    if len(texts) == 1 and len(texts[0]) > 1000:
        assert [held_out for held_out, _ in pairs] == [False, True]
        assert pairs[0][1].endswith("\n")
        assert 0.02 < held / kept < 0.05


def test_the_digest_knows_texts_order_and_cuts():
    digests = {survey(texts).digest for texts in (["ab", "cd"], ["cd", "ab"], ["abcd"], ["ab", "ce"], ["abc", "d "])}
    assert len(digests) == 5


@pytest.mark.parametrize("texts", [[], ["a"]])
def test_no_text_is_refused(texts):
    with pytest.raises(UserError, match="to hold out"):
        survey(texts)


def test_text_that_changes_between_two_readings_is_noticed():
    with pytest.raises(UserError, match="must not change"):
        list(split(["other", "texts"], survey(["some", "texts"])))


def test_documents_stream(tmp_path):
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"text": f"t{i}"}) for i in range(5)) + "\n{broken")
    assert list(itertools.islice(documents(tmp_path), 5)) == [f"t{i}" for i in range(5)]


@pytest.mark.parametrize(
    "texts",
    [texts_of(2000), texts_of(FEW), texts_of(FEW - 1), ["one text"] * 200, ["ab", "cd"], ["a book\n" * 4000]],
    ids=["many", "few", "too-few", "all-alike", "two", "one"],
)
def test_the_rule_is_known_early_and_then_each_document_is_decided_by_itself(texts):
    found = survey(texts)
    assert ends_held_out(texts) == found.ends
    assert [pair for text in texts for pair in parts(text, found.ends)] == list(split(texts, found))


def test_many_documents_are_not_all_read_to_know_the_rule():
    stream = iter(texts_of(2000))
    assert not ends_held_out(stream)
    assert len(list(stream)) > 1700  # the hash picks one of 33: none of 300 would be one chance in ten thousand
    for texts in ([], ["a"]):
        with pytest.raises(UserError, match="to hold out"):
            ends_held_out(texts)
