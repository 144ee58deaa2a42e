"""How much attention each rank of a ring computes at each step: pairs of a query and a key that it sees.

They are counted exactly, from the same bounds as ranges.py's, on the host.

Plain causal attention in zigzag order gives every rank the same work at every step, and nobody waits. Documents and
windows do not: who has little to do at a step waits for others. `lock_step` is the upper bound of that, in which
everybody waits for the busiest at every step; cost.py has what lies between.

    >>> pairs(cp=4, length=8)                      # [step, rank]: the diagonal, then half of the keys or of the queries
    array([[36, 36, 36, 36],
           [32, 32, 32, 32],
           [32, 32, 32, 32],
           [32, 32, 32, 32]])
"""

import numpy as np

from zigzag_jax.layout import CHUNKS, Layout, chunk_starts
from zigzag_jax.ranges import live_steps


def pairs(
    cp: int, length: int, *, layout: Layout = "zigzag", positions: np.ndarray | None = None, window: int | None = None
) -> np.ndarray:
    """Pairs of a query and a key it sees, int64 [live steps, cp]: at each of `live_steps(cp, length, window)`, by rank.

    length: tokens a rank. positions: int [B, cp * length], natural order, or None: one document a row; rows of a batch
    are added up. ValueError for positions of another length.
    """
    steps = live_steps(cp, length, window, layout)
    if positions is not None and positions.shape[1:] != (cp * length,):
        raise ValueError(f"positions must be [B, {cp * length}], got {list(positions.shape)}")
    chunk = length // CHUNKS[layout]
    starts = np.array([chunk_starts(rank, cp, length, layout) for rank in range(cp)])
    sources = (np.arange(cp) - np.array(steps)[:, None]) % cp
    work = np.zeros(sources.shape, np.int64)
    for rank in range(cp):
        g = (starts[rank][:, None] + np.arange(chunk)).reshape(-1)
        for row in [None] if positions is None else positions:
            lo = np.zeros_like(g) if row is None else g - row[g]
            lo = lo if window is None else np.maximum(lo, g - window + 1)
            edges = np.stack([starts, starts + chunk])[:, sources[:, rank]]  # [edge, step, chunk]
            seen = _beyond(g + 1, edges) - _beyond(lo, edges)
            work[:, rank] += np.sum(seen[0] - seen[1], axis=-1)
    return work


def _beyond(bounds: np.ndarray, t: np.ndarray) -> np.ndarray:
    """sum(max(bounds - t, 0)) for each t, of bounds that never decrease: a search, and a running sum from the end."""
    tails = np.append(np.cumsum(bounds[::-1])[::-1], 0)
    at = np.searchsorted(bounds, t)
    return tails[at] - t * (len(bounds) - at)


def lock_step(work: np.ndarray) -> float:
    """Sum over steps of the busiest rank's work [step, rank], as a multiple of the mean rank's: a ring in lock step."""
    return float(work.max(axis=1).sum() / work.sum(axis=0).mean())


def busiest(work: np.ndarray) -> float:
    """Sum over steps of the rank that has most, as a multiple of the mean rank's: what an all-gather waits for."""
    return float(work.sum(axis=0).max() / work.sum(axis=0).mean())


__all__ = ["busiest", "lock_step", "pairs"]
