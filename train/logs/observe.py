"""What is measured of a step: where its time went, tokens a second, MFU, memory.

    |-- data --|------------- compute -------------|-- wait --|-- data --|---- ...
    end of the                                     result is   next step
    step before                                    here        begins

data      until the batch is on the devices: a thread reads one ahead, so it is short unless reading is the bottleneck
compute   from handing the step to the devices until its loss is here; the first step's also compiles
wait      the rest of the time since the last step, without a training step: checkpoints, evaluation, logs

Time that a device waits for another (the ring, the experts, a slower host) is inside compute: only a trace tells it
apart. Rates and MFU are by data + compute, the time of a step; `wait` is beside them to be seen.
"""

import time

import jax
from jax.sharding import Mesh

from zigzag_jax.models.flops import packed_training_flops, peak_flops
from zigzag_jax.models.registry import ModelConfig
from zigzag_jax.train.data.batches import Batches
from zigzag_jax.train.logs.trace import Profile

_GIB = 2**30


class StepTimer:
    """Splits the time of each step: `begin`, `data_ready`, `finished`, over and over."""

    def __init__(self) -> None:
        self._end = self._begin = self._data = time.perf_counter()
        self.data = self.compute = self.wait = 0.0

    def begin(self) -> None:
        """The last step is done with, all that was to be said of it is said."""
        self._begin = time.perf_counter()
        self.wait = self._begin - self._end

    def data_ready(self) -> None:
        """The batch is there."""
        self._data = time.perf_counter()
        self.data = self._data - self._begin

    def finished(self) -> None:
        """The result is there."""
        self._end = time.perf_counter()
        self.compute = self._end - self._data

    @property
    def seconds(self) -> float:
        """Of the step, but for its wait."""
        return self.data + self.compute


def memory() -> dict[str, float]:
    """The most memory that any device of this process has had in use; nothing where devices do not say (CPUs)."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [x["peak_bytes_in_use"] for x in stats if "peak_bytes_in_use" in x]
    return {"memory_gib": max(peaks) / _GIB} if peaks else {}


class Observer:
    """Turns a step's time and batch into numbers for metrics.jsonl, and traces the steps of a Profile."""

    def __init__(self, sizes: ModelConfig, batches: Batches, mesh: Mesh, profile: Profile) -> None:
        self.sizes, self.batches, self.devices, self.profile = sizes, batches, mesh.size, profile
        self.peak = peak_flops(mesh.devices.flat[0].device_kind)
        self.timer = StepTimer()

    def begin(self, step: int) -> None:
        """Step number `step`, from 1, begins."""
        self.profile.before(step)
        self.timer.begin()

    def values(self, step: int, tokens: float) -> dict[str, float]:
        """Of the step just finished, number `step`, with so many predicted tokens."""
        seconds = self.timer.seconds
        values = {
            "tokens_per_second": tokens / seconds,
            "tokens_per_second_per_device": tokens / seconds / self.devices,
            "time_data": self.timer.data,
            "time_compute": self.timer.compute,
            "time_wait": self.timer.wait,
        }
        if self.peak is not None:
            flops = packed_training_flops(self.sizes, self.batches.document_lengths(step - 1))
            values["mfu"] = flops / seconds / (self.peak * self.devices)
        return values | memory()
