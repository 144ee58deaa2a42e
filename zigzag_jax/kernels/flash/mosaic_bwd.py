"""Flash attention backward for Hopper: five matmuls in one kernel, in Pallas Mosaic GPU.

A block owns 128 keys of one kv head (an *item*; 64 where its consumers halve the columns), and walks over the query
tiles (64 rows) of all heads of the group that see any of them (mosaic_walk.py); blocks that would idle help it
(mosaic_chunks.py). With keys along the rows of every score tile (FlashAttention-2, Dao 2023, algorithm 2;
FlashAttention-3, Shah et al. 2024, section 3),

    S = K Q^T - lse / scale      P = exp2(scale log2(e) S)      dP = V dO^T - delta      dS = P dP
    dV += P dO                   dK += dS Q                     dQ = dS^T K

P stays in registers for dV, and dS for dK; both are complete when the item ends. lse and delta enter as the *starting
values* of the accumulators. dS goes through shared memory, too, so that each warpgroup computes half of dQ's columns
over all 128 keys (where consumers halve all columns, P and dS go this way only). dQ is staged in float32 and added to
global memory by TMA (reduce-add), issued by a warp of the producer, and at the end dK and dV the same way:

    producer warp 0   Q dO of the next tile                          tensor core   S dP | dV dQ dK | S dP | ...
    producer warp 1   dQ of the last tile, added to global memory    other units      P dS      dQ out
    producer warp 3   what to do next (`deterministic`: once, by warp 0)

What the consumers do, and why in that order: mosaic_bwd_tiles.py.

`deterministic` makes the blocks that add to a tile of dQ take turns in the order of their keys; two warps then add
alternately, each waiting for its own tile's turn. Blocks start in that order too, so each waits for running ones only.
"""

# Pallas' annotations do not know refs, layouts and the inline_mgpu decorator; the compile tests check these calls
# and static flags guard the names that pyright takes for unbound
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportPrivateImportUsage=false, reportAbstractUsage=false, reportGeneralTypeIssues=false

import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from zigzag_jax.kernels.flash import mosaic_chunks, mosaic_numbers, mosaic_walk
from zigzag_jax.kernels.flash.contract import LOG2E, Settings
from zigzag_jax.kernels.flash.mosaic_bwd_tiles import (
    CONSUMERS,
    FIRST_KEY,
    KEYS,
    MORE,
    RANGES,
    STAGE_NOTE,
    STARTS,
    STOPS,
    BackwardTuning,
    Block,
    Consumer,
    Shape,
    slot,
    zero,
)
from zigzag_jax.kernels.flash.mosaic_walk import QUERY_TILE, Items, Walk
from zigzag_jax.kernels.hopper import i32, launch, next_turn, sm_count, wait_turn
from zigzag_jax.ranges import KeyRange


def flash_bwd(
    q, k, v, lse, delta, dout, keys: KeyRange, settings: Settings, dq, deterministic: bool, tuning: BackwardTuning
):
    """The contract's backward; Sq is a multiple of QUERY_TILE, Sk of the key_tile; dq is there to be added to."""
    batch, rows, heads, dim = q.shape
    key_rows, kv_heads, out_dim = v.shape[1:]
    shape = Shape(dim, out_dim, q.dtype, settings, deterministic, tuning)
    # -inf, the lse of a row that saw nothing, would give inf - inf
    lse = jnp.where(lse == -jnp.inf, 0.0, lse)
    if settings.softcap is None:
        lse = (math.log(shape.scale_in_p) - lse) / settings.scale
    else:
        lse = -LOG2E * lse
    visits = mosaic_walk.visits(keys, key_rows, tuning.key_tile)
    items = Items(
        batch, kv_heads, heads // kv_heads, key_rows // tuning.key_tile,
        head_bytes=rows * ((dim + out_dim) * q.dtype.itemsize + dim * dq.dtype.itemsize), take_turns=deterministic,
    )  # fmt: skip
    query_tiles = rows // QUERY_TILE
    order = items.order(visits)
    lengths, (total, by_head) = items.lengths(visits, order), items.sums(visits)
    shares = mosaic_chunks.shares(lengths, total, query_tiles * items.group, sm_count(), whole=deterministic)
    numbers = [shares, by_head, visits, order, *keys]
    if deterministic:
        turn = jnp.zeros(batch * heads * query_tiles, jnp.int32)
        numbers += [mosaic_walk.first_visitor(visits, query_tiles), turn]
    helpers = 0 if deterministic else mosaic_chunks.HELPERS * sm_count()
    dq_ref, numbers_ref = jax.new_ref(dq), jax.new_ref(mosaic_numbers.join(*numbers))
    gradient = lambda columns: jax.ShapeDtypeStruct((items.splits * batch, key_rows, kv_heads, columns), jnp.float32)
    dk, dv = launch(
        functools.partial(_kernel, shape, items, [x.shape for x in numbers]),
        q, k, v, dout, lse, -delta, dq_ref, numbers_ref,
        out_type=(gradient(dim), gradient(out_dim)),
        scratch_types={**shape.memory(), "record_full": plgpu.Barrier(num_barriers=mosaic_chunks.RECORDS)},
        grid=(items.count + helpers,), grid_names=("block",), warpgroups=CONSUMERS + 1, name="flash_bwd",
    )  # fmt: skip
    summed = (lambda x: x) if items.splits == 1 else (lambda x: x.reshape(items.splits, batch, *x.shape[1:]).sum(0))
    return jax.freeze(dq_ref), summed(dk), summed(dv)


