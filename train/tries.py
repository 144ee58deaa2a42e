"""`python -m zigzag_jax.train.tries --out DIR --restart N`: whether starting a run once more is worth it.

What starts a run again by itself (Slurm's requeue, a JobSet) asks this before each start; the templates in examples/
do. A run that fails again and again without a newer checkpoint needs a person: exit code 2 then, else 0. Each start is
a line of DIR/starts.jsonl, a file that a first start (--restart 0: a person gave the command) begins anew; not so while
another run has DIR (train/lock.py), whose starts these are.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from zigzag_jax.train.errors import DONE, MachineError, UserError, exit_code, may_come_back
from zigzag_jax.train.hosts.together import PAUSES
from zigzag_jax.train.lock import user_of
from zigzag_jax.train.reading import newest_of, steps_in

FILE = "starts.jsonl"


@dataclass(frozen=True)
class TriesConfig:
    """Count the starts of a run that come by themselves; exit code 2 where they lead nowhere."""

    out: Path
    """The run's folder, --out of zigzag_jax.train."""
    restart: int = 0
    """How often this job was started again: SLURM_RESTART_COUNT, or a JobSet's restart-attempt; 0: by a person."""
    most: int = 5
    """Starts in a row that may lead to no newer checkpoint."""


def check_start(config: TriesConfig, pauses: Sequence[float] = PAUSES) -> str:
    """Note a start; which it is, as words. UserError where too many starts in a row led to no newer checkpoint, or
    DIR cannot be written; MachineError where the storage fails, tried again after `pauses` in seconds. As long it is
    waited for another run to end.
    """
    if config.restart < 0:
        raise UserError("restart", "must be >= 0", config.restart)
    if config.most < 1:
        raise UserError("most", "must be >= 1", config.most)
    left = list(pauses)
    while True:
        try:
            if not config.restart and (user := user_of(config.out)) is not None:
                if not left:
                    return f"{config.out} is in use by {user}, whose starts are counted on"
                time.sleep(left.pop(0))  # it may be about to end
                continue
            return _check_start(config)
        except OSError as error:
            if not may_come_back(error):
                raise UserError("out", f"must be a folder that can be written ({error.strerror})", config.out) from None
            if not left:
                raise MachineError(f"{config.out}: {error.strerror}, tried for {sum(pauses):.0f} s") from None
            time.sleep(left.pop(0))


def _check_start(config: TriesConfig) -> str:
    steps = steps_in(config.out / "checkpoints")
    step, where = max(steps, default=0), newest_of(steps)
    before = _starts(config.out / FILE) if config.restart else []
    idle = next((n for n, found in enumerate(reversed(before)) if found < step), len(before))
    if idle >= config.most:
        rule = f"must hold a newer checkpoint after {idle} starts ({where}): mend what ends them, then start by hand"
        raise UserError("out", rule, config.out)
    config.out.mkdir(parents=True, exist_ok=True)
    _write(config.out / FILE, [*before, step])
    return f"start {config.restart + 1} of this job: {where}" + (f", as {idle} starts before" if idle else "")


def _starts(path: Path) -> list[int]:
    """The newest step that each start found, in order."""
    lines = path.read_text().splitlines() if path.exists() else []
    try:
        return [int(json.loads(line)["step"]) for line in lines]
    except (ValueError, KeyError, TypeError):
        raise UserError("out", f'{FILE} must have an object with a "step" a line; delete it', path) from None


def _write(path: Path, steps: Sequence[int]) -> None:
    """Whole or not at all: a start may be killed at any time."""
    part = path.with_suffix(".tmp")
    part.write_text("".join(json.dumps({"start": n, "step": step}) + "\n" for n, step in enumerate(steps, 1)))
    os.replace(part, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    config = tyro.cli(TriesConfig, args=arguments, prog="python -m zigzag_jax.train.tries")
    try:
        sys.stdout.write(check_start(config) + "\n")
    except (UserError, MachineError) as error:
        sys.stderr.write(f"error: {error}\n")
        return exit_code(error)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
