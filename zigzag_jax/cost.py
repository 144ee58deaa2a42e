"""What context parallelism costs, on paper: each rank's work and bytes, and how long ranks wait for each other.

Work is counted in pairs of a query and a key that it sees, exactly, from the same bounds as ranges.py's, on the host.
The constants that make seconds of it were measured (docs/benchmarks.md).

In a ring, rank r attends at step s to the keys of rank (r - s) % cp while it passes them on. Its next step begins when
its kernel is done and its hop too, and a hop is done when both neighbours have come to it:

    begin[s + 1, r] = max(begin[s, r] + kernel[s, r] + toll * hop[s], max(begin[s] of r - 1, r, r + 1) + hop[s])

where the toll is what a hop takes from the kernel that it flies beside.

Plain causal attention in zigzag order gives every rank the same work at every step, and nobody waits. Documents and
windows do not: who has little to do at a step waits. The upper bound, in which everybody waits for the slowest at every
step, is `lock_step`; `critical_path` follows the dependencies above. An all-gather waits once, for all bytes at the
start and for the slowest rank's sum at the end, and needs the memory of cp payloads.

    >>> pairs(cp=4, length=8)                      # [step, rank]: the diagonal, then half of the keys or of the queries
    array([[36, 36, 36, 36],
           [32, 32, 32, 32],
           [32, 32, 32, 32],
           [32, 32, 32, 32]])
"""

import itertools
from typing import Literal, NamedTuple

import numpy as np

from zigzag_jax.layout import CHUNKS, Layout, chunk_starts
from zigzag_jax.ranges import live_steps

Payload = Literal["latent", "expanded"]


class Machine(NamedTuple):
    """A GPU and the links to its neighbours."""

    forward: float = 660e12
    """FLOP/s of the attention kernel: cp4-s32k's forward on one H100 takes 3.3 ms, MLA's kernel has 655 to 670."""
    backward: float = 640e12
    """The same, 8.6 ms; delta and casts are in it."""
    matmul: float = 650e12
    """FLOP/s of a large matmul."""
    memory: float = 3e12
    """Bytes a second."""
    link: float = 200e9
    """Bytes a second one way between neighbours: a hop of 17 MB through NCCL between two H200 on NVLink. 50e9: one port
    of 400 Gb/s."""
    toll: float = 0.95
    """By how much of a hop's time the kernel beside it takes longer: NCCL's kernel holds multiprocessors of which each
    has a block of the attention kernel. A backward step on two H200 takes 2.16 ms with a hop of 34 MB beside it, 0.17
    ms, and 2.00 without. Of all constants the least certain: one size, two GPUs. 0: hops are free where they hide."""


H100 = Machine()


class Layer(NamedTuple):
    """The attention of one layer, as far as it costs anything."""

    heads: int
    """H, of the queries."""
    dim: int
    """D, of q and k."""
    out_dim: int
    """E, of v."""
    payload: int
    """Values a token that travel; their gradient travels in float32."""
    itemsize: int = 2
    """Bytes of each."""
    rank: int = 0
    """R of a latent that is expanded at every step (mla.py); 0: k and v travel as they are."""


class Seconds(NamedTuple):
    """Of one layer's attention, all ranks together: when the last has finished."""

    forward: float
    backward: float

    @property
    def both(self) -> float:
        """Their sum."""
        return self.forward + self.backward


# ---------------------------------------------------------------------------------------------------------------- work
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
    """Sum over steps of the busiest rank's work [step, rank], as a multiple of the mean rank's."""
    return float(work.max(axis=1).sum() / work.sum(axis=0).mean())


def busiest(work: np.ndarray) -> float:
    """Sum over steps of the rank that has most, as a multiple of the mean rank's: what an all-gather waits for."""
    return float(work.sum(axis=0).max() / work.sum(axis=0).mean())


# ------------------------------------------------------------------------------------------------------------- seconds
def critical_path(kernels: np.ndarray, hops: list[float], gaps: list[int], toll: float = 0.0) -> float:
    """When the last rank has finished `kernels` [step, rank], in seconds.

    hops: seconds that what flies beside each step's kernel takes; 0: nothing. gaps: how many ranks it goes on.
    """
    begin = np.zeros(kernels.shape[1])
    for kernel, hop, gap in zip(kernels, hops, gaps, strict=True):
        ends = begin + kernel + toll * hop
        if hop:
            met = np.maximum(np.maximum(begin, np.roll(begin, gap)), np.roll(begin, -gap))
            ends = np.maximum(ends, met + hop)
        begin = ends
    return float(begin.max())


