"""Weights & Biases, where --wandb PROJECT asks for it; the package is imported only then.

A missing package or login is a mistake of the start and ends it. All that goes wrong elsewhere (a network, a quota, a
service that died) ends no run: it is said, metrics.jsonl has the numbers anyway, and W&B gets later ones when it can.
"""

import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from zigzag_jax.train.errors import UserError

_ID = "wandb-id"  # beside metrics.jsonl: a resumed run goes on in the same place


class WandbRun:
    """A run of W&B that may fail at any time."""

    def __init__(self, run: Any, say: Callable[[str], None], *, retry: float = 60.0, patience: float = 20.0) -> None:
        """`run` as wandb.init gives it; `retry` seconds after a failure it is tried again, and `patience` seconds are
        waited for it at the end: a scheduler that stops a run often gives it no more than 30.
        """
        self._run, self._say, self._retry, self._patience = run, say, retry, patience
        self._failed: float | None = None  # when it last did

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Tell it the numbers of a step; none while it fails."""
        if self._failed is not None and time.monotonic() - self._failed < self._retry:
            return
        try:
            self._run.log(dict(values), step=step)
        except Exception as error:  # whatever its libraries raise
            if self._failed is None:
                self._say(f"step {step}: W&B takes no numbers ({_words(error)}); training goes on without it")
            self._failed = time.monotonic()
            return
        if self._failed is not None:
            self._failed = None
            self._say(f"step {step}: W&B takes numbers again")

    def finish(self) -> None:
        """Have it send what it still has, but do not wait for ever."""
        failed: list[str] = []

        def finish() -> None:
            try:
                self._run.finish()
            except Exception as error:
                failed.append(_words(error))

        thread = threading.Thread(target=finish, name="wandb", daemon=True)
        thread.start()
        thread.join(self._patience)
        if thread.is_alive():
            failed.append(f"it has not finished in {self._patience:g} s")
        if failed:
            self._say(f"W&B may lack the last numbers ({failed[0]})")


def check_wandb(project: str | None) -> None:
    """UserError where a project is given and the package is not installed."""
    if project is None:
        return
    try:
        import wandb  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("wandb", "needs the package wandb (pip install wandb)", project) from None


def start_wandb(
    project: str | None, folder: Path | None, config: dict[str, Any], say: Callable[[str], None]
) -> WandbRun | None:
    """The W&B run of a folder; None without a project or a folder (all processes but one), or, said, without W&B.

    `config` is what the run was told. UserError without a login, OSError where the folder cannot be written.
    """
    if project is None or folder is None:
        return None
    import wandb  # pyright: ignore[reportMissingImports]
    from wandb.errors import AuthenticationError, UsageError  # pyright: ignore[reportMissingImports]

    file = folder / _ID
    if not file.exists():
        file.write_text(uuid.uuid4().hex)
    where = {"project": project, "name": folder.name, "dir": str(folder), "id": file.read_text(), "resume": "allow"}
    try:
        return WandbRun(wandb.init(config=config, **where), say)
    except (AuthenticationError, UsageError) as error:
        rule = f"needs a login that may write this project ({_words(error)})"
        raise UserError("wandb", rule, project) from None
    except Exception as error:  # a network that is down must not keep a run from being resumed
        say(f"W&B cannot be started ({_words(error)}); training goes on without it")
        return None


def _words(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
