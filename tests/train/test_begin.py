"""How a run begins."""

import io
from types import SimpleNamespace

import jax
from rich.console import Console

from zigzag_jax.train.begin import first_state, say_where
from zigzag_jax.train.config import Config


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
