"""What attention's kernels take by themselves, read off a profiler's trace: steps of a ring, documents, windows.

    python examples/kernel_times.py --models qwen,mla --tokens 8192

A clock around calls (bench_attention.py) has the start from the host in it, 20 us a call and more, and comes back
within 1 or 2%. A trace has each kernel's duration, which comes back within 0.3% where calls take turns with rests: for
short calls, and for changes smaller than that. It needs a GPU.

`kernel us` is the longest kernel of a call and `others us` the sum of the rest (ranges, counters; delta, zeros and
casts of a backward), medians of the samples. `time / tiles` is the kernel's time over causal's, over the same ratio of
the pairs in tiles of 128 x 128 that hold a visible one. Results are compared with float32 before, and a kind that falls
short is not timed.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from bench import Report, flags
from bench_calls import calls, check
from bench_inputs import MODELS, Inputs, Mask, masks, step_range, tile_area
from bench_picture import Chart
from trace_events import Event, read

from zigzag_jax.kernels import FLASH, flash_implementation
from zigzag_jax.kernels.flash.contract import Settings
from zigzag_jax.ranges import KeyRange

TIMES = Chart(("kernel us",), ("kind",), ("pass",))
REST = 0.03  # seconds before a call; the kernels of one follow each other in much less
TRACES = 3  # at most, of the same calls: a host that pauses inside of one tears it in two


def by_call(events: Sequence[Event], count: int) -> list[tuple[float, float]]:
    """(longest event, sum of the others), microseconds, of each of `count` calls that had rests between them.

    ValueError where the rests do not tell so many calls apart.
    """
    runs: list[list[float]] = []
    end = float("-inf")
    for event in events:
        if event.start - end > REST / 2 * 1e6:
            runs.append([])
        runs[-1].append(event.end - event.start)
        end = max(end, event.end)
    if len(runs) != count:
        raise ValueError(f"the trace must hold {count} calls with rests of {REST} s, got {len(runs)}")
    return [(max(run), sum(run) - max(run)) for run in runs]


def traced[K](functions: Mapping[K, Callable[[], Any]], samples: int) -> dict[K, tuple[float, float]]:
    """Medians of what `by_call` finds, of functions that take turns."""
    order = list(functions) * samples
    found: dict[K, list[tuple[float, float]]] = {key: [] for key in functions}
    for key, times in zip(order, _told_apart([functions[key] for key in order]), strict=True):
        found[key].append(times)
    medians = lambda times: tuple(statistics.median(column) for column in zip(*times, strict=True))
    return {key: medians(times) for key, times in found.items()}


def _told_apart(run: Sequence[Callable[[], Any]]) -> list[tuple[float, float]]:
    """What `by_call` finds of these calls, in the first of TRACES in which it can."""
    for _ in range(TRACES - 1):
        events = _trace(run)
        try:
            return by_call(events, len(run))
        except ValueError as torn:
            print(f"{torn}: traced anew", file=sys.stderr)
    return by_call(_trace(run), len(run))


def _trace(run: Sequence[Callable[[], Any]]) -> list[Event]:
    """What a GPU does in these calls, one after another with rests."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for call in run:
                time.sleep(REST)
                jax.block_until_ready(call())
        return max(read(Path(folder)).values(), key=len)  # of the GPU that is used


def kinds(length: int) -> dict[str, KeyRange]:
    """Causal, which is a ring's diagonal; its other steps; documents and windows, one of 4096 among them."""
    found = masks(length) | ({"window 4096": Mask(window=4096)} if length > 4096 else {})
    masked = {name: step_range(0, 0, 1, length, "zigzag", *mask) for name, mask in found.items()}
    steps = {"front": step_range(1, 0, 4, length), "back": step_range(1, 2, 4, length)}
    return {"causal": masked["causal"]} | steps | masked


def rows(name: str, x: Inputs, ranges: Mapping[str, KeyRange], samples: int) -> list[dict]:
    """The table of one model; `time / tiles` is left out where causal is not among the ranges."""
    table, causal = [], {}
    for kind, keys in ranges.items():
        runs = calls(name, x, keys)
        for (_, which), (kernel, others) in (traced(runs, samples) if runs else {}).items():
            if kind == "causal":
                causal[which] = kernel
            ratio = None
            if which in causal:
                ratio = kernel / causal[which] / (tile_area(keys) / tile_area(ranges["causal"]))
            table.append({
                "kind": kind, "pass": which, "kernel us": kernel, "others us": others, "time / tiles": ratio
            })  # fmt: skip
    return table


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--implementation", choices=list(FLASH), help="default: what the device picks")
    parser.add_argument("--models", type=lambda text: text.split(","), default=["qwen"], help=f"of {', '.join(MODELS)}")
    parser.add_argument("--tokens", type=int, default=8192, help="of a call")
    parser.add_argument("--samples", type=int, default=7)
    flags(parser, quick=False)
    args = parser.parse_args(argv)
    if unknown := [name for name in args.models if name not in MODELS]:
        parser.error(f"--models must be of {', '.join(MODELS)}, got {', '.join(unknown)}")
    if args.tokens < 1 or args.tokens % 256:
        parser.error(f"--tokens must be a multiple of 256, got {args.tokens}")
    if args.samples < 1:
        parser.error(f"--samples must be at least 1, got {args.samples}")
    if jax.default_backend() != "gpu":
        parser.error(f"a GPU must be there, whose trace has its kernels' durations, got {jax.default_backend()}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Check, time, print; 1 where a result falls short of the bars."""
    args = parse(argv)
    report = Report("kernel_times", argv, args.out)
    for model in args.models:
        x = Inputs.draw(MODELS[model], args.tokens, "bfloat16")
        name = args.implementation or flash_implementation(*x[:3], Settings(x.scale, None))
        ranges = kinds(args.tokens)
        right = report.check(f"{model} check", check(name, x, ranges, "kind"), by="kind")
        report.add(f"{model}, {name}", rows(name, x, {kind: ranges[kind] for kind in right}, args.samples), TIMES)
    return report.status


if __name__ == "__main__":
    sys.exit(main())
