"""The run's numbers on disk: DIR/metrics.jsonl, a line a step, and TensorBoard events beside it.

Each start of a run writes a header {"devices", "mesh", "resumed_from"}; then each finished step {"step", "loss", ...}
in full precision, flushed at once. Only training lines carry `loss`; evaluation writes `eval_loss`. A resumed run may
write a step again: the last line counts. Lines that a full disk does not take wait in memory for the next one. What has
a value for each of several layers is an object, {"expert_load_by_layer": {"1": 1.5}}, in TensorBoard and W&B a scalar
each, `expert_load_by_layer/1`.
"""

import contextlib
import errno
import json
import os
from collections.abc import Callable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from zigzag_jax.train.logs.tensorboard import Events
from zigzag_jax.train.logs.wandb_run import WandbRun

FILE = "metrics.jsonl"


class MetricsLog:
    """Appends to one run's metrics; a half-written last line of a killed run is cut off first.

    With folder None, in all processes but one, nothing is written. `first`: finished steps of the state that is
    resumed.
    """

    def __init__(
        self,
        folder: Path | None,
        first: int = 0,
        wandb: WandbRun | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`wandb` is told the same numbers.

        `say` gets a line when numbers cannot be written, and when they can again. OSError where the file cannot be
        opened.
        """
        self._file = self._events = None
        self._wandb, self._say = wandb, say
        self._waiting = b""  # lines that the disk has not taken
        self._failing = False
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FILE
        if path.exists():
            text = path.read_bytes()
            with path.open("rb+") as file:
                file.truncate(text.rfind(b"\n") + 1)
        self._file = path.open("ab", buffering=0)
        self._events = Events(folder / "tensorboard", first + 1)

    def header(self, **values: Any) -> None:
        """The first line of a start. OSError where it cannot be written."""
        self._line(values)

    def step(self, step: int, **values: float | Mapping[str, float]) -> None:
        """One line, and one event a value, at `step`. What the disk does not take is written with a later step."""
        failed, scalars = None, _scalars(values)
        for write in (lambda: self._line({"step": step, **values}), lambda: self._event(step, scalars)):
            try:
                write()
            except OSError as error:
                failed = error
        if (failed is not None) != self._failing:
            self._failing = failed is not None
            self._say(
                f"step {step}: metrics cannot be written ({failed.strerror}); they are kept and tried again"
                if failed
                else f"step {step}: all metrics are written again"
            )
        if self._wandb is not None:
            self._wandb.log(step, scalars)

    def _event(self, step: int, values: dict[str, float]) -> None:
        if self._events is not None:
            self._events.scalars(step, values)

    def _line(self, values: dict[str, Any]) -> None:
        if self._file is None:
            return
        self._waiting += json.dumps(values).encode() + b"\n"
        self._write(self._file)

    def _write(self, file: FileIO) -> None:
        """Append all lines that wait, or none of them."""
        end = file.seek(0, os.SEEK_END)
        try:
            if file.write(self._waiting) != len(self._waiting):  # a disk takes a part, and refuses the rest
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(end)
            raise
        self._waiting = b""

    def close(self) -> None:
        """Close both files, and the W&B run. Says so where numbers are lost."""
        try:
            if self._file is not None and self._waiting:
                self._write(self._file)
        except OSError as error:
            lines, self._waiting = self._waiting.count(b"\n"), b""
            self._say(f"the last {lines} lines of metrics cannot be written and are lost ({error.strerror})")
        for file in (self._file, self._events):
            if file is not None:
                with contextlib.suppress(OSError):  # said when it first failed
                    file.close()
        if self._wandb is not None:
            self._wandb.finish()


def _scalars(values: Mapping[str, float | Mapping[str, float]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in values.items():
        found |= {f"{name}/{key}": x for key, x in value.items()} if isinstance(value, Mapping) else {name: value}
    return found


def read(path: Path, name: str, say: Callable[[str], None] = lambda text: None) -> dict[int, float]:
    """{step: value} of the lines that carry `name`, the last line of a step winning.

    A line that is no object is passed over, and `say` gets a line with how many are: a host that lost its power can
    leave zeros in a file.
    """
    all_ = [_line(text) for text in path.read_text(errors="replace").splitlines()]
    lines = [line for line in all_ if line is not None]
    if bad := len(all_) - len(lines):
        say(f"{path}: {bad} of {len(all_)} lines cannot be read and are passed over")
    return {int(line["step"]): line[name] for line in lines if name in line and "step" in line}


def _line(text: str) -> dict[str, float] | None:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