def ring_seconds(
    layer: Layer, cp: int, length: int, work: np.ndarray, *, rows: int = 1, window: int | None = None,
    layout: Layout = "zigzag", machine: Machine = H100,
) -> Seconds:  # fmt: skip
    """Of the ring (ring.py). work: `pairs` of the same cp, length, window and layout, all `rows` of a rank's batch."""
    steps = live_steps(cp, length, window, layout)
    payload, gradient = _hop_seconds(layer, rows * length, machine)
    made = _expansion(layer, rows * length, machine)
    kernels = work * (2 * layer.heads * (layer.dim + layer.out_dim) / machine.forward) + made
    gaps = [after - before for before, after in itertools.pairwise([*steps, steps[-1]])]
    forward = critical_path(kernels, [*[payload] * (len(steps) - 1), 0.0], gaps, machine.toll)
    # the diagonal last; its gradient's hop leads home, from the last step
    order = [*range(1, len(steps)), 0]
    kernels = work[order] * (2 * layer.heads * (3 * layer.dim + 2 * layer.out_dim) / machine.backward) + 3 * made
    n = len(steps)
    flying = [payload * (at < n - 2) + gradient * (at > 0) for at in range(n)]
    backward = critical_path(kernels, flying, [*gaps[1:-1], *[cp - steps[-1]] * min(n, 2)][:n], machine.toll)
    return Seconds(forward, backward)


def gather_seconds(
    layer: Layer, cp: int, length: int, work: np.ndarray, *, rows: int = 1, machine: Machine = H100
) -> Seconds:
    """Of strategy "allgather": work as in ring_seconds. Copies into natural order are not counted."""
    payload, gradient = _hop_seconds(layer, rows * length, machine)
    most, made = int(work.sum(axis=0).max()), cp * _expansion(layer, rows * length, machine)
    forward = most * 2 * layer.heads * (layer.dim + layer.out_dim) / machine.forward
    backward = most * 2 * layer.heads * (3 * layer.dim + 2 * layer.out_dim) / machine.backward
    fetch = (cp - 1) * payload
    return Seconds(fetch + forward + made, fetch + backward + 3 * made + (cp - 1) * gradient)


def _hop_seconds(layer: Layer, tokens: int, machine: Machine) -> tuple[float, float]:
    """Of the payload and of its float32 gradient."""
    values = tokens * layer.payload / machine.link
    return values * layer.itemsize, values * 4


def _expansion(layer: Layer, tokens: int, machine: Machine) -> float:
    """Seconds in which k and v are made of one rank's latent: a matmul, and what it made is read and written once more
    when it is laid out as k and v. Its gradient takes three times as long: made again, and two matmuls.
    """
    if not layer.rank:
        return 0.0
    made = tokens * layer.heads * (layer.dim + layer.out_dim)
    return 2 * layer.rank * made / machine.matmul + 3 * layer.itemsize * made / machine.memory


# ------------------------------------------------------------------------------------------------------------- choices
def choose_strategy(ring: Seconds, gather: Seconds) -> Literal["ring", "allgather"]:
    """The faster one; but the ring, which needs a cp-th of the memory, unless the all-gather saves a tenth (two H200
    took a fifth longer for its backward than predicted).
    """
    return "allgather" if gather.both < 0.9 * ring.both else "ring"


def choose_payload(
    cp: int, rows: int, length: int, sizes: tuple[int, int, int, int, int], itemsize: int, *, machine: Machine = H100
) -> Payload:
    """The form of MLA's keys and values (mla.py) with which a ring takes less time, forward and backward.

    rows: of a rank's batch. length: tokens of each that a rank holds. sizes: (latent, rope, heads, dim, out_dim).

    >>> lite = (512, 64, 16, 192, 128)
    >>> choose_payload(4, 1, 8192, lite, 2), choose_payload(4, 1, 8192, lite, 2, machine=H100._replace(toll=0))
    ('latent', 'expanded')
    """
    if cp == 1:
        return "expanded"  # nothing travels
    latent, rope, heads, dim, out_dim = sizes
    work = np.full((cp, 1), rows * length * length // 2)  # every rank's, of a plain causal mask
    whole = Layer(heads, dim, out_dim, heads * (dim + out_dim), itemsize)
    small = whole._replace(payload=latent + rope, rank=latent)
    once = 4 * _expansion(small, rows * length, machine)
    time = lambda layer: ring_seconds(layer, cp, length, work, rows=rows, machine=machine).both
    return "expanded" if once + time(whole) < time(small) else "latent"


__all__ = [
    "H100", "Layer", "Machine", "Payload", "Seconds", "busiest", "choose_payload", "choose_strategy", "critical_path",
    "gather_seconds", "lock_step", "pairs", "ring_seconds",
]  # fmt: skip
