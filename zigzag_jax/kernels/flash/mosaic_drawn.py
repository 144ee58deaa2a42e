"""Items that the forward kernel draws from a counter, in the place of fixed shares.

With fixed shares every block is sure of a multiprocessor of its own. Beside another kernel that holds some (NCCL's,
which moves the next step's keys) the blocks left over begin when the first ones end, and the call takes twice as long.
Blocks that draw leave nothing to a late one: it finds the counter at its end.

The producer draws the next item in the middle of one, where the round trip to global memory is hidden, reads the edges
of its rows' ranges, and hands both to the consumers as a *record* in shared memory. Two records take turns, with a
signal of their own, for an item that sees nothing brings no tile whose signal could stand for it:

    producer    record 0 | tiles of item 0 .. draw .. tiles | record 1 | ...           waits until record - 2 was left
    consumers             | read, then as ever              | read ...
"""

# Pallas' annotations do not know refs
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportPrivateImportUsage=false

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from zigzag_jax.kernels.flash.mosaic_items import Edges
from zigzag_jax.kernels.hopper import NamedBarriers, draw, i32, raise_to

RECORDS = 2
_FIELDS = 6  # the item's number, the part of it, and four edges of its rows' ranges

SCRATCH = {
    "records": plgpu.SMEM((RECORDS * _FIELDS + 1,), jnp.int32),  # and a box for what was drawn
    "record_full": plgpu.Barrier(num_barriers=RECORDS),
}


class Drawn:
    """The records of a block; `at` counts them, modulo RECORDS."""

    def __init__(self, counter, records, full, free: NamedBarriers) -> None:
        self.counter, self.records, self.full, self.free = counter, records, full, free

    def draw(self) -> jax.Array:
        """Producer, the whole warpgroup: the next number, one that is no item's after the last. Once a record."""
        return draw(self.counter, self.records.at[RECORDS * _FIELDS])

    def skip_to(self, number) -> None:
        """Producer: numbers below this one need not be drawn."""
        raise_to(self.counter, number)

    def hand_over(self, at, *record) -> None:
        """Producer, the whole warpgroup: the item, the part of it, its edges."""
        self.free.sync(at)
        for i, value in enumerate(record):
            self.records[at * _FIELDS + i] = value
        plgpu.commit_smem()  # a barrier: all threads have written
        plgpu.barrier_arrive(self.full.at[at])

    def take(self, at) -> tuple[jax.Array, Edges]:
        """Consumers: the next item and its edges."""
        plgpu.barrier_wait(self.full.at[at])
        item, *edges = (self.records[at * _FIELDS + i] for i in (0, *range(2, _FIELDS)))
        return item, edges

    def again(self, at) -> tuple[jax.Array, jax.Array]:
        """Consumers, between `take` and `leave`: the item, and the part of it. Costs no register until then."""
        return self.records[at * _FIELDS], self.records[at * _FIELDS + 1]

    def leave(self, at) -> None:
        """Consumers: the record's item is done."""
        self.free.arrive(at)

    @staticmethod
    def after(at):
        """The record after this one."""
        return lax.rem(at + 1, i32(RECORDS))
