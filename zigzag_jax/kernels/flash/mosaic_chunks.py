"""Chunks: how blocks share the items of the backward, so that none idles while another has work left.

An *item* is a walk over the query tiles that see a tile of keys. It is long (a millisecond at 8192 tokens) and there
may be fewer than two a multiprocessor, so that the last ones to begin end alone. So a walk is cut into *chunks*. The
block that has the item claims them from the first on, in step with the blocks that read the same queries; *helpers*,
blocks behind those of the items, which begin where the card has nothing else left, claim from the last on, of the item
with most left. A block may begin late, too, because another kernel (NCCL's, which moves the next step's keys) holds its
multiprocessor.

What claims is a warp of the producer, half a chunk ahead; it leaves a *record* in shared memory for the rest of the
block. An item's first chunk is its own block's without a claim. Blocks that had parts of one item add up what they
found: the first to end stores, the others add to it.
"""

# Pallas' annotations do not know refs
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportPrivateImportUsage=false

from typing import NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu

from zigzag_jax.kernels.flash.mosaic_numbers import padded
from zigzag_jax.kernels.hopper import i32, next_turn, wait_turn

RECORDS = 2  # the next chunk is claimed when every warp has read the record that lay in its place
_FIELDS = 4  # of which three are used: 16 bytes are one store
_LEFT = 1 << 16  # a counter of chunks holds the number left times this, and the first of them
SIZE = RECORDS * _FIELDS  # int32 numbers of all records
CHUNKS = 32  # of all items, for each multiprocessor: what ends last is one, so this is 3% of a call
SHORTEST, LONGEST = 8, 64  # tiles of a chunk, which come first
HELPERS = 2  # blocks a multiprocessor; each helps one item to its end
_MOST = 1 << 15  # chunks that a counter can hold


class Record(NamedTuple):
    """What a block does next: int32 scalars."""

    item: jax.Array
    """-1: nothing."""
    first: jax.Array
    """Where in the item's walk the chunk begins."""
    end: jax.Array
    """The tiles that the block has done when it is done with the chunk: no more than before where there is none."""


NOTHING = Record(-1, 0, 0)  # what a helper has before it claims


