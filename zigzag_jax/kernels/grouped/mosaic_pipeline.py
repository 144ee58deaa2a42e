"""What the two Hopper kernels of the grouped matmul share: who takes which item, the slots, and the way out.

An *item* is a tile of the result; its *steps* run over the contraction, 64 at a time. One block a streaming
multiprocessor stays for the whole kernel (persistent) and takes items in turn; in each, the producer streams two tiles
a step through `stages` slots of shared memory and two consumer warpgroups multiply, 64 rows of the result each:

    producer       s0 s1 s2 s3 | s0 s1 ...                       a slot is free when both consumers have left it
    tensor core       s0 s1 s2 | s3    s0 s1 ...                 one wgmma of [64, 256] x 64 always in flight a consumer
    way out                            registers > shared memory > TMA, while the next item's tiles arrive

Items are shared out in one of two ways. *Fixed*: item j belongs to block j modulo blocks, one warp produces. *Drawn*:
the producer takes the next number of a counter in global memory, in the middle of an item, where its latency is hidden;
the item travels to the consumers as a record in shared memory, under the signal of the item's first tile. Drawing
evens out items of different lengths, and lets neighbouring blocks drift apart, which costs reuse in L2 where the
contraction is long (mosaic_tuning.py).
"""

# Pallas' annotations do not know refs, layouts and the inline_mgpu decorator; the compile tests check these calls
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportGeneralTypeIssues=false

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from zigzag_jax.kernels.hopper import (
    WARP,
    WARPGROUP,
    NamedBarriers,
    check_registers,
    draw,
    i32,
    launch,
    sm_count,
    smem,
    with_numbers,
)

ROWS = 64  # of the result that a consumer computes: the M of a wgmma
CONSUMERS = 2
TILE = CONSUMERS * ROWS
STEP = 64  # of the contraction

LOADS = 2  # copies by TMA in a step: one of each operand
_RECORDS = 8  # items between producer and consumers: at most one a slot, and those being read
_FIELDS = 8  # int32 of a record, 5 used
_END = -2  # in the first field: there are no more items

Record = tuple[jax.Array, ...]  # int32 scalars; the first is the group, -1 for rows of no group


@dataclasses.dataclass(frozen=True)
class GroupedTuning:
    """What may differ between the matmuls without changing the kernels' idea."""

    columns: int = 256
    """Of a tile of the result: the N of a wgmma. The accumulator takes columns / 2 registers a thread."""

    stages: int = 4
    """Slots of shared memory: steps on their way."""

    drawn: bool = True
    """Blocks draw their items from a counter, instead of fixed shares."""

    registers: tuple[int, int] = (232, 40)
    """Registers a thread of consumers and producer."""

    def __post_init__(self) -> None:
        if self.columns not in (128, 256):
            raise ValueError(f"columns must be 128 or 256 (two buffers take turns on the way out), got {self.columns}")
        check_registers(CONSUMERS, self.registers)


class Items(Protocol):
    """The items of a kernel."""

    count: jax.Array

    def at(self, index) -> Record:
        """Item `index`; a clamped one where there is none."""
        ...

    def steps(self, record: Record) -> jax.Array:
        """Steps of an item, at least one."""
        ...


