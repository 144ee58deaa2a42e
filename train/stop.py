"""Ctrl-C and SIGTERM ask a run to stop: it finishes its step, saves, and says so. Ctrl-C after that stops at once."""

import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """While entered, the two signals set `asked` instead of ending the process."""

    _signals = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, say: Callable[[str], None]) -> None:
        self.asked: str | None = None
        self._say = say
        self._before: list[Any] = []

    def __enter__(self) -> "StopRequest":
        self._before = [signal.signal(number, self._note) for number in self._signals]
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in zip(self._signals, self._before, strict=True):
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name
        self._say(f"{self.asked}: finishing this step, then saving (Ctrl-C again stops at once)")
