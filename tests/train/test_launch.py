"""What the launcher starts, and how it ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from zigzag_jax.train import launch
from zigzag_jax.train.errors import UserError
from zigzag_jax.train.launch import LaunchConfig, commands, environments, split, visible_gpus, wait


def test_flags_after_the_dashes_are_the_trainers():
    assert split(["--processes", "2", "--", "--steps", "3"]) == (["--processes", "2"], ["--steps", "3"])
    assert split(["--processes", "2"]) == (["--processes", "2"], [])


def test_each_process_gets_its_number():
    lines = commands(LaunchConfig(2), ["--steps", "3"], 1234)
    assert [line[-1] for line in lines] == ["0", "1"]
    assert all("--steps 3 --hosts.coordinator 127.0.0.1:1234 --hosts.num-processes 2" in " ".join(x) for x in lines)
    assert commands(LaunchConfig(1), [], 1)[0][1:] == ["-m", "zigzag_jax.train"]


@pytest.mark.parametrize(
    ("config", "flags", "message"),
    [
        (LaunchConfig(0), [], r"^processes: must be >= 1, got 0"),
        (LaunchConfig(1, gpus_per_process=0), [], r"^gpus-per-process: must be >= 1, got 0"),
        (LaunchConfig(2), ["--hosts.process-id", "1"], r"^hosts.process-id: must be left to the launcher"),
    ],
)
def test_mistakes(config: LaunchConfig, flags: list[str], message: str):
    with pytest.raises(UserError, match=message):
        commands(config, flags, 1)


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch, "has_gpu", lambda: True)


def test_the_gpus_there_are(with_gpu: None, tmp_path: Path):
    for name in ("nvidia3", "nvidia5", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert visible_gpus({}, tmp_path) == ["0", "1"]  # a container with two of them
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "4,MIG-5"}) == ["4", "MIG-5"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == []
    assert visible_gpus({"JAX_PLATFORMS": "cpu"}) is None


def test_no_gpu_is_no_mistake(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch, "has_gpu", lambda: False)
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "0"}) is None
    assert environments(LaunchConfig(2), None) == [dict(os.environ)] * 2


def test_each_process_gets_its_gpus():
    each = environments(LaunchConfig(2, gpus_per_process=2), ["4", "5", "6", "7", "8"])
    assert [env["CUDA_VISIBLE_DEVICES"] for env in each] == ["4,5", "6,7"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LaunchConfig(8), r"^processes: must be at most the 5 GPUs there are, or run on the CPU .*, got 8$"),
        (
            LaunchConfig(3, gpus_per_process=2),
            r"^processes: must be at most the 5 GPUs there are / 2 per process, .*3$",
        ),
    ],
)
def test_fewer_gpus_than_processes(config: LaunchConfig, message: str):
    with pytest.raises(UserError, match=message):
        environments(config, list("45678"))


def test_the_command_starts_nothing_where_gpus_are_missing(
    with_gpu: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(subprocess, "Popen", None)  # calling it is an error
    assert launch.main(["--processes", "3"]) == 2
    assert capfd.readouterr().err.startswith("error: processes: must be at most the 2 GPUs there are")


def start(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code])


def test_the_first_failure_is_the_exit_code_and_the_rest_is_killed(capfd: pytest.CaptureFixture[str]):
    group = [start("import time; time.sleep(60)"), start("raise SystemExit(3)")]
    assert wait(group, 0.5) == 3
    assert "launch: process 0 still there 0 s after another ended with 3: killed" in capfd.readouterr().err
    assert wait([start(""), start("")], 1) == 0
    assert wait([start("import os; os.kill(os.getpid(), 9)")], 1) == 137