def _kernel(
    shape: Shape, items: Items, shapes,
    q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, dq_ref, numbers_ref, dk_ref, dv_ref, *, record_full, **memory,
):  # fmt: skip
    shares, by_head, visits, order, starts, stops, *turns = mosaic_numbers.parts(numbers_ref, shapes)
    batch, rows, heads, _ = q_ref.shape
    tuning, deterministic, piece = shape.tuning, shape.deterministic, shape.piece

    wg, number = lax.axis_index("wg"), lax.axis_index("block")
    block = Block(shape, **memory)
    own = number < items.count  # else it is a helper
    mine = lambda record: jnp.where(own, number, record.item)  # the block's item; -1: there is none
    chunks = mosaic_chunks.Chunks(shares.numbers, items.count, block.notes, record_full)

    def consumer():
        plgpu.set_max_registers(tuning.registers[0], action="increase")
        record = chunks.take(i32(0))
        run = functools.partial(Consumer(block, (starts, stops), wg).run, record.end)
        accumulators = (plgpu.ACC((KEYS, columns), jnp.float32) for columns in (shape.dk_columns, shape.dv_columns))
        pl.when(mine(record) >= 0)(lambda: pl.run_scoped(run, *accumulators))

    class Place:
        """Where the producer is: its item."""

        def __init__(self, index) -> None:
            self.b, self.kv_head, at, split, self.first_head = items.at(index)
            self.tile = order[at]  # of keys
            self.bs = i32(0) if starts.shape[0] == 1 else self.b  # the batch row of the ranges
            self.first_key = self.tile * tuning.key_tile
            self.out_b = split * batch + self.b
            self.first_column = lax.rem(index, i32(1))  # 0, but not known: a known slice would have to lie in its array
            lo, self.whole_lo, self.whole_hi, hi = [visits[self.bs, self.tile, j] for j in range(4)]
            self.walk = Walk(lo, hi, by_head[()] > 0, items.group, items.walks_down(index))

    def load_item(place: Place):
        """Producer's first warp: what its block needs once."""
        keys = pl.ds(place.first_key, tuning.key_tile)
        plgpu.copy_gmem_to_smem(k_ref.at[place.b, keys, place.kv_head, :], block.k_smem, block.kv_full)
        plgpu.copy_gmem_to_smem(v_ref.at[place.b, keys, place.kv_head, :], block.v_smem, block.kv_full)
        block.notes[FIRST_KEY], block.notes[RANGES] = place.first_key, place.bs

    def load_tile(place: Place, position, i, flags):
        """Producer's first warp: the tile of Q at a position of the walk, as the block's i-th."""
        g, qi = place.walk.at(position)
        b, h, at = place.b, place.first_head + g, pl.ds(qi * QUERY_TILE, QUERY_TILE)
        s, d = slot(i, tuning.stages), slot(i, tuning.out_stages)
        flags += jnp.where(qi < place.whole_lo, i32(STOPS), i32(0))
        flags += jnp.where(qi >= place.whole_hi, i32(STARTS), i32(0))
        block.q_free.sync(s)
        block.notes[STAGE_NOTE + s] = qi * QUERY_TILE + flags
        plgpu.copy_gmem_to_smem(q_ref.at[b, at, h, :], block.q_smem.at[s], block.q_full.at[s])
        plgpu.copy_gmem_to_smem(lse_ref.at[b, h, at], block.stats_smem.at[s, 0], block.q_full.at[s])
        plgpu.copy_gmem_to_smem(delta_ref.at[b, h, at], block.stats_smem.at[s, 1], block.q_full.at[s])
        block.do_free.sync(d)
        plgpu.copy_gmem_to_smem(do_ref.at[b, at, h, :], block.do_smem.at[d], block.do_full.at[d])

    def load_chunk(place: Place, record: mosaic_chunks.Record, at, begin):
        """All tiles of a chunk but the last, which waits until it is known whether another chunk follows."""
        step = lambda i, _: load_tile(place, record.first + i - begin, i, MORE)
        half = lax.div(begin + record.end, i32(2))
        lax.fori_loop(begin, half, step, None)
        if deterministic:  # an item is one chunk: there is no next, and no barrier left to say so with
            chunks.claim(chunks.after(at), own, record)
        else:
            block.half_way.arrive()
        lax.fori_loop(half, record.end - 1, step, None)

    def claim_next(record: mosaic_chunks.Record, at):
        """A warp of the producer of its own, for it takes as long as a tile."""
        block.half_way.sync()
        chunks.claim(chunks.after(at), own, record)

    def each_result(adder: int, add):
        """Call add(w) for what each consumer w hands over, and give its buffer back."""
        shared = tuning.staging == 1
        for w in range(CONSUMERS):
            block.dq_full.sync(adder * CONSUMERS + w)
            add(w, 0 if shared else w)
            if shared:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                block.dq_free.arrive(1 - w)
        if not shared:
            for w in range(CONSUMERS):
                plgpu.wait_smem_to_gmem(1 - w, wait_read_only=True)
                block.dq_free.arrive(w)

    def add_chunk(adder: int, place: Place, record: mosaic_chunks.Record, begin):
        """A warp of the producer: adds the dQ of every tile, or of every other one where two warps take turns."""

        def tile(g, qi):
            def add(start, w, buffer):
                at = pl.ds(qi * QUERY_TILE, QUERY_TILE), place.first_head + g
                to = dq_ref.at[place.b, *at, pl.ds(w * shape.dq_columns + start, piece)]
                plgpu.copy_smem_to_gmem(block.dq_smem.at[buffer], to, reduction_op="add")

            if deterministic:
                first, taken = turns
                turn = (place.b * heads + place.first_head + g) * (rows // QUERY_TILE) + qi
                wait_turn(taken.numbers, turn, place.tile - first[place.bs, qi])
            for start in range(0, shape.dq_columns, piece):
                each_result(adder, functools.partial(add, start))
            if deterministic:
                plgpu.wait_smem_to_gmem(0)
                next_turn(taken.numbers, turn)

        def step(i, _):
            pair = place.walk.at(record.first + i - begin)
            if shape.adders == 1:
                tile(*pair)
            else:
                pl.when(lax.rem(i, i32(2)) == adder)(lambda: tile(*pair))

        lax.fori_loop(begin, record.end, step, None)

    def add_item(item, done):
        """The producer's first adding warp: dk and dv when the item has ended."""
        place = Place(item + zero(done))  # made anew: kept from the start it would be spilled

        def write(how):
            for x, start in shape.pieces():
                ref, columns = ((dk_ref, shape.dk_columns), (dv_ref, shape.dv_columns))[x]

                def add(ref, column, columns, w, buffer):
                    keys = pl.ds(place.first_key + shape.first_key(w), KEYS)
                    column += w * columns if tuning.by_columns else 0
                    to = ref.at[place.out_b, keys, place.kv_head, pl.ds(place.first_column + column, piece)]
                    plgpu.copy_smem_to_gmem(block.dq_smem.at[buffer], to, reduction_op=how)

                each_result(0, functools.partial(add, ref, start, columns))

        chunks.add_up(item, done, write)

    def producer():
        """Four warps that run this each for itself: one loads, one or two add, one claims."""
        plgpu.set_max_registers(tuning.registers[1], action="decrease")

        @plgpu.warp_map
        def _(warp):
            def begin():
                load_item(Place(number))
                chunks.begin(number)

            @pl.when(warp == 0)
            def _():
                lax.cond(own, begin, lambda: chunks.claim(0, False, mosaic_chunks.NOTHING))

        first = chunks.take(i32(0))
        item = mine(first)
        pl.when(item >= 0)(lambda: produce(item, first))

    def produce(item, first: mosaic_chunks.Record):
        place = Place(item)

        @plgpu.warp_map
        def _(warp):
            # an item's own block has asked for its keys before; not `own`, spelt out: a warp has no `not` (jax 0.11.2)
            pl.when((warp == 0) & (number >= items.count))(lambda: load_item(place))

            @pl.when(warp == 1)
            def _():
                for w in range(1 if tuning.staging == 1 else CONSUMERS):
                    block.dq_free.arrive(w)

        def chunk(state):
            (at, begin), record = state[:2], mosaic_chunks.Record(*state[2:])

            @plgpu.warp_map
            def _(warp):
                pl.when(warp == 0)(lambda: load_chunk(place, record, at, begin))
                for adder in range(shape.adders):
                    pl.when(warp == 1 + adder)(functools.partial(add_chunk, adder, place, record, begin))
                if not deterministic:
                    pl.when(warp == 2)(block.half_way.arrive)  # it has read the record that the next one overwrites
                    pl.when(warp == 3)(lambda: claim_next(record, at))

            at = chunks.after(at)
            following = chunks.take(at)

            @plgpu.warp_map
            def _(warp):
                flags = jnp.where(following.end > record.end, i32(MORE), i32(0))
                last = functools.partial(load_tile, place, record.first + record.end - 1 - begin, record.end - 1, flags)
                pl.when(warp == 0)(last)

            return at, record.end, *following

        state = lax.while_loop(lambda state: state[1] < state[-1], chunk, (i32(0), i32(0), *first))

        @plgpu.warp_map
        def _(warp):
            pl.when(warp == 1)(lambda: add_item(item, done=state[1]))
            for adder in range(shape.adders):
                pl.when(warp == 1 + adder)(lambda: plgpu.wait_smem_to_gmem(0))

    lax.cond(wg < CONSUMERS, consumer, producer)
