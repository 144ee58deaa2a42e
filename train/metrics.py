"""The run's numbers on disk: DIR/metrics.jsonl, a line a step, and TensorBoard events beside it.

Each start of a run writes a header {"devices", "mesh", "resumed_from"}; then each finished step {"step", "loss", ...}
in full precision, flushed at once. Only training lines carry `loss`; evaluation writes `eval_loss`. A resumed run may
write a step again: the last line counts.
"""

import json
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

FILE = "metrics.jsonl"


class MetricsLog:
    """Appends to one run's metrics; a half-written last line of a killed run is cut off first.

    With folder None, in all processes but one, nothing is written. `first`: finished steps of the state that is
    resumed.
    """

    def __init__(self, folder: Path | None, first: int = 0, wandb: Any = None) -> None:
        """`wandb`: a run of Weights & Biases that is told the same numbers (train/wandb_run.py)."""
        self._file = self._events = None
        self._wandb = wandb
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FILE
        if path.exists():
            text = path.read_bytes()
            with path.open("rb+") as file:
                file.truncate(text.rfind(b"\n") + 1)
        self._file = path.open("a")
        self._events = SummaryWriter(str(folder / "tensorboard"), write_to_disk=True, purge_step=first + 1)

    def header(self, **values: Any) -> None:
        """The first line of a start."""
        self._line(values)

    def step(self, step: int, **values: float) -> None:
        """One line, and one event a value, at `step`."""
        self._line({"step": step, **values})
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def _line(self, values: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close both files, and the W&B run."""
        for file in (self._file, self._events):
            if file is not None:
                file.close()
        if self._wandb is not None:
            self._wandb.finish()


def read(path: Path, name: str) -> dict[int, float]:
    """{step: value} of the lines that carry `name`, the last line of a step winning."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line and "step" in line}
