"""What the launcher starts, and how it ends."""

import subprocess
import sys

import pytest

from zigzag_jax.train import launch
from zigzag_jax.train.errors import UserError
from zigzag_jax.train.launch import LaunchConfig, commands, environment, split, wait


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


def test_a_gpu_each(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch, "has_gpu", lambda: True)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert environment(1, 2)["CUDA_VISIBLE_DEVICES"] == "2,3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    assert environment(1, 1)["CUDA_VISIBLE_DEVICES"] == "5"


def start(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code])


def test_the_first_failure_is_the_exit_code_and_the_rest_is_killed(capfd: pytest.CaptureFixture[str]):
    group = [start("import time; time.sleep(60)"), start("raise SystemExit(3)")]
    assert wait(group, 0.5) == 3
    assert "launch: process 0 still there 0 s after another ended with 3: killed" in capfd.readouterr().err
    assert wait([start(""), start("")], 1) == 0
    assert wait([start("import os; os.kill(os.getpid(), 9)")], 1) == 137
