"""One run at a time has a folder."""

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from votes import Votes, alone

from zigzag_jax.train.errors import UserError
from zigzag_jax.train.hosts.together import Together
from zigzag_jax.train.lock import FILE, sole_run, user_of

HOLD = """
import sys, time
from pathlib import Path
from zigzag_jax.train.hosts.together import Together
from zigzag_jax.train.lock import sole_run

with sole_run(Path(sys.argv[1]), Together(0, lambda value: value), print):
    print("in", flush=True)
    time.sleep(600)
"""


def enter(folder: Path, together: Together, said: list[str]) -> None:
    with sole_run(folder, together, said.append):
        said.append("in")


def test_a_second_run_is_refused_until_the_first_is_gone_by_kill_9_too(tmp_path: Path):
    said: list[str] = []
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True) as first:
        try:
            assert first.stdout is not None
            assert first.stdout.readline() == "in\n"
            note = (tmp_path / FILE).read_bytes()
            who = rf"process {first.pid} of {socket.gethostname()} since 20\d\d-\d\d-\d\d .*"
            rule = rf"^out: must be the folder of one run at a time \(it is in use by {who}\), got {tmp_path}$"
            with pytest.raises(UserError, match=rule):
                enter(tmp_path, alone(), said)
            assert len(said) == 1
            assert said[0].endswith("; waiting for it to end")
            assert (tmp_path / FILE).read_bytes() == note
        finally:
            first.kill()
    assert (tmp_path / FILE).read_bytes() == note  # it had no time to clear it
    enter(tmp_path, alone(), said)
    assert said[1:] == ["in"]
    assert (tmp_path / FILE).read_bytes() == b""


def test_all_processes_of_a_second_run_are_refused(tmp_path: Path):
    votes = Votes()
    with sole_run(tmp_path, alone(), print):
        for note, more in (
            (None, ""),
            ({"host": "b", "pid": 3, "since": "x", "kernel": "c"}, "; where that host is gone"),
        ):
            if note is not None:
                (tmp_path / FILE).write_text(json.dumps(note))
            said: list[str] = []
            blind, other = votes.all(lambda one, said=said: enter(tmp_path, one, said))[::-1]
            assert isinstance(blind, UserError)
            assert isinstance(other, UserError)
            assert f"(process 0 says by which{more}" in str(blind)
            assert f"since {'20' if note is None else 'x'}" in str(other)
            assert len(said) == 1
    assert votes.all(lambda one: enter(tmp_path, one, [])) == [None, None]


def test_a_lock_on_another_host_is_waited_for_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """NFS gives up the lock of a host without power after a while; here with the fourth try."""

    def tries(number: int) -> list[str]:
        left, said = [number], []

        def flock(file: object, how: int) -> None:
            if left[0]:
                left[0] -= 1
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

        monkeypatch.setattr(fcntl, "flock", flock)
        enter(tmp_path, alone(), said)
        return said

    note = {"host": socket.gethostname(), "pid": 3, "since": "x"}  # a pod keeps its name on another node
    for text in (json.dumps(note | {"kernel": "b"}), "", "[]"):  # who has it may be about to say so
        (tmp_path / FILE).write_text(text)
        assert tries(3)[1:] == ["in"]
    (tmp_path / FILE).write_text(
        json.dumps(note | {"kernel": Path("/proc/sys/kernel/random/boot_id").read_text().strip()})
    )
    with pytest.raises(UserError, match=r"process 3 of .* since x\)"):
        tries(3)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EIO])
def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int):
    def flock(file: object, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    said: list[str] = []
    if number == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(number)):
            enter(tmp_path, alone(), said)
        assert said == []
    else:
        enter(tmp_path, alone(), said)
        line = (
            f"{tmp_path / FILE} cannot be locked ({os.strerror(number)}): nothing keeps a second run out of this folder"
        )
        assert said == [line, "in"]


def test_who_has_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert user_of(tmp_path) is None
    monkeypatch.setattr("zigzag_jax.train.lock._BOOT", tmp_path / "none")  # a system that does not tell its boot
    with sole_run(tmp_path, alone(), print):
        assert json.loads((tmp_path / FILE).read_text())["kernel"] == socket.gethostname()
        assert str(user_of(tmp_path)).startswith(f"process {os.getpid()} of ")
    assert user_of(tmp_path) is None
