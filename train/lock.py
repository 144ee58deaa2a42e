"""One run at a time in a folder: process 0 of a run has the lock of DIR/run.lock for as long as it lives.

It is the kernel's lock (flock): it goes with the process, however that ends, and no killed run is in the way of the
next. The file says who has it, and is empty after a run that could end in order.

    the other run is      what a second one does
    on this host          3 s: a process that was killed may take a moment to be gone
    on another host       90 s: NFS keeps the lock of a host that lost its power for that long (a lease of NFS 4)
    unknown               a file system without locks: that is said, and nothing keeps a second run out

A host is a boot of a kernel, not a name: a pod that starts again on another node keeps its name.

NFS, and Lustre mounted with `flock`, have locks between hosts; a local file system has them for its host.
"""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime
from enum import IntEnum
from pathlib import Path
from typing import TextIO

from zigzag_jax.train.errors import UserError
from zigzag_jax.train.hosts.together import Together

FILE = "run.lock"
_BOOT = Path("/proc/sys/kernel/random/boot_id")  # Linux has it
_SHORT = 2  # pauses for a process of this host to be gone
_HELD = (errno.EAGAIN, errno.EACCES)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


class Held(IntEnum):
    """Who has the folder; of what several processes see the highest counts."""

    NOT = 0
    HERE = 1
    ELSEWHERE = 2


@contextmanager
def sole_run(folder: Path, together: Together, say: Callable[[str], None]) -> Iterator[None]:
    """Inside, this run is the only one in `folder`, which is there; all its processes enter together.

    `say` gets a line where it waits, or has to go without a lock. UserError, in all processes, where another run stays;
    OSError in process 0 where the file cannot be written.
    """
    with (folder / FILE).open("a+") if together.process == 0 else nullcontext() as file:
        held = Held.NOT
        for tries, pause in enumerate((0.0, *together.pauses)):
            time.sleep(pause)
            together.moving()
            held = Held(together.highest(Held.NOT if file is None else _take(file, say)))
            if held is Held.NOT or (held is Held.HERE and tries >= _SHORT):
                break
            if tries == 0 and file is not None:
                say(f"{folder} is in use by {_holder(file)[1]}; waiting for it to end")
        if held is not Held.NOT:
            who = "process 0 says by which" if file is None else f"it is in use by {_holder(file)[1]}"
            gone = f"; where that host is gone for good, delete {FILE}" if held is Held.ELSEWHERE else ""
            raise UserError("out", f"must be the folder of one run at a time ({who}{gone})", folder)
        try:
            yield
        finally:
            if file is not None:
                with suppress(OSError):  # storage that went away; the lock goes with the file's closing
                    file.truncate(0)


def _take(file: TextIO, say: Callable[[str], None]) -> Held:
    """Take the lock and leave a note, or tell who has it."""
    if not locked(file, say):
        return Held.HERE if _holder(file)[0] == _kernel() else Held.ELSEWHERE
    since = datetime.now().astimezone().isoformat(" ", timespec="seconds")
    note = {"host": socket.gethostname(), "pid": os.getpid(), "since": since, "kernel": _kernel()}
    file.truncate(0)
    file.write(json.dumps(note) + "\n")
    file.flush()
    os.fsync(file.fileno())
    return Held.NOT


def locked(file: TextIO, say: Callable[[str], None], how: int = fcntl.LOCK_EX) -> bool:
    """Take the lock of `file`, which goes with its closing; False where another process has it.

    `say` gets a line where the file system has no locks. OSError for whatever else is in the way.
    """
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        if error.errno not in _NO_LOCKS:
            raise
        say(f"{file.name} cannot be locked ({error.strerror}): nothing keeps a second run out of this folder")
    return True


def user_of(folder: Path) -> str | None:
    """The run that has `folder` now, as words; None where none has it, or nobody can tell. OSError as `locked`."""
    try:
        with (folder / FILE).open() as file:
            return None if locked(file, lambda text: None, fcntl.LOCK_SH) else _holder(file)[1]
    except FileNotFoundError:
        return None


def _holder(file: TextIO) -> tuple[str | None, str]:
    """(kernel of the run that has the lock, who that is as words) by its note; it may be about to write it."""
    file.seek(0)
    try:
        note = json.loads(file.read())
        return note["kernel"], f"process {note['pid']} of {note['host']} since {note['since']}"
    except (ValueError, KeyError, TypeError):
        return None, "another run"


def _kernel() -> str:
    """What another process on the same kernel says too, and nobody else."""
    with suppress(OSError):
        return _BOOT.read_text().strip()
    return socket.gethostname()
