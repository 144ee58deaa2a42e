"""The events of a profiler trace (jax.profiler.trace) on GPUs, and arithmetic on the time that they cover."""

import bisect
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import jax

COMMUNICATION = re.compile(r"nccl|P2P|PeerToPeer", re.IGNORECASE)  # a copy inside one GPU (MemcpyD2D) is work
Span = tuple[float, float]


class Event(NamedTuple):
    """Something that ran on a GPU."""

    name: str
    start: float
    """Microseconds since the trace's first event."""
    end: float

    @property
    def span(self) -> Span:
        """When."""
        return self.start, self.end

    @property
    def moves_data(self) -> bool:
        """Whether it is communication."""
        return bool(COMMUNICATION.search(self.name))


def read(folder: Path) -> dict[str, list[Event]]:
    """The events on the streams of each GPU, in the order of their starts; of the newest trace in the folder."""
    files = sorted(folder.rglob("*.xplane.pb"))
    if not files:
        raise FileNotFoundError(f"DIR must hold a trace (*.xplane.pb), got {folder}")
    found = {}
    for plane in jax.profiler.ProfileData.from_file(str(files[-1])).planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        events = [
            Event(event.name, event.start_ns / 1e3, (event.start_ns + event.duration_ns) / 1e3)
            for line in plane.lines
            if line.name.startswith("Stream")  # the others are the same time under other names
            for event in line.events
        ]
        found[plane.name.removeprefix("/device:")] = sorted(events, key=lambda event: event.start)
    origin = min((events[0].start for events in found.values() if events), default=0.0)
    return {
        gpu: [Event(name, start - origin, end - origin) for name, start, end in events] for gpu, events in found.items()
    }


def union(spans: Iterable[Span]) -> list[Span]:
    """The same time without overlaps, ascending."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged


def length(spans: Iterable[Span]) -> float:
    """Sum of the lengths."""
    return sum(end - start for start, end in spans)


def overlap(a: list[Span], b: list[Span]) -> float:
    """Length of what both unions cover."""
    return length(a) + length(b) - length(union([*a, *b]))


def without(a: list[Span], b: list[Span]) -> list[Span]:
    """What union `a` covers and union `b` does not."""
    left = []
    for start, end in a:
        for hole in clip(b, (start, end)):
            if hole[0] > start:
                left.append((start, hole[0]))
            start = hole[1]
        if end > start:
            left.append((start, end))
    return left


def clip(spans: list[Span], window: Span) -> list[Span]:
    """The part of a union that lies in a window."""
    begin, end = window
    first = bisect.bisect_right(spans, begin, key=lambda span: span[1])
    last = bisect.bisect_left(spans, end, key=lambda span: span[0])
    return [(max(a, begin), min(b, end)) for a, b in spans[first:last]]
