"""The code that a process ends with, and what the command line says."""

import errno

import jax
import pytest

from zigzag_jax.train import __main__ as command
from zigzag_jax.train.errors import MachineError, PeerError, RunError, SaveError, UserError, exit_code, refusal

MISTAKE = UserError("steps", "must be >= 1", 0)
NO_ROOM, STALE = OSError(errno.ENOSPC, "No space left", "runs/x"), OSError(errno.ESTALE, "Stale file handle", "runs/x")
CARD = jax.errors.JaxRuntimeError("INTERNAL: CUDA error: an uncorrectable ECC error")
FULL = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MISTAKE, 2), (RunError("nan"), 1), (MachineError("disk"), 70), (PeerError("gone"), 70), (SaveError("x"), 70),
        (TimeoutError("timed out"), 70), (OSError(errno.ENOTCONN, "Transport endpoint is not connected"), 70),
        (ConnectionResetError("reset"), 70), (BrokenPipeError(errno.EPIPE, "x"), 1),
        (KeyboardInterrupt(), 130), (NO_ROOM, 1), (STALE, 70), (CARD, 70), (FULL, 1), (KeyError("x"), 1),
    ],
    ids=repr,
)  # fmt: skip
def test_exit_codes(error: BaseException, code: int):
    assert exit_code(error) == code


def test_what_is_in_the_way_is_a_mistake_unless_storage_may_come_back():
    mistake = refusal(NO_ROOM, "out", "must have room", "runs/x")
    assert isinstance(mistake, UserError)
    assert str(mistake) == str(UserError("out", "must have room", "runs/x"))
    away = refusal(STALE, "out", "must have room", "runs/x")
    assert isinstance(away, MachineError)
    assert str(away) == "runs/x: storage does not answer (Stale file handle)"


@pytest.mark.parametrize(
    ("error", "code", "last"),
    [
        (MachineError("checkpoints/8 cannot be read"), 70, "error: checkpoints/8 cannot be read"),
        (NO_ROOM, 1, "error: No space left: runs/x"),
        (STALE, 70, "error: Stale file handle: runs/x"),
        (CARD, 70, "jax.errors.JaxRuntimeError: INTERNAL: CUDA error: an uncorrectable ECC error"),
    ],
    ids=repr,
)
def test_the_last_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, last: str
):
    def run(config: object) -> int:
        raise error

    monkeypatch.setattr(command, "run", run)
    assert command.main(["--out", "runs/x"]) == code
    assert capsys.readouterr().err.strip().splitlines()[-1] == last


@pytest.mark.parametrize("error", [FULL, KeyError("x"), PermissionError(errno.EACCES, "Permission denied")], ids=repr)
def test_what_nobody_foresaw_is_a_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception):
    def run(config: object) -> int:
        raise error

    monkeypatch.setattr(command, "run", run)
    with pytest.raises(type(error)):
        command.main([])


@pytest.mark.parametrize("error", [KeyError("x"), MISTAKE], ids=repr)
def test_one_of_several_processes_waits_for_no_other_at_its_end(monkeypatch: pytest.MonkeyPatch, error: Exception):
    def run(config: object) -> int:
        raise error

    left = []
    monkeypatch.setattr(command, "run", run)
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("os._exit", left.append)
    command.main([])
    assert left == [exit_code(error)]
