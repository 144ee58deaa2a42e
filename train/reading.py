"""Which checkpoint a run goes on from: the newest that all its processes can read.

What fails may be the machine's fault and not the checkpoint's, and then no checkpoint is given up for it:

    fault                                       what is done
    CONTENT  truncated, other bits than saved   read again; then it counts as damaged, and the one before it is tried
    UNSEEN   other processes see it             look again (another host's cache of the file system), then UserError
    MACHINE  anything else, EIO, ESTALE, ..     read again, then MachineError: the same command again goes on

All tries of all processes are in step (train/hosts/together.py), the last after 90 s. A checkpoint is damaged only if
all processes see the same files of the same sizes in it: else one of them reads through a cache that is behind.
"""

import errno
import os
import re
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from pathlib import Path

import jax

from zigzag_jax.train.errors import FAILED, MachineError, UserError, exit_code
from zigzag_jax.train.hosts.together import Together

_NO_STEP = -1
_OF_CONTENT = ("DATA_LOSS", "NOT_FOUND", "OUT_OF_RANGE", "INVALID_ARGUMENT", "FAILED_PRECONDITION")  # in tensorstore
_SYSTEM = r"\[os_error_code='(\d+)'"
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)  # other errors of the system are no content's
# what parsing a damaged file raises; RuntimeError and MemoryError come from devices and hosts
_PARSING = (ValueError, LookupError, TypeError, AttributeError, AssertionError, EOFError)


class Fault(IntEnum):
    """Whose fault it is that a checkpoint was not read; of several the highest counts."""

    NONE = 0
    CONTENT = 1
    UNSEEN = 2
    MACHINE = 3


class UnseenError(Exception):
    """One process does not see what another one sees."""


@dataclass(frozen=True)
class Found[T]:
    """The newest checkpoint that could be read."""

    step: int
    """Its number of finished steps."""
    state: T
    """What it holds."""
    damaged: dict[int, str]
    """Newer ones, and why they could not be read."""


def fault_of(error: Exception) -> Fault:
    """Whose fault an error in reading a checkpoint is: the machine's, unless it is plainly another's."""
    error = _told(error)
    if isinstance(error, UnseenError):
        return Fault.UNSEEN
    if isinstance(error, OSError):
        missing = isinstance(
            error, FileNotFoundError | NotADirectoryError | IsADirectoryError
        )  # orbax' own has no errno
        return Fault.CONTENT if missing else Fault.MACHINE
    if not isinstance(error, _PARSING):
        return Fault.MACHINE
    text = str(error)  # tensorstore raises a ValueError for everything, `STATUS: .. [os_error_code='5']`
    status, system = re.match(r"([A-Z_]{5,}): ", text), re.search(_SYSTEM, text)
    if system is not None:
        return Fault.CONTENT if int(system[1]) in _MISSING else Fault.MACHINE
    return Fault.CONTENT if status is None or status[1] in _OF_CONTENT else Fault.MACHINE


