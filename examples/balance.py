"""How evenly a ring's work is spread: zigzag, the naive contiguous layout, documents and windows. No device is used.

    JAX_PLATFORMS=cpu python examples/balance.py

Lock step: were every rank to wait for the busiest at each step, a ring's time would be the sum over steps of what that
one has to do, and 1.00 would mean that every rank is busy all the time. A rank waits for those it exchanges with only,
so lock step is the upper bound of the critical path; an all-gather waits for the rank with the largest sum. Work is
counted in scores, pairs of a query and a key it sees, from the library's own key ranges.
"""

import numpy as np

from zigzag_jax.cost import along_critical_path, busiest, lock_step, pairs

LENGTH = 4096


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
    names = (
        "cp", "zigzag", "contiguous", "contiguous / zigzag", "zigzag, window 512", "zigzag, 8 documents",
        "its critical path", "all-gather, 8 documents",
    )  # fmt: skip
    print("| " + " | ".join(names) + " |")
    print("| " + " | ".join(["---:"] * len(names)) + " |")
    for cp in (2, 4, 8):
        local = LENGTH // cp
        zigzag, naive = pairs(cp, local), pairs(cp, local, layout="contiguous")
        ratio = naive.max(axis=1).sum() / zigzag.max(axis=1).sum()
        packed = [pairs(cp, local, positions=row) for row in rows]
        columns = (
            lock_step(zigzag), lock_step(naive), ratio, lock_step(pairs(cp, local, window=512)),
            np.mean([lock_step(work) for work in packed]),
            np.mean([along_critical_path(work, tuple(range(cp))) for work in packed]),
            np.mean([busiest(work) for work in packed]),
        )  # fmt: skip
        print(f"| {cp} | " + " | ".join(f"{x:.2f}" for x in columns) + " |")


if __name__ == "__main__":
    main()
