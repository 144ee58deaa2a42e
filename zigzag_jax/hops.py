"""Which steps a ring runs, and what flies beside each: pure data, which ring.py acts on and cost.py reckons with.

The payload goes on from live step to live step, and a gap of dead ones in one permute. In the backward the gradient of
k and v follows a step behind it, and the diagonal comes last, so that the gradient's hop home has a kernel above it:

    >>> forward_hops((0, 1, 7))                                       # cp 8, a window that reaches one chunk back
    [Hop(step=0, by=1, came=0), Hop(step=1, by=6, came=0), Hop(step=7, by=0, came=0)]
    >>> backward_hops((0, 1, 7), cp=8)                                # the payload has made its first hop before
    [Hop(step=1, by=6, came=0), Hop(step=7, by=0, came=6), Hop(step=0, by=0, came=1)]
"""

import itertools
from typing import Any, NamedTuple


class Hop(NamedTuple):
    """One step and the permutes posted above its kernel; `came` and `by` are 0 where nothing is sent."""

    step: Any
    """Ring step, int or traced."""
    by: int
    """How many ranks the payload goes on, to the next live step."""
    came: int = 0
    """How many ranks the travelling gradient has to come, from the live step before (backward only)."""


def forward_hops(live: tuple[int, ...]) -> list[Hop]:
    """Live steps (ranges.live_steps) in order; the last one sends nothing."""
    return [Hop(step, by) for step, by in zip(live, [*_gaps(live), 0], strict=True)]


def backward_hops(live: tuple[int, ...], cp: int) -> list[Hop]:
    """Live steps in order, the diagonal last: the payload has made its first hop, the gradient's last leads home."""
    steps = live[1:]
    if not steps:
        return [Hop(0, by=0)]
    gaps = _gaps(steps)
    hops = [Hop(step, by, came) for step, by, came in zip(steps, [*gaps, 0], [0, *gaps], strict=True)]
    return [*hops, Hop(0, by=0, came=cp - steps[-1])]


def _gaps(steps: tuple[int, ...]) -> list[int]:
    return [after - before for before, after in itertools.pairwise(steps)]


__all__ = ["Hop", "backward_hops", "forward_hops"]
