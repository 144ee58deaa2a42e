"""A disk without room: training goes on, tries again, and loses neither the state, nor a checkpoint, nor a number.

The disk is full for this process only: a limit on the size of files makes the system refuse to write, in Python and in
the libraries below it.
"""

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zigzag_jax.train.checkpoint import Checkpoints
from zigzag_jax.train.errors import MachineError, SaveError
from zigzag_jax.train.logs import metrics
from zigzag_jax.train.logs.metrics import MetricsLog
from zigzag_jax.train.saving import Saver


def room(size: int) -> None:
    """Let files of this process grow to `size` bytes; -1: without limit."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@contextmanager
def full(size: int = 65536) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    room(size)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def state(seed: int) -> dict:
    """A quarter of a megabyte that does not compress."""
    return {"w": jnp.asarray(np.random.default_rng(seed).normal(size=65536), jnp.float32)}


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def make(tmp_path: Path, said: list[str]):
    checkpoints = Checkpoints(tmp_path, keep=2, say=said.append)
    yield lambda **options: Saver(checkpoints, 2, ({}, {}, {}), said.append, **{"alone": True, "retry": 0.0, **options})
    checkpoints.close()


def restored(saver: Saver) -> tuple[int, np.ndarray]:
    step, got = saver.checkpoints.restore(jax.eval_shape(lambda: {"w": jnp.zeros(65536)})) or pytest.fail(
        "nothing restored"
    )
    return step, np.asarray(got["w"])


def test_training_goes_on_and_saves_when_there_is_room(make: Callable[..., Saver], said: list[str], capfd):
    saver = make()
    saver.after(1, state(1))
    assert saver.checkpoints.latest() is None  # not due
    saver.after(2, state(2))
    with full():
        saver.after(3, state(3))
        assert said == []
        saver.after(4, state(4))
        saver.after(5, state(5))  # not due by its number: the one before failed
        assert [line.split(";")[0].split(" (")[1] for line in said] == ["File too large)"] * 2
        assert "the newest checkpoint is of step 2;" in said[0]
        assert [p.name for p in saver.checkpoints.folder.iterdir()] == ["2"]
    saver.after(6, state(6))
    saver.finish(6, state(6))
    assert said[2:] == ["step 6: saving again"]
    step, got = restored(saver)
    assert step == 6
    np.testing.assert_array_equal(got, state(6)["w"])
    assert "Traceback" not in capfd.readouterr().err


def test_no_more_tries_than_it_says(make: Callable[..., Saver], said: list[str]):
    saver = make(retry=1000.0)
    with full():
        for step in range(2, 8):
            saver.after(step, state(step))
    assert [line.split(":")[0] for line in said] == ["step 2", "step 4", "step 6"]


def test_a_finished_run_waits_for_room(make: Callable[..., Saver], said: list[str]):
    saver = make()
    with full():
        saver.after(3, state(3), now=True)
        saver.finish(3, state(3), working=lambda: room(-1))
    assert restored(saver)[0] == 3
    assert said[-1] == "step 3: saving again"


def test_and_ends_with_an_error_when_there_is_none(make: Callable[..., Saver]):
    saver = make(give_up=0.2)
    saver.after(2, state(2))
    with full():
        saver.after(3, state(3), now=True)
        rule = r"step 3: the state could not be saved in 0.2 s \(File too large\); the newest checkpoint is of step 2"
        with pytest.raises(MachineError, match=rule):
            saver.finish(3, state(3))
    assert restored(saver)[0] == 2


def test_the_oldest_is_deleted_though_a_save_failed(tmp_path: Path, said: list[str]):
    """Orbax strikes it off its list before the new one is whole, and deletes it after."""
    checkpoints = Checkpoints(tmp_path, keep=1, say=said.append)
    saver = Saver(checkpoints, 1, ({}, {}, {}), said.append, alone=True, retry=0.0)
    for step in range(1, 6):
        with full(65536 if step in (2, 4) else -1):
            saver.after(step, state(step))
        assert checkpoints.latest() == step - (step in (2, 4))
        assert [p.name for p in tmp_path.iterdir()] == [str(checkpoints.latest())]
    assert "the newest checkpoint is of step 1;" in said[0]
    checkpoints.close()


def test_what_a_killed_save_left_is_removed(tmp_path: Path, said: list[str]):
    (tmp_path / "7.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    checkpoints = Checkpoints(tmp_path, keep=2, say=said.append)
    assert checkpoints.latest() is None
    assert (tmp_path / "7.orbax-checkpoint-tmp").exists()  # it may be another run that is writing there
    checkpoints.remove_parts()
    assert list(tmp_path.iterdir()) == []
    checkpoints.close()


def save_in_the_background(checkpoints: Checkpoints) -> None:
    """Returns while files are being written, however soon that ends: what fails is met later."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zigzag_jax.train.checkpoint._PATIENCE", 0.0)
        patch.setattr(checkpoints._manager, "is_saving_in_progress", lambda: True)
        checkpoints.save(1, state(1), {}, {}, {})


