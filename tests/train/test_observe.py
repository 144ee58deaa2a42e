"""What is measured of a step, and the trace of chosen ones."""

import doctest
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from zigzag_jax.models import flops
from zigzag_jax.models.presets import PRESETS
from zigzag_jax.train.errors import UserError
from zigzag_jax.train.logs import observe, trace
from zigzag_jax.train.logs.observe import Observer, StepTimer, memory
from zigzag_jax.train.logs.trace import Profile, profile_steps

SIZES = PRESETS["qwen3-30b-a3b"]
LENGTHS = np.array([1000, 24, 1])


def test_the_time_of_a_step_falls_into_three(monkeypatch: pytest.MonkeyPatch):
    clock = iter([0.0, 10.0, 11.0, 15.0, 15.5, 16.0, 20.0])
    monkeypatch.setattr(observe.time, "perf_counter", lambda: next(clock))
    timer = StepTimer()
    for want in ((1.0, 4.0, 10.0), (0.5, 4.0, 0.5)):
        timer.begin()
        timer.data_ready()
        timer.finished()
        assert (timer.data, timer.compute, timer.wait) == want
        assert timer.seconds == timer.data + timer.compute


def observer(kind: str) -> Observer:
    devices = np.array([SimpleNamespace(device_kind=kind)] * 8)
    batches = SimpleNamespace(document_lengths=lambda step: LENGTHS if step == 6 else None)
    mesh = SimpleNamespace(size=8, devices=devices)
    made = Observer(SIZES, batches, mesh, Profile(range(0), None, print))  # type: ignore[arg-type]
    made.timer.data, made.timer.compute = 0.5, 1.5
    return made


def test_the_numbers_of_a_step():
    got = observer("NVIDIA H100 80GB HBM3").values(7, 1000.0)  # step 7 is batch number 6
    assert (got["tokens_per_second"], got["tokens_per_second_per_device"]) == (500.0, 62.5)
    # every document by itself: attention does not cross them
    want = sum(flops.training_flops(SIZES, int(n)) for n in LENGTHS) / 2.0 / (8 * 989e12)
    np.testing.assert_allclose(got["mfu"], want, rtol=1e-12)
    assert "mfu" not in observer("cpu").values(7, 1000.0)


def test_no_documents_no_flops():
    assert flops.packed_training_flops(SIZES, np.zeros(0, np.int64)) == 0.0


def test_peaks():
    assert flops.peak_flops("NVIDIA H200") == flops.H100_FLOPS
    assert flops.peak_flops("NVIDIA A100-SXM4-80GB") == flops.peak_flops("NVIDIA A100-PCIE-40GB") == 312e12
    assert flops.peak_flops("NVIDIA H100 NVL") is None


def test_memory_is_that_of_the_fullest_device(monkeypatch: pytest.MonkeyPatch):
    devices = [SimpleNamespace(memory_stats=lambda n=n: n and {"peak_bytes_in_use": n * 2**30}) for n in (1, 3, 2)]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert memory() == {"memory_gib": 3.0}
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(memory_stats=lambda: None)])
    assert memory() == {}


def test_a_trace_of_chosen_steps(tmp_path: Path):
    said: list[str] = []
    with Profile(profile_steps("2:3"), tmp_path, said.append) as profile:
        for step in range(1, 5):
            profile.before(step)
            jax.block_until_ready(jax.numpy.ones(step) + 1)
            assert bool(list(tmp_path.rglob("*.xplane.pb"))) == (step == 4)
            profile.after(step)
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1
    assert len(said) == 1
    assert said[0].startswith(f"trace written to {tmp_path / 'profile'}")
    assert profile.last == 3
    assert Profile(profile_steps(None), tmp_path, said.append).last is None


def test_a_trace_that_cannot_be_written_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full() -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr("jax.profiler.start_trace", lambda folder: None)
    monkeypatch.setattr("jax.profiler.stop_trace", full)
    said: list[str] = []
    with Profile(profile_steps("1"), tmp_path, said.append) as profile:
        profile.before(1)
        profile.after(1)
    assert len(said) == 1
    assert said[0] == "the trace could not be written or read (RuntimeError: no room); training goes on"


def test_a_trace_that_cannot_be_begun_ends_no_run(tmp_path: Path):
    said: list[str] = []
    with jax.profiler.trace(tmp_path), Profile(profile_steps("1:2"), tmp_path, said.append) as profile:
        for step in (1, 2):
            profile.before(step)
            profile.after(step)
    assert len(said) == 1
    assert said[0].startswith("the trace could not be begun (RuntimeError: ")


def test_a_trace_ends_with_the_run(tmp_path: Path):
    said: list[str] = []
    with Profile(profile_steps("1:9"), tmp_path, said.append) as profile:
        profile.program = SimpleNamespace(as_text=pytest.fail)  # type: ignore[assignment]
        profile.before(1)
        profile.after(1)
    assert len(said) == 1  # who stops in the middle has no time for a summary
    with Profile(profile_steps("1:9"), None, said.append) as profile:  # another process
        profile.before(1)
        profile.after(1)
    assert len(said) == 1


@pytest.mark.parametrize("text", ["0", "3:2", "a", "1:b", ":", "1:2:3", "-1"])
def test_steps_that_are_none(text: str):
    with pytest.raises(UserError, match=r"^profile: must be a step N or steps A:B, 1 <= A <= B, got"):
        profile_steps(text)


def test_the_examples():
    assert all(doctest.testmod(module).failed == 0 for module in (flops, trace))
