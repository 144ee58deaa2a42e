"""What stops a run that cannot go on."""

import io
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from zigzag_jax.models.presets import PRESETS
from zigzag_jax.train import __main__ as command_line
from zigzag_jax.train.checkpoint import Checkpoints
from zigzag_jax.train.config import Config
from zigzag_jax.train.errors import PeerError, RunError, UserError
from zigzag_jax.train.hosts.watchdog import PATIENT
from zigzag_jax.train.logs import metrics
from zigzag_jax.train.logs.display import Display
from zigzag_jax.train.logs.metrics import MetricsLog
from zigzag_jax.train.logs.observe import Observer
from zigzag_jax.train.logs.report import HeldOut
from zigzag_jax.train.logs.trace import Profile, profile_steps
from zigzag_jax.train.loop import _begin, _check_finite, _say_where, _train, run
from zigzag_jax.train.step import StepMetrics
from zigzag_jax.train.stop import StopRequest
from zigzag_jax.train.task import Losses


class Dog(list[tuple[int, str, float]]):
    """Hears what a watchdog hears."""

    link = None

    def doing(self, step: int, what: str, times: float = 1) -> None:
        self.append((step, what, times))


def train(out: Path, step: Callable[..., tuple], dog: Dog, **changes: Any) -> None:
    """Train a state of one number by `step`, with the loop, the checkpoints and the logs of a run."""
    config = Config(out=out, **{"steps": 5, "save_every": 2, "eval_every": 9, **changes})
    batches = SimpleNamespace(at=lambda n: {"tokens": jnp.full((2, 4), n)})
    run = SimpleNamespace(
        config=config, config_json={}, identity={}, batches=batches, say=print,
        step=jax.jit(step, donate_argnums=0), sizes=SimpleNamespace(sparse_layers=[False, True]),
    )  # fmt: skip
    mesh, console = jax.make_mesh((1,), ("cp",), devices=jax.devices()[:1]), Console(file=io.StringIO())
    state = {"w": jnp.float32(1)}
    with ExitStack() as stack:
        checkpoints = Checkpoints(out / "checkpoints", 9, console.print)
        stack.callback(checkpoints.close)
        begin = checkpoints.restore(jax.eval_shape(lambda: state)) or (0, state)
        log = MetricsLog(out)
        stack.callback(log.close)
        profile = stack.enter_context(Profile(profile_steps(config.profile), out, console.print))
        observer = Observer(None, batches, mesh, profile)  # pyright: ignore[reportArgumentType]
        display = stack.enter_context(Display(config.steps, 0, console))
        _train(run, checkpoints, log, display, StopRequest(print), dog, observer, begin)  # pyright: ignore[reportArgumentType]


def metrics_of(loss: jax.Array) -> StepMetrics:
    zero = jnp.float32(0)
    return StepMetrics(Losses(loss, zero, jnp.float32(8), jnp.array([[3.0, 0, 3]]), zero), jnp.float32(1))


def halve(state: dict, batch: dict) -> tuple[dict, StepMetrics]:
    return {"w": state["w"] / 2}, metrics_of(state["w"])


def test_a_trace_is_summed_up_in_its_own_time(tmp_path: Path):
    dog = Dog()
    train(tmp_path, halve, dog, profile="2:3")
    assert (3, "summing up the trace of step", PATIENT) in dog
    patient = [step for step, what, times in dog if what == "computing step" and times == PATIENT]
    assert patient == [1, 4]  # in step 4 the others wait for process 0


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_what_is_kept_of_a_bad_step_is_the_state_before_it_and_its_batch(tmp_path: Path, bad: str):
    """The update of step 4 overflows: it is in no checkpoint, and the same command again meets the same step."""

    def overflow(state: dict, batch: dict) -> tuple[dict, StepMetrics]:
        broken = batch["tokens"][0, 0] == 3  # of step 4
        w = jnp.where(broken, jnp.inf, state["w"] / 2)
        result = metrics_of(jnp.where(broken & (bad == "loss"), jnp.nan, 1.0))
        return {"w": w}, result._replace(grad_norm=jnp.where(broken & (bad == "gradient"), jnp.inf, 1.0))

    for _ in range(2):  # the second time from the checkpoint of step 3
        with pytest.raises(RunError, match=r"^step 4: the .* is (nan|inf), training stops") as error:
            train(tmp_path, overflow, Dog(), save_every=1)
        assert "the newest checkpoint, of step 3, is whole" in str(error.value)
        assert str(error.value).endswith(f"its batch is {tmp_path / 'bad_batch_4.npz'}")
        checkpoints = Checkpoints(tmp_path / "checkpoints", 9, print)
        assert [path.name for path in sorted(checkpoints.folder.iterdir())] == ["1", "2", "3"]
        step, state = checkpoints.restore({"w": jax.ShapeDtypeStruct((), jnp.float32)}) or (0, {})
        checkpoints.close()
        assert (step, float(state["w"])) == (3, 1 / 8)
        np.testing.assert_array_equal(np.load(tmp_path / "bad_batch_4.npz")["tokens"], np.full((2, 4), 3))
    assert sorted(metrics.read(tmp_path / metrics.FILE, "loss")) == [1, 2, 3]


