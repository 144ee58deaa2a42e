"""Ends a run that hangs, or whose peers are gone: stacks, one line that says where, exit code 70; where a peer ended by
an error, its exit code.

The loop says what it does (`doing`); a thread looks twice a second whether it still does the same after its time, or
whether the wire (link.py) knows of a process that is gone. A step has --hosts.timeout seconds, all that may compile
ten times that. JAX would wait for ever in most of these cases (a collective over NCCL does not notice that its peer is
gone), and where it does notice it calls abort() with its own message; so abort() is caught too, for the last line to be
ours. One that another thing called leaves the stacks of all threads, and the process ends by it.

    error: step 8, mesh axis cp: process 1 (hostb) is gone, as process 0 (hosta) sees it; the newest checkpoint is of
    step 6; stacks: runs/x/stacks-process-0.txt

Nothing is saved at that moment: half of the state is at the other processes or given to the step that hangs.

What takes the watchdog itself ends the process too, by an alarm of the kernel's (SIGALRM, as an exit code 142), which
no lock holds up: it is set before the last words, which the storage may hang in, and before what an abort() calls,
which may have been called with malloc's lock held. In a run of several processes each look of the thread sets it on,
so that a thread which keeps Python's lock for ever does not keep its GPUs as long.
"""

import contextlib
import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from jax.sharding import Mesh

from zigzag_jax.train.errors import MACHINE_FAILED, RunError, UserError
from zigzag_jax.train.hosts.link import Link
from zigzag_jax.train.reading import newest_of

PATIENT = 10  # what may compile has this many times a step's time
_TICK = 0.5
_GRACE = 3.0  # seconds that a process has to end by itself once a peer is known to be gone
_STORAGE = 5.0  # seconds that storage has to say what lies there
_LAST_WORDS = 30  # seconds until the kernel ends a process that is ending
_LONGEST = 10**9  # seconds that alarm() takes
_SLACK = 60  # seconds beyond an activity's own until it ends one in which nothing looks any more


def axes_between(processes: np.ndarray, names: tuple[str, ...], mine: int, other: int | None = None) -> list[str]:
    """Mesh axes along which process `mine` meets `other` (None: any); `processes` is the mesh with process numbers.

    Where the two share no line of the mesh: all axes that `mine` meets anybody on. Empty in a run of one process.

    >>> axes_between(np.array([[0, 0], [1, 1]]), ("dp", "cp"), 0, 1)
    ['dp']
    """
    meets: list[str] = []
    for axis, name in enumerate(names):
        lines = np.moveaxis(processes, axis, -1).reshape(-1, processes.shape[axis])
        lines = lines[(lines == mine).any(1)]
        if (lines != mine).any() if other is None else (lines == other).any():
            meets.append(name)
    return meets if meets or other is None else axes_between(processes, names, mine)


