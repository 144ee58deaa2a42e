"""Weights & Biases is told what the file is told; a mistake at the start is one line, and a failure ends no run."""

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from zigzag_jax.train.errors import UserError
from zigzag_jax.train.logs import metrics, wandb_run
from zigzag_jax.train.logs.metrics import MetricsLog
from zigzag_jax.train.logs.wandb_run import WandbRun, check_wandb, start_wandb


class CommError(Exception):
    """As wandb.errors has it."""


class AuthenticationError(CommError):
    """As wandb.errors has it."""


class UsageError(Exception):
    """As wandb.errors has it."""


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    """Put a module wandb in the place of the package; it gets wandb.init."""
    fake, errors = ModuleType("wandb"), ModuleType("wandb.errors")
    errors.AuthenticationError, errors.UsageError = AuthenticationError, UsageError  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setitem(sys.modules, "wandb.errors", errors)
    return lambda init: setattr(fake, "init", init)


def raising(error: Exception) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def test_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # type: ignore[arg-type]
    check_wandb(None)
    with pytest.raises(UserError, match=r"^wandb: needs the package wandb \(pip install wandb\), got mine"):
        check_wandb("mine")


def test_it_is_told_what_the_file_is_told(tmp_path: Path, install):
    begun, told, ended = [], [], []
    run = SimpleNamespace(log=lambda values, step: told.append((step, values)), finish=lambda: ended.append(True))
    install(lambda **how: begun.append(how) or run)
    check_wandb("mine")
    for step in (1, 2):  # the second start goes on where the first was
        log = MetricsLog(tmp_path, wandb=start_wandb("mine", tmp_path, {"seed": 0}, pytest.fail))
        log.step(step, loss=0.5)
        log.close()
    assert told == [(1, {"loss": 0.5}), (2, {"loss": 0.5})]
    assert metrics.read(tmp_path / metrics.FILE, "loss") == {1: 0.5, 2: 0.5}
    assert len(ended) == 2
    assert begun[0] == begun[1]
    assert (begun[0]["project"], begun[0]["resume"]) == ("mine", "allow")
    assert start_wandb(None, tmp_path, {}, print) is start_wandb("mine", None, {}, print) is None


@pytest.mark.parametrize("error", [AuthenticationError("no such key"), UsageError("No API key configured")])
def test_a_missing_login_is_a_mistake(tmp_path: Path, install, error: Exception):
    install(raising(error))
    with pytest.raises(UserError, match=r"^wandb: needs a login that may write this project \(.*key.*\), got mine$"):
        start_wandb("mine", tmp_path, {}, pytest.fail)


@pytest.mark.parametrize("error", [CommError("timed out"), ConnectionError("refused"), ValueError("?")])
def test_a_service_that_is_away_keeps_no_run_from_being_resumed(tmp_path: Path, install, error: Exception):
    install(raising(error))
    said: list[str] = []
    assert start_wandb("mine", tmp_path, {}, said.append) is None
    assert said == [f"W&B cannot be started ({type(error).__name__}: {error}); training goes on without it"]


def test_a_failure_in_the_middle_is_said_once_and_costs_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clock, told, said = [0.0], [], []
    monkeypatch.setattr(wandb_run.time, "monotonic", lambda: clock[0])
    up = lambda values, step: told.append(step)
    run = SimpleNamespace(log=up, finish=raising(OSError("gone")))
    log = MetricsLog(tmp_path, wandb=WandbRun(run, said.append, retry=60.0))
    for step in range(1, 11):
        clock[0] = 25.0 * step
        run.log = raising(CommError("over\nquota")) if 3 <= step < 7 else up
        log.step(step, loss=1.0 * step)
    log.close()
    assert told == [1, 2, 9, 10]  # failed at 75 s, tried again at 150 s and at 225 s
    assert said == [
        "step 3: W&B takes no numbers (CommError: over quota); training goes on without it",
        "step 9: W&B takes numbers again",
        "W&B may lack the last numbers (OSError: gone)",
    ]
    assert len(metrics.read(tmp_path / metrics.FILE, "loss")) == 10


def test_an_end_that_hangs_is_left():
    end, said = threading.Event(), []
    WandbRun(SimpleNamespace(finish=end.wait), said.append, patience=0.1).finish()
    assert said == ["W&B may lack the last numbers (it has not finished in 0.1 s)"]
    end.set()
