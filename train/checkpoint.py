"""Checkpoints: DIR/checkpoints/STEP, written in the background, read into any mesh.

Each holds the state and sums over its bits (train/sums.py), a small JSON with what the run was (train/identity.py), one
that a person may want to read (`origin`), and the model's config.json, so that it can be exported alone
(models/hf/run_folder.py reads it). A folder appears under its final name only when it is whole, so a kill leaves the
one before. One that is damaged is named, renamed STEP.corrupt, and the one before it used (train/reading.py); if none
can be read, that is an error and all stay as they are. One that cannot be written takes back what it wrote and raises
SaveError; train/saving.py tells what a run does then.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from zigzag_jax.models.hf.run_folder import CONFIG, STATE
from zigzag_jax.train.errors import MachineError, RunError, SaveError, UserError, may_come_back, refusal
from zigzag_jax.train.hosts.together import Together
from zigzag_jax.train.identity import IDENTITY
from zigzag_jax.train.quiet import say_errors_once
from zigzag_jax.train.reading import newest_of, read_newest, reason, steps_in
from zigzag_jax.train.sums import differing, sums

# Seconds that the files of one step may take. Orbax' own 20 minutes are too few for 366 GB (a model of 30 B parameters)
# on slow storage; one that hangs is the watchdog's, when the next save has to wait for this one.
_SLOWEST = 86400
_PATIENCE = 2.0  # seconds that a save is waited for before it goes on in the background


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(
        self, folder: Path, keep: int, say: Callable[[str], None], *, together: Together | None = None
    ) -> None:
        """`keep` of them stay. `together`: this process among the others, by default JAX's.

        OSError for a folder that cannot be made or read, MachineError where its storage may come back.
        """
        self.folder, self.keep, self.say = folder.absolute(), keep, say
        self._together = Together() if together is None else together
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        say_errors_once()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self.keep, create=True, enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(timeout_secs=_SLOWEST),
        )  # fmt: skip
        try:
            return ocp.CheckpointManager(self.folder, options=options)
        except OSError as error:
            if not may_come_back(error):
                raise
            raise MachineError(f"{self.folder} cannot be opened ({error.strerror})") from None

    def latest(self) -> int | None:
        """Newest step that is whole or being written, or None."""
        return self._manager.latest_step()

    def newest_said(self) -> str:
        """Which checkpoint a run would go on from, as words."""
        try:
            steps = steps_in(self.folder)
        except OSError as error:
            return f"the folder of checkpoints cannot be looked into ({error.strerror})"
        text = newest_of(steps)
        if self._manager.is_saving_in_progress() and self.latest() not in steps:
            text += f", that of step {self.latest()} is still being written"
        return text

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
        about = {IDENTITY: identity, CONFIG: config, "origin": {**origin, "sums": True}, "sums": sums(state)}
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
                self.remove_parts()
                self._manager.reload()  # it had already struck the oldest off its list, and would never delete it
            raise SaveError(reason(error)) from error

    def remove_parts(self) -> None:
        """Remove what killed saves left. Only where none of this run is saving, nor another that writes here."""
        for path in self.folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)

    def restore(self, abstract: Any) -> tuple[int, Any] | None:
        """(step, state) of the newest checkpoint that all processes can read, or None; `abstract` are shapes with
        shardings. Newer ones, which are damaged, are set aside.

        UserError where there are checkpoints and none can be read, or not all processes see one. MachineError where
        the machine cannot read one.
        """
        read = lambda step: (self._read(step, abstract), self._sums(step))
        found = read_newest(self.folder, read, self._together, self.tell, self._wrong)
        if found is None:
            return None
        if found.damaged:
            self._set_aside(found.damaged)
        elif self.latest() != found.step:  # it came late to this host
            self._manager.reload()
        state, saved = found.state
        if saved is None:
            self.tell(f"checkpoints/{found.step} was written before there were sums: its numbers are not compared")
        return found.step, state

    def _read(self, step: int, abstract: Any) -> Any:
        # not by the manager, which waits for the other processes after a read, also for one whose read has failed
        args = ocp.args.StandardRestore(abstract)
        return ocp.StandardCheckpointHandler().restore(self.folder / str(step) / STATE, args=args)

    def _sums(self, step: int) -> dict[str, int] | None:
        folder = self.folder / str(step) / "sums"
        if not folder.exists():
            about = folder.parent / "origin" / "metadata"
            if about.exists() and json.loads(about.read_text()).get(
                "sums"
            ):  # else it is of a time before there were any
                raise FileNotFoundError("the sums of its numbers are missing")
            return None
        if not isinstance(found := json.loads((folder / "metadata").read_text()), dict):
            raise ValueError("the sums of its numbers are no JSON object")
        return found

    def _wrong(self, read: tuple[Any, dict[str, int] | None]) -> str:
        """Which numbers of a checkpoint are not those that were saved, as words; empty where all are."""
        state, saved = read
        here = sums(state)  # by all processes
        names = "" if saved is None else differing(saved, here)
        if (who := self._together.first(bool(names))) is None:
            return ""
        return f"its numbers are not those that were saved: {names or f'process {who} says which'}"

    def _set_aside(self, damaged: dict[int, str]) -> None:
        """Name and rename damaged checkpoints, now that an older one could be read."""
        self._manager.close()
        if self._together.process == 0:
            for step, why in damaged.items():
                path = self.folder / str(step)
                names = (Path(f"{path}.corrupt{'' if n == 1 else n}") for n in range(1, 1000))
                free = next(name for name in names if not name.exists())
                try:
                    path.rename(free)
                except OSError as error:
                    rule = f"must let a damaged checkpoint be renamed ({error.strerror}; it is damaged: {why})"
                    raise refusal(error, "out", rule, path) from None
                self.say(f"checkpoints/{step} cannot be read and is now {free}; an older one is used ({why})")
        # the others open the folder when that is done; one that still saw it there would refuse to save that step
        if (who := self._together.until(lambda: not steps_in(self.folder) & damaged.keys())) is not None:
            rule = f"must be seen alike by all processes: process {who} still sees {max(damaged)}, which is renamed"
            raise UserError("out", rule, self.folder)
        self._manager = self._open()

    def tell(self, text: str) -> None:
        """A line of this process; only process 0 has a console."""
        if self._together.process == 0:
            self.say(text)
        else:
            sys.stderr.write(f"process {self._together.process}: {text}\n")

    def close(self) -> None:
        """Finish writing and stop; says so where what was being written could not be."""
        try:
            self.wait()
        except SaveError as error:
            self.say(f"the checkpoint that was being written could not be ({error}); {self.newest_said()}")
        self._manager.close()
