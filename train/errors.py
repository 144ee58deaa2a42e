"""How a run ends: its exit codes, and the errors that end it with one line instead of a traceback."""

from zigzag_jax.models.errors import UserError

# exit codes: finished, training cannot go on, a user's mistake, a peer is gone or a step hangs, interrupted and saved,
# Ctrl-C twice
DONE, FAILED, USER_ERROR, PEER_GONE, PREEMPTED, INTERRUPTED = 0, 1, 2, 70, 75, 130


class RunError(RuntimeError):
    """Training cannot go on; the command line prints `error: MESSAGE` and exits with 1."""


class PeerError(RunError):
    """A process of the run is not there; the command line prints `error: MESSAGE` and exits with 70."""


__all__ = [
    "DONE", "FAILED", "INTERRUPTED", "PEER_GONE", "PREEMPTED", "USER_ERROR", "PeerError", "RunError", "UserError",
]  # fmt: skip
