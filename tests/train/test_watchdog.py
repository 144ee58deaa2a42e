"""A hang and a lost peer end in one line that names step, axis and process; a run that goes on is left alone."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from zigzag_jax.train.hosts import watchdog
from zigzag_jax.train.hosts.link import Link
from zigzag_jax.train.hosts.watchdog import Watchdog, axes_between, newest

TWO_HOSTS = np.array([[[0, 0], [1, 1]], [[2, 2], [3, 3]]])  # dp 2, fsdp 2, cp 2


@pytest.mark.parametrize(
    ("mine", "other", "want"),
    [(0, 1, ["fsdp"]), (0, 2, ["dp"]), (0, 3, ["dp", "fsdp"]), (3, None, ["dp", "fsdp"]), (1, 0, ["fsdp"])],
)
def test_axes_between(mine: int, other: int | None, want: list[str]):
    assert axes_between(TWO_HOSTS, ("dp", "fsdp", "cp"), mine, other) == want


def test_one_process_has_no_axis():
    assert axes_between(np.zeros((1, 1, 4), int), ("dp", "fsdp", "cp"), 0) == []


class Left(list[int]):
    """Takes the exit code instead of leaving, and waits for the test to end."""

    def __call__(self, code: int) -> None:
        self.append(code)
        time.sleep(0.1)

    def wait(self) -> None:
        """Until it has taken one, or half a minute."""
        for _ in range(600):
            if self:
                break
            time.sleep(0.05)


def test_a_command_that_writes_nothing_leaves_its_stacks_on_stderr(capfd: pytest.CaptureFixture[str]):
    left = Left()
    with Watchdog(None, 1, None, leave=left) as dog:
        dog.doing(3, "scoring batch")
        left.wait()
    assert left == [70]
    *stacks, last = capfd.readouterr().err.strip().splitlines()
    assert last == "error: step 3: process 0 has been scoring batch 3 for 1 s; --hosts.timeout gives it more"
    assert any("most recent call first" in line for line in stacks)


def test_a_hang_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    (tmp_path / "checkpoints" / "6").mkdir(parents=True)
    left = Left()
    with Watchdog(tmp_path, 1, None, leave=left) as dog:
        dog.on(jax.make_mesh((2,), ("cp",), devices=jax.devices()[:2]))
        dog.doing(8, "computing step")
        left.wait()
    assert left == [70]
    text = capfd.readouterr().err
    last = text.strip().splitlines()[-1]
    assert last.startswith("error: step 8: process 0 has been computing step 8 for 1 s")
    assert "the newest checkpoint is of step 6" in last
    assert "test_a_hang_is_named" in (tmp_path / "stacks-process-0.txt").read_text()


def test_a_hang_of_the_storage_is_no_hang_of_the_watchdog(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(watchdog, "_STORAGE", 0.3)
    monkeypatch.setattr(watchdog, "newest", lambda folder: time.sleep(60))
    os.mkfifo(tmp_path / "stacks-process-0.txt")  # nobody reads: opening it waits for ever
    left = Left()
    with Watchdog(tmp_path, 1, None, leave=left) as dog:
        dog.doing(8, "computing step")
        left.wait()
    assert left == [70]
    text = capfd.readouterr().err
    assert text.strip().splitlines()[-1].endswith(f"; --hosts.timeout gives it more; {tmp_path} does not answer")
    assert "test_a_hang_of_the_storage" in text  # the stacks


STUCK = """
import ctypes, os, socket, sys, time
from pathlib import Path
from zigzag_jax.train.hosts import watchdog
from zigzag_jax.train.hosts.link import Link
watchdog._SLACK = watchdog._LAST_WORDS = 2
mine, other = socket.socketpair()
link = Link(1, {0: mine}, ["a", "b"], 1000.0)
hold = ctypes.PyDLL(None).sleep  # without giving up Python's lock
with watchdog.Watchdog(Path(sys.argv[1]), 100 if sys.argv[2] == "abort" else 1, link) as dog:
    dog.doing(3, "computing step")
    if sys.argv[2] == "abort":  # which found malloc's lock taken, say
        link.wait_for_gone = lambda seconds: hold(1000)
        os.abort()
    time.sleep(0.8)
    hold(1000)