def test_steps_to_trace_that_are_done_are_said():
    mesh = jax.make_mesh((1,), ("cp",), devices=jax.devices()[:1])
    for first, want in ((3, True), (2, False)):
        said: list[str] = []
        config = Config(steps=9, profile="2:3")
        run = SimpleNamespace(
            config=config, mesh=mesh, say=said.append, task=SimpleNamespace(sharding=SimpleNamespace(expert_axes=()))
        )
        _say_where(run, first)  # pyright: ignore[reportArgumentType]
        assert ("profile: steps 2:3 are done, nothing is traced" in said) == want
        assert said[-1].startswith(f"resumed at step {first}; the learning rate")


@pytest.mark.parametrize(("loss", "norm"), [(np.nan, 1.0), (1.0, np.inf)])
def test_a_loss_that_is_no_number_stops_before_it_is_saved(loss: float, norm: float):
    zero = jnp.float32(0)
    result = SimpleNamespace(
        losses=Losses(jnp.float32(loss), zero, jnp.float32(1), jnp.zeros((0, 1)), zero), grad_norm=np.float32(norm)
    )
    with pytest.raises(
        RunError, match=r"^step 7: the .* is (nan|inf), training stops; that of step 5; its batch is there"
    ):
        _check_finite(7, result, lambda: "that of step 5", lambda: "its batch is there")  # type: ignore[arg-type]


def test_a_run_does_not_write_into_the_model_that_it_begins_with(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(PRESETS["tiny-qwen3-moe"].to_hf()))
    config = Config(model=str(tmp_path), random_init=True, out=tmp_path / "x" / "..")
    with pytest.raises(UserError, match=r"^out: must be another folder than the model's, got "):
        run(config)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("batch", "must be even", 3), 2, "error: batch: must be even, got 3"),
        (RunError("step 1: no"), 1, "error: step 1: no"),
        (PeerError("process 1 did not come"), 70, "error: process 1 did not come"),
        (KeyboardInterrupt(), 130, "interrupted; the same command again goes on"),
    ],
)
def test_each_end_is_one_line(
    error: BaseException, code: int, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail(config: object) -> int:
        raise error

    monkeypatch.setattr(command_line, "run", fail)
    assert command_line.main([]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(text)


def test_the_held_out_rows_do_not_depend_on_the_mesh():
    class Batches(SimpleNamespace):
        def __len__(self) -> int:
            return 100

    batches = (Batches(batch=8, seq_len=padded, plan=SimpleNamespace(seq_len=512)) for padded in (512, 516))
    assert [HeldOut(b).count for b in batches] == [8, 8]  # type: ignore[arg-type]


def test_weights_that_are_read_slowly_are_told_to_the_watchdog():
    told: list[str] = []
    run = SimpleNamespace(abstract=None, init=lambda tell: [tell(n, 3) for n in range(3)])
    checkpoints = SimpleNamespace(restore=lambda abstract: None)
    _begin(run, checkpoints, Console(file=io.StringIO()), told.append)  # pyright: ignore[reportArgumentType]
    assert told == ["reading the checkpoint", "making the weights", *["reading the weights"] * 3]
    checkpoints.restore = lambda abstract: (7, "state")
    found = _begin(run, checkpoints, Console(), told.append)  # pyright: ignore[reportArgumentType]
    assert found == (7, "state")
