"""A run that differs from the one that wrote the checkpoints is refused, by all its processes."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from votes import Votes, alone

from zigzag_jax.models.presets import PRESETS
from zigzag_jax.models.qwen3_moe import Qwen3MoeConfig
from zigzag_jax.models.rope import Rope
from zigzag_jax.train.config import Config
from zigzag_jax.train.data.tokenizer import train_tokenizer
from zigzag_jax.train.errors import MachineError, UserError
from zigzag_jax.train.identity import check_identity, compare, identity_of, newest_identity, saved_identity

MISSING = "No such file or directory"


def save(folder: Path, step: int, model: str) -> Path:
    file = folder / str(step) / "identity" / "metadata"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"model": model}))
    return file


def test_a_run_is_compared_with_the_newest_checkpoint(tmp_path: Path):
    check_identity(tmp_path, {"model": "b"}, alone(), print)  # there is none
    save(tmp_path, 9, "a")
    save(tmp_path, 10, "b")
    save(tmp_path, 8, "c")
    check_identity(tmp_path, {"model": "b"}, alone(), print)
    with pytest.raises(
        UserError, match=r"^model: must stay what the run was begun with, b \(or give another --out\), got a"
    ):
        check_identity(tmp_path, {"model": "a"}, alone(), print)


def test_the_first_field_that_differs_is_named_old_and_new():
    compare({"seq-len": 256, "model": "a"}, {"seq-len": 256, "model": "a", "new in this version": 1})
    with pytest.raises(UserError, match=r"seq-len: must stay .*256.*, got 128"):
        compare({"seq-len": 256, "model": "a"}, {"seq-len": 128, "model": "b"})


def test_what_has_a_digest_may_lie_elsewhere():
    compare({"data": "TOKENS (digest 0a1b)"}, {"data": "/scratch/TOKENS (digest 0a1b)"})
    with pytest.raises(UserError, match=r"^data: must stay .*, TOKENS \(digest 0a1b\) .*, got TOKENS \(digest 0a1c\)$"):
        compare({"data": "TOKENS (digest 0a1b)"}, {"data": "TOKENS (digest 0a1c)"})


def test_a_field_that_a_version_adds_does_not_change_the_model():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Later(Qwen3MoeConfig):
        added: bool = False

    config = Config(model="tiny-qwen3-moe")
    tokenizer = train_tokenizer(["a b c " * 50], characters=300, vocab_size=300)
    dataset: Any = SimpleNamespace(digest="d" * 64, tokenizer=tokenizer)
    sizes = PRESETS["tiny-qwen3-moe"]
    of = lambda sizes: identity_of(config, sizes, dataset)
    later = {x.name: getattr(sizes, x.name) for x in dataclasses.fields(sizes)}
    assert of(Later(**later)) == of(sizes)
    for changed in (Later(**later, added=True), dataclasses.replace(sizes, rope=Rope(1.0))):
        assert {name for name, value in of(changed).items() if value != of(sizes)[name]} == {"model"}


@pytest.mark.parametrize(
    ("text", "why"),
    [(None, MISSING), ("{", "Expecting property name"), ("[]", "it holds no JSON object")],
    ids=["none", "half", "list"],
)
def test_where_no_checkpoint_says_what_run_it_is_of_it_is_not_taken_for_this_one(
    tmp_path: Path, text: str | None, why: str
):
    said: list[str] = []
    file = save(tmp_path, 4, "a")
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(UserError, match=rf"^out: must hold a checkpoint that says what run it is of \({why}.*/4$"):
        check_identity(tmp_path, {"model": "a"}, alone(), said.append)
    assert said[0] == "no checkpoint says what run it is of; looked at again for 0 s"
    assert said[1].startswith(f"checkpoints/4 does not say what run it is of ({why}")
    save(tmp_path, 3, "b")
    with pytest.raises(UserError, match=r"^model: must stay .* b "):
        check_identity(tmp_path, {"model": "a"}, alone(), said.append)
    assert said[2].startswith(f"checkpoints/4 does not say what run it is of ({why}")
    assert said[2].endswith("; an older one is asked")


def test_one_that_is_seen_late_is_waited_for(tmp_path: Path):
    said: list[str] = []
    found = [(None, {4: MISSING})] * 2 + [({"model": "a"}, {})]
    assert saved_identity(tmp_path, alone(), said.append, lambda folder: found.pop(0)) == {"model": "a"}
    assert (found, len(said)) == ([], 1)


def test_a_run_that_one_of_two_processes_refuses_is_refused_by_both(tmp_path: Path):
    save(tmp_path, 4, "a")
    looks = (lambda folder: (None, {}), newest_identity)  # the first one's host does not show the checkpoint yet

    def check(model: str) -> list[str]:
        one = lambda own: check_identity(tmp_path, {"model": model}, own, print, looks[own.process])
        return [str(found) for found in Votes().all(one)]

    assert check("a") == ["None", "None"]
    blind, seeing = check("b")
    assert blind == f"out: must hold the checkpoints of this run (process 1 says why not), got {tmp_path}"
    assert seeing == "model: must stay what the run was begun with, a (or give another --out), got b"


def test_one_that_a_host_does_not_show_yet_is_compared_by_the_others(tmp_path: Path):
    save(tmp_path, 4, "a")
    blind = lambda folder: (None, {4: MISSING})
    found = lambda *looks: Votes().all(lambda own: saved_identity(tmp_path, own, print, looks[own.process]))
    assert found(newest_identity, blind) == [{"model": "a"}, None]
    assert [type(error) for error in found(blind, blind)] == [UserError, UserError]


def test_one_that_the_machine_cannot_read_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    save(tmp_path, 4, "4")
    save(tmp_path, 8, "8")
    failing, read_text = [OSError(116, "Stale file handle")] * 2, Path.read_text

    def read(path: Path) -> str:
        if failing:
            raise failing.pop()
        return read_text(path)

    monkeypatch.setattr(Path, "read_text", read)
    assert saved_identity(tmp_path, alone(), said.append) == {"model": "8"}
    assert said == ["what run this is, in checkpoints: Stale file handle; tried again for 0 s"]
    failing += [OSError(116, "Stale file handle")] * 9
    with pytest.raises(MachineError, match=r" cannot be read, tried for 0 s \(Stale file handle\)$"):
        saved_identity(tmp_path, alone(), said.append)
