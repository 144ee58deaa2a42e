"""The cache of tokens: whole or not there, built once, found again."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from zigzag_jax.train.data import store
from zigzag_jax.train.data.store import open_dataset
from zigzag_jax.train.data.token_file import token_dtype
from zigzag_jax.train.data.tokenizer import encode
from zigzag_jax.train.errors import UserError


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder of 120 documents, and a cache of its own."""
    monkeypatch.setenv("ZIGZAG_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(120):
        (folder / f"{i:03}.txt").write_text(f"document {i}\n" + "a ring is a line that comes home\n" * (i % 9))
    return folder


def text_of(dataset, side, d):
    side = getattr(dataset, side)
    return dataset.tokenizer.decode(side.tokens[side.offsets[d] : side.offsets[d + 1] - 1].tolist())


def test_the_store_holds_each_document_once_and_closes_it(data):
    dataset = open_dataset(data, None, vocab_size=300)
    texts = [
        text_of(dataset, side, d) for side in ("train", "held_out") for d in range(len(getattr(dataset, side).lengths))
    ]
    assert sorted(texts) == sorted(p.read_text() for p in data.iterdir())
    assert len(dataset.held_out.lengths) > 0
    for side in (dataset.train, dataset.held_out):
        assert side.tokens.dtype == np.uint16
        assert side.offsets.dtype == np.int64
        lasts = side.offsets[1:] - 1
        assert (side.tokens[lasts] == dataset.end_of_document).all()
        assert (side.tokens == dataset.end_of_document).sum() == len(lasts)
        assert side.offsets[-1] == len(side.tokens) == side.lengths.sum()
        assert int(side.tokens.max()) < dataset.vocab_size == 300


def test_the_second_time_nothing_is_tokenised(data, monkeypatch):
    said = []
    first = open_dataset(data, None, vocab_size=300, say=said.append)
    assert any("building" in line for line in said)
    monkeypatch.setattr(store, "_build", None)
    said.clear()
    again = open_dataset(str(data), None, vocab_size=300, say=said.append)
    assert (again.digest, again.folder, said) == (first.digest, first.folder, [])
    np.testing.assert_array_equal(again.train.tokens, first.train.tokens)


def test_text_vocabulary_and_tokenizer_are_the_key(data, tmp_path):
    first = open_dataset(data, None, vocab_size=300)
    smaller = open_dataset(data, None, vocab_size=290)
    given = open_dataset(data, smaller.folder / "tokenizer.json")
    assert given.digest == smaller.digest != first.digest  # the same tokens, so the same digest
    assert len({d.folder for d in (first, smaller, given)}) == 3
    (data / "000.txt").write_text("another text")
    assert open_dataset(data, None, vocab_size=300).digest != first.digest


def test_a_given_tokenizer_is_used_and_kept(data, tmp_path):
    trained = open_dataset(data, None, vocab_size=300)
    file = trained.tokenizer.to_str()
    (tmp_path / "mine.json").write_text(file)
    given = open_dataset(data, tmp_path / "mine.json")
    assert given.tokenizer.to_str() == file
    assert (given.folder / "tokenizer.json").exists()


def test_one_document_gives_both_sides(data, tmp_path):
    (tmp_path / "book.txt").write_text("".join(f"Line {n}: a ring is a line that comes home.\n" for n in range(900)))
    dataset = open_dataset(tmp_path / "book.txt", None, vocab_size=300)
    assert text_of(dataset, "train", 0) + text_of(dataset, "held_out", 0) == (tmp_path / "book.txt").read_text()


def test_large_vocabularies_take_four_bytes():
    assert [token_dtype(n) for n in (1024, 65535, 65536, 151_669)] == ["uint16", "uint16", "uint32", "uint32"]


def test_killed_between_write_and_rename_leaves_nothing_visible(data, tmp_path):
    program = (
        "import os, signal\nfrom zigzag_jax.train.data import store\n"
        "store._publish = lambda work, folder: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"store.open_dataset({str(data)!r}, None, vocab_size=300)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=False)
    assert run.returncode == -signal.SIGKILL
    left = list((tmp_path / "cache").iterdir())
    assert len(left) == 1
    assert left[0].name.startswith(".")
    assert (left[0] / "meta.json").exists()  # it was whole, but for its name
    dataset = open_dataset(data, None, vocab_size=300)
    assert left[0].exists()  # its builder might still be at work
    os.utime(left[0], (0, 0))
    for file in left[0].iterdir():
        os.utime(file, (0, 0))
    work = store._work_folder(dataset.folder)
    assert not left[0].exists()
    assert list(dataset.folder.parent.glob(".*")) == [work]


def test_a_failure_while_building_leaves_nothing(data, tmp_path, monkeypatch):
    def interrupt(work, folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "_publish", interrupt)
    with pytest.raises(KeyboardInterrupt):
        open_dataset(data, None, vocab_size=300)
    assert list((tmp_path / "cache").iterdir()) == []


def test_two_builders_at_once_agree(data, tmp_path, monkeypatch):
    both = threading.Barrier(2)
    publish = store._publish

    def together(work, folder):
        both.wait(timeout=60)
        publish(work, folder)

    monkeypatch.setattr(store, "_publish", together)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(open_dataset(data, None, vocab_size=300))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({d.digest for d in found}) == 1 == len(list((tmp_path / "cache").iterdir()))
    assert len(found) == 2


def test_other_processes_wait_for_process_0(data):
    found, said = [], []
    thread = threading.Thread(
        target=lambda: found.append(open_dataset(data, None, vocab_size=300, process_index=1, say=said.append))
    )
    thread.start()
    time.sleep(0.5)
    assert not found
    first = open_dataset(data, None, vocab_size=300)
    thread.join(timeout=30)
    assert found[0].digest == first.digest
    assert said == [f"waiting for process 0 to build the tokens in {first.folder}"]


def test_others_wait_for_as_long_as_process_0_moves(data, tmp_path, monkeypatch):
    """A builder that takes four times as long as they wait for a sign of it, and writes no file for half of that."""
    monkeypatch.setattr(store, "_FRESH", 0.05)
    texts = store.documents
    slow = lambda where: (time.sleep(1.0 / 120) or text for text in texts(where))
    waited = []
    other = {"process_index": 1, "wait_s": 0.5, "working": lambda: waited.append(time.monotonic())}
    first = threading.Thread(target=lambda: open_dataset(data, None, vocab_size=300))
    monkeypatch.setattr(
        store, "documents", lambda where: slow(where) if threading.current_thread() is first else texts(where)
    )
    monkeypatch.setattr(store, "survey", lambda read, real=store.survey: real(texts(data)))
    first.start()
    assert open_dataset(data, None, vocab_size=300, **other).vocab_size == 300
    first.join()
    assert waited[-1] - waited[0] > 2 * 0.5
    assert len(waited) > 3  # so that a watchdog leaves them alone


def test_a_builder_that_was_killed_is_not_waited_for(data, tmp_path):
    key = open_dataset(data, None, vocab_size=300).folder
    key.rename(key.with_name(f".{key.name}-killed"))
    with pytest.raises(UserError, match=r"process 0 built nothing there in 0\.3 s"):
        open_dataset(data, None, vocab_size=300, process_index=1, wait_s=0.3)


def test_each_document_is_a_sign_of_work(data):
    signs = []
    open_dataset(data, None, vocab_size=300, working=lambda: signs.append(1))
    assert len(signs) == 3 * 120  # read for the key, for the tokenizer, for the tokens


def test_waiting_in_vain_is_told(data):
    with pytest.raises(UserError, match=r"all processes share.*0\.3 s") as caught:
        open_dataset(data, None, process_index=1, wait_s=0.3)
    assert caught.value.field == "ZIGZAG_CACHE"


@pytest.mark.parametrize("file", ["train.tokens", "held_out.offsets", "meta.json", "tokenizer.json"])
def test_a_damaged_cache_is_named(data, file):
    folder = open_dataset(data, None, vocab_size=300).folder
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: len(content) // 2 // 8 * 8])
    with pytest.raises(UserError, match="delete that folder") as caught:
        open_dataset(data, None, vocab_size=300)
    assert folder.name in str(caught.value)


def test_a_cache_that_cannot_be_written_is_named(data, monkeypatch):
    monkeypatch.setenv("ZIGZAG_CACHE", "/proc/zigzag")
    with pytest.raises(UserError, match="/proc/zigzag"):
        open_dataset(data, None)


def test_a_full_disk_is_told(data, tmp_path, monkeypatch):
    def full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("zigzag_jax.train.data.token_file.TokenWriter.sync", full)
    with pytest.raises(UserError, match="No space left"):
        open_dataset(data, None, vocab_size=300)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_rename_that_fails_for_another_reason_is_told(data, monkeypatch):
    def refuse(source, target):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(UserError, match="Permission denied"):
        open_dataset(data, None, vocab_size=300)


def test_bad_input_is_told_before_anything_is_written(data, tmp_path):
    (tmp_path / "bad.json").write_text("{not json")
    for where, tokenizer, field in ((tmp_path / "nowhere", None, "data"), (data, tmp_path / "bad.json", "tokenizer")):
        with pytest.raises(UserError) as caught:
            open_dataset(where, tokenizer)
        assert caught.value.field == field
    assert not (tmp_path / "cache").exists()


def test_the_cache_is_where_the_environment_says_when_asked(monkeypatch, tmp_path):
    monkeypatch.delenv("ZIGZAG_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert store.cache_folder() == tmp_path / ".cache" / "zigzag_jax"


def test_batches_of_text_do_not_matter(data, monkeypatch):
    first = open_dataset(data, None, vocab_size=300)
    monkeypatch.setattr("zigzag_jax.train.data.dataset._BATCH", 50)
    monkeypatch.setenv("ZIGZAG_CACHE", f"{first.folder.parent}-other")
    said = []
    ticks = iter(range(0, 10**6, 3))
    monkeypatch.setattr(store.time, "monotonic", lambda: next(ticks))  # every look at the clock is 3 seconds later
    other = open_dataset(data, None, vocab_size=300, say=said.append)
    assert other.digest == first.digest
    assert sum("tokenised" in line for line in said) > 10
    assert len(encode(other.tokenizer, ["a"])[0]) == 1
