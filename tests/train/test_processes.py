"""Real processes over gloo: the same weights as one, one killed, one told to stop, one that differs."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from programs import shared_programs

from zigzag_jax.models.hf.run_folder import Parameters
from zigzag_jax.train.hosts.together import Together
from zigzag_jax.train.lock import sole_run

FLAGS = ["--seq-len", "32", "--batch", "2", "--save-every", "2", "--mesh.cp", "4", "--hosts.timeout", "60"]


FAILING = """
import sys
from zigzag_jax.train.__main__ import main
from zigzag_jax.train.data.batches import Batches
from zigzag_jax.train.errors import UserError

read = Batches.at

def at(self, step):
    if step == 2:
        raise UserError("data", "must be whole", "a.txt")
    return read(self, step)

Batches.at = at
sys.exit(main())
"""  # a trainer that finds the data damaged in its third step


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    (folder / "a.txt").write_text("".join(f"Line {n}: home after {n % 7} hops.\n" for n in range(2000)))
    return folder


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def environment(place: Path) -> dict[str, str]:
    """Of every process here."""
    own = {"ZIGZAG_CACHE": str(place / "cache"), "JAX_PLATFORMS": "cpu"}
    return os.environ | own | shared_programs(place / "programs")


class Group:
    """Processes of one run."""

    def __init__(self, place: Path, out: Path, size: int, steps: int, *more: tuple[str, ...], failing: int = -1):
        self.out = out
        port = free_port()
        for i in range(size):
            command = [sys.executable, *(("-c", FAILING) if i == failing else ("-m", "zigzag_jax.train"))]
            command += ["--data", str(place / "a.txt"), "--out", str(out)]
            command += [*FLAGS, "--steps", str(steps), *(more[i] if i < len(more) else ())]
            if size > 1:
                command += ["--hosts.coordinator", f"127.0.0.1:{port}", "--hosts.num-processes", str(size)]
                command += ["--hosts.process-id", str(i)]
            with (place / f"{out.name}-{i}.err").open("w") as error:
                process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=error, env=environment(place))
            self.all = [*getattr(self, "all", []), process]
        self.errors = [place / f"{out.name}-{i}.err" for i in range(size)]

    def codes(self, seconds: float = 400) -> list[int]:
        try:
            return [process.wait(seconds) for process in self.all]
        finally:
            for process in self.all:
                process.kill()

    def last(self, i: int) -> str:
        return (self.errors[i].read_text().strip().splitlines() or [""])[-1]

    def wait_for(self, step: int, seconds: float = 400) -> None:
        end = time.monotonic() + seconds
        while max(losses(self.out), default=0) < step:
            assert time.monotonic() < end
            assert all(p.poll() is None for p in self.all), [path.read_text() for path in self.errors]
            time.sleep(0.02)


def losses(out: Path) -> dict[int, float]:
    if not (out / "metrics.jsonl").exists():
        return {}
    lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines(keepends=True) if x.endswith("\n")]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def saved(out: Path) -> list[int]:
    return sorted(int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdecimal())


@pytest.fixture(scope="module")
def alone(place: Path) -> Path:
    """The run of one process: four steps."""
    out = place / "alone"
    assert Group(place, out, 1, 4).codes() == [0]
    return out


def test_processes_that_differ_say_so(place: Path, tmp_path: Path):
    group = Group(place, tmp_path / "differ", 2, 3, (), ("--seed", "1"))
    assert group.codes() == [2, 2]
    for i in range(2):
        assert group.last(i).startswith("error: seed: must be the same in all processes, 0 in process 0 (")
        assert ", got 1 in process 1 (" in group.last(i)


@pytest.mark.slow
def test_a_folder_of_another_run_is_refused_by_all(place: Path, tmp_path: Path):
    out = tmp_path / "used"
    out.mkdir()
    with sole_run(out, Together(), print):  # as a run that is at it
        group = Group(place, out, 2, 3)
        assert group.codes() == [2, 2], [path.read_text() for path in group.errors]
    rule = "error: out: must be the folder of one run at a time"
    assert group.last(0).startswith(f"{rule} (it is in use by process {os.getpid()} of ")
    assert group.last(1) == f"{rule} (process 0 says by which), got {out}"
    assert [path.name for path in out.iterdir()] == ["run.lock"]


@pytest.mark.byhand
@pytest.mark.parametrize("failing", [0, 1])
def test_a_mistake_that_one_finds_ends_all_with_its_exit_code(place: Path, tmp_path: Path, failing: int):
    group = Group(place, tmp_path / f"failing{failing}", 2, 4000, failing=failing)
    assert group.codes(120) == [2, 2], [path.read_text() for path in group.errors]
    assert group.last(failing) == "error: data: must be whole, got a.txt"
    last = group.last(1 - failing)
    assert last.startswith("error: step 3, mesh axis cp: process ")
    assert f"process {failing} (" in last
    assert ") ended: data: must be whole, got a.txt, as process " in last


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.byhand)])
def test_as_one_process(place: Path, alone: Path, tmp_path: Path, size: int):
    several = tmp_path / f"of{size}"
    assert Group(place, several, size, 4).codes() == [0] * size
    assert losses(several) == pytest.approx(losses(alone), rel=1e-5)
    want, got = Parameters(alone / "checkpoints" / "4"), Parameters(several / "checkpoints" / "4")
    assert list(want) == list(got)
    for name in want:
        # Adam divides by the gradient's size: where that is rounding alone, 1 of 10,000 elements now and then, the four
        # steps differ by some of the 7e-4 that they can go at most
        off = np.abs(got[name][:] - want[name][:]) > 1e-4
        assert off.mean() < 1e-3, f"{name}: {off.sum()} of {off.size} differ"


@pytest.mark.parametrize("dead", [pytest.param(1, marks=pytest.mark.slow), pytest.param(0, marks=pytest.mark.byhand)])
def test_one_is_killed_and_the_same_commands_again_go_on(place: Path, tmp_path: Path, dead: int):
    out = tmp_path / f"dead{dead}"
    group = Group(place, out, 2, 4000)
    group.wait_for(5)
    begin = time.monotonic()
    group.all[dead].kill()
    group.all[dead].wait()
    code = group.all[1 - dead].wait(60)
    assert time.monotonic() - begin < 30
    assert code == 70, group.codes()
    last = group.last(1 - dead)
    assert last.startswith("error: step ")
    assert f", mesh axis cp: process {dead} (" in last
    assert "is gone" in last
    assert f"the newest checkpoint is of step {saved(out)[-1]}" in last
    *_, before, newest = saved(out)
    for file in (out / "checkpoints" / str(newest)).glob("**/ocdbt.process_1/d/*"):
        file.write_bytes(b"")  # what process 1 alone wrote, and reads
    assert Group(place, out, 2, newest + 1).codes() == [0, 0]
    assert (out / "checkpoints" / f"{newest}.corrupt").is_dir()
    resumed = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines() if "resumed_from" in line]
    assert resumed[-1]["resumed_from"] == before
    assert saved(out)[-1] == newest + 1


@pytest.mark.slow
def test_a_signal_to_one_stops_all_after_the_same_step(place: Path, tmp_path: Path):
    group = Group(place, tmp_path / "term", 2, 4000)
    group.wait_for(3)
    group.all[1].send_signal(signal.SIGTERM)
    assert group.codes(120) == [75, 75], [path.read_text() for path in group.errors]
    assert saved(group.out)[-1] == max(losses(group.out))


def evaluated(place: Path, run: Path, out: Path, size: int) -> list[subprocess.CompletedProcess[str]]:
    """What each process of an evaluation of `run` said."""
    command = [sys.executable, "-m", "zigzag_jax.train.evaluate", str(run), "--data", str(place / "a.txt")]
    command += ["--seq-len", "32", "--rows", "7", "--mesh.dp", "2", "--mesh.cp", "2", "--dtype", "float32"]
    port, env = free_port(), environment(place)

    def start(i: int) -> subprocess.Popen[str]:
        hosts = ["--hosts.coordinator", f"127.0.0.1:{port}", "--hosts.num-processes", str(size)]
        hosts += ["--hosts.process-id", str(i), "--hosts.timeout", "60"]
        words = [*command, "--out", str(out), *(hosts if size > 1 else ())]
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)

    processes = [start(i) for i in range(size)]
    try:
        said = [process.communicate(timeout=400) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [subprocess.CompletedProcess((), p.returncode, *texts) for p, texts in zip(processes, said, strict=True)]


@pytest.mark.slow
def test_two_processes_evaluate_as_one(place: Path, alone: Path, tmp_path: Path):
    (one,) = evaluated(place, alone, tmp_path / "one.npz", 1)
    first, second = evaluated(place, alone, tmp_path / "two.npz", 2)
    assert [x.returncode for x in (one, first, second)] == [0, 0, 0], [x.stderr for x in (one, first, second)]
    table = lambda done: re.findall(r"^ +(?:all|\d+ \.\. \d+) +[\d,]+ .*$", done.stdout, re.MULTILINE)  # gloo talks too
    assert [len(table(x)) for x in (one, first, second)] == [2, 2, 0]  # the second process says nothing
    assert table(first) == table(one)
    want, got = np.load(tmp_path / "one.npz"), np.load(tmp_path / "two.npz")
    assert want["losses"].shape == (7, 32)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], atol=1e-5)
    # what process 0 alone finds ends both: it cannot write there
    (tmp_path / "folder.npz").mkdir()
    both = evaluated(place, alone, tmp_path / "folder.npz", 2)
    assert [x.returncode for x in both] == [2, 2], [x.stderr for x in both]
    rule = "out: must be a file that can be written (Is a directory), got "
    assert both[0].stderr.splitlines()[-1].startswith(f"error: {rule}")
    assert f"ended: {rule}" in both[1].stderr.splitlines()[-1]


@pytest.mark.byhand
def test_one_that_is_frozen_is_named(place: Path, tmp_path: Path):
    group = Group(place, tmp_path / "frozen", 2, 4000)
    group.wait_for(2)
    group.all[1].send_signal(signal.SIGSTOP)
    assert group.all[0].wait(120) == 70
    assert "process 1 (" in group.last(0)
    assert "has not been heard of for 30 s" in group.last(0)
    group.all[1].kill()
    group.codes()
