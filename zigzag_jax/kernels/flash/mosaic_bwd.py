"""Flash attention backward for Hopper: five matmuls in one kernel, in Pallas Mosaic GPU.

A block owns 128 keys of one kv head, 64 for each of two consumer warpgroups, and walks over the query tiles (64 rows)
of all heads of the group that see any of them. With keys along the rows of every score tile (FlashAttention-2, Dao
2023, algorithm 2; FlashAttention-3, Shah et al. 2024, section 3),

    S = K Q^T - lse / scale      P = exp2(scale log2(e) S)      dP = V dO^T - delta      dS = P dP
    dV += P dO                   dK += dS Q                     dQ = dS^T K

P and dS stay in registers for dV and dK, which are complete when the block ends. lse and delta enter as the *starting
values* of the accumulators. dS goes through shared memory, so that each warpgroup computes half of dQ's columns over
all 128 keys; dQ is staged in float32 and added to global memory by TMA (reduce-add), issued by a warp of the producer:

    producer warp 0   Q dO of the next tile                          tensor core   S dP | dV dQ dK | S dP | ...
    producer warp 1   dQ of the last tile, added to global memory    other units      P dS      dQ out

Shared memory bandwidth is the limit (82% busy): S, dP and dQ read both operands from it and run beside exp2, which
reads none. More wgmma in flight lose (docs/kernels.md). So does another order of statements: ptxas allocates registers
on a knife's edge, and the deviceless compile test holds every configuration to no spill and no serialised wgmma.

`deterministic` makes the blocks that add to a tile of dQ take turns in the order of their keys; two warps then add
alternately, each waiting for its own tile's turn. Blocks start in that order too, so each waits for running ones only.
"""

# Pallas' annotations do not know refs, layouts and the inline_mgpu decorator; the compile tests check these calls
# and static flags guard the names that pyright takes for unbound
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportPrivateImportUsage=false, reportAbstractUsage=false, reportGeneralTypeIssues=false

import dataclasses
import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from zigzag_jax.kernels.flash.contract import LOG2E, Settings
from zigzag_jax.kernels.hopper import (
    ACC,
    COLUMN,
    WARP,
    WARPGROUP,
    NamedBarriers,
    check_registers,
    down,
    fence_smem,
    i32,
    launch,
    next_turn,
    sm_count,
    smem,
    wait_turn,
)
from zigzag_jax.ranges import KeyRange, tile_rows

QUERY_TILE, KEY_TILE = 64, 128
TOGETHER = 256  # key tiles whose blocks run side by side, of as few kv heads as have so many: Q, dO and dQ stay in L2
CONSUMERS = 2
KEYS = KEY_TILE // CONSUMERS  # of a warpgroup: the M of its wgmmas

_keep = lax.optimization_barrier  # holds LLVM back from moving a use above the wait that makes the value valid


@dataclasses.dataclass(frozen=True)
class BackwardTuning:
    """What may differ between head dims without changing the kernel's idea."""

    overlap: bool = True
    """dP runs while P is computed. Off where the accumulators of dK and dV leave no registers for both."""

    column_parts: int = 1
    """Blocks that share the columns of dQ, dK and dV, each repeating S and dP: for head dims over 192."""

    stages: int = 2
    """Tiles of Q and of dO in shared memory. More than 2 leave too few named barriers for `deterministic`."""

    staging: int = 2
    """Buffers of dQ on its way out: one a warpgroup, or one for both in turn."""

    ds_buffers: int = 2
    """Buffers of dS."""

    registers: tuple[int, int] = (240, 24)
    """Registers a thread of consumers and producer."""

    def __post_init__(self) -> None:
        check_registers(CONSUMERS, self.registers)


