"""How far context parallelism scales, on paper: the cost model (zigzag_jax/cost.py) over cp and sequence length.

    python examples/scale_on_paper.py                          plain causal, NVLink's hops
    python examples/scale_on_paper.py --link 50e9              one port of 400 Gb/s a GPU
    python examples/scale_on_paper.py --documents 32 --png scale.png

One layer's attention, forward and backward, of Qwen3-30B-A3B, one row. `% of ideal` is the share of the time in which a
rank computes for itself: mean work over the time of the whole. No device is used and nothing is run.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from bench_common import MODELS, documents, table

from zigzag_jax.cost import H100, Layer, Machine, along_critical_path, gather_seconds, lock_step, pairs, ring_seconds

LENGTHS = tuple(2**n for n in (15, 17, 19, 20, 22))  # 32k .. 4M
RANKS = tuple(2**n for n in range(9))  # 1 .. 256
SHORTEST = 256  # tokens a rank: two tiles of a kernel


class Point(NamedTuple):
    """One sequence length on so many ranks."""

    length: int
    cp: int
    lock_step: float
    path: float
    """Along the critical path, with hops that take no time: both as a multiple of the mean rank's work."""
    sent: int
    """Bytes that a rank of the ring sends, forward and backward."""
    hop: float
    """Seconds of a forward hop."""
    ideal: float
    """Seconds of the mean rank's work."""
    ring: float
    gather: float
    gathered: int
    """Bytes of the keys and values that an all-gather holds."""


def predict(layer: Layer, length: int, cp: int, machine: Machine, count: int) -> Point:
    """The model's numbers; `count` documents of random lengths in the row."""
    positions = np.asarray(documents(count, length)) if count > 1 else None
    work = pairs(cp, length // cp, positions=positions)
    alone = machine._replace(link=float("inf"))
    mean = np.full((1, 1), work.sum() // cp)
    return Point(
        length, cp, lock_step(work), along_critical_path(work, tuple(range(cp))),
        sent=(cp - 1) * length // cp * layer.payload * 2 * (layer.itemsize + 2),  # twice itself, once its gradient
        hop=length // cp * layer.payload * layer.itemsize / machine.link,
        ideal=ring_seconds(layer, 1, length // cp, mean, machine=alone).both,
        ring=ring_seconds(layer, cp, length // cp, work, machine=machine).both,
        gather=gather_seconds(layer, cp, length // cp, work, machine=machine).both,
        gathered=length * layer.payload * layer.itemsize,
    )  # fmt: skip


def row(p: Point) -> dict:
    """A line of the table."""
    return {
        "tokens": f"{p.length >> 10}k", "cp": p.cp, "a rank": p.length // p.cp, "lock step": p.lock_step,
        "critical path": p.path, "sent GiB": p.sent / 2**30,
        "hop ms": 1e3 * p.hop if p.cp > 1 else None, "ideal ms": 1e3 * p.ideal, "ring ms": 1e3 * p.ring,
        "ring % of ideal": p.ideal / p.ring, "all-gather ms": 1e3 * p.gather,
        "all-gather % of ideal": p.ideal / p.gather, "gathered GiB": p.gathered / 2**30,
    }  # fmt: skip


def draw(points: list[Point], path: Path, title: str) -> None:
    """Share of the ideal over cp: a colour a length, the ring's lines whole and the all-gather's dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for colour, length in enumerate(sorted({p.length for p in points})):
        own = [p for p in points if p.length == length]
        style = {"color": f"C{colour}", "marker": "o", "markersize": 3}
        cps = [p.cp for p in own]
        axes.plot(cps, [100 * p.ideal / p.ring for p in own], label=f"{length >> 10}k tokens", **style)
        axes.plot(cps, [100 * p.ideal / p.gather for p in own], linestyle="--", alpha=0.6, **style)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="cp", ylabel="% of ideal", ylim=(0, 103), title=title)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend(title="ring (all-gather dashed)")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--link", type=float, default=H100.link, help="bytes a second between neighbours, one way")
    parser.add_argument("--documents", type=int, default=1, help="documents of random lengths in the row")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="TOKENS")
    parser.add_argument("--png", type=Path, help="a file for the curves (needs matplotlib)")
    args = parser.parse_args(argv)
    if not args.link > 0:
        parser.error(f"--link must be > 0 bytes a second, got {args.link}")
    if wrong := [n for n in args.lengths if n < SHORTEST or n % (2 * SHORTEST)]:
        parser.error(f"--lengths must be multiples of {2 * SHORTEST}, got {wrong[0]}")
    if not 1 <= args.documents <= min(args.lengths):
        parser.error(f"--documents must be 1 to {min(args.lengths)}, got {args.documents}")
    heads = MODELS["qwen"]
    layer = Layer(heads.heads, heads.dim, heads.out_dim, heads.kv_heads * (heads.dim + heads.out_dim))
    machine = H100._replace(link=args.link)
    ranks = lambda length: [cp for cp in RANKS if length % (2 * cp) == 0 and length // cp >= SHORTEST]
    points = [predict(layer, n, cp, machine, args.documents) for n in args.lengths for cp in ranks(n)]
    print(table([row(p) for p in points]))
    if args.png:
        kind = "plain causal" if args.documents == 1 else f"{args.documents} documents"
        draw(points, args.png, f"attention of one layer, predicted: {kind}, {args.link / 1e9:g} GB/s a hop")
    return 0


if __name__ == "__main__":
    sys.exit(main())
