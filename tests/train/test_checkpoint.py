"""Checkpoints come back bit for bit on any mesh; a damaged one is named, set aside, and the one before it used."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from votes import Votes, alone

from zigzag_jax.train.checkpoint import Checkpoints
from zigzag_jax.train.errors import MachineError, RunError, UserError
from zigzag_jax.train.identity import newest_identity


def state(value: float, devices: int = 1) -> dict:
    mesh = jax.make_mesh((devices,), ("cp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    put = lambda x: jax.device_put(np.float32(x), NamedSharding(mesh, PartitionSpec("cp")))
    return {"w": put(np.arange(8) + value), "m": put(np.full((4, 2), value))}


def abstract(devices: int = 1) -> dict:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0.0, devices))


def same(a: dict, b: dict) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def kept(tmp_path: Path, said: list[str]):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2, say=said.append, together=alone())
    yield checkpoints
    checkpoints.close()


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (OSError(116, "Stale file handle"), MachineError, r"checkpoints cannot be opened \(Stale file handle\)$"),
        (PermissionError(13, "Permission denied"), PermissionError, "Permission denied"),
    ],
    ids=["stale", "forbidden"],
)
def test_a_folder_that_cannot_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, kind: type[Exception], words: str
):
    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("orbax.checkpoint.CheckpointManager", fail)
    with pytest.raises(kind, match=words):
        Checkpoints(tmp_path / "checkpoints", 2, print, together=alone())


def test_nothing_there(kept: Checkpoints):
    assert kept.latest() is None
    assert kept.restore(abstract()) is None


def test_saved_on_one_device_read_on_four(kept: Checkpoints):
    kept.save(3, state(1.5), {"model": "a"}, {}, {})
    kept.wait()
    step, got = kept.restore(abstract(4)) or pytest.fail("nothing restored")
    assert step == 3
    assert len(got["w"].sharding.device_set) == 4
    same(got, state(1.5))
    assert newest_identity(kept.folder) == ({"model": "a"}, {})


def test_only_the_newest_are_kept_and_a_step_is_saved_once(kept: Checkpoints):
    for step in (1, 2, 3):
        kept.save(step, state(step), {}, {}, {})
    kept.wait()
    kept.save(3, state(99.0), {}, {}, {})
    kept.wait()
    assert sorted(p.name for p in kept.folder.iterdir() if p.name.isdigit()) == ["2", "3"]
    same((kept.restore(abstract()) or pytest.fail("nothing restored"))[1], state(3))


@pytest.mark.parametrize("damage", ["halve", "remove"])
def test_a_damaged_checkpoint_is_set_aside(kept: Checkpoints, said: list[str], damage: str):
    for step in (4, 8):
        kept.save(step, state(step), {"model": "a"}, {}, {})
        kept.wait()
    for file in (kept.folder / "8").rglob("*"):
        if file.is_file():
            file.unlink() if damage == "remove" else file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    identity, unread = newest_identity(kept.folder)
    assert (identity, unread.keys()) == ({"model": "a"}, {8})
    step, got = kept.restore(abstract()) or pytest.fail("nothing restored")
    assert step == 4
    same(got, state(4))
    assert (kept.folder / "8.corrupt").is_dir()
    assert any("checkpoints/8" in line for line in said)
    kept.save(8, state(8.5), {}, {}, {})  # the run goes on and comes to step 8 again
    kept.wait()
    same((kept.restore(abstract()) or pytest.fail("nothing restored"))[1], state(8.5))


def test_one_bit_that_the_storage_changed_is_noticed(kept: Checkpoints, said: list[str]):
    """In the values of an array, which nothing else in a checkpoint covers."""
    large = lambda seed: {"v": jnp.asarray(np.random.default_rng(seed).normal(size=65536), jnp.float32), **state(seed)}
    for step in (4, 8):
        kept.save(step, large(step), {}, {}, {})
        kept.wait()
    values = max((kept.folder / "8" / "state").rglob("*"), key=lambda path: path.stat().st_size)
    changed = bytearray(values.read_bytes())
    changed[len(changed) // 2] ^= 1
    values.write_bytes(changed)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), large(0))
    step, got = kept.restore(shapes) or pytest.fail("nothing restored")
    assert step == 4
    same(got, large(4))
    assert said[-1].endswith("(its numbers are not those that were saved: ['v'])")
    assert (kept.folder / "8.corrupt").is_dir()


def test_numbers_that_are_wrong_for_one_of_two_processes_are_wrong_for_both(kept: Checkpoints):
    kept.save(4, state(4), {}, {}, {})
    kept.wait()
    votes = Votes()
    both = [Checkpoints(kept.folder, 2, print, together=votes.of(i)) for i in (0, 1)]
    right = kept._sums(4)
    saved = [right, None]  # one sees no sums, as a cache may have it
    assert votes.all(lambda one: both[one.process]._wrong((state(4), saved[one.process]))) == ["", ""]
    saved = [right, {**(right or {}), "['m']": 1}]
    words = votes.all(lambda one: both[one.process]._wrong((state(4), saved[one.process])))
    assert [text.split(": ")[1] for text in words] == ["process 1 says which", "['m']"]
    for one in both:
        one.close()


@pytest.mark.parametrize("text", ["[]", "{", None])
def test_sums_that_cannot_be_read_are_damage(kept: Checkpoints, said: list[str], text: str | None):
    for step in (4, 8):
        kept.save(step, state(step), {}, {}, {})
        kept.wait()
    if text is None:
        shutil.rmtree(kept.folder / "8" / "sums")
    else:
        (kept.folder / "8" / "sums" / "metadata").write_text(text)
    assert (kept.restore(abstract()) or pytest.fail("nothing restored"))[0] == 4
    assert (kept.folder / "8.corrupt").is_dir()


def test_a_checkpoint_without_sums_is_read_and_that_is_said(kept: Checkpoints, said: list[str]):
    kept.save(4, state(4), {}, {}, {})
    kept.wait()
    shutil.rmtree(kept.folder / "4" / "sums")
    (kept.folder / "4" / "origin" / "metadata").write_text("{}")
    same((kept.restore(abstract()) or pytest.fail("nothing restored"))[1], state(4))
    assert said == ["checkpoints/4 was written before there were sums: its numbers are not compared"]


def test_where_none_can_be_read_nothing_is_touched(kept: Checkpoints):
    for step in (4, 8):
        kept.save(step, state(step), {}, {}, {})
        kept.wait()
    wrong = {"w": abstract()["w"], "another": abstract()["m"]}
    with pytest.raises(UserError, match=r"^out: must hold a checkpoint that can be read .*/8$"):
        kept.restore(wrong)
    assert sorted(p.name for p in kept.folder.iterdir() if not p.name.startswith(".")) == ["4", "8"]
    assert kept.restore(abstract()) is not None


def test_a_checkpoint_that_is_damaged_for_one_of_two_processes_is_set_aside_by_both(
    kept: Checkpoints, capsys: pytest.CaptureFixture[str]
):
    for step in (4, 8):
        kept.save(step, state(step), {}, {}, {})
        kept.wait()
    votes, said = Votes(), ([], [])
    both = [Checkpoints(kept.folder, 2, said[i].append, together=votes.of(i)) for i in (0, 1)]
    read = both[1]._read

    def damaged(step: int, abstract: dict) -> dict:
        if step == 8:
            raise ValueError("DATA_LOSS: half a file")
        return read(step, abstract)

    both[1]._read = damaged  # type: ignore[method-assign]
    for got in votes.all(lambda one: both[one.process].restore(abstract())):
        assert got[0] == 4
        same(got[1], state(4))
    assert said[0][-1] == (
        f"checkpoints/8 cannot be read and is now {kept.folder}/8.corrupt; an older one is used "
        "(process 1 cannot read it)"
    )
    assert said[1] == []
    error = "process 1: checkpoints/8: DATA_LOSS: half a file; tried again for 0 s\n"
    assert capsys.readouterr().err == error
    assert [one.latest() for one in both] == [4, 4]
    for one in both:
        one.close()


def test_a_checkpoint_that_cannot_be_renamed(kept: Checkpoints, monkeypatch: pytest.MonkeyPatch):
    for step in (4, 8):
        kept.save(step, state(step), {}, {}, {})
        kept.wait()
    (kept.folder / "8" / "state" / "manifest.ocdbt").write_bytes(b"")

    def rename(path: Path, target: Path) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "rename", rename)
    rule = r"^out: must let a damaged checkpoint be renamed \(Read-only file system; it is damaged: DATA_LOSS.*/8$"
    with pytest.raises(UserError, match=rule):
        kept.restore(abstract())
    monkeypatch.undo()
    assert (kept.folder / "8").is_dir()


def test_a_process_that_goes_on_seeing_what_was_renamed(kept: Checkpoints, monkeypatch: pytest.MonkeyPatch):
    for step in (4, 8):
        kept.save(step, state(step), {}, {}, {})
        kept.wait()
    (kept.folder / "8" / "state" / "manifest.ocdbt").write_bytes(b"")
    monkeypatch.setattr("zigzag_jax.train.checkpoint.steps_in", lambda folder: {4, 8})  # a cache that is behind
    with pytest.raises(UserError, match=r"^out: must be seen alike by all processes: process 0 still sees 8"):
        kept.restore(abstract())


def test_a_checkpoint_that_was_seen_late_is_the_newest(kept: Checkpoints):
    late = Checkpoints(kept.folder, 2, print, together=alone())
    kept.save(4, state(4), {}, {}, {})
    kept.wait()
    assert late.latest() is None
    assert (late.restore(abstract()) or pytest.fail("nothing restored"))[0] == 4
    assert late.latest() == 4
    late.close()


def test_what_is_still_being_written_is_not_called_whole(kept: Checkpoints, monkeypatch: pytest.MonkeyPatch):
    assert kept.newest_said() == "there is no checkpoint yet"
    kept.save(4, state(4), {}, {}, {})
    kept.wait()
    assert kept.newest_said() == "the newest checkpoint is of step 4"
    monkeypatch.setattr(kept, "latest", lambda: 8)
    monkeypatch.setattr(kept._manager, "is_saving_in_progress", lambda: True)
    assert kept.newest_said() == "the newest checkpoint is of step 4, that of step 8 is still being written"


def test_a_refused_save_is_an_error(kept: Checkpoints):
    kept.save(8, state(8), {}, {}, {})
    kept.wait()
    with pytest.raises(RunError, match="step 4: the checkpoint was refused, the newest is 8"):
        kept.save(4, state(4), {}, {}, {})