def shares(lengths, total, longest: int, blocks: int, whole: bool):
    """What blocks share in global memory, of the length of each item's walk, int32 [items].

    total: the sum of lengths, float32. longest: as long as a walk can be. whole: each item is one chunk.
    int32 [3 x items, padded to fours, + items + 1]: which chunks of an item are left (their number times 2^16, and the
    first of them), the blocks that ended it, whether one of them has stored; the lengths, and that of a chunk.
    """
    some = jnp.clip((total / (CHUNKS * blocks)).astype(jnp.int32), SHORTEST, LONGEST)
    chunk = i32(longest) if whole else lax.max(some, i32(longest // _MOST + 1))
    # behind the first chunk, which is the owner's
    left = lax.max(lax.div(lengths - 1, jnp.broadcast_to(chunk, lengths.shape)), jnp.zeros_like(lengths))
    pitch = padded(lengths.size)
    left = jnp.pad(left * _LEFT + 1, (0, pitch - lengths.size))
    return jnp.concatenate([left, jnp.zeros(2 * pitch, jnp.int32), lengths, chunk[None]])


class Chunks:
    """A block's view.

    numbers: a ref to the `shares` of so many items; records: shared memory, int32 [SIZE or more]; full: RECORDS
    barriers.
    """

    def __init__(self, numbers, items: int, records, full) -> None:
        self.numbers, self.items, self.records, self.full = numbers, items, records, full
        self.pitch = padded(items)

    @staticmethod
    def after(at):
        """The record after this one."""
        return lax.rem(at + 1, i32(RECORDS))

    def begin(self, item) -> None:
        """The item's first chunk is this block's: record 0. One warp."""
        count = lax.min(self._length(item), self._length(self.items))  # behind the items' lengths is a chunk's
        for i, value in enumerate(Record(item, i32(0), count)):
            self.records[i] = value
        plgpu.barrier_arrive(self.full.at[0])

    def claim(self, at, own, last: Record) -> None:
        """Claim a chunk, hand it over as record `at`. One warp.

        own: whether the item of the `last` record is the block's own; NOTHING where a helper looks for one.
        """
        operands = (i32(x) for x in (at, own, last.item, last.end))
        _claim(self.numbers, self.records, self.items, self.pitch, *operands)
        plgpu.barrier_arrive(self.full.at[at])

    def _length(self, item):
        return self.numbers[3 * self.pitch + item]

    def take(self, at) -> Record:
        """Wait for record `at` and read it: once by each warp."""
        plgpu.barrier_wait(self.full.at[at])
        return Record(*(self.records[at * _FIELDS + i] for i in range(len(Record._fields))))

    def add_up(self, item, done, write) -> None:
        """Store what this block found of the item, `done` tiles, or add it to what other blocks found. One warp.

        write(None) stores by TMA, write("add") adds.
        """

        def alone():
            write(None)

        def shared():
            first = _count_up(self.numbers, i32(self.pitch) + item) == 0
            stored = i32(2 * self.pitch) + item

            def store():
                write(None)
                plgpu.wait_smem_to_gmem(0)
                next_turn(self.numbers, stored)

            def add():
                wait_turn(self.numbers, stored, i32(1))
                write("add")

            lax.cond(first, store, add)

        lax.cond(done == self._length(item), alone, shared)


def _claim(numbers, records, items: int, pitch: int, at, own, item, done) -> None:
    """Write record `at`; see Record and `shares`. own: whether the block has the item; item -1: look for one."""
    lengths = 4 * 3 * pitch  # where they begin, in bytes
    larger = """
            add.s32 i, i, 1;
            """.join(
        f"""setp.gt.s32 p, {n}, most;
            selp.b32 item, i, item, p;
            max.s32 most, most, {n};"""
        for n in ("n0", "n1", "n2", "n3")
    )

    @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * 2, *[plgpu.Layout.WG_SPLAT] * 4))
    def claim(_, numbers, records, at, own, item, done):
        mgpu.utils.inline_ptx(
            f"""{{
            .reg .pred p, owner, leader, looking;
            .reg .b32 lane, item, chunk, place, left, most, i, n0, n1, n2, n3;
            .reg .b64 a;
            mov.u32 lane, %laneid;
            setp.eq.u32 leader, lane, 0;
            setp.ne.s32 owner, $3, 0;
            mov.b32 item, $4;
            setp.lt.s32 looking, item, 0;
            @!looking bra take;

            search:
            mov.b32 most, {_LEFT - 1};
            shl.b32 i, lane, 2;
            next:
            setp.ge.s32 p, i, {pitch};
            @p bra searched;
            mad.wide.s32 a, i, 4, $0;
            ld.relaxed.gpu.global.v4.b32 {{n0, n1, n2, n3}}, [a];
            {larger}
            add.s32 i, i, 125;
            bra next;
            searched:
            bar.warp.sync 0xffffffff;
            redux.sync.max.s32 left, most, 0xffffffff;
            setp.lt.s32 p, left, {_LEFT};
            @p bra nothing;
            setp.eq.s32 p, left, most;
            vote.sync.ballot.b32 i, p, 0xffffffff;
            bfind.u32 i, i;
            shfl.sync.idx.b32 item, item, i, 31, 0xffffffff;

            take:
            mad.wide.s32 a, item, 4, $0;
            mov.b32 i, {-_LEFT};
            @owner add.s32 i, i, 1;
            @leader atom.relaxed.gpu.global.add.u32 place, [a], i;
            shfl.sync.idx.b32 place, place, 0, 31, 0xffffffff;
            shr.s32 left, place, 16;
            and.b32 place, place, {_LEFT - 1};
            setp.gt.s32 p, left, 0;
            @p bra found;
            @looking bra search;

            nothing:
            mov.b32 item, -1;
            mov.b32 left, 0;
            bra write;

            found:
            @owner bra first;
            add.s32 place, place, left;
            sub.s32 place, place, 1;
            first:
            ld.global.b32 chunk, [$0 + {lengths + 4 * items}];
            ld.global.b32 left, [a + {lengths}];
            mul.lo.s32 place, place, chunk;
            sub.s32 left, left, place;
            min.s32 left, left, chunk;

            write:
            add.s32 left, left, $5;
            mad.lo.s32 i, $2, {4 * _FIELDS}, $1;
            @leader st.shared.v4.b32 [i], {{item, place, left, 0}};
            }}""",
            mgpu.utils.memref_ptr(numbers), mgpu.utils.memref_ptr(records),
            at.registers[()], own.registers[()], item.registers[()], done.registers[()], convergent=True,
        )  # fmt: skip

    claim(numbers, records, at, own, item, done)


def _count_up(counters, index):
    """What counters[index] was, which is one more now: the same for all threads of the calling warp."""
    result = plgpu.ShapeDtypeStruct((), jnp.int32, plgpu.Layout.WG_SPLAT)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT), return_type=result)
    def up(_, ref, i):
        before = mgpu.utils.inline_ptx(
            """{
            .reg .pred p;
            .reg .b32 t;
            .reg .b64 a;
            mad.wide.s32 a, $2, 4, $1;
            mov.u32 t, %laneid;
            setp.eq.u32 p, t, 0;
            @p atom.relaxed.gpu.global.add.u32 t, [a], 1;
            shfl.sync.idx.b32 $0, t, 0, 31, 0xffffffff;
            }""",
            mgpu.utils.memref_ptr(ref), i.registers[()],
            result_types=mgpu.utils.dtype_to_ir_type(jnp.int32), has_side_effects=True, convergent=True,
        )  # fmt: skip
        return mgpu.FragmentedArray.splat(before, (), is_signed=True)

    return up(counters, index)
