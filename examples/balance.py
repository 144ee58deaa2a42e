"""How evenly a ring's work is spread: zigzag, the naive contiguous layout, documents and windows. No device is used.

    JAX_PLATFORMS=cpu python examples/balance.py

A ring runs in lock step, so its time is the sum over steps of what the busiest rank has to do (the critical path). Its
work is counted in scores, pairs of a query and a key it sees, from the library's own key ranges. 1.00 means that every
rank is busy all the time.
"""

import jax.numpy as jnp
import numpy as np

from zigzag_jax.layout import Layout, global_positions
from zigzag_jax.ranges import key_range, visible_bounds

LENGTH = 4096


def scores(cp: int, layout: Layout, positions: np.ndarray | None = None, window: int | None = None) -> np.ndarray:
    """Scores of each (step, rank), float64 [cp, cp]; positions int32 [1, LENGTH] in natural order."""
    local = LENGTH // cp
    work = np.zeros((cp, cp))
    for rank in range(cp):
        g = global_positions(rank, cp, local, layout)
        own = None if positions is None else jnp.asarray(positions[:, np.asarray(g)])
        lo, hi = visible_bounds(g, own, window)
        for step in range(cp):
            keys = key_range(lo, hi, (rank - step) % cp, cp, local, layout)
            work[step, rank] = np.maximum(np.asarray(keys.stop) - np.asarray(keys.start), 0).sum()
    return work


def critical_path(work: np.ndarray) -> float:
    """Sum over steps of the busiest rank's scores, as a multiple of the mean rank's."""
    return float(work.max(axis=1).sum() / work.sum(axis=0).mean())


def documents(count: int, seed: int) -> np.ndarray:
    """Positions of `count` documents of random lengths in one row: int32 [1, LENGTH]."""
    cuts = np.sort(np.random.default_rng(seed).choice(np.arange(1, LENGTH), count - 1, replace=False))
    starts = np.zeros(LENGTH, np.int32)
    for cut in cuts:
        starts[cut:] = cut
    return (np.arange(LENGTH, dtype=np.int32) - starts)[None]


def main() -> None:
    """Print the table."""
    rows = [documents(8, seed) for seed in range(8)]
    print("| cp | zigzag | contiguous | contiguous / zigzag | zigzag, 8 documents | zigzag, window 512 |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for cp in (2, 4, 8):
        zigzag, naive = scores(cp, "zigzag"), scores(cp, "contiguous")
        ratio = naive.max(axis=1).sum() / zigzag.max(axis=1).sum()
        packed = np.mean([critical_path(scores(cp, "zigzag", positions=row)) for row in rows])
        windowed = critical_path(scores(cp, "zigzag", window=512))
        columns = (critical_path(zigzag), critical_path(naive), ratio, packed, windowed)
        print(f"| {cp} | " + " | ".join(f"{x:.2f}" for x in columns) + " |")


if __name__ == "__main__":
    main()