def reason(error: Exception) -> str:
    """An error in reading or writing files, as a few words."""
    error = _told(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if found := re.search(_SYSTEM, str(error)):
        return os.strerror(int(found[1]))
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _told(error: Exception) -> Exception:
    """What tensorstore told, where orbax raises an Exception of no kind in its place."""
    return error.__cause__ if type(error) is Exception and isinstance(error.__cause__, Exception) else error


def steps_in(folder: Path) -> set[int]:
    """Steps of the checkpoints there that are whole, by their names. OSError where the folder cannot be read."""
    if not folder.exists():
        return set()
    return {int(path.name) for path in folder.iterdir() if path.name.isdecimal() and path.is_dir()}


def newest_of(steps: set[int]) -> str:
    """Which of the checkpoints that are whole a run would go on from, as words."""
    return f"the newest checkpoint is of step {max(steps)}" if steps else "there is no checkpoint yet"


def attempt[T](
    act: Callable[[], T], together: Together, tell: Callable[[str], None], what: str, place: Path | None = None
) -> tuple[T | None, Fault, str]:
    """(what `act` gives, Fault.NONE, "") once it gives something in all processes, else (None, fault, why).

    CONTENT is told on after the second try, where all processes see the same files in `place`; else after the last,
    as UNSEEN. `tell` gets a line about `what` after the first.
    """
    value, fault, worst, why = None, Fault.MACHINE, Fault.MACHINE, ""
    for number, pause in enumerate((0.0, *together.pauses)):
        time.sleep(pause)
        together.moving()
        if fault is not Fault.NONE:
            value, fault, why = _once(act)
        worst = Fault(together.highest(fault))
        if worst is Fault.NONE:
            return value, worst, ""
        who = together.first(fault is worst)
        if fault is not worst:
            why = f"process {who} {'does not see it' if worst is Fault.UNSEEN else 'cannot read it'}"
        if worst is Fault.CONTENT and place is not None and number > 0 and _same_files(place, together):
            return None, worst, why
        if number == 0:
            tell(f"{what}: {why}; tried again for {together.patience}")
    if worst is Fault.CONTENT and place is not None:
        return None, Fault.UNSEEN, "not all see the same files in it"
    return None, worst, why


def read_newest[T](
    folder: Path, read: Callable[[int], T], together: Together, tell: Callable[[str], None],
    wrong: Callable[[T], str] = lambda state: "",
) -> Found[T] | None:  # fmt: skip
    """The newest checkpoint of `folder` that all processes can `read`, by its step; None where there is none.

    What one process has read is kept until the others have. Then all call `wrong`, which may compute together, and
    tells all alike why it is not what was saved; empty where it is. UserError where there are checkpoints and none can
    be read, or where not all processes see one; MachineError where it is the machine that cannot read.
    """
    damaged: dict[int, str] = {}
    while True:
        seen, _, why = attempt(lambda: steps_in(folder), together, tell, "the folder of checkpoints")
        if seen is None:
            raise MachineError(f"{folder} cannot be looked into, tried for {together.patience} ({why})")
        step = together.highest(max(seen - damaged.keys(), default=_NO_STEP))
        if step == _NO_STEP:
            break
        name, place = f"checkpoints/{step}", folder / str(step)
        act = partial(attempt, partial(_read, place, read, together.process), together, tell, name, place)
        state, fault, why = _right(act, wrong)
        if fault is Fault.UNSEEN:
            rule = f"must be seen by all processes, on storage that they share ({why} after {together.patience})"
            raise UserError("out", rule, place)
        if fault is Fault.MACHINE:
            raise MachineError(f"{name} cannot be read, tried for {together.patience} ({why}); nothing is changed")
        if fault is Fault.NONE:
            assert state is not None
            return Found(step, state, damaged)
        damaged[step] = why
    if damaged:
        newest = max(damaged)
        raise UserError("out", f"must hold a checkpoint that can be read ({damaged[newest]})", folder / str(newest))
    return None


def _right[T](act: Callable[[], tuple[T | None, Fault, str]], wrong: Callable[[T], str]) -> tuple[T | None, Fault, str]:
    """As `act`, done once more where what it gives is `wrong`, then CONTENT."""
    why = ""
    for _ in range(2):
        state, fault, cause = act()
        if state is None:
            return state, fault, cause
        if not (why := wrong(state)):
            return state, fault, ""
        del state  # there may be no room for two
    return None, Fault.CONTENT, why


def _once[T](act: Callable[[], T]) -> tuple[T | None, Fault, str]:
    try:
        return act(), Fault.NONE, ""
    except jax.errors.JaxRuntimeError as error:
        if exit_code(error) == FAILED:  # no memory on the card: it fails the same way again
            raise
        return None, Fault.MACHINE, reason(error)
    except Exception as error:  # whatever a damaged file raises; only its words are kept, it holds what was read
        return None, fault_of(error), reason(error)


def _read[T](place: Path, read: Callable[[int], T], process: int) -> T:
    if not place.is_dir():
        raise UnseenError(f"process {process} does not see it")
    return read(int(place.name))


def _same_files(place: Path, together: Together) -> bool:
    try:
        files = sorted((str(path.relative_to(place)), path.stat().st_size) for path in place.rglob("*"))
    except OSError:
        files = None
    return together.first(files is None) is None and together.same(zlib.crc32(repr(files).encode()) >> 1)
