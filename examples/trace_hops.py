"""What the events of one GPU say of a ring: its hops, its steps, and what of the time nothing was computed.

A *hop* is what moves together: transfers whose times overlap (k and v, and the gradient that flies beside them). It is
*exposed* while the GPU runs no kernel. A *step* ends with an attention kernel and begins where the one before it ended;
its time is that kernel's, other kernels', exposed communication, and a bubble in which the GPU does nothing: the four
add up. What follows the last attention kernel is a step without one.

NCCL's kernels wait for their peer, so a rank that is late shows as exposed time of the others.
"""

import bisect
import re
import statistics
from typing import NamedTuple

from trace_events import Event, clip, length, overlap, union

ATTENTION = re.compile(r"flash|fmha|cudnn.*sdpa", re.IGNORECASE)  # ours, and cuDNN's
REST = "(after the last)"


class Hop(NamedTuple):
    """Transfers that overlap; microseconds."""

    start: float
    end: float
    transfers: int
    exposed: float
    beside: str
    """The kernel that ran longest meanwhile; "" if none did."""


class Step(NamedTuple):
    """From the end of one attention kernel to the end of the next; microseconds."""

    kernel: str
    start: float
    end: float
    attention: float
    other: float
    exposed: float
    bubble: float


def hops(events: list[Event]) -> list[Hop]:
    """In the order of their starts, by which `events` are sorted."""
    groups: list[list[Event]] = []
    for move in (e for e in events if e.moves_data):
        if groups and move.start < max(e.end for e in groups[-1]):
            groups[-1].append(move)
        else:
            groups.append([move])
    works = [e for e in events if not e.moves_data]
    starts, longest = [e.start for e in works], max((e.end - e.start for e in works), default=0.0)
    busy, found = union(e.span for e in works), []
    for group in groups:
        begin, end = group[0].start, max(e.end for e in group)
        beside: dict[str, float] = {}
        for work in works[bisect.bisect_left(starts, begin - longest) : bisect.bisect_left(starts, end)]:
            if work.end > begin:
                shared = min(work.end, end) - max(work.start, begin)
                beside[work.name] = beside.get(work.name, 0.0) + shared
        exposed = end - begin - length(clip(busy, (begin, end)))
        found.append(Hop(begin, end, len(group), exposed, max(beside, key=lambda name: beside[name], default="")))
    return found


def attends(event: Event) -> bool:
    """Whether it is an attention kernel, by its name."""
    return bool(ATTENTION.search(event.name)) and not event.moves_data


def steps(events: list[Event]) -> list[Step]:
    """In their order; attention kernels that overlap are one."""
    kernels = [e for e in events if attends(e)]
    attention, works = union(e.span for e in kernels), union(e.span for e in events if not e.moves_data)
    whole = union(e.span for e in events)
    if not whole:
        return []
    names = {e.start: e.name for e in reversed(kernels)}
    ends = [(end, names[start]) for start, end in attention]
    last = whole[-1][1]
    ends += [(last, REST)] if not ends or ends[-1][0] < last else []
    found, begin = [], whole[0][0]
    for end, name in ends:
        own, working, busy = (length(clip(spans, (begin, end))) for spans in (attention, works, whole))
        found.append(Step(name, begin, end, own, working - own, busy - working, end - begin - busy))
        begin = end
    return found


def summary(events: list[Event]) -> dict[str, float]:
    """Milliseconds of one GPU's trace."""
    moves = union(e.span for e in events if e.moves_data)
    works = union(e.span for e in events if not e.moves_data)
    whole = union([*moves, *works])
    begin, end = (whole[0][0], whole[-1][1]) if whole else (0.0, 0.0)
    figures = {
        "trace ms": end - begin,
        "kernels ms": length(works),
        "communication ms": length(moves),
        "exposed ms": length(moves) - overlap(moves, works),
        "idle ms": end - begin - length(whole),
    }
    return {name: x / 1e3 for name, x in figures.items()} | {"transfers": sum(e.moves_data for e in events)}


def by_kernel(found: list[Step]) -> list[dict]:
    """A row for each attention kernel by name: how many steps, and of a step the median of each part."""
    rows = []
    for name in dict.fromkeys(step.kernel for step in found):
        own = [step for step in found if step.kernel == name]
        median = lambda part, own=own: statistics.median(getattr(step, part) for step in own)
        rows.append({
            "kernel": name, "steps": len(own),
            "kernel ms": median("attention") / 1e3, "other ms": median("other") / 1e3,
            "exposed us": median("exposed"), "bubble us": median("bubble"),
            "all exposed ms": sum(step.exposed for step in own) / 1e3,
            "all bubbles ms": sum(step.bubble for step in own) / 1e3,
        })  # fmt: skip
    return rows


def busiest(events: list[Event], count: int = 20) -> str:
    """The names that took most time, a line each: milliseconds, calls, name."""
    times: dict[str, list[float]] = {}
    for event in events:
        times.setdefault(event.name, []).append((event.end - event.start) / 1e3)
    most = sorted(times.items(), key=lambda item: -sum(item[1]))[:count]
    return "\n".join(f"{sum(ms):9.2f} ms {len(ms):5} x  {name[:80]}" for name, ms in most)