def flash_bwd(
    q, k, v, lse, delta, dout, keys: KeyRange, settings: Settings, dq, deterministic: bool, tuning: BackwardTuning
):
    """The contract's backward where Sq is a multiple of QUERY_TILE, Sk of KEY_TILE; dq is there to be added to."""
    batch, rows, heads, dim = q.shape
    key_rows, kv_heads, out_dim = v.shape[1:]
    dt, narrow = q.dtype, dim // tuning.column_parts // CONSUMERS  # columns of dQ that a warpgroup computes
    # -inf, the lse of a row that saw nothing, would give inf - inf
    lse = jnp.where(lse == -jnp.inf, 0.0, lse) * (-1 / settings.scale if settings.softcap is None else -LOG2E)
    visits = _visits(keys, key_rows)
    order = _order(visits, deterministic)
    blocks = _Blocks(batch, kv_heads, heads // kv_heads, key_rows // KEY_TILE, tuning)
    dq_ref, turns = jax.new_ref(dq), ()
    if deterministic:
        tiles = rows // QUERY_TILE
        counters = jnp.zeros(batch * heads * tiles * tuning.column_parts, jnp.int32)
        turns = (_first_visitor(visits, tiles), jax.new_ref(counters))
    scratch = {
        "q_smem": smem((tuning.stages, QUERY_TILE, dim), dt, narrow),
        "do_smem": smem((tuning.stages, QUERY_TILE, out_dim), dt),
        "k_smem": smem((KEY_TILE, dim), dt, narrow),
        "v_smem": smem((KEY_TILE, out_dim), dt),
        "ds_smem": smem((tuning.ds_buffers, KEY_TILE, QUERY_TILE), dt, math.gcd(narrow, QUERY_TILE)),
        "dq_smem": smem((tuning.staging, QUERY_TILE, narrow), jnp.float32),
        "lse_smem": plgpu.SMEM((tuning.stages, QUERY_TILE), jnp.float32),
        "delta_smem": plgpu.SMEM((tuning.stages, QUERY_TILE), jnp.float32),
        "kv_full": plgpu.Barrier(num_arrivals=2),
        "q_full": plgpu.Barrier(num_arrivals=3, num_barriers=tuning.stages),
        "do_full": plgpu.Barrier(num_barriers=tuning.stages),
    }
    gradient = lambda columns: jax.ShapeDtypeStruct((blocks.splits, batch, key_rows, kv_heads, columns), jnp.float32)
    dk, dv = launch(
        functools.partial(_kernel, settings, tuning, blocks, deterministic),
        q, k, v, dout, lse, -delta, *keys, visits, order, dq_ref, *turns,
        out_type=(gradient(dim), gradient(out_dim)), scratch_types=scratch,
        grid=(blocks.count,), grid_names=("block",), warpgroups=CONSUMERS + 1, name="flash_bwd",
    )  # fmt: skip
    total = (lambda x: x[0]) if blocks.splits == 1 else (lambda x: x.sum(0))
    return jax.freeze(dq_ref), total(dk), total(dv)


def _visits(keys: KeyRange, key_rows: int):
    """[B or 1, key tiles, 4] int32: query tiles lo..hi see some key of the tile, whole_lo..whole_hi all of it.

    In the order lo, whole_lo, whole_hi, hi.
    """
    rows = tile_rows(keys, KEY_TILE, key_rows)
    lo = rows.first // QUERY_TILE
    hi = jnp.maximum(-(-rows.end // QUERY_TILE), lo)
    whole_lo = jnp.clip(-(-rows.whole_first // QUERY_TILE), lo, hi)
    whole_hi = jnp.clip(rows.whole_end // QUERY_TILE, whole_lo, hi)
    return jnp.stack([lo, whole_lo, whole_hi, hi], -1)


def _order(visits, ascending: bool):
    """int32 [key tiles + 1]: the order in which blocks take the key tiles, then 1 where they walk head by head.

    The tile with most visitors first (a sort by counting, which is one small kernel), or ascending. Head by head where
    the last visitor moves with the key tile: see _Walk.
    """
    cost, tiles = jnp.sum(visits[..., 3] - visits[..., 0], axis=0), jnp.arange(visits.shape[1], dtype=jnp.int32)
    before = (cost[None] > cost[:, None]) | ((cost[None] == cost[:, None]) & (tiles[None] < tiles[:, None]))
    longest = jnp.sum(jnp.where(before.sum(1)[None] == tiles[:, None], tiles[None], 0), axis=1, dtype=jnp.int32)
    moving = visits[:, 1:, 3] != visits[:, :-1, 3]
    by_head = 4 * jnp.sum(moving, dtype=jnp.int32) > moving.size
    return jnp.append(tiles if ascending else longest, by_head.astype(jnp.int32))


def _first_visitor(visits, query_tiles: int):
    """[B or 1, query tiles] int32: the first key tile that sees each query tile; the others follow without a gap."""
    tile = jnp.arange(query_tiles, dtype=jnp.int32)[None, None]
    return jnp.sum(visits[..., 3, None] <= tile, axis=1, dtype=jnp.int32)


class _Blocks:
    """The grid: which keys, kv head and share of its group each block has.

    The tiles of some kv heads side by side (see TOGETHER); `order` says which key tile is behind the number given here.
    """

    def __init__(self, batch: int, kv_heads: int, group: int, key_tiles: int, tuning: BackwardTuning) -> None:
        self.kv_heads, self.key_tiles, self.parts = kv_heads, key_tiles, tuning.column_parts
        every = batch * kv_heads
        self.together = next(
            n for n in range(1, every + 1) if every % n == 0 and n * key_tiles >= min(TOGETHER, every * key_tiles)
        )
        fill = [n for n in range(1, group + 1) if group % n == 0 and every * key_tiles * self.parts * n >= sm_count()]
        self.splits = fill[0] if fill else group  # blocks that share a group's heads: as few as fill the card
        self.group = group // self.splits
        self.count = every * key_tiles * self.parts * self.splits

    def at(self, index):
        """(batch row, kv head, key tile, column part, split, first query head) of block `index`."""
        index, part = lax.div(index, i32(self.parts)), lax.rem(index, i32(self.parts))
        index, split = lax.div(index, i32(self.splits)), lax.rem(index, i32(self.splits))
        index, inner = lax.div(index, i32(self.together)), lax.rem(index, i32(self.together))
        outer, tile = lax.div(index, i32(self.key_tiles)), lax.rem(index, i32(self.key_tiles))
        head = outer * self.together + inner
        batch, kv_head = lax.div(head, i32(self.kv_heads)), lax.rem(head, i32(self.kv_heads))
        return batch, kv_head, tile, part, split, (kv_head * self.splits + split) * self.group


class _Walk:
    """The order in which a block visits its (head of the group, query tile) pairs.

    Blocks of one kv head should stand at the same tile of the same head at the same time, so that Q, dO and dQ come
    from L2. Where key tiles end at the same query tile (causal, documents) they walk q tiles outside and heads inside,
    down in one wave of blocks and up in the next: a wave starts where the sweep of the one before it passes. Where the
    end moves with the key tile (a sliding window) each head is walked down by itself.
    """

    def __init__(self, lo, hi, by_head, group: int, index) -> None:
        self.lo, self.hi, self.group, self.by_head = lo, hi, group, by_head
        wave = lax.div(index, i32(sm_count()))
        down = self.by_head | (lax.rem(wave, i32(2)) == 0)
        self.first = jnp.where(down, hi - 1, lo)
        self.last = jnp.where(down, lo, hi - 1)
        self.inc = jnp.where(down, i32(-1), i32(1))
        self.count = (hi - lo) * group

    def next(self, g, qi):
        """The pair after (g, qi); after the last one any pair in range."""
        wrap = jnp.where(self.by_head, qi == self.last, g == self.group - 1)
        stay_in_tile = jnp.where(wrap, lax.max(lax.min(qi + self.inc, self.hi - 1), self.lo), qi)
        stay_in_head = jnp.where(wrap, self.first, qi + self.inc)
        next_g = jnp.where(
            wrap,
            jnp.where(self.by_head, lax.min(g + 1, i32(self.group - 1)), i32(0)),
            jnp.where(self.by_head, g, g + 1),
        )
        return next_g, jnp.where(self.by_head, stay_in_head, stay_in_tile)


def _kernel(
    settings: Settings, tuning: BackwardTuning, blocks: _Blocks, deterministic: bool,
    q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, start_ref, stop_ref, visits_ref, order_ref, dq_ref, *refs,
    q_smem, k_smem, v_smem, do_smem, ds_smem, dq_smem, lse_smem, delta_smem, kv_full, q_full, do_full,
):  # fmt: skip
    *turns, dk_ref, dv_ref = refs
    _, rows, heads, dim = q_ref.shape
    out_dim, dt, parts = v_ref.shape[3], q_ref.dtype, tuning.column_parts
    dim_part, out_part = dim // parts, out_dim // parts
    narrow = dim_part // CONSUMERS
    scale, cap = settings.scale, settings.softcap
    to_log2 = scale * LOG2E

    wg, index = lax.axis_index("wg"), lax.axis_index("block")
    b, kv_head, place, part, split, first_head = blocks.at(index)
    key_tile = order_ref[place]
    bs = i32(0) if start_ref.shape[0] == 1 else b  # the batch row of the ranges
    first_key = key_tile * KEY_TILE
    lo, whole_lo, whole_hi, hi = [visits_ref[bs, key_tile, j] for j in range(4)]
    walk = _Walk(lo, hi, order_ref[blocks.key_tiles] > 0, blocks.group, index)

    stages, adders = tuning.stages, 2 if deterministic else 1
    everyone = CONSUMERS * WARPGROUP + WARP
    q_free = NamedBarriers(4, stages, everyone)
    do_free = NamedBarriers(q_free.end, stages, everyone)
    ds_full = NamedBarriers(do_free.end, 1, CONSUMERS * WARPGROUP)
    ds_free = NamedBarriers(ds_full.end, 2 - tuning.ds_buffers, CONSUMERS * WARPGROUP)
    dq_full = NamedBarriers(ds_free.end, CONSUMERS * adders, WARPGROUP + WARP)
    dq_free = NamedBarriers(dq_full.end, CONSUMERS, WARPGROUP + WARP)

    def zero(i):
        """0, but LLVM cannot know: without it the descriptors of operand slices leave the loop and are spilled."""
        return lax.shift_right_logical(i, 30)

    def slot(i, count):
        return lax.rem(i, i32(count)) if count > 1 else zero(i)

    def columns(part_columns, start=0, width=None):
        """Slice of this block's part of D or E columns, from `start`; all of them where there is one part."""
        width = width or part_columns
        if parts == 1 and width == part_columns:
            return slice(None)
        at = start if parts == 1 else part * part_columns + start
        return pl.ds(pl.multiple_of(at, math.gcd(width, 64)), width)

    def consumer():
        plgpu.set_max_registers(tuning.registers[0], action="increase")
        keys = pl.ds(first_key + wg * KEYS, KEYS)
        acc = lambda m, n: plgpu.ACC((m, n), jnp.float32)
        down_rows = lambda x: down(x, QUERY_TILE)
        load = lambda ref: plgpu.load(ref, layout=COLUMN)
        my_rows = lambda z: pl.ds(pl.multiple_of((wg + z) * KEYS, KEYS), KEYS)
        my_columns = lambda z: columns(dim_part, (wg + z) * narrow, narrow)

        def masked(x, qi, fill):
            """What `x()` [keys, queries] is where the query sees the key, else fill.

            Two selects with a barrier between them keep register pressure low.
            """
            at = pl.ds(qi * QUERY_TILE, QUERY_TILE)
            start = plgpu.load(start_ref.at[bs, at], layout=COLUMN, optimized=False) - (first_key + wg * KEYS)
            stop = plgpu.load(stop_ref.at[bs, at], layout=COLUMN, optimized=False) - (first_key + wg * KEYS)
            key = plgpu.broadcasted_iota(jnp.int32, (KEYS, QUERY_TILE), 0, layout=ACC)
            x = _keep(jnp.where(key >= down_rows(start), x(), fill))
            return jnp.where(key < down_rows(stop), x, fill)

        def on_edge(qi):
            return (qi < whole_lo) | (qi >= whole_hi)

        def put_ds(ds, i, z):
            if tuning.ds_buffers == 1:
                ds_free.sync()
            at = lax.rem(i, i32(2)) if tuning.ds_buffers == 2 else z
            ds_smem[at, pl.ds(wg * KEYS, KEYS)] = ds
            return at

        def put_dq(dq, i, z):
            dq = dq * scale
            dq_free.sync(wg)
            dq_smem[wg + z if tuning.staging == CONSUMERS else z] = dq
            fence_smem()
            dq_full.arrive(wg if adders == 1 else lax.rem(i, i32(2)) * 2 + wg)

        def overlapped(dk_acc, dv_acc, i, state):
            g, qi = state
            z, s = zero(i), slot(i, stages)
            plgpu.barrier_wait(q_full.at[s])

            def scores(s_acc, dp_acc):
                lse = load(lse_smem.at[s])
                s0 = lax.cond(on_edge(qi), lambda: masked(lambda: down_rows(lse), qi, -jnp.inf), lambda: down_rows(lse))
                dp0 = down_rows(load(delta_smem.at[s]))
                s_acc[...] = s0  # both before any wgmma is in flight
                dp_acc[...] = dp0
                plgpu.wgmma(s_acc, k_smem.at[my_rows(z)], q_smem.at[s].T)
                plgpu.barrier_wait(do_full.at[s])
                plgpu.wgmma(dp_acc, v_smem.at[my_rows(z)], do_smem.at[s].T)
                p = jnp.exp2(_keep(plgpu.wgmma_accumulator_load(s_acc, wait_n=1)) * to_log2).astype(dt)
                dp = _keep(plgpu.wgmma_accumulator_load(dp_acc, wait_n=0))
                p32, dp = _keep((p, dp))
                ds = (p32.astype(jnp.float32) * dp).astype(dt)
                at = put_ds(ds, i, z)
                plgpu.wgmma(dv_acc, p, do_smem.at[s, :, columns(out_part)])
                fence_smem()
                ds_full.sync()
                return ds, at

            ds, at = pl.run_scoped(scores, acc(KEYS, QUERY_TILE), acc(KEYS, QUERY_TILE))

            def gradients(dq_acc):
                plgpu.wgmma(dq_acc, ds_smem.at[at].T, k_smem.at[:, my_columns(z)])
                plgpu.wgmma(dk_acc, ds, q_smem.at[s, :, columns(dim_part)])
                plgpu.wgmma_wait(2)
                do_free.arrive(s)
                put_dq(_keep(plgpu.wgmma_accumulator_load(dq_acc, wait_n=1)), i, z)
                plgpu.wgmma_wait(0)
                q_free.arrive(s)

            pl.run_scoped(gradients, acc(QUERY_TILE, narrow))
            return walk.next(g, qi)

        def serial(dk_acc, dv_acc, i, state):
            """As overlapped, with S, P, dP and dS one after the other; with the softcap's slope, 1 - tanh^2."""
            g, qi = state
            z, s = zero(i), slot(i, stages)
            plgpu.barrier_wait(q_full.at[s])
            lse = down_rows(load(lse_smem.at[s]))

            def probabilities(s_acc):
                if cap is None:
                    s_acc[...] = lse
                plgpu.wgmma(s_acc, k_smem.at[my_rows(z)], q_smem.at[s].T)
                scores = plgpu.wgmma_accumulator_load(s_acc)
                if cap is None:
                    return jnp.exp2(scores * to_log2).astype(dt), None
                t = 1 - 2 / (jnp.exp2(scores * (2 * to_log2 / cap)) + 1)
                return jnp.exp2(t * (cap * LOG2E) + lse).astype(dt), (1 - t * t).astype(dt)

            p, slope = pl.run_scoped(probabilities, acc(KEYS, QUERY_TILE))
            p = lax.cond(on_edge(qi), lambda: masked(lambda: p, qi, jnp.zeros((), dt)), lambda: p)
            plgpu.barrier_wait(do_full.at[s])

            def dscores(dp_acc):
                dp_acc[...] = down_rows(load(delta_smem.at[s]))
                plgpu.wgmma(dp_acc, v_smem.at[my_rows(z)], do_smem.at[s].T)
                dp = plgpu.wgmma_accumulator_load(dp_acc)
                plgpu.wgmma(dv_acc, p, do_smem.at[s, :, columns(out_part)])
                p32, dp = _keep((p, dp))
                ds = p32.astype(jnp.float32) * dp
                return (ds if slope is None else ds * slope.astype(jnp.float32)).astype(dt)

            ds = pl.run_scoped(dscores, acc(KEYS, QUERY_TILE))
            plgpu.wgmma_wait(0)
            do_free.arrive(s)
            at = put_ds(ds, i, z)
            fence_smem()
            ds_full.sync()

            def gradients(dq_acc):
                plgpu.wgmma(dq_acc, ds_smem.at[at].T, k_smem.at[:, my_columns(z)])
                plgpu.wgmma(dk_acc, ds_smem.at[at, my_rows(z)], q_smem.at[s, :, columns(dim_part)])
                put_dq(plgpu.wgmma_accumulator_load(dq_acc, wait_n=1), i, z)
                plgpu.wgmma_wait(0)
                q_free.arrive(s)

            pl.run_scoped(gradients, acc(QUERY_TILE, narrow))
            return walk.next(g, qi)

        def store(dk, dv):
            dk_ref.at[split, b, keys, kv_head, pl.ds(part * dim_part, dim_part)][...] = dk
            dv_ref.at[split, b, keys, kv_head, pl.ds(part * out_part, out_part)][...] = dv

        def run(dk_acc, dv_acc):
            for s in range(stages):
                q_free.arrive(s)
                do_free.arrive(s)
            plgpu.barrier_wait(kv_full)
            step = overlapped if tuning.overlap and cap is None else serial
            lax.fori_loop(i32(0), walk.count, functools.partial(step, dk_acc, dv_acc), (i32(0), walk.first))
            dk = plgpu.wgmma_accumulator_load(dk_acc)
            dv = plgpu.wgmma_accumulator_load(dv_acc)
            store(dk * scale, dv)

        def nothing():
            zeros = lambda n: plgpu.layout_cast(jnp.zeros((KEYS, n), jnp.float32), ACC)
            store(zeros(dim_part), zeros(out_part))

        pl.when(walk.count > 0)(lambda: pl.run_scoped(run, acc(KEYS, dim_part), acc(KEYS, out_part)))
        pl.when(walk.count == 0)(nothing)

    def load_tiles():
        plgpu.copy_gmem_to_smem(k_ref.at[b, pl.ds(first_key, KEY_TILE), kv_head, :], k_smem, kv_full)
        plgpu.copy_gmem_to_smem(v_ref.at[b, pl.ds(first_key, KEY_TILE), kv_head, :], v_smem, kv_full)

        def step(i, state):
            g, qi = state
            h, at, s = first_head + g, pl.ds(qi * QUERY_TILE, QUERY_TILE), slot(i, stages)
            q_free.sync(s)
            plgpu.copy_gmem_to_smem(q_ref.at[b, at, h, :], q_smem.at[s], q_full.at[s])
            plgpu.copy_gmem_to_smem(lse_ref.at[b, h, at], lse_smem.at[s], q_full.at[s])
            plgpu.copy_gmem_to_smem(delta_ref.at[b, h, at], delta_smem.at[s], q_full.at[s])
            do_free.sync(s)
            plgpu.copy_gmem_to_smem(do_ref.at[b, at, h, :], do_smem.at[s], do_full.at[s])
            return walk.next(g, qi)

        lax.fori_loop(i32(0), walk.count, step, (i32(0), walk.first))

    def add_tiles(adder: int):
        """Adds the dQ of every tile, or of every other one where two warps take turns."""
        shared = tuning.staging == 1
        if adder == 0:
            for w in range(1 if shared else CONSUMERS):
                dq_free.arrive(w)

        def add(w, g, qi):
            dq_full.sync(adder * 2 + w)
            at = pl.ds(qi * QUERY_TILE, QUERY_TILE), first_head + g, pl.ds(part * dim_part + w * narrow, narrow)
            plgpu.copy_smem_to_gmem(dq_smem.at[0 if shared else w], dq_ref.at[b, *at], reduction_op="add")

        def tile(g, qi):
            if deterministic:
                first_ref, turn_ref = turns
                mine = ((b * heads + first_head + g) * (rows // QUERY_TILE) + qi) * parts + part
                wait_turn(turn_ref, mine, key_tile - first_ref[bs, qi])
            if shared:
                for w in range(CONSUMERS):
                    add(w, g, qi)
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    dq_free.arrive(1 - w)
            else:
                for w in range(CONSUMERS):
                    add(w, g, qi)
                for w in range(CONSUMERS):
                    plgpu.wait_smem_to_gmem(1 - w, wait_read_only=True)
                    dq_free.arrive(w)
            if deterministic:
                plgpu.wait_smem_to_gmem(0)
                next_turn(turn_ref, mine)

        def step(i, state):
            if adders == 1:
                tile(*state)
            else:
                pl.when(lax.rem(i, i32(2)) == adder)(lambda: tile(*state))
            return walk.next(*state)

        lax.fori_loop(i32(0), walk.count, step, (i32(0), walk.first))
        plgpu.wait_smem_to_gmem(0)

    def producer():
        plgpu.set_max_registers(tuning.registers[1], action="decrease")

        @pl.when(walk.count > 0)
        def _():
            @plgpu.warp_map
            def _(warp):
                pl.when(warp == 0)(load_tiles)
                for adder in range(adders):
                    pl.when(warp == 1 + adder)(functools.partial(add_tiles, adder))

    lax.cond(wg < CONSUMERS, consumer, producer)