def test_a_run_that_ends_says_what_was_not_written(tmp_path: Path, said: list[str]):
    checkpoints = Checkpoints(tmp_path, keep=2, say=said.append)
    with full():
        save_in_the_background(checkpoints)
        checkpoints.close()
    assert said == ["the checkpoint that was being written could not be (File too large); there is no checkpoint yet"]


def test_one_of_several_processes_ends(make: Callable[..., Saver]):
    saver = make(alone=False)
    with full(), pytest.raises(MachineError, match=r"step 2: the state cannot be saved .*there is no checkpoint yet"):
        saver.after(2, state(2))


def test_what_another_process_broke_off_is_left_to_the_watchdog(
    make: Callable[..., Saver], monkeypatch: pytest.MonkeyPatch, said: list[str]
):
    saver = make(alone=False)

    def gone(*args, **options) -> bool:
        raise ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer")

    monkeypatch.setattr(saver.checkpoints._manager, "save", gone)
    with pytest.raises(SaveError, match="Gloo AllGather failed"):
        saver.after(2, state(2))
    assert said == []


def test_what_fails_in_the_background_is_noticed(tmp_path: Path, said: list[str]):
    checkpoints = Checkpoints(tmp_path, keep=2, say=said.append)
    with full():
        save_in_the_background(checkpoints)
        with pytest.raises(SaveError, match="File too large"):
            checkpoints.wait()
        checkpoints.check()  # and only once
    checkpoints.save(1, state(1), {}, {}, {})
    checkpoints.wait()
    assert checkpoints.latest() == 1
    checkpoints.close()


def test_metrics_wait_for_room(tmp_path: Path, said: list[str]):
    log = MetricsLog(tmp_path, say=said.append)
    log.header(devices=1)
    path = tmp_path / metrics.FILE
    log.step(1, loss=1.0)
    with full(path.stat().st_size + 10):  # room for a part of a line
        log.step(2, loss=2.0)
        log.step(3, loss=3.0)
        assert metrics.read(path, "loss") == {1: 1.0}
    log.step(4, loss=4.0)
    log.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"devices": 1}, *({"step": n, "loss": float(n)} for n in (1, 2, 3, 4))]
    assert said == [
        "step 2: metrics cannot be written (File too large); they are kept and tried again",
        "step 4: all metrics are written again",
    ]


def test_numbers_that_are_lost_are_said(tmp_path: Path, said: list[str]):
    log = MetricsLog(tmp_path, say=said.append)
    with full(10):
        log.step(1, loss=1.0)
        with pytest.raises(OSError, match=r"No space left|File too large"):
            log.header(devices=1)
        log.close()
    assert said[-1].startswith("the last 2 lines of metrics cannot be written and are lost")
    log.close()  # TensorBoard's file keeps what it could not write until it is closed with room


def test_what_waits_is_written_at_the_end(tmp_path: Path, said: list[str]):
    log = MetricsLog(tmp_path, say=said.append)
    with full(10):
        log.step(1, loss=1.0)
    log.close()
    assert metrics.read(tmp_path / metrics.FILE, "loss") == {1: 1.0}
    assert len(said) == 1
