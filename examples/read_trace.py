"""What a profiler trace says about a ring: communication that stands alone, kernel time per step, bubbles.

    python examples/read_trace.py DIR [--png FILE] [--json FILE] [--ms BEGIN:END]

DIR is what `jax.profiler.trace(DIR)` wrote on GPUs. For each GPU: the time its kernels ran, the time data moved between
GPUs (NCCL's kernels and copies), and the *exposed* part of that, while nothing else ran on the GPU; then its steps by
attention kernel, and its hops, those with most exposed time first. What a step and a hop are: trace_hops.py. --json
holds all of them. --ms reads a part of a long trace, milliseconds since its first event.
"""

import argparse
import json
import sys
from pathlib import Path

from bench import table
from trace_events import Event, read
from trace_hops import Hop, by_kernel, hops, steps, summary
from trace_picture import draw

SHOWN = 12  # hops of a GPU on the screen


def hop_rows(found: list[Hop]) -> list[dict]:
    """A row a hop, numbered in the order of time."""
    return [
        {
            "hop": number, "start ms": hop.start / 1e3, "transfers": hop.transfers, "us": hop.end - hop.start,
            "exposed us": hop.exposed, "beside": hop.beside or "nothing",
        }
        for number, hop in enumerate(found, 1)
    ]  # fmt: skip


def cut(events: list[Event], begin: float, end: float) -> list[Event]:
    """Those that lie between, microseconds."""
    return [event for event in events if begin <= event.start and event.end <= end]


def span(text: str) -> tuple[float, float]:
    """Of --ms, in microseconds; ValueError where it is none."""
    begin, end = (float(part) * 1e3 for part in text.split(":"))
    if not 0 <= begin < end:
        raise ValueError(text)
    return begin, end


def main(argv: list[str] | None = None) -> int:
    """Print the tables of each GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--png", type=Path, help="a file for the timeline (needs matplotlib)")
    parser.add_argument("--json", type=Path, help="a file for the numbers")
    parser.add_argument("--ms", metavar="BEGIN:END", help="what lies between, milliseconds since the first event")
    args = parser.parse_args(argv)
    try:
        gpus = read(args.folder)
        window = span(args.ms) if args.ms else None
    except FileNotFoundError as mistake:
        parser.error(str(mistake))
    except ValueError:
        parser.error(f"--ms must be BEGIN:END with 0 <= BEGIN < END, got {args.ms}")
    if not gpus:
        parser.error(f"DIR must hold a trace of a GPU, got one without any in {args.folder}")
    if window:
        gpus = {gpu: cut(events, *window) for gpu, events in gpus.items()}
        if not any(gpus.values()):
            parser.error(f"--ms must name a part of the trace in which something ran, got {args.ms}")
    found = {}
    print(table([{"GPU": gpu, **summary(events)} for gpu, events in gpus.items()]))
    for gpu, events in gpus.items():
        numbered, stepped = hop_rows(hops(events)), steps(events)
        worst = sorted(numbered, key=lambda row: -row["exposed us"])[:SHOWN]
        for title, rows in (("steps, medians", by_kernel(stepped)), (f"{len(numbered)} hops", worst)):
            if rows:
                print(f"\n{gpu}, {title}\n\n{table(rows)}")
        found[gpu] = {**summary(events), "steps": [step._asdict() for step in stepped], "hops": numbered}
    if args.png:
        draw(gpus, args.png)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