def run(
    body: Callable, *arrays, out_type, tiles: dict[str, tuple[int, ...]], tuning: GroupedTuning, name: str,
    loads: int = LOADS, scratch: dict | None = None,
) -> Any:  # fmt: skip
    """Launch `body(*refs, *out_refs, out_smem, full, records, **tiles, **scratch)`.

    `tiles` are a slot's operands, brought by `loads` copies a step. With `tuning.drawn` the last ref before the results
    is the counter. `out_smem` has the dtype of the first result.
    """
    dt, out_dtype = arrays[0].dtype, jax.tree.leaves(out_type)[0].dtype
    scratch = (scratch or {}) | {key: smem((tuning.stages, *shape), dt, 64) for key, shape in tiles.items()}
    scratch |= {
        "out_smem": smem((CONSUMERS, 2, ROWS, 128 // jnp.dtype(out_dtype).itemsize), out_dtype),
        "full": plgpu.Barrier(num_arrivals=loads, num_barriers=tuning.stages),
    }
    if tuning.drawn:
        scratch["records"] = plgpu.SMEM((_RECORDS * _FIELDS + _FIELDS,), jnp.int32)
        arrays = with_numbers(jnp.zeros(1, jnp.int32), *arrays)
    return launch(
        body, *arrays, out_type=out_type, scratch_types=scratch, grid=(sm_count(),), grid_names=("sm",),
        warpgroups=CONSUMERS + 1, name=name,
    )  # fmt: skip


class Pipeline:
    """A block's items and slots, in the same order for producer and consumers."""

    def __init__(self, tuning: GroupedTuning, items: Items, full, counter, records, loads: int = LOADS) -> None:
        self.tuning, self.items, self.full, self.counter, self.records = tuning, items, full, counter, records
        self.loads = loads
        producer = WARPGROUP if tuning.drawn else WARP
        self.free = NamedBarriers(4, tuning.stages, CONSUMERS * WARPGROUP + producer)

    def roles(self, work: Callable[[jax.Array, Record], None], load: Callable[..., None]) -> None:
        """Run the block: consumers call work(slot, record) for each item, the producer load(slot, record, step)."""

        def consumer():
            plgpu.set_max_registers(self.tuning.registers[0], action="increase")
            for s in range(self.tuning.stages):
                self.free.arrive(s)
            (self._consume_drawn if self.tuning.drawn else self._consume_share)(work)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def producer():
            plgpu.set_max_registers(self.tuning.registers[1], action="decrease")
            (self._produce_drawn if self.tuning.drawn else self._produce_share)(load)

        lax.cond(lax.axis_index("wg") < CONSUMERS, consumer, producer)

    # ------------------------------------------------------------------------------------------------ fixed shares
    def _share(self):
        """How many items this block has."""
        return lax.div(self.items.count - lax.axis_index("sm") + (sm_count() - 1), i32(sm_count()))

    def _mine(self, j):
        return self.items.at(j * sm_count() + lax.axis_index("sm"))

    def _consume_share(self, work) -> None:
        def one(j, state):
            slot, record = state
            following = self._mine(j + 1)  # read an item ahead
            work(slot, record)
            return self._after(slot, self.items.steps(record)), following

        lax.fori_loop(i32(0), self._share(), one, (i32(0), self._mine(i32(0))))

    def _produce_share(self, load) -> None:
        def one(j, slot):
            record = self._mine(j)
            return self._load(load, slot, record, i32(0), self.items.steps(record))

        @plgpu.warp_map
        def _(warp):
            @pl.when(warp == 0)
            def _():
                lax.fori_loop(i32(0), self._share(), one, i32(0))

    # ------------------------------------------------------------------------------------------------ drawn items
    def _consume_drawn(self, work) -> None:
        def one(state):
            _, slot, at = state
            plgpu.barrier_wait(self.full.at[slot])  # the record was written before its first tile was asked for
            record = tuple(self.records[at * _FIELDS + i] for i in range(5))
            live = record[0] > _END
            pl.when(live)(lambda: work(slot, record))
            steps = jnp.where(live, self.items.steps(record), 0)
            return record[0], self._after(slot, steps), lax.rem(at + 1, i32(_RECORDS))

        lax.while_loop(lambda state: state[0] > _END, one, (i32(0), i32(0), i32(0)))

    def _produce_drawn(self, load) -> None:
        def next_item():
            index = draw(self.counter, self.records.at[_RECORDS * _FIELDS])
            return index, self.items.at(index)

        def one(state):
            _, record, slot, at = state
            for i, value in enumerate(record):
                self.records[at * _FIELDS + i] = value
            steps = self.items.steps(record)
            half = lax.div(
                steps + 1, i32(2)
            )  # one at least: its slot is waited for, which parts one draw from the next
            slot = self._load(load, slot, record, i32(0), half)
            index, following = next_item()
            slot = self._load(load, slot, record, half, steps)
            return index, following, slot, lax.rem(at + 1, i32(_RECORDS))

        state = (*next_item(), i32(0), i32(0))
        _, _, slot, at = lax.while_loop(lambda state: state[0] < self.items.count, one, state)
        self.records[at * _FIELDS] = i32(_END)
        self.free.sync(slot)
        for _ in range(self.loads):  # in their place
            plgpu.barrier_arrive(self.full.at[slot])

    # ------------------------------------------------------------------------------------------------ slots
    def _after(self, slot, steps):
        return lax.rem(slot + steps, i32(self.tuning.stages))

    def following(self, slot):
        """The slot after this one."""
        return jnp.where(slot == self.tuning.stages - 1, 0, slot + 1)

    def _previous(self, slot):
        return jnp.where(slot == 0, self.tuning.stages - 1, slot - 1)

    def _load(self, load, slot, record: Record, first, end):
        """Producer: steps [first, end) of an item; returns the slot after them."""

        def one(step, slot):
            self.free.sync(slot)
            load(slot, record, step)
            return self.following(slot)

        return lax.fori_loop(first, end, one, slot)

    def _wait(self, slot, step) -> None:
        if self.tuning.drawn:  # the first wait came with the record
            pl.when(step > 0)(lambda: plgpu.barrier_wait(self.full.at[slot]))
        else:
            plgpu.barrier_wait(self.full.at[slot])

    def multiply(
        self, slot, record: Record, wgmma: Callable[..., None], before: Callable[..., None] | None = None,
        steps: int | None = None, a_step: int = 1,
    ):  # fmt: skip
        """Consumer: wgmma(slot) for every step, after before(slot, step); a slot is left when its wgmma is done.

        Each wgmma runs on while the next step is waited for and prepared. `steps`: how many multiply, all by default;
        `a_step`: how many wgmma each begins. Returns the slot after them.
        """

        def one(step, slot):
            self._wait(slot, step)
            if before is not None:
                before(slot, step)
            wgmma(slot)
            plgpu.wgmma_wait(a_step)
            pl.when(step > 0)(lambda: self.free.arrive(self._previous(slot)))
            return self.following(slot)

        slot = lax.fori_loop(i32(0), self.items.steps(record) if steps is None else i32(steps), one, slot)
        plgpu.wgmma_wait(0)
        self.free.arrive(self._previous(slot))
        return slot

    def skip(self, slot, record: Record) -> None:
        """Consumer: leave every slot of an item as it comes."""

        def one(step, slot):
            self._wait(slot, step)
            self.free.arrive(slot)
            return self.following(slot)

        lax.fori_loop(i32(0), self.items.steps(record), one, slot)


# -------------------------------------------------------------------------------------------------------- the way out
# Two buffers of 128 byte rows a warpgroup take turns; a tile has an even number of pieces, so the next begins with the
# buffer that was used before the last one.


def send(values, buffers, put: Callable[[int, Any], None]) -> None:
    """A warpgroup's values [64, columns]: put(p, buffer) for each piece of them, in shared memory.

    `put` begins one group of copies by TMA, which may be empty; after ordinary loads of the buffer it need not wait.
    """
    width = buffers.shape[-1]
    for p in range(values.shape[1] // width):
        send_piece(values[:, p * width : (p + 1) * width], buffers.at[p % 2], functools.partial(put, p))


def send_piece(values, buffer, put: Callable[[Any], None]) -> None:
    """One piece by one of the two buffers, which its caller takes in turn."""
    plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the copy from this buffer, not that from the other
    buffer[...] = values
    plgpu.commit_smem()  # a barrier too: all threads are done with the other buffer
    put(buffer)
