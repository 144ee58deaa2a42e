"""What a profiler trace says about communication: how much of it had a kernel beside it, and how much stood alone.

    python examples/read_trace.py DIR [--png FILE] [--json FILE]

DIR is what `jax.profiler.trace(DIR)` wrote on GPUs. For each GPU: the time its kernels ran, the time data moved between
GPUs (NCCL's kernels and copies), and the *exposed* part of that, while nothing else ran on the GPU. NCCL's kernels wait
for their peer, so a rank that is late shows as exposed time of the others.
"""

import argparse
import json
import re
import sys
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
    def moves_data(self) -> bool:
        """Whether it is communication."""
        return bool(COMMUNICATION.search(self.name))


def read(folder: Path) -> dict[str, list[Event]]:
    """The events on the streams of each GPU, in the order of their starts."""
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


def summary(events: list[Event]) -> dict[str, float]:
    """Milliseconds of one GPU's trace."""
    moves = union((e.start, e.end) for e in events if e.moves_data)
    works = union((e.start, e.end) for e in events if not e.moves_data)
    whole = union([*moves, *works])
    begin, end = (whole[0][0], whole[-1][1]) if whole else (0.0, 0.0)
    exposed = length(moves) - overlap(moves, works)
    figures = {
        "trace ms": end - begin,
        "kernels ms": length(works),
        "communication ms": length(moves),
        "exposed ms": exposed,
        "idle ms": end - begin - length(whole),
    }
    return {name: x / 1e3 for name, x in figures.items()} | {"transfers": sum(e.moves_data for e in events)}


def busiest(events: list[Event], count: int = 20) -> str:
    """The names that took most time, a line each: milliseconds, calls, name."""
    times: dict[str, list[float]] = {}
    for event in events:
        times.setdefault(event.name, []).append((event.end - event.start) / 1e3)
    most = sorted(times.items(), key=lambda item: -sum(item[1]))[:count]
    return "\n".join(f"{sum(ms):9.2f} ms {len(ms):5} x  {name[:80]}" for name, ms in most)


def draw(gpus: dict[str, list[Event]], path: Path) -> None:
    """A timeline: a row for the kernels and one for the communication of each GPU."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(14, 0.8 * len(gpus) + 1.2), layout="constrained")
    for row, (gpu, events) in enumerate(gpus.items()):
        for moving, colour, at in ((False, "#30638e", 0.05), (True, "#d1495b", 0.5)):
            spans = [(e.start / 1e3, (e.end - e.start) / 1e3) for e in events if e.moves_data == moving]
            axes.broken_barh(spans, (row + at, 0.4), facecolors=colour, label=None)
        axes.text(0, row + 0.45, gpu, ha="right", va="center")
    axes.set(xlabel="ms", yticks=[], title="kernels (blue) and communication (red)")
    axes.invert_yaxis()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Print a line a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--png", type=Path, help="a file for the timeline (needs matplotlib)")
    parser.add_argument("--json", type=Path, help="a file for the numbers")
    args = parser.parse_args(argv)
    try:
        gpus = read(args.folder)
    except FileNotFoundError as mistake:
        parser.error(str(mistake))
    if not gpus:
        parser.error(f"DIR must hold a trace of a GPU, got one without any in {args.folder}")
    rows = {gpu: summary(events) for gpu, events in gpus.items()}
    for gpu, row in rows.items():
        print(gpu, ", ".join(f"{name.removesuffix(' ms')} {x:.3f}" for name, x in row.items()))
    if args.png:
        draw(gpus, args.png)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
