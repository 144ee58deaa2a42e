"""Ctrl-C and SIGTERM ask a run to stop: it finishes its step, saves, and says so. Ctrl-C after that stops at once.

Of several processes any may get the signal, and all stop after the same step: saving needs all of them. The one that
got it says so between two steps (`StopRequest.after`), and they stop after the next. The report at the end of a run
goes on counting: each part of it that needs all processes, a batch or a token, is a step more.
"""

import itertools
import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from zigzag_jax.train.hosts.link import Link


class Stopped(Exception):
    """What is left of a run's report was left out; its weights are saved."""


class StopRequest:
    """While entered, the two signals set `asked` instead of ending the process."""

    _signals = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, say: Callable[[str], None], link: Link | None = None) -> None:
        self.asked: str | None = None
        self.next = "finishing this step, then saving"
        """What follows a signal, as words."""
        self._say, self._link = say, link
        self._before: list[Any] = []

    def __enter__(self) -> "StopRequest":
        self._before = [signal.signal(number, self._note) for number in self._signals]
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in zip(self._signals, self._before, strict=True):
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def after(self, step: int) -> bool:
        """Whether to stop now, `step` being finished; a stop that is asked for here comes after the next in all."""
        if self._link is None:
            return self.asked is not None
        if self.asked is not None and self._link.stop_at is None:
            self._link.stop_after(step + 1)
        if self.asked is None and self._link.stop_at is not None:
            self.asked = "a signal to another process"
        return self._link.stop_at is not None and self._link.stop_at <= step

    def parts(self, step: int) -> Callable[[], None]:
        """To call after each part of the report of a run that is saved after `step`; Stopped where that is the last."""
        self.next = "all is saved, leaving the rest of the report out"
        numbers = itertools.count(step + 1)

        def after() -> None:
            if self.after(next(numbers)):
                raise Stopped

        return after

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name
        self._say(f"{self.asked}: {self.next} (Ctrl-C again stops at once)")
