"""A wire between the processes of a run beside the one that carries arrays: who is alive, where, and when to stop.

Process 0 listens on the coordinator's port before JAX does; the others call and say who they are (`call_roll` in
agree.py), and the connections stay open. So that

- a process that dies is known to all within a moment, by name: the kernel closes its connection;
- one that ends by an error says which, and the others end with its exit code: whoever starts them again, or does not,
  is told one thing by all;
- one whose host is gone, or that is frozen, is known after PATIENCE seconds of silence: everybody says something every
  second;
- all stop after the same step: who wants to stop waits, between two steps, until everybody has heard of it. A step
  needs all processes, so none is past the next one then.

Messages are JSON, one a line. To process 0: beat [step, doing], stop N, heard N, failed [TEXT, code], bye. From it:
beat, stop N, agreed N, gone [process, why, code], behind TEXT, bye. Nothing here knows of JAX.
"""

import contextlib
import json
import selectors
import socket
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, NamedTuple

from zigzag_jax.train.errors import MACHINE_FAILED, exit_code
from zigzag_jax.train.hosts.behind import State, behind

_TICK = 1.0  # seconds between two beats
_GRACE = 1.0  # seconds that a process stays to let the others hear why it ends


class Gone(NamedTuple):
    """The first process that is known to be gone."""

    process: int
    """Its number."""
    why: str
    """How it went, as words."""
    code: int
    """The exit code that the others take from it."""
    since: float
    """When that was known, by time.monotonic()."""


def patience(timeout: int) -> float:
    """Seconds of silence after which a process counts as gone."""
    return max(10.0, min(60.0, timeout / 2))


