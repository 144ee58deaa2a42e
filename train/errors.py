"""How a run ends: its exit codes, and the errors that end it with one line instead of a traceback."""

# exit codes: finished, training cannot go on, a user's mistake, a peer is gone or a step hangs, interrupted and saved,
# Ctrl-C twice
DONE, FAILED, USER_ERROR, PEER_GONE, PREEMPTED, INTERRUPTED = 0, 1, 2, 70, 75, 130


class UserError(ValueError):
    """A user's mistake; the command line prints `error: FIELD: RULE, got VALUE` and exits with 2."""

    def __init__(self, field: str, rule: str, value: object) -> None:
        super().__init__(f"{field}: {rule}, got {value}")
        self.field, self.rule, self.value = field, rule, value

    def __reduce__(self) -> tuple[type["UserError"], tuple[str, str, object]]:
        return UserError, (self.field, self.rule, self.value)  # so that a process can send it to another


class RunError(RuntimeError):
    """Training cannot go on; the command line prints `error: MESSAGE` and exits with 1."""


class PeerError(RunError):
    """A process of the run is not there; the command line prints `error: MESSAGE` and exits with 70."""
