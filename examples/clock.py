"""How times are taken: medians of samples that run in turn, with a rest before each.

A card that is kept busy grows warm and slows down, and whoever is timed last pays for it; so what is compared takes
turns. The first call of a sample wakes the card up and is not counted. Nothing of JAX is imported: torch's processes
take their times by the same clock.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Clock(NamedTuple):
    """So many samples of so many calls."""

    samples: int
    repeats: int
    """Calls of a sample, one behind the other; its time is that of all, divided."""
    idle: float
    """Seconds of rest before a sample."""
    wait: Callable[[Any], object]
    """Returns when the device has made a call's result."""

    def in_turn[K](self, functions: Mapping[K, Callable[[], Any]]) -> dict[K, float]:
        """Median milliseconds of a call of each."""
        samples: dict[K, list[float]] = {key: [] for key in functions}
        for _ in range(self.samples):
            for key, call in functions.items():
                time.sleep(self.idle)
                result = call()
                self.wait(result)
                begin = time.perf_counter()
                for _ in range(self.repeats):
                    del result  # its memory is the next one's
                    result = call()
                self.wait(result)
                del result
                samples[key].append((time.perf_counter() - begin) / self.repeats * 1e3)
        return {key: statistics.median(taken) for key, taken in samples.items()}
