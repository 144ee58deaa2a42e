"""Ctrl-C and SIGTERM ask a run to stop: it finishes its step, saves, and says so. A second Ctrl-C stops at once."""

import signal
from types import FrameType, TracebackType


class StopRequest:
    """While entered, the two signals set `asked` instead of ending the process."""

    _signals = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.asked: str | None = None
        self._before: list = []

    def __enter__(self) -> "StopRequest":
        self._before = [signal.signal(number, self._note) for number in self._signals]
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in zip(self._signals, self._before, strict=True):
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name
