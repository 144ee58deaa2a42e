"""How many bytes are read or written, while a person waits: a bar in a terminal, a line now and then elsewhere."""

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

Told = Callable[[int, int], None]
"""Gets (bytes done, bytes of all) as they grow."""

_LINE_EVERY = 10.0  # seconds between lines where there is no terminal


def silent(done: int, total: int) -> None:
    """A Told that says nothing."""


class ByteBar:
    """Shows bytes; entered, it is a Told. Nothing is shown before the first bytes are."""

    def __init__(self, doing: str, done: str, console: Console) -> None:
        """`doing` and `done` as in "reading weights" and "read"."""
        self._done, self._console = done, console
        self._bar = Progress(
            TextColumn(doing), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TextColumn("left"),
            TimeRemainingColumn(), console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._task, self._last_line = self._bar.add_task("", total=None), time.monotonic()

    def __enter__(self) -> Told:
        return self._told

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def _told(self, done: int, total: int) -> None:
        self._bar.start()
        self._bar.update(self._task, completed=done, total=total)
        if not self._console.is_terminal and time.monotonic() - self._last_line > _LINE_EVERY:
            self._last_line = time.monotonic()
            text = f"{done / 2**30:.1f} of {total / 2**30:.1f} GiB {self._done}"
            self._console.print(text, highlight=False, soft_wrap=True)
