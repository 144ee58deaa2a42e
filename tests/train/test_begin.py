"""How a run begins."""

import errno
import io
import os
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from rich.console import Console

from zigzag_jax.train.begin import first_state, say_where, writable
from zigzag_jax.train.config import Config
from zigzag_jax.train.errors import MachineError, UserError


def test_steps_to_trace_that_are_done_are_said():
    mesh = jax.make_mesh((1,), ("cp",), devices=jax.devices()[:1])
    for first, want in ((3, True), (2, False)):
        said: list[str] = []
        config = Config(steps=9, profile="2:3")
        run = SimpleNamespace(
            config=config, mesh=mesh, say=said.append, task=SimpleNamespace(sharding=SimpleNamespace(expert_axes=()))
        )
        say_where(run, first)  # pyright: ignore[reportArgumentType]
        assert ("profile: steps 2:3 are done, nothing is traced" in said) == want
        assert said[-1].startswith(f"resumed at step {first}; the learning rate")


def test_weights_that_are_read_slowly_are_told_to_the_watchdog():
    told: list[str] = []
    run = SimpleNamespace(abstract=None, init=lambda tell: [tell(n, 3) for n in range(3)])
    checkpoints = SimpleNamespace(restore=lambda abstract: None)
    first_state(run, checkpoints, Console(file=io.StringIO()), told.append)  # pyright: ignore[reportArgumentType]
    assert told == ["reading the checkpoint", "making the weights", *["reading the weights"] * 3]
    checkpoints.restore = lambda abstract: (7, "state")
    found = first_state(run, checkpoints, Console(), told.append)  # pyright: ignore[reportArgumentType]
    assert found == (7, "state")


def test_a_folder_that_cannot_be_written_is_a_mistake_or_storage_that_is_away(tmp_path: Path):
    for number, kind in ((errno.EACCES, UserError), (errno.ENOSPC, UserError), (errno.EIO, MachineError)):
        with pytest.raises(kind, match=os.strerror(number)), writable(tmp_path):
            raise OSError(number, os.strerror(number), str(tmp_path))
