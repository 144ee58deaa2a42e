"""How a run ends: its exit codes, and the errors that end it with one line instead of a traceback.

Of several processes all end with the code of the first that failed (train/hosts/link.py).
"""

import os
import sys

import jax

from zigzag_jax.models.errors import DONE, FAILED, MACHINE_FAILED, USER_ERROR, UserError, may_come_back

# beside DONE, FAILED (training cannot go on), USER_ERROR and MACHINE_FAILED: interrupted and saved, Ctrl-C twice
PREEMPTED, INTERRUPTED = 75, 130
_OF_DEVICES = ("INTERNAL", "UNAVAILABLE", "ABORTED", "UNKNOWN", "DATA_LOSS", "CANCELLED", "DEADLINE_EXCEEDED")


class RunError(RuntimeError):
    """Training cannot go on; the command line prints `error: MESSAGE` and exits with 1."""


class MachineError(RunError):
    """Storage, a network or another process failed: the same command again may go on. The command line prints
    `error: MESSAGE` and exits with 70.
    """


class PeerError(MachineError):
    """A process of the run is not there."""


class SaveError(Exception):
    """A checkpoint that could not be written; its text is the reason. The state and older checkpoints are whole."""

    @property
    def of_storage(self) -> bool:
        """Whether the system refused to write; else something broke off, such as another process."""
        return isinstance(self.__cause__, OSError) or "[os_error_code" in str(self.__cause__)


def refusal(error: Exception, field: str, rule: str, value: object) -> RunError | UserError:
    """What to raise where `error` is in the way of using `value`: MachineError for storage that may come back, else
    UserError(field, rule, value).
    """
    if may_come_back(error):
        return MachineError(f"{value}: storage does not answer ({getattr(error, 'strerror', None) or error})")
    return UserError(field, rule, value)


def exit_code(error: BaseException) -> int:
    """The code that a process ends with by an error."""
    if isinstance(error, UserError):
        return USER_ERROR
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    machine = isinstance(error, MachineError | SaveError) or may_come_back(error)
    if isinstance(error, jax.errors.JaxRuntimeError):  # a card that fell off its bus, a NCCL call that failed
        machine = str(error).startswith(_OF_DEVICES)
    return MACHINE_FAILED if machine else FAILED


def leave(text: str, code: int) -> int:
    """Say what ends a command; its exit code. One of several processes ends here and now: at its exit JAX would wait
    for the others, which wait for this one.
    """
    sys.stderr.write(text + "\n")
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


__all__ = [
    "DONE", "FAILED", "INTERRUPTED", "MACHINE_FAILED", "PREEMPTED", "USER_ERROR", "MachineError", "PeerError",
    "RunError", "SaveError", "UserError", "exit_code", "leave", "may_come_back", "refusal",
]  # fmt: skip
