"""What each device gives to transfers during a step, read off the schedule of the compiled step (zigzag_jax/hlo.py).

Loops are counted as often as they run. What is given to a gather or a reduction goes on to all others. XLA may put
several small arrays of one hop into one transfer, or leave out what nobody needs, so these are the program's own
numbers; those of --dry-run follow from the model's sizes.
"""

from collections import defaultdict
from typing import NamedTuple

from zigzag_jax.hlo import Program

HOP = "collective-permute"
_COVERS = ("flash_fwd", "flash_bwd", "matmul")  # what lasts long enough to hide a hop


class Travel(NamedTuple):
    """All transfers of one kind and size."""

    kind: str
    """Of zigzag_jax.hlo.MOVES; a hop of the ring is a collective-permute."""
    size: int
    """Bytes that a device gives each time."""
    times: float
    """How many of them a step has; nan where XLA does not know how often a loop runs."""
    asynchronous: float
    """How many of these run beside other work."""
    covered: float
    """How many of those have a kernel of the attention or a matmul between their start and their done."""


def travels(program: Program) -> tuple[Travel, ...]:
    """Every transfer of a scheduled program, those first that carry most bytes in all."""
    found: dict[tuple[str, int], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for flight in program.flights():
        counts = found[flight.kind, flight.size]
        covered = flight.asynchronous and any(name in flight.under for name in _COVERS)
        for n, counted in enumerate((True, flight.asynchronous, covered)):
            counts[n] += flight.times * counted
    every = [Travel(*what, *counts) for what, counts in found.items()]
    return tuple(sorted(every, key=lambda x: (-x.size * x.times, x.kind)))


def hops_said(every: tuple[Travel, ...]) -> str:
    """How many hops of the ring there are, and how they run, as words."""
    counts = [(x.times, x.asynchronous, x.covered) for x in every if x.kind == HOP]
    if not counts:
        return "no hops"
    times, asynchronous, covered = map(sum, zip(*counts, strict=True))
    return f"{times:g} hops a step, {asynchronous:g} asynchronous, {covered:g} above a kernel"


def table(every: tuple[Travel, ...], most: int = 8) -> list[str]:
    """A line for each kind and size, the `most` that carry most."""
    lines = []
    for x in every[:most]:
        how = f"{x.asynchronous:g} asynchronous, {x.covered:g} above a kernel"
        lines.append(f"{x.times:10g} x {x.size / 2**20:10.3f} MiB  {x.kind}, {how}")
    if rest := every[most:]:
        total = sum(x.size * x.times for x in rest)
        lines.append(f"{sum(x.times for x in rest):10g} more, together {total / 2**20:.3f} MiB")
    return lines
