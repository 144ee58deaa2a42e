"""--profile: a trace of some steps, in which is seen what metrics.jsonl cannot tell: kernels, copies, waiting."""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import jax

from zigzag_jax.hlo import Program
from zigzag_jax.train.errors import UserError
from zigzag_jax.train.logs.scopes import by_scope, launches, table
from zigzag_jax.train.logs.timeline import split, words

FOLDER = "profile"


def profile_steps(text: str | None) -> range:
    """The steps, counted from 1, of --profile A:B (both traced) or N; UserError where it is neither.

    >>> profile_steps("3:5"), profile_steps("7"), profile_steps(None)
    (range(3, 6), range(7, 8), range(0, 0))
    """
    if text is None:
        return range(0)
    first, _, last = text.partition(":")
    try:
        steps = range(int(first), int(last or first) + 1)
    except ValueError:
        steps = range(0)
    if not steps or steps.start < 1:
        raise UserError("profile", "must be a step N or steps A:B, 1 <= A <= B", text)
    return steps


class Profile:
    """Writes a trace of some steps (jax.profiler) to a folder and says where their time went; entered, it ends the
    trace however the run ends.
    """

    def __init__(self, steps: range, run: Path | None, say: Callable[[str], None]) -> None:
        """`run`: the run's folder; with None, in all processes but one, nothing is traced."""
        self.steps, self.folder, self.say = steps, None if run is None else run / FOLDER, say
        self.program: jax.stages.Compiled | None = None
        """The step; without it the trace is written and not summed up."""
        self._step: jax.profiler.StepTraceAnnotation | None = None  # of a step that is being traced
        self._traced = 0

    @property
    def last(self) -> int | None:
        """The step after which process 0 sums the trace up, which takes minutes where the program is large."""
        return self.steps[-1] if self.steps else None

    def before(self, step: int) -> None:
        """Step number `step`, from 1, is about to begin."""
        if self.folder is None or step not in self.steps:
            return
        if self._step is None:
            try:
                jax.profiler.start_trace(self.folder)
            except Exception as error:  # as in _stop
                self.folder = None
                self.say(f"the trace could not be begun ({type(error).__name__}: {error}); training goes on")
                return
        self._step = jax.profiler.StepTraceAnnotation("train", step_num=step)
        self._step.__enter__()

    def after(self, step: int) -> None:
        """It has finished."""
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._traced += 1
            if step + 1 not in self.steps:
                self._stop(summary=True)

    def _stop(self, *, summary: bool) -> None:
        """End the trace. What goes wrong with it is said and ends no run: training matters more than its picture."""
        self._step = None
        assert self.folder is not None
        try:
            jax.profiler.stop_trace()
            self.say(f"trace written to {self.folder} (xprof or TensorBoard's profile plugin shows it)")
            if summary and self.program is not None:
                program, found = Program(self.program.as_text() or ""), launches(self.folder)
                for line in table(by_scope(program, found), jax.local_device_count(), self._traced):
                    self.say(line)
                self.say(words(split(program, found), self._traced))
        except Exception as error:
            self.say(f"the trace could not be written or read ({type(error).__name__}: {error}); training goes on")

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._step is not None:
            self._stop(summary=False)  # asked to stop, or broken: no time for more than to write it
