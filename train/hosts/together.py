"""What the processes of a run do together: small numbers that all of them compare, so that all decide alike.

Everything here is a vote, and each process has to call it as often as the others. Nobody waits inside a vote for long:
where one process needs time, all pause and vote again.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import jax
import numpy as np
from jax.experimental import multihost_utils

# seconds between tries, 90 in all: NFS believes what it has heard of a folder for up to 60, and servers come back
PAUSES = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 30.0)
_NOBODY = 2**31 - 1  # a vote that is above every process number


def lowest(value: int) -> int:
    """The lowest of what all processes give, an int32, in all of them."""
    return value if jax.process_count() == 1 else int(multihost_utils.process_allgather(np.int32(value)).min())


@dataclass(frozen=True)
class Together:
    """One process among those that decide together."""

    process: int = field(default_factory=jax.process_index)
    """Its number."""
    lowest: Callable[[int], int] = lowest
    """The lowest of what all give."""
    pauses: Sequence[float] = PAUSES
    """Seconds between tries."""
    moving: Callable[[], None] = lambda: None
    """Called before each try: a watchdog hears that it is no hang."""

    def highest(self, value: int) -> int:
        """The highest of what all processes give."""
        return -self.lowest(-value)

    def same(self, value: int) -> bool:
        """Whether all processes give the same."""
        return self.lowest(value) == self.highest(value)

    def first(self, here: bool) -> int | None:
        """Number of the first process in which it is so, None where it is so in none."""
        who = self.lowest(self.process if here else _NOBODY)
        return None if who == _NOBODY else who

    def until(self, done: Callable[[], bool]) -> int | None:
        """None as soon as it is `done` in all processes; after all pauses the first process in which it is not."""
        who = None
        for pause in (0.0, *self.pauses):
            time.sleep(pause)
            self.moving()
            if (who := self.first(not done())) is None:
                break
        return who

    @property
    def patience(self) -> str:
        """How long all tries last, as words."""
        return f"{sum(self.pauses):.0f} s"
