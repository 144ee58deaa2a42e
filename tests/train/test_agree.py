"""The roll call and the wire, with threads for processes: who is missing, who differs, who is gone, when to stop."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from zigzag_jax.train.config import Config, HostsConfig
from zigzag_jax.train.errors import MachineError, PeerError, RunError, UserError
from zigzag_jax.train.hosts.agree import (
    _LONGEST,
    LIBRARIES,
    _read_line,
    call_roll,
    check_devices,
    facts,
    first_difference,
    settings,
    source_digest,
)
from zigzag_jax.train.hosts.link import Link, patience


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def call(size: int, *, there: list[int] | None = None, those: Callable[[int], dict] = lambda i: {}, timeout: int = 20):
    """What call_roll gives or raises in each process of `size`, by its number."""
    port, there = free_port(), list(range(size)) if there is None else there

    def one(i: int):
        try:
            return call_roll(Config(hosts=HostsConfig(f"127.0.0.1:{port}", size, i, timeout)), those(i))
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return dict(zip(there, pool.map(one, there), strict=True))


@contextmanager
def links(size: int) -> Iterator[dict[int, Link]]:
    found = {i: link for i, link in call(size).items() if isinstance(link, Link)}
    assert len(found) == size
    yield found
    for link in reversed(found.values()):
        link.close()


def cut(link: Link) -> None:
    """What the kernel does for a process that is killed."""
    link.closing = True  # a dead process says nothing of what it sees
    for peer in list(link._peers.values()):
        peer.shutdown(socket.SHUT_RDWR)


def until(what: Callable[[], bool], seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end:
        time.sleep(0.01)
    return what()


def test_facts_are_flags_code_and_versions():
    mine = facts(Config(steps=7, hosts=HostsConfig("a:1", 2, 1)))
    assert mine["steps"] == "7"
    assert mine["code of zigzag_jax"] == source_digest()
    assert {f"version of {name}" for name in LIBRARIES} <= mine.keys()
    assert mine == facts(Config(steps=7, hosts=HostsConfig("b:1", 2, 0)))
    assert mine["data"] == "None"


def test_first_difference():
    same = {"steps": "1", "jax": "2"}
    assert first_difference({0: same, 1: dict(same)}, ["a", "b"]) is None
    found = first_difference({0: same, 1: same | {"jax": "3"}}, ["a", "b"])
    assert found == ("jax", "must be the same in all processes, 2 in process 0 (a)", "3 in process 1 (b)")


def test_what_is_missing_in_one_process_is_none_there():
    found = first_difference({0: {}, 1: {"NCCL_ALGO": "Ring"}}, ["a", "b"])
    assert found == ("NCCL_ALGO", "must be the same in all processes, none in process 0 (a)", "Ring in process 1 (b)")


def test_settings_are_those_of_this_process(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1")
    monkeypatch.setenv("NCCL_PROTO", "Simple")
    assert settings().items() >= {("XLA_FLAGS --xla_a", "1"), ("NCCL_PROTO", "Simple"), ("jax_enable_x64", "False")}
    monkeypatch.setenv("XLA_FLAGS", "/no/such/file")
    with pytest.raises(UserError, match=r"^XLA_FLAGS: must be flags, or a file of them \(No such file .*, got /no"):
        settings()


def test_the_roll_call_compares_settings(monkeypatch: pytest.MonkeyPatch):
    own = threading.local()
    monkeypatch.setattr("zigzag_jax.train.hosts.agree.settings", lambda: {"XLA_FLAGS --xla_a": own.value})

    def those(i: int) -> dict:
        own.value = str(i // 2)
        return {"steps": "1"}

    for error in call(3, those=those).values():
        assert isinstance(error, UserError)
        assert str(error).startswith("XLA_FLAGS --xla_a: must be the same in all processes, 0 in process 0 (")
        assert ", got 1 in process 2 (" in str(error)


def gpus(*counts: int, kind: str = "H100", platform: str = "gpu") -> list:
    """Devices of processes 0, 1, .."""
    owners = [process for process, count in enumerate(counts) for _ in range(count)]
    return [SimpleNamespace(process_index=p, device_kind=kind, platform=platform) for p in owners]


def test_all_bring_the_same_devices():
    check_devices(gpus(8, 8), ["a", "b"])
    check_devices(gpus(1, 3, kind="cpu", platform="cpu"), ["a", "b"])
    rule = r"^devices: must be the same in all processes, 8 x H100 in process 0 \(a\), got "
    with pytest.raises(UserError, match=rule + r"7 x H100 in process 2 \(c\)$"):
        check_devices(gpus(8, 8, 7), ["a", "b", "c"])
    with pytest.raises(UserError, match=rule + r"1 x A100, 7 x H100 in process 1 \(b\)$"):
        check_devices([*gpus(8, 7), *gpus(0, 1, kind="A100")], ["a", "b"])


def test_all_are_told_who_differs():
    for error in call(3, those=lambda i: {"steps": str(i // 2)}).values():
        assert isinstance(error, UserError)
        assert str(error).startswith("steps: must be the same in all processes, 0 in process 0 (")
        assert ", got 1 in process 2 (" in str(error)


def test_all_are_told_who_is_missing():
    for error in call(3, there=[0, 1], timeout=1).values():
        assert isinstance(error, PeerError)
        assert str(error) == "process 2 of 3 did not come within 1 s"


def test_process_0_is_missing():
    (error,) = call(2, there=[1], timeout=1).values()
    assert isinstance(error, PeerError)
    assert str(error).startswith("process 0 did not answer at 127.0.0.1:")


@pytest.mark.parametrize("text", [b"", b"{broken off", b"x" * (_LONGEST + 8192)], ids=["nothing", "half", "endless"])
def test_no_line(text: bytes):
    mine, other = socket.socketpair()
    with mine, ThreadPoolExecutor(1) as pool:
        sent = pool.submit(lambda: (other.sendall(text), other.close()))
        with pytest.raises(ValueError, match="the line broke off"):
            _read_line(mine)
        while mine.recv(65536):
            pass
        sent.result()


def outcomes(*hosts: HostsConfig) -> list[str]:
    """What calling the roll ends with in each."""

    def one(mine: HostsConfig):
        try:
            return call_roll(Config(hosts=mine), {})
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(hosts)) as pool:
        return [str(found) for found in pool.map(one, hosts)]


def test_the_same_number_twice():
    errors = call(2, there=[1, 1], timeout=1)
    assert isinstance(errors[1], PeerError)  # no process 0; with it:
    port = free_port()
    found = outcomes(*(HostsConfig(f"127.0.0.1:{port}", 3, i, 2) for i in (0, 1, 1)))
    assert "process 2 of 3 did not come within 2 s" in found
    assert "hosts.process-id: must be given to one process each, got 1" in found


def test_another_number_of_processes_is_a_mistake_and_no_absence():
    port = free_port()
    found = outcomes(HostsConfig(f"127.0.0.1:{port}", 3, 0, 60), HostsConfig(f"127.0.0.1:{port}", 6, 2, 60))
    for error in found:
        assert error.startswith("hosts.num-processes: must be the same in all processes, 3 in process 0 (")
        assert "), got 6 in process 2 (" in error


def test_a_port_that_is_taken():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=r"^hosts.coordinator: must have a free port on this host .*, got \d+"):
            call_roll(Config(hosts=HostsConfig(f"127.0.0.1:{port}", 2, 0, 1)), {})


def test_a_stranger_on_the_port_does_no_harm():
    port, answers = free_port(), []

    def one(i: int):
        answers.append(call_roll(Config(hosts=HostsConfig(f"127.0.0.1:{port}", 2, i, 20)), {}))

    first = threading.Thread(target=one, args=(0,))
    first.start()
    endless = b"x" * (_LONGEST + 8192)
    for text in (b"GET / HTTP/1.1\r\n\r\n", json.dumps([1]).encode() + b"\n", b"{broken off", endless):
        assert until(lambda text=text: _send(port, text))
    one(1)
    first.join(20)
    assert sorted(link.process for link in answers) == [0, 1]
    for link in answers:
        link.close()


def _send(port: int, text: bytes) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as line:
            line.sendall(text)
            return True
    except OSError:
        return False


@pytest.mark.parametrize("dead", [0, 2])
def test_all_know_who_is_gone(dead: int):
    with links(4) as found:
        cut(found[dead])
        for process in set(found) - {dead}:
            assert found[process].wait_for_gone(10)
            gone = found[process].gone
            assert gone is not None
            assert gone[:3] == (dead, "is gone", 70)


def test_silence_counts_as_gone():
    with links(2) as found:
        found[0].silence = 2.0
        found[1]._beat = lambda: None  # frozen  # type: ignore[method-assign]
        assert found[0].wait_for_gone(15)
        assert found[0].gone is not None
        assert found[0].gone[:2] == (1, "has not been heard of for 2 s")


@pytest.mark.parametrize("failed", [0, 1])
@pytest.mark.parametrize(
    ("error", "why", "code"),
    [
        (UserError("data", "must exist", "x"), "ended: data: must exist, got x", 2),
        (RunError("step 3: the loss is nan\nand more"), "ended: step 3: the loss is nan", 1),
        (MachineError("a disk is gone"), "ended: a disk is gone", 70),
        (KeyboardInterrupt(), "ended: KeyboardInterrupt", 130),
    ],
    ids=["user", "run", "machine", "interrupt"],
)
def test_why_a_process_ended_is_told_and_its_exit_code(failed: int, error: BaseException, why: str, code: int):
    with links(3) as found:
        found[failed].__exit__(type(error), error, None)
        for other in {0, 1, 2} - {failed}:
            assert found[other].wait_for_gone(10)
            gone = found[other].gone
            assert gone is not None
            assert gone[:3] == (failed, why, code)


def test_the_first_that_failed_counts():
    with links(3) as found:
        found[1].close("data: must exist", 2)
        assert all(found[i].wait_for_gone(10) for i in (0, 2))
        cut(found[2])
        time.sleep(0.3)
        gone = found[0].gone
        assert gone is not None
        assert gone[:3] == (1, "ended: data: must exist", 2)


def test_a_good_bye_alarms_nobody():
    with links(3) as found:
        found[1].close()
        found[0].close()
        time.sleep(0.3)
        assert found[2].gone is None


def test_what_comes_behind_a_good_bye_is_not_heard():
    mine, other = socket.socketpair()
    link = Link(0, {1: mine}, ["a", "b"], 1.0)
    with other:
        other.sendall(b'{"bye": true}\n{"beat": [3, "computing step"]}\n')
        time.sleep(2.5)
        assert link.gone is None
        link.close()


@pytest.mark.parametrize("asking", [[0], [2], [0, 1, 2]], ids=["zero", "two", "all"])
def test_all_stop_after_the_same_step(asking: list[int]):
    with links(3) as found:
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda i: found[i].stop_after(5 + i), asking))
        stops = {link.stop_at for link in found.values()}
        assert len(stops) == 1
        assert stops <= {5 + i for i in asking}


def test_a_stop_waits_for_nobody_who_is_done():
    with links(3) as found, ThreadPoolExecutor(1) as pool:
        found[1].close()
        pool.submit(found[0].stop_after, 5).result(timeout=10)
        assert until(lambda: found[2].stop_at == 5)
    with links(2) as found, ThreadPoolExecutor(1) as pool:
        found[0].close()
        pool.submit(found[1].stop_after, 5).result(timeout=10)


def test_where_a_process_is_reaches_process_0_and_comes_back():
    with links(3) as found:
        for i, link in found.items():
            link.doing(5, "reading the batch of step" if i == 1 else "computing step")
        assert until(lambda: "process 1: reading" in found[2].behind)


def test_patience():
    assert [patience(t) for t in (1, 20, 60, 300)] == [10, 10, 30, 60]
