"""A profiler trace as a timeline: for each GPU what it computed, what it moved, and when it did nothing."""

from pathlib import Path

from trace_events import Event, Span, union, without
from trace_hops import attends, hops

LANES = {  # name: (colour, top and height in a GPU's row)
    "attention kernels": ("#30638e", 0.05, 0.40),
    "other kernels": ("#9fb8cc", 0.05, 0.40),
    "communication beside a kernel": ("#edae49", 0.50, 0.25),
    "communication alone (exposed)": ("#d1495b", 0.50, 0.25),
    "nothing (bubble)": ("#4a4a4a", 0.80, 0.08),
}
LABELLED = 30  # hops of a GPU: the numbers of more would cover each other


def lanes(events: list[Event]) -> list[list[Span]]:
    """What is drawn in each lane, microseconds."""
    works, moves = ([e for e in events if e.moves_data == moving] for moving in (False, True))
    busy, moving = union(e.span for e in works), union(e.span for e in moves)
    exposed, whole = without(moving, busy), union([*busy, *moving])
    attention = union(e.span for e in works if attends(e))
    nothing = without([(whole[0][0], whole[-1][1])], whole) if whole else []
    return [attention, without(busy, attention), without(moving, exposed), exposed, nothing]


def draw(gpus: dict[str, list[Event]], path: Path) -> None:
    """A row a GPU; each hop has a number."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(14, 1.1 * len(gpus) + 1.4), layout="constrained")
    for row, events in enumerate(gpus.values()):
        for (name, (colour, top, height)), spans in zip(LANES.items(), lanes(events), strict=True):
            bars = [(start / 1e3, (end - start) / 1e3) for start, end in spans]
            axes.broken_barh(bars, (row + top, height), facecolors=colour, label=name if row == 0 else None)
        found = hops(events)
        for number, hop in enumerate(found if len(found) <= LABELLED else [], 1):
            middle = (hop.start + hop.end) / 2e3
            axes.text(middle, row + 0.625, str(number), ha="center", va="center", fontsize=7)
    axes.set_yticks([row + 0.4 for row in range(len(gpus))], list(gpus))
    axes.set(xlabel="ms", ylim=(len(gpus), 0))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", ncols=len(LANES), fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
