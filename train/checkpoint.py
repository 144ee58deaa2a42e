"""Checkpoints: DIR/checkpoints/STEP, written in the background, read into any mesh.

Each holds the state, a small JSON with what the run was (`identity`), one that a person may want to read (`origin`),
and the model's config.json, so that it can be exported alone (models/hf/run_folder.py reads it). A folder appears under
its final name only when it is whole, so a kill leaves the one before. One that cannot be read is named, renamed
STEP.corrupt, and the one before it used; if none can be read, that is an error and all stay as they are: the cause may
be the machine. Of several processes all take the newest that every one of them can read: each tries, then they vote.
One that cannot be written takes back what it wrote and raises SaveError; train/saving.py tells what a run does then.
"""

import json
import logging
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from zigzag_jax.models.hf.run_folder import CONFIG, STATE
from zigzag_jax.train.errors import RunError, UserError

_PATIENCE = 2.0  # seconds that a save is waited for before it goes on in the background
_NOBODY = 2**31 - 1  # a vote that is above every process number
_NO_STEP = -1  # a vote that is below every step


class SaveError(Exception):
    """A checkpoint that could not be written; its text is the reason. The state and older checkpoints are whole."""

    @property
    def of_storage(self) -> bool:
        """Whether the system refused to write; else something broke off, such as another process."""
        return isinstance(self.__cause__, OSError) or "[os_error_code" in str(self.__cause__)