class Link:
    """The wire of one process: to all others in process 0, to process 0 elsewhere."""

    def __init__(self, process: int, peers: Mapping[int, socket.socket], hosts: list[str], silence: float) -> None:
        """`peers`: connections by process; `hosts`: name of the host of each process; `silence` in seconds."""
        self.process, self.hosts, self.silence = process, hosts, silence
        self.gone: Gone | None = None
        self.behind = ""
        self.stop_at: int | None = None
        self.closing = False
        self._state: State = (0, "starting before step")
        self._peers, self._states = dict(peers), dict.fromkeys(range(len(hosts)))
        self._rest = {p: b"" for p in peers}
        self._quiet = dict.fromkeys(peers, 0)  # beats since a word was heard; counted, for a clock goes on in a sleep
        self._missing: set[int] = set()  # who has not heard of the stop
        self._agreed, self._lock = threading.Event(), threading.RLock()
        self._selector = selectors.DefaultSelector()
        for p, peer in peers.items():
            peer.settimeout(5.0)
            self._selector.register(peer, selectors.EVENT_READ, p)
        self._thread = threading.Thread(target=self._listen, name="link", daemon=True)
        self._thread.start()

    def doing(self, step: int, what: str) -> None:
        """Where this process is, told with the next beat."""
        self._state = (step, what)

    def stop_after(self, step: int) -> None:
        """Have all processes stop after `step`, or after the earlier one that somebody asked for first.

        Returns when all have heard; call it between two steps.
        """
        if self.process == 0:
            self._stop(step)
        else:
            self._send(0, stop=step)
        while not self._agreed.wait(0.05) and self.gone is None and (self.process == 0 or self._peers):
            pass

    def wait_for_gone(self, seconds: float) -> bool:
        """Whether a process is known to be gone, now or within that time."""
        end = time.monotonic() + seconds
        while self.gone is None and time.monotonic() < end:
            time.sleep(0.02)
        return self.gone is not None

    def name(self, process: int) -> str:
        """`process I (HOST)`."""
        return f"process {process} ({self.hosts[process]})"

    def close(self, failed: str | None = None, code: int = MACHINE_FAILED) -> None:
        """Say good-bye, or why this process ends, and with which exit code; the others end with it too then."""
        if self.closing:
            return
        self.closing = True
        if failed is None:
            self._send_all(bye=True)
        elif self.process == 0:
            self._send_all(gone=[0, f"ended: {failed}", code])
        else:
            self._send(0, failed=[failed, code])
        for peer in list(self._peers.values()):
            with contextlib.suppress(OSError):
                peer.shutdown(socket.SHUT_WR)
        self._thread.join(_GRACE)  # it goes on reading until the others have heard and hung up

    def __enter__(self) -> "Link":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()
        else:
            self.close(str(error).split("\n", maxsplit=1)[0] or type(error).__name__, exit_code(error))

    def _listen(self) -> None:
        due = time.monotonic()
        while self._peers:
            for key, _ in self._selector.select(max(0.0, due - time.monotonic())):
                self._read(key.data)
            if time.monotonic() >= due:
                due = time.monotonic() + _TICK
                self._beat()
        self._selector.close()

    def _beat(self) -> None:
        self._states[self.process] = self._state
        if self.process == 0:
            self.behind = behind(self._states)
            self._send_all(beat=[*self._state], behind=self.behind)
        else:
            self._send_all(beat=[*self._state])
        for p in list(self._quiet):
            self._quiet[p] += 1
            if self._quiet[p] * _TICK > self.silence:
                self._lose(p, f"has not been heard of for {self.silence:.0f} s")

    def _read(self, p: int) -> None:
        try:
            data = self._peers[p].recv(65536)
        except OSError:
            data = b""
        if not data:
            self._lose(p, "is gone")
            return
        *lines, self._rest[p] = (self._rest[p] + data).split(b"\n")
        for line in lines:
            if p not in self._peers:  # it said good-bye; a beat of its other thread came behind
                break
            self._quiet[p] = 0
            self._hear(p, json.loads(line))

    def _hear(self, p: int, message: dict[str, Any]) -> None:
        if message.get("bye"):
            self._drop(p)
            with self._lock:  # it has all that it needs, and will hear of no stop
                self._missing.discard(p)
                self._settle()
        elif "failed" in message:
            why, code = message["failed"]
            self._lose(p, f"ended: {why}", code)
        elif "gone" in message:
            self._note(*message["gone"])
        elif "stop" in message and self.process == 0:
            self._stop(message["stop"])
        elif "stop" in message:
            self.stop_at = message["stop"]
            self._send(0, heard=self.stop_at)
        elif "heard" in message:
            with self._lock:
                self._missing.discard(p)
                self._settle()
        elif "agreed" in message:
            self._agreed.set()
        elif "beat" in message:
            self._states[p] = (message["beat"][0], message["beat"][1])
            self.behind = message.get("behind", self.behind)

    def _stop(self, step: int) -> None:
        """In process 0: the first wish counts."""
        with self._lock:
            if self.stop_at is None:
                self.stop_at, self._missing = step, set(self._peers)
                self._send_all(stop=step)
                self._settle()

    def _settle(self) -> None:
        if self.stop_at is not None and not self._missing and not self._agreed.is_set():
            self._agreed.set()
            self._send_all(agreed=self.stop_at)

    def _lose(self, p: int, why: str, code: int = MACHINE_FAILED) -> None:
        self._drop(p)
        if self.closing:
            return
        if self.process == 0:
            self._send_all(gone=[p, why, code])
        self._note(p, why, code)

    def _note(self, p: int, why: str, code: int) -> None:
        if self.gone is None and p != self.process:
            self.gone = Gone(p, why, code, time.monotonic())

    def _drop(self, p: int) -> None:
        peer = self._peers.pop(p, None)
        self._quiet.pop(p, None)
        if peer is not None:
            self._selector.unregister(peer)
            peer.close()

    def _send_all(self, **message: Any) -> None:
        for p in list(self._peers):
            self._send(p, **message)

    def _send(self, p: int, **message: Any) -> None:
        """A connection that is broken is found broken by the reader."""
        try:
            with self._lock:
                self._peers[p].sendall(json.dumps(message).encode() + b"\n")
        except (OSError, KeyError):
            return
