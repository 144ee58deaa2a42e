"""What a device did at each moment of a trace: it computed, it only moved data, or it did nothing.

    computing      |=======|   |=========|     |====|
    moving data        |-------|      |----------|
                           ^^^^           ^^^^^        exposed: transfers with nothing beside them
                                                       (NCCL's kernels wait for a peer that is late: that is in here)

Launches beside each other are counted once here, so the three add up to the time from the first launch to the last.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from zigzag_jax.hlo import Program
from zigzag_jax.train.logs.scopes import MOVES, Launch, launched

Span = tuple[float, float]


class Split(NamedTuple):
    """Seconds of a device, the mean over all that were traced."""

    computing: float
    """Something ran that is no transfer."""
    exposed: float
    """Only transfers ran."""
    nothing: float
    """Nothing ran: the host was late, or data."""


def split(program: Program, found: Iterable[Launch]) -> Split:
    """Of a program's launches, from the first to the last of each device; zeros where there is none."""
    work: dict[str, list[Span]] = defaultdict(list)
    every: dict[str, list[Span]] = defaultdict(list)
    for launch, (scope, _) in launched(program, found):
        span = launch.start, launch.start + launch.seconds
        every[launch.device].append(span)
        if scope != MOVES:
            work[launch.device].append(span)
    totals = Split(0.0, 0.0, 0.0)
    for device, spans in every.items():
        computing, busy = covered(work[device]), covered(spans)
        whole = max(end for _, end in spans) - min(begin for begin, _ in spans)
        here = computing, busy - computing, whole - busy
        totals = Split(*(total + x / len(every) for total, x in zip(totals, here, strict=True)))
    return totals


def covered(spans: Iterable[Span]) -> float:
    """How much time spans cover together.

    >>> covered([(0.0, 2.0), (1.0, 3.0), (5.0, 6.0), (5.0, 5.5)])
    4.0
    """
    total, last = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, last))
        last = max(last, end)
    return total


def words(of: Split, steps: int) -> str:
    """A line, in milliseconds of a step."""
    computing, exposed, nothing = (f"for {1e3 * seconds / steps:.3f} ms" for seconds in of)
    return f"of a step a device computed {computing}, moved data only {exposed}, did nothing {nothing}"
