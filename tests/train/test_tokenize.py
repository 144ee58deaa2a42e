"""Tokenising by several processes: whatever happens on the way, the folder is the same to the last byte."""

import errno
import functools
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from zigzag_jax.train import tokenize as command
from zigzag_jax.train.data.dataset import read_dataset, unfinished
from zigzag_jax.train.data.shards import cut, stats_of
from zigzag_jax.train.data.split import parts
from zigzag_jax.train.data.store import open_dataset
from zigzag_jax.train.data.tokenizer import train_tokenizer
from zigzag_jax.train.errors import MachineError, RunError, UserError
from zigzag_jax.train.logs.display import TokenDisplay
from zigzag_jax.train.tokenize import TokenizeConfig, tokenize

TEXTS = [f"document {n}\n" + f"a ring of {n} is a line that comes home\n" * (n % 90) for n in range(400)]
SMALL = 12_000  # bytes of a shard here: some 60 shards


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of three kinds of files and a tokenizer."""
    folder = tmp_path_factory.mktemp("tokenize")
    (folder / "data" / "c").mkdir(parents=True)
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in TEXTS]
    (folder / "data" / "a.jsonl").write_bytes(b"".join(lines[:330]))
    (folder / "data" / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[330:350]), mtime=0))
    for n, text in enumerate(TEXTS[350:]):
        (folder / "data" / "c" / f"{n:02}.txt").write_text(text)
    train_tokenizer(TEXTS, characters=sum(map(len, TEXTS)), vocab_size=300).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(command, "cut", functools.partial(cut, most=SMALL))


def config(place: Path, out: Path, **more) -> TokenizeConfig:
    return TokenizeConfig(**{"data": (place / "data",), "tokenizer": place / "tokenizer.json", "out": out} | more)


def make(those: TokenizeConfig) -> str:
    with Path(os.devnull).open("w") as null:
        console = Console(file=null, record=True, width=200)
        tokenize(those, console)
    return console.export_text()


def shard_count(data: Path) -> int:
    found = sorted(data.rglob("*.*"))
    return len(cut(found, stats_of(found), "", {str(file): file.stat().st_size for file in found}, SMALL))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def calm(place: Path) -> Path:
    """What one worker makes that nobody disturbs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "cut", functools.partial(cut, most=SMALL))
        make(config(place, place / "calm", workers=1))
    return place / "calm"