def lowest(value: int) -> int:
    """The lowest of what all processes give, in all of them; each must call this as often as the others."""
    return value if jax.process_count() == 1 else int(multihost_utils.process_allgather(np.int32(value)).min())


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(
        self, folder: Path, keep: int, say: Callable[[str], None], *, process: int | None = None,
        vote: Callable[[int], int] = lowest,
    ) -> None:  # fmt: skip
        """`keep` of them stay. `process` is this one's number, by default JAX's, and `vote` as `lowest`."""
        self.folder, self.keep, self.say = folder.absolute(), keep, say
        self._process, self._vote = jax.process_index() if process is None else process, vote
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        if self._process == 0:  # what a killed save left; nobody is saving yet
            self._remove_parts()
        logging.getLogger("absl").addFilter(_not_said_twice)
        options = ocp.CheckpointManagerOptions(max_to_keep=self.keep, create=True, enable_async_checkpointing=True)
        return ocp.CheckpointManager(self.folder, options=options)

    def latest(self) -> int | None:
        """Newest step that is whole or being written, or None."""
        return self._manager.latest_step()

    def newest_said(self) -> str:
        """Which checkpoint a run would go on from, as words."""
        try:
            whole = max((int(path.name) for path in self.folder.iterdir() if path.name.isdecimal()), default=None)
        except OSError as error:
            return f"the folder of checkpoints cannot be looked into ({error.strerror})"
        text = "there is no checkpoint yet" if whole is None else f"the newest checkpoint, of step {whole}, is whole"
        if self._manager.is_saving_in_progress() and self.latest() != whole:
            text += f", that of step {self.latest()} is still being written"
        return text

    def identity(self) -> dict[str, Any] | None:
        """What the run that wrote the newest readable identity was, or None where there is no checkpoint."""
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                return json.loads((self.folder / str(step) / "identity" / "metadata").read_text())
            except (OSError, ValueError):
                continue  # `restore` names it
        return None

    def save(
        self, step: int, state: Any, identity: dict[str, Any], config: dict[str, Any], origin: dict[str, Any]
    ) -> None:
        """Begin to save the state after `step` finished steps, what the run was, the model's config.json, and where it
        comes from (train/origin.py).

        A small state is on disk when this returns; the files of a large one are written while training goes on.
        Raises SaveError, for an earlier step's files too.
        """
        if step == self.latest():
            return
        about = {"identity": identity, CONFIG: config, "origin": origin}
        items = {name: ocp.args.JsonSave(values) for name, values in about.items()}
        args = ocp.args.Composite(**{STATE: ocp.args.StandardSave(state)}, **items)
        with self._saving():
            if not self._manager.save(step, args=args):
                raise RunError(f"step {step}: the checkpoint was refused, the newest is {self.latest()}")
            begin = time.monotonic()
            while self._manager.is_saving_in_progress() and time.monotonic() - begin < _PATIENCE:
                time.sleep(0.005)
        self.check()

    def check(self) -> None:
        """SaveError where files that were being written in the background could not be."""
        if not self._manager.is_saving_in_progress():
            self.wait()  # which raises what the background met; orbax' check_for_errors raises nothing by then

    def wait(self) -> None:
        """Return when all that was begun is on disk, or raise SaveError."""
        with self._saving():
            self._manager.wait_until_finished()

    @contextmanager
    def _saving(self) -> Iterator[None]:
        try:
            yield
        except RunError:
            raise
        except Exception as error:  # OSError, or whatever the libraries below make of it
            if jax.process_count() == 1:  # else another process may still be writing there
                self._remove_parts()
                self._manager.reload()  # it had already struck the oldest off its list, and would never delete it
            raise SaveError(_reason(error)) from error

    def _remove_parts(self) -> None:
        for path in self.folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)

    def restore(self, abstract: Any) -> tuple[int, Any] | None:
        """(step, state) of the newest checkpoint that all processes can read, or None; `abstract` are shapes with
        shardings.

        UserError where there are checkpoints and none can be read, or not all processes see any.
        """
        steps = sorted(self._manager.all_steps())
        failed: dict[int, str] = {}
        left = list(steps)
        while (step := self._vote(left[-1] if left else _NO_STEP)) != _NO_STEP:
            left = [x for x in left if x < step]
            state = None
            try:
                state = self._read(step, abstract)
            except Exception as error:  # whatever a damaged file raises
                failed[step] = _reason(error)
                if self._process != 0:  # only process 0 says lines, and it does not know why
                    sys.stderr.write(f"process {self._process}: checkpoints/{step} cannot be read ({failed[step]})\n")
            if (who := self._vote(_NOBODY if step not in failed else self._process)) == _NOBODY:
                newer = [x for x in steps if x > step]  # one that another process does not see would be in the way too
                self._set_aside({x: failed.get(x, "not all processes see it") for x in newer})
                return step, state
            failed.setdefault(step, f"process {who} cannot read it")
        if steps:
            newest = steps[-1]
            rule = f"must hold a checkpoint that can be read ({failed.get(newest, 'a process sees none')})"
            raise UserError("out", rule, self.folder / str(newest))
        return None

    def _read(self, step: int, abstract: Any) -> Any:
        # not by the manager, which waits for the other processes after a read, also for one whose read has failed
        args = ocp.args.StandardRestore(abstract)
        return ocp.StandardCheckpointHandler().restore(self.folder / str(step) / STATE, args=args)

    def _set_aside(self, failed: dict[int, str]) -> None:
        """Name and rename checkpoints that cannot be read, now that an older one could."""
        if self._vote(-len(failed)) == 0:
            return
        self._manager.close()
        if self._process == 0:
            for step, reason in failed.items():
                path = self.folder / str(step)
                names = (Path(f"{path}.corrupt{'' if n == 1 else n}") for n in range(1, 1000))
                free = next(name for name in names if not name.exists())
                path.rename(free)
                self.say(f"checkpoints/{step} cannot be read and is now {free}; an older one is used ({reason})")
        self._vote(0)  # the others open the folder when that is done
        self._manager = self._open()

    def close(self) -> None:
        """Finish writing and stop; says so where what was being written could not be."""
        try:
            self.wait()
        except SaveError as error:
            self.say(f"the checkpoint that was being written could not be ({error}); {self.newest_said()}")
        self._manager.close()


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if found := re.search(r"([^:]+) \[os_error_code", str(error)):  # as tensorstore ends what the system told it
        return found[1].strip()
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _not_said_twice(record: logging.LogRecord) -> bool:
    """Orbax writes a traceback of every error that it also raises."""
    return record.levelno != logging.ERROR or "orbax" not in record.pathname


def check_identity(old: dict[str, Any], new: dict[str, Any]) -> None:
    """UserError for the first field in which a resumed run would be another run."""
    for name, value in new.items():
        if name in old and old[name] != value:
            raise UserError(name, f"must stay what the run was begun with, {old[name]} (or give another --out)", value)