"""


@pytest.mark.system
@pytest.mark.parametrize("why", ["abort", "lock"])
def test_a_process_that_cannot_look_any_more_is_ended_by_the_kernel(tmp_path: Path, why: str):
    done = subprocess.run(
        [sys.executable, "-c", STUCK, str(tmp_path), why], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == -signal.SIGALRM, done.stderr


def test_the_alarm_goes_with_the_watchdog(tmp_path: Path):
    one, other = socket.socketpair()
    link = Link(1, {0: one}, ["a", "b"], 100.0)
    with other, Watchdog(tmp_path, 10**9, link) as dog:
        time.sleep(1.2)
        assert 10**6 < signal.getitimer(signal.ITIMER_REAL)[0] <= 10**9 + 60
        dog.doing(1, "computing step", 1e-7)
        time.sleep(1.2)
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 160
        link.close()
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_peer_s_error_gives_the_exit_code_and_no_stacks(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("zigzag_jax.train.hosts.watchdog._GRACE", 0.1)
    mine, other = socket.socketpair()
    link, left = Link(1, {0: mine}, ["a", "b"], 10.0), Left()
    with other, Watchdog(tmp_path, 100, link, leave=left) as dog:
        dog.doing(3, "computing step")
        other.sendall(json.dumps({"gone": [0, "ended: data: must exist", 2]}).encode() + b"\n")
        left.wait()
    assert left[0] == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    want = "error: step 3: process 0 (a) ended: data: must exist, as process 1 (b) sees it; there is no checkpoint yet"
    assert line == want
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_a_peer_s_error_caused_takes_its_exit_code(tmp_path: Path):
    mine, other = socket.socketpair()
    link, left = Link(1, {0: mine}, ["a", "b"], 10.0), Left()

    def collective() -> None:
        with Watchdog(tmp_path, 100, link, leave=left):
            other.sendall(json.dumps({"gone": [0, "ended: data: must exist", 2]}).encode() + b"\n")
            raise ValueError("Connection closed by peer")

    with other, pytest.raises(ValueError, match="closed by peer"):
        collective()
    assert left == [2]


def test_steps_that_finish_and_what_may_compile_are_left_alone(tmp_path: Path):
    left = Left()
    with Watchdog(tmp_path, 1, None, leave=left) as dog:
        dog.doing(1, "computing step", 10)
        time.sleep(1.8)
        for step in range(2, 6):
            dog.doing(step, "computing step")
            time.sleep(0.4)
    assert left == []


def test_newest(tmp_path: Path):
    assert newest(tmp_path) == "there is no checkpoint yet"
    for name in ("3", "12", "9.corrupt", "12.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest(tmp_path) == "the newest checkpoint is of step 12"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").touch()
    assert newest(tmp_path / "run") == "the folder of checkpoints cannot be looked into (Not a directory)"


ABORT = """
import faulthandler, os, socket, sys, threading, time
from pathlib import Path
from zigzag_jax.train.hosts.link import Link
from zigzag_jax.train.hosts.watchdog import Watchdog
def in_a_library():
    os.abort()
faulthandler.enable()
mine, other = socket.socketpair()
link = Link(1, {0: mine}, ["a", "b"], 10.0)
with Watchdog(Path(sys.argv[1]), 100, link) as dog:
    dog.doing(3, "computing step")
    if sys.argv[2] == "gone":
        threading.Timer(0.3, other.close).start()
    if sys.argv[2] != "after":
        in_a_library()
in_a_library()
"""


@pytest.mark.system
@pytest.mark.parametrize(("why", "code"), [("gone", 70), ("else", -6), ("after", -6)])
def test_abort_has_our_last_word_where_a_peer_is_gone_and_leaves_stacks_always(tmp_path: Path, why: str, code: int):
    done = subprocess.run(
        [sys.executable, "-c", ABORT, str(tmp_path), why], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == code, done.stderr
    last = (done.stderr.strip().splitlines() or [""])[-1]
    assert last.startswith("error: step 3: process 0 (a) is gone, as process 1 (b) sees it") == (why == "gone")
    assert done.stderr.count("in in_a_library") == 1
    stacks = tmp_path / "stacks-process-1.txt"
    assert stacks.exists() == (why != "after")  # faulthandler's own, once the watchdog is gone
    assert why == "after" or "in in_a_library" in stacks.read_text()
