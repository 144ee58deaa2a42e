"""Processes that share tasks: all are done once; what goes wrong in one is raised here, and no process stays."""

import functools
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from zigzag_jax.train.data.workers import run_tasks
from zigzag_jax.train.errors import MachineError, RunError, UserError

pytestmark = pytest.mark.system

Task = tuple[str, Path]


def maker(note: Path) -> Callable[[Task], Iterator[tuple[int, int, int]]]:
    """What a worker does: a file a task, and what the task says."""
    (note / f"made-{os.getpid()}").touch()

    def work(task: Task) -> Iterator[tuple[int, int, int]]:
        what, file = task
        if what == "user":
            raise UserError("data", "must be better", file)
        if what == "full":
            raise OSError(28, "No space left on device")
        if what == "away":
            raise MachineError("a.txt: storage does not answer")
        if what == "bug":
            raise KeyError("a bug")
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "sleep":
            time.sleep(600)
        with file.open("x"):
            yield 1, 10, 0
            yield 0, 0, 100

    return work


def run(tmp_path: Path, what: list[str], workers: int) -> list[int]:
    seen: list[list[int]] = []
    tasks = [(name, tmp_path / str(n)) for n, name in enumerate(what)]
    run_tasks(functools.partial(maker, tmp_path), tasks, workers, lambda counters: seen.append(list(counters)))
    assert seen == sorted(seen)
    return seen[-1]


def test_every_task_is_done_once_and_progress_adds_up(tmp_path: Path):
    assert run(tmp_path, ["file"] * 20, 2) == [20, 200, 2000]
    assert len(list(tmp_path.glob("made-*"))) == 2
    assert len(list(tmp_path.iterdir())) == 22
    run_tasks(functools.partial(maker, tmp_path), [], 3, lambda counters: None)


@pytest.mark.parametrize(
    ("what", "kind", "said"),
    [
        (["sleep", "user"], UserError, "^data: must be better, got .*1$"),
        pytest.param(["full"], OSError, "No space left", marks=pytest.mark.slow),
        pytest.param(["away"], MachineError, "^a.txt: storage does not answer$", marks=pytest.mark.slow),
        pytest.param(["bug"], RunError, "^a worker failed; the same command", marks=pytest.mark.slow),
        (["kill"], RunError, r"^a worker was killed by signal 9 \(is there memory"),
    ],
    ids=lambda x: x[-1] if isinstance(x, list) else "",
)
def test_what_goes_wrong_is_raised_and_the_others_are_stopped(tmp_path: Path, what: list[str], kind: type, said: str):
    begin = time.monotonic()
    with pytest.raises(kind, match=said):
        run(tmp_path, what, 2)
    assert time.monotonic() - begin < 100  # a worker that sleeps would take ten minutes
    assert not multiprocessing.active_children()


def test_a_worker_that_cannot_be_started_leaves_none_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    process = multiprocessing.get_context("spawn").Process
    start, started = process.start, []

    def second_fails(self) -> None:
        if started:
            raise BlockingIOError("no more processes")
        start(self)
        started.append(self)

    monkeypatch.setattr(process, "start", second_fails)
    with pytest.raises(BlockingIOError, match="no more processes"):
        run(tmp_path, ["sleep"] * 2, 2)
    assert [process.is_alive() for process in started] == [False]


def test_workers_do_not_outlive_a_parent_that_is_killed(tmp_path: Path):
    program = (
        f"import functools, sys\nfrom pathlib import Path\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_workers import run\n"
        f"run(Path({str(tmp_path)!r}), ['sleep'], 1)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program])
    deadline = time.monotonic() + 60
    while not (made := list(tmp_path.glob("made-*"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    worker = int(made[0].name.removeprefix("made-"))
    parent.kill()
    parent.wait()
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{worker}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            break
        if state == "Z":  # it ended; nobody has asked for its exit code yet
            break
        time.sleep(0.05)
    else:
        pytest.fail("the worker is still there")


def test_a_user_error_can_be_sent():
    error = pickle.loads(pickle.dumps(UserError("data", "must be", Path("x"))))
    assert (error.field, error.rule, error.value, str(error)) == ("data", "must be", Path("x"), "data: must be, got x")
