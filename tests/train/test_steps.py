"""The loop over the steps, with a state of one number: who hears what, what is saved, what is kept of a bad step."""

import io
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from zigzag_jax.train.checkpoint import Checkpoints
from zigzag_jax.train.config import Config
from zigzag_jax.train.errors import RunError
from zigzag_jax.train.hosts.watchdog import PATIENT
from zigzag_jax.train.logs import metrics
from zigzag_jax.train.logs.display import Display
from zigzag_jax.train.logs.metrics import MetricsLog
from zigzag_jax.train.logs.trace import Profile, profile_steps
from zigzag_jax.train.step import StepMetrics
from zigzag_jax.train.steps import Steps
from zigzag_jax.train.task import Losses


class Weight(NamedTuple):
    """A state."""

    params: dict[str, jax.Array]


class Dog(list[tuple[int, str, float]]):
    """Hears what a watchdog hears, and asks for a stop after a step."""

    link = None

    def __init__(self, stop_after: int | None = None) -> None:
        super().__init__()
        self.stop_after = stop_after

    def after(self, step: int) -> bool:
        return step == self.stop_after

    def doing(self, step: int, what: str, times: float = 1) -> None:
        self.append((step, what, times))


def train(out: Path, step: Callable[..., tuple], dog: Dog, **changes: Any) -> tuple[int, Any]:
    """Train a state of one number by `step`, with the loop, the checkpoints and the logs of a run."""
    config = Config(out=out, **{"steps": 5, "save_every": 2, "eval_every": 9, **changes})
    batches = SimpleNamespace(at=lambda n: {"tokens": jnp.full((2, 4), n)})
    run = SimpleNamespace(
        config=config, config_json={}, identity={}, batches=batches, say=print,
        step=jax.jit(step, donate_argnums=0), sizes=SimpleNamespace(sparse_layers=[False, True]),
        mesh=jax.make_mesh((1,), ("cp",), devices=jax.devices()[:1]), losses=None,
        held_out=SimpleNamespace(loss=lambda losses, params: float(params["w"])),
    )  # fmt: skip
    console = Console(file=io.StringIO())
    state = Weight({"w": jnp.float32(1)})
    with ExitStack() as stack:
        checkpoints = Checkpoints(out / "checkpoints", 9, console.print)
        stack.callback(checkpoints.close)
        begin = checkpoints.restore(jax.eval_shape(lambda: state)) or (0, state)
        log = MetricsLog(out)
        stack.callback(log.close)
        profile = stack.enter_context(Profile(profile_steps(config.profile), out, console.print))
        display = stack.enter_context(Display(config.steps, 0, console))
        return Steps(run, checkpoints, log, display, dog, dog, profile).train(*begin)  # pyright: ignore[reportArgumentType]


def metrics_of(loss: jax.Array) -> StepMetrics:
    zero = jnp.float32(0)
    return StepMetrics(Losses(loss, zero, jnp.float32(8), jnp.array([[3.0, 0, 3]]), zero), jnp.float32(1))


def halve(state: Weight, batch: dict) -> tuple[Weight, StepMetrics]:
    w = state.params["w"]
    return Weight({"w": w / 2}), metrics_of(w)


def test_the_watchdog_hears_what_begins(tmp_path: Path):
    dog = Dog()
    step, state = train(tmp_path, halve, dog, steps=3, eval_every=2)
    assert (step, float(state.params["w"])) == (3, 1 / 8)
    begun = ["reading the batch of step", "computing step", "saving after step"]
    assert [what for _, what, _ in dog] == [*begun, *begun, "evaluating after step", *begun]
    assert [n for n, _, _ in dog] == [1, 1, 1, 2, 2, 2, 2, 3, 3, 3]
    assert [times for _, _, times in dog] == [10, 10, 10, 1, 1, 10, 10, 1, 1, 10]
    lines = [json.loads(line) for line in (tmp_path / metrics.FILE).read_text().splitlines()]
    assert [line.get("loss") for line in lines] == [1.0, 1 / 2, None, 1 / 4]  # before its update
    assert lines[2] == {"step": 2, "eval_loss": 1 / 4}
    assert lines[0]["expert_load_by_layer"] == {"1": 1.5}


def test_a_stop_saves_and_evaluates_nothing(tmp_path: Path):
    dog = Dog(stop_after=3)
    assert train(tmp_path, halve, dog, eval_every=1)[0] == 3
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["2", "3"]
    assert dog[-1] == (3, "saving after step", PATIENT)
    step, state = train(tmp_path, halve, Dog(stop_after=5))  # the last step is no stop
    assert (step, float(state.params["w"])) == (5, 1 / 32)


def test_a_trace_is_summed_up_in_its_own_time(tmp_path: Path):
    dog = Dog()
    train(tmp_path, halve, dog, profile="2:3")
    assert (3, "summing up the trace of step", PATIENT) in dog
    patient = [step for step, what, times in dog if what == "computing step" and times == PATIENT]
    assert patient == [1, 4]  # in step 4 the others wait for process 0


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_what_is_kept_of_a_bad_step_is_the_state_before_it_and_its_batch(tmp_path: Path, bad: str):
    """The update of step 4 overflows: it is in no checkpoint, and the same command again meets the same step."""

    def overflow(state: Weight, batch: dict) -> tuple[Weight, StepMetrics]:
        broken = batch["tokens"][0, 0] == 3  # of step 4
        w = jnp.where(broken, jnp.inf, state.params["w"] / 2)
        result = metrics_of(jnp.where(broken & (bad == "loss"), jnp.nan, 1.0))
        return Weight({"w": w}), result._replace(grad_norm=jnp.where(broken & (bad == "gradient"), jnp.inf, 1.0))

    for _ in range(2):  # the second time from the checkpoint of step 3
        with pytest.raises(RunError, match=r"^step 4: the .* is (nan|inf), training stops") as error:
            train(tmp_path, overflow, Dog(), save_every=1)
        assert "the newest checkpoint is of step 3" in str(error.value)
        assert str(error.value).endswith(f"its batch is {tmp_path / 'bad_batch_4.npz'}")
        checkpoints = Checkpoints(tmp_path / "checkpoints", 9, print)
        assert [path.name for path in sorted(checkpoints.folder.iterdir())] == ["1", "2", "3"]
        step, state = checkpoints.restore(jax.eval_shape(lambda: Weight({"w": jnp.float32(1)}))) or (0, Weight({}))
        checkpoints.close()
        assert (step, float(state.params["w"])) == (3, 1 / 8)
        np.testing.assert_array_equal(np.load(tmp_path / "bad_batch_4.npz")["tokens"], np.full((2, 4), 3))
    assert sorted(metrics.read(tmp_path / metrics.FILE, "loss")) == [1, 2, 3]
