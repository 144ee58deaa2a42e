"""What bench_attention.py says of whole rings: ranks, strategies and masks.

On one GPU the ranks of a ring can only take turns, and nothing travels. What is measured is each rank's own work; the
slowest rank's is the compute critical path, for under a plain causal mask the slowest rank is busy at every step. What
the wire adds to it is modelled (zigzag_jax/cost.py, its kernels as fast as those measured here): hops that outlast
their kernel, what a hop takes from the kernel that it flies beside, and for the all-gather all of the bytes.

With documents or a window ranks wait for each other as well: the slowest rank is the one with most pairs, and the ring
takes between its own time and the lock step of all.
"""

import math

from bench_inputs import Mask
from bench_picture import Chart
from bench_rings import STRATEGIES, Case, Rings

from zigzag_jax import cost

PATH, WIRE = "compute critical path ms", "modelled wire ms"
SUM = "compute critical path plus the modelled wire ms"
RANKS = Chart(("fwd ms", "bwd ms"), ("strategy", "rank", "by"), stacked=True)
PATHS = Chart((PATH, WIRE), ("strategy", "by"), stacked=True)
AREAS = Chart(("time / causal", "area / causal", "lock step / causal"), ("mask",), ("by",))


def ranks(rings: Rings) -> list[dict]:
    """Every rank of the zigzag ring, of the naive ring and of the all-gather."""
    rows = []
    cases = {(strategy, rank): Case(strategy, rank) for strategy in STRATEGIES for rank in range(rings.cp)}
    for name in rings.names:
        found = rings.timed(cases, name)
        both = {case: sum(ms.values()) for case, ms in found.items()}
        zigzag = [t for (strategy, _), t in both.items() if strategy == "zigzag ring"]
        for (strategy, rank), ms in found.items():
            t, work = both[strategy, rank], sum(rings.flops(cases[strategy, rank]).values())
            rows.append({
                "strategy": strategy, "rank": rank, "by": name, "fwd ms": ms["fwd"], "bwd ms": ms["bwd"],
                "both ms": t, "TF/s": work / t / 1e9, "/ slowest zigzag": t / max(zigzag),
            })  # fmt: skip
    return rows


def paths(rings: Rings, rows: list[dict], link: float) -> list[dict]:
    """What cp GPUs would take, of the rows of `ranks`, and the naive ring's time in terms of it.

    link: bytes a second between neighbours, one way.
    """
    found = []
    for name in dict.fromkeys(row["by"] for row in rows):
        path, wires = {}, {}
        for strategy in STRATEGIES:
            own = [row for row in rows if (row["by"], row["strategy"]) == (name, strategy)]
            path[strategy] = max(row["both ms"] for row in own)
            wires[strategy] = modelled_wire(rings, strategy, own, link)
        total = {strategy: path[strategy] + wires[strategy] for strategy in STRATEGIES}
        found += [
            {
                "strategy": strategy, "by": name, PATH: path[strategy], WIRE: wires[strategy], SUM: total[strategy],
                "naive / path": path["naive ring"] / path[strategy],
                "naive / path plus wire": total["naive ring"] / total[strategy],
            }
            for strategy in STRATEGIES
        ]  # fmt: skip
    return found


def modelled_wire(rings: Rings, strategy: str, rows: list[dict], link: float) -> float:
    """Milliseconds that communication adds to the ring's forward and backward, by the cost model alone: with the wire
    and without. What was measured, the rows of the strategy's ranks, gives the speed of its kernels.
    """
    layout, gathers = STRATEGIES[strategy]
    work = [rings.flops(Case(strategy, row["rank"])) for row in rows]
    rate = lambda which: sum(x[which] for x in work) / sum(row[f"{which} ms"] for row in rows) * 1e3
    machine = cost.H100._replace(forward=rate("fwd"), backward=rate("bwd"), link=link)
    layer, counted = rings.heads.layer(rings.x.q.dtype.itemsize), rings.pairs(Mask(), layout)

    def seconds(machine: cost.Machine) -> float:
        if gathers:
            return cost.gather_seconds(layer, rings.cp, rings.length, counted, machine=machine).both
        return cost.ring_seconds(layer, rings.cp, rings.length, counted, layout=layout, machine=machine).both

    return (seconds(machine) - seconds(machine._replace(link=math.inf))) * 1e3


def masks(rings: Rings) -> list[dict]:
    """Documents and windows: the slowest rank's zigzag ring and the pairs that it sees, beside plain causal's.

    `lock step` is what the pairs say of a ring whose ranks all wait for each other at every step.
    """
    rows, cases = [], rings.slowest()
    work = {title: rings.pairs(case.mask) for title, case in cases.items()}
    area = {title: int(work[title][:, case.rank].sum()) for title, case in cases.items()}
    lock = {title: int(steps.max(axis=1).sum()) for title, steps in work.items()}
    for name in rings.names:
        found = rings.timed(cases, name)
        for title, ms in found.items():
            both, causal, share = sum(ms.values()), sum(found["causal"].values()), area[title] / area["causal"]
            rows.append({
                "mask": title, "slowest rank": cases[title].rank, "by": name,
                "fwd ms": ms["fwd"], "bwd ms": ms["bwd"], "both ms": both,
                "time / causal": both / causal, "area / causal": share, "time / area": both / causal / share,
                "lock step / causal": lock[title] / lock["causal"],
            })  # fmt: skip
    return rows


def balance(rows: list[dict]) -> str:
    """What the ranks' table says, a line an implementation."""
    lines = []
    for name in dict.fromkeys(row["by"] for row in rows):
        times = lambda s, name=name: [row["both ms"] for row in rows if (row["by"], row["strategy"]) == (name, s)]
        zigzag = times("zigzag ring")
        lines.append(
            f"{name}: naive / zigzag {max(times('naive ring')) / max(zigzag):.3f} "
            f"(by pairs {2 - 1 / len(zigzag):.3f}), slowest / fastest zigzag rank {max(zigzag) / min(zigzag):.3f}"
        )
    return "\n".join(lines)