class Watchdog:
    """Watches one process of a run from a thread of its own, while entered."""

    def __init__(
        self, folder: Path | None, timeout: float, link: Link | None, *, leave: Callable[[int], Any] = os._exit
    ):
        """`folder` takes the stacks, None where nothing is written; `timeout` in seconds a step; `leave` ends the
        process at once.
        """
        self.folder, self.timeout, self.link, self._leave = folder, timeout, link, leave
        self.process = 0 if link is None else link.process
        self._mesh: Mesh | None = None
        self._step, self._what, self._limit, self._spent = 0, "starting before step", PATIENT * timeout, 0.0
        self._before: int | None = None  # what abort() called first before
        self._done, self._ending = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def on(self, mesh: Mesh) -> None:
        """Name this mesh's axes from now on."""
        self._mesh = mesh

    def doing(self, step: int, what: str, times: float = 1.0) -> None:
        """The process is now at `what` of `step` and has `times` the time of a step for it."""
        self._step, self._what, self._limit, self._spent = step, what, times * self.timeout, 0.0
        if self.link is not None:
            self.link.doing(step, what)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        if self.link is not None:
            self._before = _set_abort(_handler(self._aborted))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, Exception) and not isinstance(error, UserError | RunError) and self.link is not None:
            # most probably a collective that broke off; who is to blame is known in a moment, or after a silence
            wait = 0.0 if "RESOURCE_EXHAUSTED" in str(error) else self.link.silence + 2
            if self.link.wait_for_gone(wait):
                self._end(*self._gone())
        self._done.set()
        if self.link is not None:
            _set_abort(self._before)
            self._thread.join(2 * _TICK)  # which sets the alarm on
        signal.alarm(0)

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._done.wait(_TICK):
            now = time.monotonic()
            if self.link is not None:  # a run of one process may be stopped by Ctrl-Z for as long as one likes
                signal.alarm(min(int(self._limit), _LONGEST) + _SLACK)
            self._spent += min(now - last, 2 * _TICK)  # a process that was stopped, or a laptop's sleep, is no hang
            last = now
            gone = None if self.link is None or self.link.closing else self.link.gone
            if gone is not None and now - gone.since > _GRACE:
                self._end(*self._gone())
            if self._spent > self._limit:
                self._end(self._hang(), MACHINE_FAILED)

    def _axis(self, other: int | None) -> str:
        if self._mesh is None:
            return ""
        processes = np.vectorize(lambda device: device.process_index, otypes=[int])(self._mesh.devices)
        names = axes_between(processes, self._mesh.axis_names, self.process, other)
        return f", mesh axis {' or '.join(names)}" if names else ""

    def _gone(self) -> tuple[str, int]:
        assert self.link is not None
        assert self.link.gone is not None
        process, why, code, _ = self.link.gone
        me = self.link.name(self.process)
        return f"step {self._step}{self._axis(process)}: {self.link.name(process)} {why}, as {me} sees it", code

    def _hang(self) -> str:
        behind = self.link.behind if self.link is not None else ""
        me = f"process {self.process}" if self.link is None else self.link.name(self.process)
        return (
            f"step {self._step}{self._axis(None)}: {me} has been {self._what} {self._step} for {self._limit:.0f} s"
            f"{f' ({behind})' if behind else ''}; --hosts.timeout gives it more"
        )

    def _aborted(self) -> None:
        """abort() was called, by JAX for a peer that is gone or by something that is broken in this process."""
        signal.alarm(_LAST_WORDS)
        if self.link is not None and self.link.wait_for_gone(_GRACE):
            self._end(*self._gone())
        if self._ending.acquire(blocking=False):  # else another thread has said it all
            self._stacks()

    def _end(self, why: str, code: int) -> None:
        """Say it, and leave at once: a shutdown in order would wait for the others."""
        if not self._ending.acquire(blocking=False):
            time.sleep(60)  # another thread is at it
        signal.alarm(_LAST_WORDS)
        if self.link is not None:
            self.link.close(why, code)
        where = self._stacks() if code == MACHINE_FAILED else ""  # a peer's own error is not found in them
        sys.stderr.write(f"error: {why}{self._saved()}{where}\n")
        sys.stderr.flush()
        self._leave(code)

    def _saved(self) -> str:
        """What the folder holds, as words."""
        if (folder := self.folder) is None:
            return ""
        return f"; {_in_time(lambda: newest(folder)) or f'{folder} does not answer'}"

    def _stacks(self) -> str:
        """Write what all threads are at, to stderr and into the folder; where to, as words."""
        faulthandler.dump_traceback(sys.__stderr__ or sys.stderr)
        if self.folder is None:
            return ""
        path = self.folder / f"stacks-process-{self.process}.txt"

        def write() -> str:
            with contextlib.suppress(OSError), path.open("w") as file:
                faulthandler.dump_traceback(file)
                return f"; stacks: {path}"
            return ""

        return _in_time(write) or ""


def _in_time(look: Callable[[], str]) -> str | None:
    """What `look` finds in the storage, None where that does not answer."""
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(look()), daemon=True)
    thread.start()
    thread.join(_STORAGE)
    return found[0] if found else None


def newest(folder: Path) -> str:
    """Which checkpoint a run would go on from, as words; looks at names only, the writer may be what hangs."""
    try:
        return newest_of({int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdecimal()})
    except FileNotFoundError:
        return newest_of(set())
    except OSError as error:
        return f"the folder of checkpoints cannot be looked into ({error.strerror})"


_handlers: list[Any] = []  # what C calls must not be collected


def _handler(call: Callable[[], None]) -> int | None:
    """A signal handler that calls this; it comes from a C++ thread that waits for nothing of ours."""
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: call())
    _handlers.append(handler)
    return ctypes.cast(handler, ctypes.c_void_p).value


def _set_abort(handler: int | None) -> int | None:
    """Have abort() call `handler` first; which it called before. None: none."""
    set_handler = ctypes.CDLL(None).signal
    set_handler.restype, set_handler.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
    return set_handler(signal.SIGABRT, handler)