def test_it_is_what_the_trainer_makes_of_the_same_text(calm: Path, place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ZIGZAG_CACHE", str(place / "cache"))
    found = read_dataset(calm, field="data", remedy="")
    want = open_dataset(place / "data", place / "tokenizer.json")
    assert (found.digest, found.vocab_size, found.end_of_document) == (want.digest, 300, want.end_of_document)
    assert found.tokenizer.to_str() == want.tokenizer.to_str()
    for held, side in enumerate((found.train, found.held_out)):
        texts = [text for text in TEXTS if parts(text, False) == [(bool(held), text)]]
        assert len(side.lengths) == len(texts) > 0
        for d in (0, len(texts) // 2, len(texts) - 1):
            ids = side.read(side.offsets[d], side.offsets[d + 1] - 1)
            assert found.tokenizer.decode(ids.tolist()) == texts[d]
    assert not unfinished(calm).exists()
    assert sorted(contents(calm)) == sorted(
        [f"{side}.{kind}" for side in ("train", "held_out") for kind in ("tokens", "offsets")]
        + ["meta.json", "tokenizer.json"]
    )


@pytest.mark.system
def test_killed_and_resumed_is_byte_for_byte_the_same_whatever_the_workers(calm: Path, place: Path, tmp_path: Path):
    out = tmp_path / "out"
    program = (
        "import functools, sys\nfrom zigzag_jax.train import tokenize\n"
        f"tokenize.cut = functools.partial(tokenize.cut, most={SMALL})\n"
        f"sys.exit(tokenize.main(['--data', {str(place / 'data')!r}, '--out', {str(out)!r}, '--workers', '2', "
        f"'--tokenizer', {str(place / 'tokenizer.json')!r}]))\n"
    )
    shards = unfinished(out) / "shards"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(shards.glob("[!.]*"))) < 5 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was to be killed before its end"
    done = len(list(shards.glob("[!.]*")))
    assert 5 <= done < shard_count(place / "data")
    assert not out.exists()
    (shards / ".59-killed").mkdir(exist_ok=True)  # what a worker may leave
    assert "going on with" in make(config(place, out, workers=3))
    assert contents(out) == contents(calm)
    assert not unfinished(out).exists()


@pytest.mark.parametrize("when", ["join", "rename", "rmtree"])
def test_broken_off_at_its_end_it_goes_on_from_there(
    calm: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
):
    """The work folder of a run whose shards are all done: nothing is tokenised again."""
    out = tmp_path / "out"
    work = unfinished(out)

    def write_shards(make, tasks, workers, watch):
        assert workers == 4
        writer = make()
        for task in tasks:
            list(writer(task))

    monkeypatch.setattr(command, "run_tasks", write_shards)
    module = {"join": command, "rename": os, "rmtree": shutil}[when]
    real = getattr(module, when)

    def interrupt(*arguments, **more):
        if {"rename": arguments[-1] == out, "rmtree": arguments[0] == work}.get(when, True):
            raise KeyboardInterrupt
        real(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(module, when, interrupt)
        with pytest.raises(KeyboardInterrupt):
            make(config(place, out, workers=4))
    assert work.exists()
    assert out.exists() == (when == "rmtree")
    monkeypatch.setattr(command, "run_tasks", lambda make, tasks, *rest: tasks and pytest.fail("a shard is missing"))
    said = make(config(place, out))
    assert ("is whole already" in said) == (when == "rmtree")
    assert contents(out) == contents(calm)
    assert not work.exists()
    assert "is whole already" in make(config(place, out))


def test_another_request_does_not_go_on_with_it(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out, data = tmp_path / "out", tmp_path / "data"
    data.mkdir()
    (data / "a.txt").write_text("a ring is a line that comes home\n" * 50)

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run_tasks", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make(config(place, out, data=(data,)))
    for changed, field in (
        ({"text_field": "content"}, "text-field"),
        ({"tokenizer": None}, "tokenizer"),
        ({"data": (data, place / "data")}, "data"),
    ):
        with pytest.raises(UserError, match=rf"^{field}: must stay what .*out\.unfinished was begun with") as caught:
            make(config(place, out, **{"data": (data,)} | changed))
        assert caught.value.field == field


class Broken(Exception):
    """What ends a worker of these tests."""


def in_one_process(shards: list[str], most: int = 10**6):
    """run_tasks here, which notes the name of each shard that it makes and breaks off after `most`."""

    def write_shards(make, tasks, workers, watch):
        writer = make()
        for task in tasks:
            if len(shards) >= most:
                raise Broken
            shards.append(task.name)
            list(writer(task))

    return write_shards


def test_a_mended_file_is_read_again_and_the_others_are_kept(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One file of many small ones, and a line of a large one; also a file more."""
    data, out, made = tmp_path / "data", tmp_path / "out", []
    shutil.copytree(place / "data", data)
    monkeypatch.setattr(command, "run_tasks", in_one_process(made, most=shard_count(data) - 1))
    with pytest.raises(Broken):
        make(config(place, out, data=(data,)))
    before = set(made)
    (data / "c" / "07.txt").write_text("mended, and much longer: " + TEXTS[357] * 3)
    (data / "d.txt").write_text(TEXTS[3])
    made.clear()
    monkeypatch.setattr(command, "run_tasks", in_one_process(made))
    said = make(config(place, out, data=(data,))).replace("\n", "")
    assert f"changed since: {data}/c/07.txt, {data}/d.txt" in said
    assert len(made) <= 3  # that of 07.txt, that of d.txt, and the one that was missing
    assert f"{len(before) - 1} of " in said
    monkeypatch.setattr(command, "run_tasks", in_one_process([]))
    make(config(place, tmp_path / "calm", data=(data,)))
    assert contents(out) == contents(tmp_path / "calm")


def test_a_tokenizer_that_the_mended_text_changes_makes_all_shards_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    data, made = tmp_path / "data", []
    data.mkdir()
    for n in range(4):
        (data / f"{n}.txt").write_text(f"{n}: a ring is a line that comes home\n" * 300)
    ours = functools.partial(TokenizeConfig, data=(data,), vocab_size=270)
    monkeypatch.setattr(command, "run_tasks", in_one_process(made, most=3))
    with pytest.raises(Broken):
        make(ours(out=tmp_path / "out"))
    (data / "2.txt").write_text("another text altogether, zzzz\n" * 300)
    made.clear()
    monkeypatch.setattr(command, "run_tasks", in_one_process(made))
    assert "shards are kept" not in make(ours(out=tmp_path / "out"))
    assert len(made) == shard_count(data)
    make(ours(out=tmp_path / "calm"))
    assert contents(tmp_path / "out") == contents(tmp_path / "calm")


def test_a_whole_folder_is_not_written_again(calm: Path, place: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"^out: must be a new folder, got .*calm, which holds the tokens of another"):
        make(config(place, calm, text_field="content"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^out: must be a new folder, got .*which is not empty"):
        make(config(place, tmp_path))


def test_a_small_corpus_and_a_tokenizer_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The ends of few documents are held out, as the trainer does it; two --data are one corpus."""
    monkeypatch.setenv("ZIGZAG_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    for name in "ab":
        (tmp_path / "data" / f"{name}.txt").write_text(f"{name}: a ring is a line that comes home\n" * 200)
    monkeypatch.setattr(command, "run_tasks", lambda make, tasks, *rest: [list(make()(task)) for task in tasks])
    data = (tmp_path / "data" / "a.txt", tmp_path / "data" / "b.txt")
    make(TokenizeConfig(data=data, out=tmp_path / "deep" / "out", vocab_size=270))
    found = read_dataset(tmp_path / "deep" / "out", field="data", remedy="")
    want = open_dataset(tmp_path / "data", None, vocab_size=270)
    assert (found.digest, found.vocab_size) == (want.digest, want.vocab_size)
    assert (len(found.train.lengths), len(found.held_out.lengths)) == (2, 2)


def test_data_may_be_named_several_times(monkeypatch: pytest.MonkeyPatch):
    seen: list[TokenizeConfig] = []
    monkeypatch.setattr(command, "tokenize", lambda config, console: seen.append(config))
    assert command.main(["--data", "a", "--data", "b", "--out", "c"]) == 0
    assert seen[0].data == (Path("a"), Path("b"))


def test_what_is_wrong_in_a_worker_is_one_line(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    lines = [json.dumps({"text": text}) for text in TEXTS]
    lines[380] = '{"text": 3}'
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    flags = ["--data", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert command.main([*flags, "--tokenizer", str(place)]) == 2
    assert capsys.readouterr().err == (
        f'error: data: each JSONL line must be an object with a string "text", got {tmp_path}/a.jsonl:381\n'
    )
    assert not (tmp_path / "out").exists()
    for error, code, said in (
        (RunError("a worker failed"), 1, "error: a worker failed\n"),
        (MachineError("storage does not answer"), 70, "error: storage does not answer\n"),
        (KeyboardInterrupt(), 130, "interrupted; the same command again goes on\n"),
    ):

        def fail(*arguments, error: BaseException = error):
            raise error

        monkeypatch.setattr(command, "tokenize", fail)
        assert command.main(flags) == code
        assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"workers": 0}, r"^workers: must be >= 1, got 0"),
        ({"vocab_size": 300}, r"^vocab-size: must be left out where --tokenizer is given, got 300"),
        ({"vocab_size": 100, "tokenizer": None}, r"^vocab-size: must be at least 257"),
        ({"tokenizer": Path("nowhere.json")}, r"^tokenizer: must be a tokenizer\.json that exists"),
        ({"data": (Path("nowhere"),)}, r"^data: must be a file or a folder that exists, got .*nowhere"),
        ({"text_field": "body"}, r'^data: each JSONL line must be an object with a string "body", got .*a\.jsonl:1'),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_a_mistake_is_told_before_anything_is_tokenised(place: Path, tmp_path: Path, changed: dict, said: str):
    with pytest.raises(UserError, match=said):
        make(config(place, tmp_path / "out", **changed))
    assert not (tmp_path / "out").exists()


def test_an_empty_corpus_and_text_that_is_none_are_refused(place: Path, tmp_path: Path):
    (tmp_path / "empty.jsonl").write_text('{"text": " "}\n\n')
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe")
    for name, said in (("empty.jsonl", "^data: must hold text to train on"), ("binary.txt", "^data: must be UTF-8")):
        with pytest.raises(UserError, match=said):
            make(config(place, tmp_path / "out", data=(tmp_path / name,)))


def test_the_folder_may_not_lie_in_the_data_nor_be_written_twice_at_once(place: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"^out: must not lie in the data"):
        make(config(place, place / "data" / "c" / "out"))
    at_once = pytest.raises(UserError, match=r"^out: must be written by one command at a time")
    with command._alone(unfinished(tmp_path / "out"), print), at_once:
        make(config(place, tmp_path / "out"))


def test_data_that_changes_meanwhile_is_noticed(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.txt").write_text("a ring is a line that comes home\n" * 50)

    def change(make, tasks, workers, watch):
        (tmp_path / "a.txt").write_text("another\n" * 50)

    monkeypatch.setattr(command, "run_tasks", change)
    with pytest.raises(UserError, match=r"^data: must not change while it is read; the same command again goes on"):
        make(config(place, tmp_path / "out", data=(tmp_path / "a.txt",)))


def test_a_full_disk_is_told(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command, "run_tasks", full)
    with pytest.raises(UserError, match=r"^out: must be a folder with room to write in \(No space left .*goes on, got"):
        make(config(place, tmp_path / "out"))
    with pytest.raises(UserError, match=r"^out: must be a folder with room to write in"):
        make(config(place, Path("/proc/zigzag/out")))


def test_storage_that_is_away_is_no_mistake(calm: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def away(*arguments, **options):
        raise OSError(errno.ESTALE, "Stale file handle")

    words = "storage does not answer (Stale file handle)"
    for name, out in (("run_tasks", tmp_path / "out"), ("read_meta", calm)):
        with monkeypatch.context() as patch:
            patch.setattr(command, name, away)
            with pytest.raises(MachineError, match=re.escape(f"{out}: {words}")):
                make(config(place, out))
    monkeypatch.setattr(Path, "stat", away)
    with pytest.raises(MachineError, match=re.escape(words)):
        stats_of([tmp_path / "a.txt"])


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown(terminal: bool, monkeypatch: pytest.MonkeyPatch):
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr("zigzag_jax.train.logs.display.time.monotonic", lambda: next(clock))
    with Path(os.devnull).open("w") as null:
        console = Console(file=null, record=True, width=100, force_terminal=terminal)
        with TokenDisplay(1000, 400, console) as display:
            for n in range(1, 5):
                display.show((10 * n, 30_000_000 * n, 150 * n))
    lines = [line for line in console.export_text().splitlines() if line.strip()]
    if terminal:
        assert "100%" in lines[-1]
        assert "40 documents  5.0 MB/s" in lines[-1]
    else:  # a line after 12 s, in which 300 of 600 bytes were done, and after 24
        assert lines == ["70%  20 documents  5.0 MB/s  12 s left", "100%  40 documents  5.0 MB/s  0 s left"]


def test_a_file_that_goes_away_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"^data: must be readable \(No such file or directory\), got .*gone\.txt$"):
        stats_of([tmp_path / "gone.txt"])
