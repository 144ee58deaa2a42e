"""Pictures of how evenly a ring's work is spread, as the library's cost model counts it."""

import runpy
from pathlib import Path

import numpy as np
from canvas import INK, QUIET, RANKS, Canvas

from zigzag_jax.cost import lock_step, pairs

BALANCE = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "balance.py"))


def work_per_hop() -> Canvas:
    """Bars: what each rank does at each step, naive and zigzag; the ring waits for the tallest."""
    cp, block = 4, (BALANCE["LENGTH"] / 4) ** 2
    canvas = Canvas(820, 320, "Work of each rank at each step of the ring, naive and zigzag layout")
    for panel, layout in enumerate(("contiguous", "zigzag")):
        work = pairs(cp, BALANCE["LENGTH"] // cp, layout=layout) / block
        left, ground, high = 40 + 400 * panel, 230, 150
        path = work.max(axis=1).sum()
        canvas.text(left, 22, "naive" if layout == "contiguous" else "zigzag", size=15, bold=True)
        canvas.text(left, 44, f"waits for {path:.2f} blocks in all, mean rank {work.sum() / cp:.2f}", size=12)
        canvas.line(left - 6, ground, left + 350, ground, QUIET)
        for step in range(cp):
            x = left + 88 * step
            for rank in range(cp):
                tall = max(high * work[step, rank], 1)
                canvas.rect(x + 18 * rank, ground - tall, 17, tall, RANKS[rank], stroke=None)
            tallest = ground - high * work[step].max()
            canvas.line(x - 3, tallest, x + 74, tallest, INK, dash="3 2")
            canvas.text(x + 36, ground + 14, f"step {step}", size=12, anchor="middle", fill=QUIET)
    canvas.legend(40, 272, [(RANKS[r], f"rank {r}") for r in range(cp)], 80)
    canvas.text(40, 298, "1 block: all queries of a rank over all keys of another; dashed: what a step takes",
                size=12, fill=QUIET)  # fmt: skip
    return canvas


def balance_over_cp() -> Canvas:
    """Curves: the lock step of the ring over cp, for documents and windows."""
    sizes = (1, 2, 4, 8)
    path = lambda cp, **mask: lock_step(pairs(cp, BALANCE["LENGTH"] // cp, **mask))
    packed = lambda count: [
        np.mean([path(cp, positions=BALANCE["documents"](count, seed)) for seed in range(4)]) for cp in sizes
    ]
    curves = {
        "zigzag, one document": [path(cp) for cp in sizes],
        "naive, one document": [path(cp, layout="contiguous") for cp in sizes],
        "zigzag, 4 documents": packed(4),
        "zigzag, 16 documents": packed(16),
        "zigzag, window 512": [path(cp, window=512) for cp in sizes],
    }
    canvas = Canvas(820, 350, "Time of a ring in lock step over cp, for several masks")
    left, ground, wide, high = 60, 290, 460, 240
    top = max(max(curve) for curve in curves.values())
    y_of = lambda value: ground - high * (value - 1) / (top - 1)
    canvas.text(left, 20, "Ring in lock step: its time / time if all were busy", size=15, bold=True)
    for tick in np.arange(1, top + 0.01, 0.5):
        canvas.line(left, y_of(tick), left + wide, y_of(tick), "#dde2e7")
        canvas.text(left - 8, y_of(tick), f"{tick:g}", size=12, anchor="end", fill=QUIET)
    for n, cp in enumerate(sizes):
        canvas.text(left + wide * n / 3, ground + 16, f"cp {cp}", size=12, anchor="middle", fill=QUIET)
    for n, (name, curve) in enumerate(curves.items()):
        canvas.path([(left + wide * i / 3, y_of(value)) for i, value in enumerate(curve)], RANKS[n])
        canvas.rect(560, 63 + 28 * n, 12, 12, RANKS[n])
        canvas.text(580, 69 + 28 * n, f"{name}: {curve[-1]:.2f} at cp 8")
    canvas.text(left, 334, f"{BALANCE['LENGTH']} tokens; documents of random lengths, mean of 4 draws", size=12,
                fill=QUIET)  # fmt: skip
    return canvas
