"""What context parallelism costs, on paper: seconds that the ranks of a ring compute, send, and wait for each other.

work.py counts each rank's work exactly. The constants that make seconds of it were measured; how well they predict
other runs: docs/schedule.md.

In a ring, rank r attends at step s to the keys of rank (r - s) % cp while it passes them on (hops.py). Its next step
begins when its kernel is done and its hop too. A hop by n ranks takes from rank r - n and gives to rank r + n, and is
done when both have come to it; a payload and a gradient beside one kernel go by ways of their own and share the link:

    begin[s + 1, r] = max(begin[s, r] + kernel[s, r] + toll * sum of hop[s],
                          max(begin[s] of r and of r - n, r + n for each hop by n) + sum of hop[s])

where the toll is what a hop takes from the kernel that it flies beside. The backward's first hop flies beside the
matmul that makes dout and is taken as free. `critical_path` follows these dependencies. An all-gather waits once, for
all bytes at the start and for the slowest rank's sum at the end, and needs the memory of cp payloads.
"""

from typing import Literal, NamedTuple

import numpy as np

from zigzag_jax.hops import Hop, backward_hops, forward_hops
from zigzag_jax.layout import Layout
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


class LatentSizes(NamedTuple):
    """The sizes of multi-head latent attention (mla.py)."""

    latent: int
    """R, of the vector that k and v of all heads are made of."""
    rope: int
    """P, of the rotary key that the heads share."""
    heads: int
    """H."""
    dim: int
    """D, of q and k."""
    out_dim: int
    """E, of v."""

    @property
    def payloads(self) -> dict[str, int]:
        """Values a token that a forward hop carries, in each form.

        >>> LatentSizes(latent=512, rope=64, heads=16, dim=192, out_dim=128).payloads
        {'latent': 576, 'expanded': 4160}
        """
        own = self.heads * (self.dim - self.rope + self.out_dim)
        return {"latent": self.latent + self.rope, "expanded": own + self.rope}


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
    """The pass that makes the result."""
    backward: float
    """The pass that makes the gradients, with all that it computes again."""

    @property
    def both(self) -> float:
        """Their sum."""
        return self.forward + self.backward


# ------------------------------------------------------------------------------------------------------------- seconds
class Flight(NamedTuple):
    """A hop beside a kernel."""

    seconds: float
    """That it takes, alone on the link."""
    by: int
    """How many ranks it goes on."""


def critical_path(kernels: np.ndarray, flights: list[list[Flight]], toll: float = 0.0) -> float:
    """When the last rank has finished `kernels` [step, rank], in seconds. flights: what flies beside each step's."""
    begin = np.zeros(kernels.shape[1])
    for kernel, beside in zip(kernels, flights, strict=True):
        taken = sum(flight.seconds for flight in beside)
        ends = begin + kernel + toll * taken
        if beside:
            partners = [np.roll(begin, way * flight.by) for flight in beside for way in (1, -1)]
            ends = np.maximum(ends, np.max([begin, *partners], axis=0) + taken)
        begin = ends
    return float(begin.max())


def along_critical_path(work: np.ndarray, live: tuple[int, ...]) -> float:
    """The ring's forward where hops take no time, as a multiple of the mean rank's work [live step, rank]."""
    flights = [[Flight(0.0, hop.by)] if hop.by else [] for hop in forward_hops(live)]
    return critical_path(work.astype(float), flights) / float(work.sum(axis=0).mean())


def ring_seconds(
    layer: Layer, cp: int, length: int, work: np.ndarray, *, rows: int = 1, window: int | None = None,
    layout: Layout = "zigzag", machine: Machine = H100,
) -> Seconds:  # fmt: skip
    """Of the ring (ring.py). work: `pairs` (work.py) of the same cp, length, window and layout, of all rows."""
    live = live_steps(cp, length, window, layout)
    payload, gradient = _hop_seconds(layer, rows * length, machine)
    made = _expansion(layer, rows * length, machine)

    def path(hops: list[Hop], seconds_a_pair: float, expansion: float) -> float:
        kernels = work[[live.index(hop.step) for hop in hops]] * seconds_a_pair + expansion
        flights = [
            [Flight(seconds, by) for seconds, by in ((payload, hop.by), (gradient, hop.came)) if by] for hop in hops
        ]
        return critical_path(kernels, flights, machine.toll)

    forward = 2 * layer.heads * (layer.dim + layer.out_dim) / machine.forward
    backward = 2 * layer.heads * (3 * layer.dim + 2 * layer.out_dim) / machine.backward
    return Seconds(path(forward_hops(live), forward, made), path(backward_hops(live, cp), backward, 3 * made))


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
    """Seconds in which k and v are made of one rank's latent: two matmuls, whose results are written. Its gradient
    takes three times as long: made again, and two matmuls. That a backward lays k out, in either form, is not counted.
    """
    if not layer.rank:
        return 0.0
    rope = layer.payload - layer.rank
    made = tokens * layer.heads * (layer.dim - rope + layer.out_dim)
    return made * (2 * layer.rank / machine.matmul + layer.itemsize / machine.memory)


# ------------------------------------------------------------------------------------------------------------- choices
def choose_strategy(ring: Seconds, gather: Seconds) -> Literal["ring", "allgather"]:
    """The faster one; but the ring, which needs a cp-th of the memory, unless the all-gather saves a tenth (two H200
    took a fifth longer for its backward than predicted).
    """
    return "allgather" if gather.both < 0.9 * ring.both else "ring"


def choose_payload(
    cp: int, rows: int, length: int, sizes: LatentSizes, itemsize: int, *,
    strategy: Literal["ring", "allgather"] = "ring", machine: Machine = H100,
) -> Payload:  # fmt: skip
    """The form of MLA's keys and values (mla.py) with which `strategy` takes less time, forward and backward.

    rows: of a rank's batch. length: tokens of each that a rank holds. Which link it is need not be known: over any of
    25e9 to 400e9 bytes a second the latent of DeepSeek-V2 and of Lite takes less time.

    >>> lite = LatentSizes(latent=512, rope=64, heads=16, dim=192, out_dim=128)
    >>> choose_payload(4, 1, 8192, lite, 2), choose_payload(4, 1, 8192, lite, 2, machine=H100._replace(toll=0))
    ('latent', 'expanded')
    """
    if cp == 1:
        return "expanded"  # nothing travels
    work = np.full((cp, 1), rows * length * length // 2)  # every rank's, of a plain causal mask
    whole = Layer(sizes.heads, sizes.dim, sizes.out_dim, sizes.payloads["expanded"], itemsize)
    small = whole._replace(payload=sizes.payloads["latent"], rank=sizes.latent)
    once = 4 * _expansion(small, rows * length, machine)
    seconds = gather_seconds if strategy == "allgather" else ring_seconds
    time = lambda layer: seconds(layer, cp, length, work, rows=rows, machine=machine).both
    return "expanded" if once + time(whole) < time(small) else "latent"


__all__ = [
    "H100", "Flight", "LatentSizes", "Layer", "Machine", "Payload", "Seconds", "along_critical_path",
    "choose_payload", "choose_strategy", "critical_path", "gather_seconds", "ring_seconds",
]  # fmt: skip
