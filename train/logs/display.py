"""What a person watches: a live bar in a terminal, a line now and then elsewhere."""

import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

_LINE_EVERY = 10.0  # seconds between lines where there is no terminal


class _Bar:
    """A bar in a terminal; elsewhere what its heirs print."""

    def __init__(self, head: Iterable[ProgressColumn], total: int, done: int, console: Console) -> None:
        self.console, self._begin = console, time.monotonic()
        self._bar = Progress(
            *head, BarColumn(), TextColumn("{task.description}"),
            TextColumn("left"), TimeRemainingColumn(), console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=total, completed=done)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()


class Display(_Bar):
    """Step, loss, tokens/s and time left of a run; only process 0 shows anything."""

    def __init__(self, steps: int, done: int, console: Console) -> None:
        super().__init__((TextColumn("step"), MofNCompleteColumn()), steps, done, console)
        self.steps, self._first, self._last_line = steps, done, 0.0

    def step(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Show a finished step."""
        text = f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s"
        self._bar.update(self._task, completed=step, description=text)
        now = time.monotonic()
        if not self.console.is_terminal and (
            now - self._last_line > _LINE_EVERY or step in (self._first + 1, self.steps)
        ):
            self._last_line = now
            left = (now - self._begin) / max(1, step - self._first) * (self.steps - step)
            self.console.print(f"step {step}/{self.steps}  {text}  {left:.0f} s left", highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """A line among the others."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


class TokenDisplay(_Bar):
    """Documents, MB/s and time left of `zigzag_jax.train.tokenize`."""

    def __init__(self, total: int, done: int, console: Console) -> None:
        """`total` bytes of files, of which `done` were tokenised before."""
        self.total, self.done = max(1, total), done
        super().__init__((TaskProgressColumn(),), self.total, done, console)
        self._last_line = self._begin

    def show(self, so_far: Sequence[int]) -> None:
        """Show what this start has done: (documents, characters, bytes of files)."""
        documents, characters, size = so_far
        now = time.monotonic()
        seconds = max(1e-3, now - self._begin)
        text = f"{documents:,} documents  {characters / 1e6 / seconds:.1f} MB/s"
        done = self.done + size
        self._bar.update(self._task, completed=done, description=text)
        if not self.console.is_terminal and now - self._last_line > _LINE_EVERY:
            self._last_line = now
            left = f"{seconds / size * (self.total - done):.0f} s left" if size else "time left not known yet"
            self.console.print(f"{done / self.total:.0%}  {text}  {left}", highlight=False, soft_wrap=True)
