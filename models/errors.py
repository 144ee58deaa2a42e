"""What ends a command, as every command line here tells it: a user's mistake, or storage that is away."""

import errno
import sys

DONE, FAILED, USER_ERROR, MACHINE_FAILED = 0, 1, 2, 70

# of a disk, a server or the way to it that may come back; not all systems have all of them
_AWAY = frozenset(
    getattr(errno, name, 0)
    for name in (
        "EIO", "ESTALE", "ETIMEDOUT", "EREMOTEIO", "ENOTCONN", "ESHUTDOWN", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN",
        "ENETUNREACH", "ENETRESET", "ECONNRESET", "ECONNABORTED", "ECONNREFUSED",
    )
) - {0}  # fmt: skip


class UserError(ValueError):
    """A user's mistake; the command line prints `error: FIELD: RULE, got VALUE` and exits with 2."""

    def __init__(self, field: str, rule: str, value: object) -> None:
        super().__init__(f"{field}: {rule}, got {value}")
        self.field, self.rule, self.value = field, rule, value

    def __reduce__(self) -> tuple[type["UserError"], tuple[str, str, object]]:
        return UserError, (self.field, self.rule, self.value)  # so that a process can send it to another


def may_come_back(error: BaseException) -> bool:
    """Whether an error of the system is one of storage that is away and may be there again later."""
    named = TimeoutError | ConnectionResetError | ConnectionAbortedError | ConnectionRefusedError  # with no number, too
    return isinstance(error, named) or (isinstance(error, OSError) and error.errno in _AWAY)


def fail(error: Exception) -> int:
    """Say on stderr what ends a command; its exit code."""
    sys.stderr.write(f"error: {error}\n")
    return MACHINE_FAILED if may_come_back(error) else USER_ERROR
