"""When a run saves, and what it does where that fails: a full disk, a folder that became read-only, storage gone away.

What was learnt since the newest checkpoint is then in memory only, so a run of one process goes on, says what is wrong,
and tries again after some time until somebody has made room. At its end, or asked to stop, it waits for that, but not
for ever. Of several processes one that cannot write would leave the others waiting for it in the middle of their own
save: it ends, and the wire (train/hosts/link.py) tells them why.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from zigzag_jax.train.checkpoint import Checkpoints
from zigzag_jax.train.errors import MachineError, SaveError


@dataclass
class Saver:
    """Saves the state of a run every so many steps."""

    checkpoints: Checkpoints
    """Where to."""
    every: int
    """Steps between two checkpoints."""
    about: tuple[dict[str, Any], dict[str, Any], dict[str, Any]]
    """What the run is, the model's config.json, and where it comes from."""
    say: Callable[[str], None]
    """Prints a line."""
    alone: bool
    """Whether the run has one process."""
    retry: float = 30.0
    """Seconds between tries."""
    give_up: float = 240.0
    """Seconds that a finished run tries to save."""
    _failed: tuple[float, str] | None = field(default=None, init=False)  # when the newest try failed, and why

    def after(self, step: int, state: Any, *, now: bool = False) -> None:
        """Save the state after a finished step where that is due, asked for (`now`), or an earlier try failed.

        MachineError where one of several processes cannot write, SaveError where the others broke off its saving.
        """
        if now or step % self.every == 0 or (self._failed and time.monotonic() - self._failed[0] > self.retry):
            self._try(step, lambda: self._save(step, state))
        elif self._failed is None:
            self._try(step, self.checkpoints.check)

    def finish(self, step: int, state: Any, working: Callable[[], None] = lambda: None) -> None:
        """Return when the state after `step` is on disk; `working` is called before each further try.

        MachineError where it is not after `give_up` seconds, or one of several processes cannot save.
        """
        begin = time.monotonic()
        self._try(step, self.checkpoints.wait)
        while self.checkpoints.latest() != step:
            if self._failed and time.monotonic() - begin > self.give_up:
                why = f"the state could not be saved in {self.give_up:g} s ({self._failed[1]})"
                raise MachineError(f"step {step}: {why}; {self.checkpoints.newest_said()}")
            time.sleep(self.retry if self._failed else 0)
            working()
            self._try(step, lambda: self._save(step, state))
            self._try(step, self.checkpoints.wait)

    def _save(self, step: int, state: Any) -> None:
        self.checkpoints.save(step, state, *self.about)
        if self._failed is not None:
            self.say(f"step {step}: saving again")
        self._failed = None

    def _try(self, step: int, act: Callable[[], None]) -> None:
        try:
            act()
        except SaveError as error:
            why = f"the state cannot be saved in {self.checkpoints.folder} ({error})"
            if not self.alone:
                if error.of_storage:
                    raise MachineError(f"step {step}: {why}; {self.checkpoints.newest_said()}") from None
                raise  # most probably another process is gone, which the watchdog says better
            self.say(f"step {step}: {why}; {self.checkpoints.newest_said()}; next try in {self.retry:g} s")
            self._failed = (time.monotonic(), str(error))
