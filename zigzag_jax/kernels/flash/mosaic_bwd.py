"""Flash attention backward for Hopper: five matmuls in one kernel, in Pallas Mosaic GPU.

A block owns 128 keys of one kv head (an *item*), 64 for each of two consumer warpgroups, and walks over the query tiles
(64 rows) of all heads of the group that see any of them (mosaic_walk.py); blocks that would idle help it
(mosaic_chunks.py). With keys along the rows of every score tile (FlashAttention-2, Dao 2023, algorithm 2;
FlashAttention-3, Shah et al. 2024, section 3),

    S = K Q^T - lse / scale      P = exp2(scale log2(e) S)      dP = V dO^T - delta      dS = P dP
    dV += P dO                   dK += dS Q                     dQ = dS^T K

P stays in registers for dV, and dS for dK; both are complete when the item ends. lse and delta enter as the *starting
values* of the accumulators. dS goes through shared memory, too, so that each warpgroup computes half of dQ's columns
over all 128 keys; dQ is staged in float32 and added to global memory by TMA (reduce-add), issued by a warp of the
producer, and at the end dK and dV the same way:

    producer warp 0   Q dO of the next tile                          tensor core   S dP | dV dQ dK | S dP | ...
    producer warp 1   dQ of the last tile, added to global memory    other units      P dS      dQ out
    producer warp 3   what to do next (`deterministic`: once, by warp 0)

That is the *overlapped* schedule. Where dK and dV leave no registers for S and dP at once (192/128), and with a
softcap, it is *serial*: S, P, dP and dS one after the other, and dK takes dS from shared memory. For 192/128 dQ comes a
tile *late* then: the other consumer's half of dS has long been there, the two need not meet, and one computes P and dS
while the other multiplies. (`deterministic` needs the named barriers for its turns.)

    consumer 0   S(i) | P | dP(i) dV(i) | dS | dQ(i-1) dK(i) |         S(i+1) ...
    consumer 1   ...    dQ(i-2) dK(i-1) |      S(i) | P | dP(i) dV(i) | dS | dQ(i-1) dK(i) | ...

What differs from tile to tile and item to item (is there a mask, is it the last one) the producer leaves in shared
memory as a *note*, so that the consumers need no registers for it.

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
from typing import Literal

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from zigzag_jax.kernels.flash import mosaic_chunks, mosaic_walk
from zigzag_jax.kernels.flash.contract import LOG2E, Settings
from zigzag_jax.kernels.flash.mosaic_walk import KEY_TILE, QUERY_TILE, Items, Walk
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
from zigzag_jax.ranges import KeyRange

CONSUMERS = 2
KEYS = KEY_TILE // CONSUMERS  # of a warpgroup: the M of its wgmmas

# notes, behind the records of chunks: of the item, its first key and the batch row of its ranges; of each tile of Q,
# its first query and, as the lowest bits: the mask cuts the scores, another tile follows, the second part of columns
_EDGE, _MORE, _PART = 1, 2, 4
_FIRST_KEY, _RANGES, _STAGE_NOTE = mosaic_chunks.SIZE, mosaic_chunks.SIZE + 1, mosaic_chunks.SIZE + 2

_keep = lax.optimization_barrier  # holds LLVM back from moving a use above the wait that makes the value valid


@dataclasses.dataclass(frozen=True)
class BackwardTuning:
    """What may differ between head dims without changing the kernel's idea."""

    schedule: Literal["overlapped", "late"] = "overlapped"
    """Of a consumer's tile, see above. Overlapped with a softcap is serial, and late with `deterministic`. Late needs 2
    ds_buffers, and no more than 3 stages of Q and dO together: named barriers."""

    column_parts: int = 1
    """Blocks that share the columns of dQ, dK and dV, each repeating S and dP: for head dims over 192."""

    stages: int = 2
    """Tiles of Q in shared memory. With those of dO at most 5, for there are no more named barriers."""

    out_stages: int = 2
    """Tiles of dO in shared memory. More than of Q would lie idle."""

    staging: int = 2
    """Buffers of dQ on its way out: one a warpgroup, or one for both in turn."""

    ds_buffers: int = 2
    """Buffers of dS."""

    registers: tuple[int, int] = (240, 24)
    """Registers a thread of consumers and producer."""

    def __post_init__(self) -> None:
        check_registers(CONSUMERS, self.registers)
        if self.column_parts not in (1, 2):
            raise ValueError(f"column_parts must be 1 or 2 (a tile's note has one bit for it), got {self.column_parts}")
        if self.schedule not in ("overlapped", "late"):
            raise ValueError(f"schedule must be overlapped or late, got {self.schedule!r}")
        late = self.schedule == "late"
        if self.ds_buffers not in ((2,) if late else (1, 2)):
            raise ValueError(f"ds_buffers must be 1 or 2, of schedule 'late' 2, got {self.ds_buffers}")
        if not 1 <= self.out_stages <= self.stages or self.stages + self.out_stages > (3 if late else 5):
            raise ValueError(
                "out_stages must be at least 1, at most stages, and both together at most 5, of schedule 'late' 3, "
                f"got {self.out_stages} and {self.stages}"
            )


def flash_bwd(
    q, k, v, lse, delta, dout, keys: KeyRange, settings: Settings, dq, deterministic: bool, tuning: BackwardTuning
):
    """The contract's backward where Sq is a multiple of QUERY_TILE, Sk of KEY_TILE; dq is there to be added to."""
    batch, rows, heads, dim = q.shape
    key_rows, kv_heads, out_dim = v.shape[1:]
    dt, narrow = q.dtype, dim // tuning.column_parts // CONSUMERS  # columns of dQ that a warpgroup computes
    if tuning.column_parts > 1 and out_dim // tuning.column_parts % narrow:
        raise ValueError(f"a part of {out_dim} columns of v must be a multiple of {narrow}, a piece of dv")
    # -inf, the lse of a row that saw nothing, would give inf - inf
    lse = jnp.where(lse == -jnp.inf, 0.0, lse)
    if settings.softcap is None:
        lse = (math.log(_scale_in_p(settings, tuning, dt)) - lse) / settings.scale
    else:
        lse = -LOG2E * lse
    visits = mosaic_walk.visits(keys, key_rows)
    order = mosaic_walk.order(visits, deterministic)
    items = Items(
        batch, kv_heads, heads // kv_heads, key_rows // KEY_TILE, tuning.column_parts,
        head_bytes=rows * ((dim + out_dim) * dt.itemsize + dim * dq.dtype.itemsize), take_turns=deterministic,
    )  # fmt: skip
    tiles, counters = mosaic_chunks.shares(items.tiles(visits, order), sm_count(), whole=deterministic)
    helpers = 0 if deterministic else mosaic_chunks.HELPERS * sm_count()
    dq_ref, counters, turns = jax.new_ref(dq), jax.new_ref(counters), ()
    if deterministic:
        query_tiles = rows // QUERY_TILE
        turn = jnp.zeros(batch * heads * query_tiles * tuning.column_parts, jnp.int32)
        turns = (mosaic_walk.first_visitor(visits, query_tiles), jax.new_ref(turn))
    scratch = {
        "q_smem": smem((tuning.stages, QUERY_TILE, dim), dt, narrow),
        "do_smem": smem((tuning.out_stages, QUERY_TILE, out_dim), dt),
        "k_smem": smem((KEY_TILE, dim), dt, narrow),
        "v_smem": smem((KEY_TILE, out_dim), dt),
        "ds_smem": smem((tuning.ds_buffers, KEY_TILE, QUERY_TILE), dt, math.gcd(narrow, QUERY_TILE)),
        "dq_smem": smem((tuning.staging, QUERY_TILE, narrow), jnp.float32),
        "stats_smem": plgpu.SMEM((tuning.stages, 2, QUERY_TILE), jnp.float32),
        "notes": plgpu.SMEM((_STAGE_NOTE + tuning.stages,), jnp.int32),
        "kv_full": plgpu.Barrier(num_arrivals=2),
        "q_full": plgpu.Barrier(num_arrivals=3, num_barriers=tuning.stages),
        "do_full": plgpu.Barrier(num_barriers=tuning.out_stages),
        "record_full": plgpu.Barrier(num_barriers=mosaic_chunks.RECORDS),
    }
    gradient = lambda columns: jax.ShapeDtypeStruct((items.splits * batch, key_rows, kv_heads, columns), jnp.float32)
    dk, dv = launch(
        functools.partial(_kernel, settings, tuning, items, deterministic),
        q, k, v, dout, lse, -delta, jnp.stack(keys), visits, order, tiles, dq_ref, counters, *turns,
        out_type=(gradient(dim), gradient(out_dim)), scratch_types=scratch,
        grid=(items.count + helpers,), grid_names=("block",), warpgroups=CONSUMERS + 1, name="flash_bwd",
    )  # fmt: skip
    total = (lambda x: x) if items.splits == 1 else (lambda x: x.reshape(items.splits, batch, *x.shape[1:]).sum(0))
    return jax.freeze(dq_ref), total(dk), total(dv)


def _scale_in_p(settings: Settings, tuning: BackwardTuning, dtype) -> float:
    """What P, and dS with it, is multiplied by beside its definition: all of the scale where that is faster.

    Then it is in S's starting values, and neither dQ's tiles nor dK need to be scaled; dV is divided by it at the end.
    """
    fits = dtype == jnp.bfloat16  # in float16 small values of P would lose their bits
    return settings.scale if fits and tuning.schedule == "late" and settings.softcap is None else 1.0


def _kernel(
    settings: Settings, tuning: BackwardTuning, items: Items, deterministic: bool,
    q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, bounds_ref, visits_ref, order_ref, tiles_ref,
    dq_ref, counters_ref, *refs,
    q_smem, k_smem, v_smem, do_smem, ds_smem, dq_smem, stats_smem, notes,
    kv_full, q_full, do_full, record_full,
):  # fmt: skip
    *turns, dk_ref, dv_ref = refs
    batch, rows, heads, dim = q_ref.shape
    out_dim, dt, parts = v_ref.shape[3], q_ref.dtype, tuning.column_parts
    dim_part, out_part = dim // parts, out_dim // parts
    narrow = dim_part // CONSUMERS
    scale, cap = settings.scale, settings.softcap
    to_log2 = scale * LOG2E
    in_p = _scale_in_p(settings, tuning, dt)

    wg, block = lax.axis_index("wg"), lax.axis_index("block")
    own = block < items.count  # else it is a helper
    mine = lambda record: jnp.where(own, block, record.item)  # the block's item; -1: there is none
    chunks = mosaic_chunks.Chunks(tiles_ref, counters_ref, notes, record_full)

    stages, out_stages, adders = tuning.stages, tuning.out_stages, 2 if deterministic else 1
    late = tuning.schedule == "late" and not deterministic  # whose turns take the named barriers
    everyone = CONSUMERS * WARPGROUP + WARP
    q_free = NamedBarriers(4, stages, everyone)
    do_free = NamedBarriers(q_free.end, out_stages, everyone)
    ds_full = NamedBarriers(do_free.end, 2 * CONSUMERS if late else 1, CONSUMERS * WARPGROUP)
    ds_free = NamedBarriers(ds_full.end, 2 - tuning.ds_buffers, CONSUMERS * WARPGROUP)
    dq_full = NamedBarriers(ds_free.end, CONSUMERS * adders, WARPGROUP + WARP)
    dq_free = NamedBarriers(dq_full.end, CONSUMERS, WARPGROUP + WARP)
    # of a chunk: time to claim the next; the producer's four warps but the adding one, which is no more than stages + 2
    # tiles behind the loading one, less than the shortest chunk
    half_way = NamedBarriers(dq_free.end, 0 if deterministic else 1, 3 * WARP)

    def zero(i):
        """0, but LLVM cannot know: without it the descriptors of operand slices leave the loop and are spilled."""
        return lax.shift_right_logical(i, 30)

    def slot(i, count):
        return lax.rem(i, i32(count)) if count > 1 else zero(i)

    def buffer(i):
        """Of `late`: where dS of tile i is, from -1 on."""
        return slot(i + 2, 2)

    def done_with(consumer, i):
        """Of `late`: which ds_full says that a consumer has stored dS of tile i and has multiplied dQ of tile i - 1."""
        return 2 * consumer + buffer(i)

    def pieces():
        """What an item's dk and dv are handed over by, as (0 for dk or 1 for dv, first column): as wide as dQ's buffer.

        Of the last piece TMA leaves out the columns that are not there.
        """
        return [(x, start) for x, columns in enumerate((dim_part, out_part)) for start in range(0, columns, narrow)]

    def columns(part_columns, part, start=0, width=None):
        """Slice of a part of D or E columns, from `start`; all of them where there is one part."""
        width = width or part_columns
        if parts == 1 and width == part_columns:
            return slice(None)
        at = start if parts == 1 else part * part_columns + start
        return pl.ds(pl.multiple_of(at, math.gcd(width, 64)), width)

    def consumer():
        plgpu.set_max_registers(tuning.registers[0], action="increase")
        acc = lambda m, n: plgpu.ACC((m, n), jnp.float32)
        down_rows = lambda x: down(x, QUERY_TILE)
        load = lambda ref: plgpu.load(ref, layout=COLUMN)
        my_rows = lambda z: pl.ds(pl.multiple_of((wg + z) * KEYS, KEYS), KEYS)
        my_columns = lambda z, s: columns(dim_part, part_of(s), (wg + z) * narrow, narrow)
        part_of = lambda s: lax.div(notes[_STAGE_NOTE + s] & _PART, i32(_PART)) if parts > 1 else 0

        def masked(x, s, fill):
            """What `x()` [keys, queries] is where the query sees the key, else fill.

            Two selects with a barrier between them keep register pressure low.
            """
            row, b = pl.multiple_of(notes[_STAGE_NOTE + s] & -QUERY_TILE, QUERY_TILE), notes[_RANGES]
            at, first_key = pl.ds(row, QUERY_TILE), notes[_FIRST_KEY] + wg * KEYS
            start = plgpu.load(bounds_ref.at[0, b, at], layout=COLUMN, optimized=False) - first_key
            stop = plgpu.load(bounds_ref.at[1, b, at], layout=COLUMN, optimized=False) - first_key
            key = plgpu.broadcasted_iota(jnp.int32, (KEYS, QUERY_TILE), 0, layout=ACC)
            x = _keep(jnp.where(key >= down_rows(start), x(), fill))
            return jnp.where(key < down_rows(stop), x, fill)

        def on_edge(s):
            return notes[_STAGE_NOTE + s] & _EDGE > 0

        def put_ds(ds, i):
            if late:
                ds_full.sync(done_with(1 - wg, i - 1))
            elif tuning.ds_buffers == 1:
                ds_free.sync()
            at = slot(i, tuning.ds_buffers)
            ds_smem[at, pl.ds(wg * KEYS, KEYS)] = ds
            return at

        def put(x, z, adder):
            """Hand over [64, columns] to be added."""
            w = wg + z
            dq_free.sync(w)
            at = w if tuning.staging == CONSUMERS else z
            if x.shape[1] == narrow:
                dq_smem[at] = x
            else:
                dq_smem[at, :, : x.shape[1]] = x
            fence_smem()
            dq_full.arrive(adder * CONSUMERS + w)

        def put_dq(dq, i, z):
            put(dq * (scale / in_p), z, 0 if adders == 1 else lax.rem(i, i32(2)))

        def overlapped(dk_acc, dv_acc, i):
            z, s, d = zero(i), slot(i, stages), slot(i, out_stages)
            plgpu.barrier_wait(q_full.at[s])

            def scores(s_acc, dp_acc):
                lse = load(stats_smem.at[s, 0])
                s0 = lax.cond(on_edge(s), lambda: masked(lambda: down_rows(lse), s, -jnp.inf), lambda: down_rows(lse))
                dp0 = down_rows(load(stats_smem.at[s, 1]))
                s_acc[...] = s0  # both before any wgmma is in flight
                dp_acc[...] = dp0
                plgpu.wgmma(s_acc, k_smem.at[my_rows(z)], q_smem.at[s].T)
                plgpu.barrier_wait(do_full.at[d])
                plgpu.wgmma(dp_acc, v_smem.at[my_rows(z)], do_smem.at[d].T)
                p32 = jnp.exp2(_keep(plgpu.wgmma_accumulator_load(s_acc, wait_n=1)) * to_log2)
                p = p32.astype(dt)
                dp = _keep(plgpu.wgmma_accumulator_load(dp_acc, wait_n=0))
                ds = (p32 * dp).astype(dt)
                at = put_ds(ds, i)
                plgpu.wgmma(dv_acc, p, do_smem.at[d, :, columns(out_part, part_of(s))])
                fence_smem()
                ds_full.sync()
                return ds, at

            ds, at = pl.run_scoped(scores, acc(KEYS, QUERY_TILE), acc(KEYS, QUERY_TILE))

            def gradients(dq_acc):
                plgpu.wgmma(dq_acc, ds_smem.at[at].T, k_smem.at[:, my_columns(z, s)])
                plgpu.wgmma(dk_acc, ds, q_smem.at[s, :, columns(dim_part, part_of(s))])
                following = notes[_STAGE_NOTE + s] & _MORE
                plgpu.wgmma_wait(2)
                do_free.arrive(d)
                put_dq(_keep(plgpu.wgmma_accumulator_load(dq_acc, wait_n=1)), i, z)
                plgpu.wgmma_wait(0)
                q_free.arrive(s)
                return following

            return pl.run_scoped(gradients, acc(QUERY_TILE, narrow))

        def serial(dk_acc, dv_acc, i):
            """As overlapped, with S, P, dP and dS one after the other; with the softcap's slope, 1 - tanh^2."""
            z, s, d = zero(i), slot(i, stages), slot(i, out_stages)
            plgpu.barrier_wait(q_full.at[s])
            lse = down_rows(load(stats_smem.at[s, 0]))

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
            p = lax.cond(on_edge(s), lambda: masked(lambda: p, s, jnp.zeros((), dt)), lambda: p)
            plgpu.barrier_wait(do_full.at[d])

            def dscores(dp_acc):
                dp_acc[...] = down_rows(load(stats_smem.at[s, 1]))
                plgpu.wgmma(dp_acc, v_smem.at[my_rows(z)], do_smem.at[d].T)
                dp = plgpu.wgmma_accumulator_load(dp_acc)
                plgpu.wgmma(dv_acc, p, do_smem.at[d, :, columns(out_part, part_of(s))])
                p32, dp = _keep((p, dp))
                ds = p32.astype(jnp.float32) * dp
                return (ds if slope is None else ds * slope.astype(jnp.float32)).astype(dt)

            at = put_ds(pl.run_scoped(dscores, acc(KEYS, QUERY_TILE)), i)
            plgpu.wgmma_wait(0)  # here, that dV multiplies until dS is stored
            do_free.arrive(d)
            return (gradients_late if late else gradients)(dk_acc, at, i)

        def gradients(dk_acc, at, i):
            """What `serial` ends with: dQ and dK, of the dS in buffer `at`."""
            z, s = zero(i), slot(i, stages)
            fence_smem()
            ds_full.sync()

            def multiply(dq_acc):
                plgpu.wgmma(dq_acc, ds_smem.at[at].T, k_smem.at[:, my_columns(z, s)])
                plgpu.wgmma(dk_acc, ds_smem.at[at, my_rows(z)], q_smem.at[s, :, columns(dim_part, part_of(s))])
                put_dq(plgpu.wgmma_accumulator_load(dq_acc, wait_n=1), i, z)
                following = notes[_STAGE_NOTE + s] & _MORE
                plgpu.wgmma_wait(0)
                q_free.arrive(s)
                return following

            return pl.run_scoped(multiply, acc(QUERY_TILE, narrow))

        def gradients_late(dk_acc, at, i):
            """As `gradients`, with dQ of the tile before, whose dS the other consumer has had a tile's time for."""
            z, s = zero(i), slot(i, stages)
            plgpu.commit_smem()  # a fence and a barrier of this consumer: dK reads the dS of its own warps

            def multiply(dq_acc):
                plgpu.wgmma(dq_acc, ds_smem.at[buffer(i - 1)].T, k_smem.at[:, my_columns(z, s)])
                plgpu.wgmma(dk_acc, ds_smem.at[at, my_rows(z)], q_smem.at[s, :, columns(dim_part, part_of(s))])
                dq = _keep(plgpu.wgmma_accumulator_load(dq_acc, wait_n=1))
                ds_full.arrive(done_with(wg, i))  # now: the other consumer need not wait for dQ's buffer
                pl.when(i > 0)(lambda: put_dq(dq, i - 1, z))
                following = notes[_STAGE_NOTE + s] & _MORE
                plgpu.wgmma_wait(0)
                q_free.arrive(s)
                return following

            return pl.run_scoped(multiply, acc(QUERY_TILE, narrow))

        def end_late(done):
            """Multiply dQ of the last tile."""
            z = zero(done)
            ds_full.sync(done_with(1 - wg, done - 1))

            def multiply(dq_acc):
                plgpu.wgmma(dq_acc, ds_smem.at[buffer(done - 1)].T, k_smem.at[:, my_columns(z, 0)])
                put_dq(_keep(plgpu.wgmma_accumulator_load(dq_acc, wait_n=0)), done - 1, z)

            pl.run_scoped(multiply, acc(QUERY_TILE, narrow))

        step = overlapped if tuning.schedule == "overlapped" and cap is None else serial

        def run(end, dk_acc, dv_acc):
            for s in range(stages):
                q_free.arrive(s)
            for d in range(out_stages):
                do_free.arrive(d)
            if late:  # the first tile multiplies whatever is in the place of a dS before it, and hands nothing over
                ds_full.arrive(done_with(wg, -1))
            plgpu.barrier_wait(kv_full)

            def tile(state):
                i, _ = state
                return i + 1, step(dk_acc, dv_acc, i)

            done, _ = lax.while_loop(lambda state: state[1] > 0, tile, (i32(0), end))
            if late:
                pl.when(done > 0)(lambda: end_late(done))
            results = (
                plgpu.wgmma_accumulator_load(dk_acc) * (scale / in_p),
                plgpu.wgmma_accumulator_load(dv_acc) * (1 / in_p),
            )
            for x, start in pieces():
                put(results[x][:, start : start + narrow], zero(done), 0)

        record = chunks.take(i32(0))
        scopes = acc(KEYS, dim_part), acc(KEYS, out_part)
        pl.when(mine(record) >= 0)(lambda: pl.run_scoped(functools.partial(run, record.end), *scopes))

    class Place:
        """Where the producer is: its item."""

        def __init__(self, index) -> None:
            self.b, self.kv_head, place, self.part, split, self.first_head = items.at(index)
            self.key_tile = order_ref[place]
            self.bs = i32(0) if bounds_ref.shape[1] == 1 else self.b  # the batch row of the ranges
            self.first_key = self.key_tile * KEY_TILE
            self.out_b = split * batch + self.b
            lo, self.whole_lo, self.whole_hi, hi = [visits_ref[self.bs, self.key_tile, j] for j in range(4)]
            self.walk = Walk(lo, hi, order_ref[items.key_tiles] > 0, items.group, items.walks_down(index))

    def load_item(place: Place):
        """Producer's first warp: what its block needs once."""
        keys = pl.ds(place.first_key, KEY_TILE)
        plgpu.copy_gmem_to_smem(k_ref.at[place.b, keys, place.kv_head, :], k_smem, kv_full)
        plgpu.copy_gmem_to_smem(v_ref.at[place.b, keys, place.kv_head, :], v_smem, kv_full)
        notes[_FIRST_KEY], notes[_RANGES] = place.first_key, place.bs

    def load_tile(place: Place, position, i, flags):
        """Producer's first warp: the tile of Q at a position of the walk, as the block's i-th."""
        g, qi = place.walk.at(position)
        b, h, at = place.b, place.first_head + g, pl.ds(qi * QUERY_TILE, QUERY_TILE)
        s, d = slot(i, stages), slot(i, out_stages)
        edge = (qi < place.whole_lo) | (qi >= place.whole_hi)
        note = qi * QUERY_TILE + jnp.where(edge, i32(_EDGE), i32(0)) + place.part * _PART + flags
        q_free.sync(s)
        notes[_STAGE_NOTE + s] = note
        plgpu.copy_gmem_to_smem(q_ref.at[b, at, h, :], q_smem.at[s], q_full.at[s])
        plgpu.copy_gmem_to_smem(lse_ref.at[b, h, at], stats_smem.at[s, 0], q_full.at[s])
        plgpu.copy_gmem_to_smem(delta_ref.at[b, h, at], stats_smem.at[s, 1], q_full.at[s])
        do_free.sync(d)
        plgpu.copy_gmem_to_smem(do_ref.at[b, at, h, :], do_smem.at[d], do_full.at[d])

    def load_chunk(place: Place, record: mosaic_chunks.Record, at, begin):
        """All tiles of a chunk but the last, which waits until it is known whether another chunk follows."""
        step = lambda i, _: load_tile(place, record.first + i - begin, i, _MORE)
        half = lax.div(begin + record.end, i32(2))
        lax.fori_loop(begin, half, step, None)
        if deterministic:  # an item is one chunk: there is no next, and no barrier left to say so with
            chunks.claim(chunks.after(at), own, record)
        else:
            half_way.arrive()
        lax.fori_loop(half, record.end - 1, step, None)

    def claim_next(record: mosaic_chunks.Record, at):
        """A warp of the producer of its own, for it takes as long as a tile."""
        half_way.sync()
        chunks.claim(chunks.after(at), own, record)

    def each_result(adder: int, add):
        """Call add(w) for what each consumer w hands over, and give its buffer back."""
        shared = tuning.staging == 1
        for w in range(CONSUMERS):
            dq_full.sync(adder * CONSUMERS + w)
            add(w, 0 if shared else w)
            if shared:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                dq_free.arrive(1 - w)
        if not shared:
            for w in range(CONSUMERS):
                plgpu.wait_smem_to_gmem(1 - w, wait_read_only=True)
                dq_free.arrive(w)

    def add_chunk(adder: int, place: Place, record: mosaic_chunks.Record, begin):
        """A warp of the producer: adds the dQ of every tile, or of every other one where two warps take turns."""

        def tile(g, qi):
            def add(w, buffer):
                at = pl.ds(qi * QUERY_TILE, QUERY_TILE), place.first_head + g
                to = dq_ref.at[place.b, *at, pl.ds(place.part * dim_part + w * narrow, narrow)]
                plgpu.copy_smem_to_gmem(dq_smem.at[buffer], to, reduction_op="add")

            if deterministic:
                first_ref, turn_ref = turns
                turn = ((place.b * heads + place.first_head + g) * (rows // QUERY_TILE) + qi) * parts + place.part
                wait_turn(turn_ref, turn, place.key_tile - first_ref[place.bs, qi])
            each_result(adder, add)
            if deterministic:
                plgpu.wait_smem_to_gmem(0)
                next_turn(turn_ref, turn)

        def step(i, _):
            pair = place.walk.at(record.first + i - begin)
            if adders == 1:
                tile(*pair)
            else:
                pl.when(lax.rem(i, i32(2)) == adder)(lambda: tile(*pair))

        lax.fori_loop(begin, record.end, step, None)

    def add_item(place: Place, item, done):
        """The producer's first adding warp: dk and dv when the item has ended."""

        def write(how):
            for x, start in pieces():
                ref, part_columns = ((dk_ref, dim_part), (dv_ref, out_part))[x]

                def add(w, buffer, ref=ref, column=place.part * part_columns + start):
                    keys = pl.ds(place.first_key + w * KEYS, KEYS)
                    to = ref.at[place.out_b, keys, place.kv_head, pl.ds(column, narrow)]
                    plgpu.copy_smem_to_gmem(dq_smem.at[buffer], to, reduction_op=how)

                each_result(0, add)

        chunks.add_up(item, done, write)

    def producer():
        """Four warps that run this each for itself: one loads, one or two add, one claims."""
        plgpu.set_max_registers(tuning.registers[1], action="decrease")

        @plgpu.warp_map
        def _(warp):
            def begin():
                load_item(Place(block))
                chunks.begin(block)

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
            pl.when((warp == 0) & (block >= items.count))(lambda: load_item(place))

            @pl.when(warp == 1)
            def _():
                for w in range(1 if tuning.staging == 1 else CONSUMERS):
                    dq_free.arrive(w)

        def chunk(state):
            (at, begin), record = state[:2], mosaic_chunks.Record(*state[2:])

            @plgpu.warp_map
            def _(warp):
                pl.when(warp == 0)(lambda: load_chunk(place, record, at, begin))
                for adder in range(adders):
                    pl.when(warp == 1 + adder)(functools.partial(add_chunk, adder, place, record, begin))
                if not deterministic:
                    pl.when(warp == 2)(half_way.arrive)  # it has read the record that the next one overwrites
                    pl.when(warp == 3)(lambda: claim_next(record, at))

            at = chunks.after(at)
            following = chunks.take(at)

            @plgpu.warp_map
            def _(warp):
                flags = jnp.where(following.end > record.end, i32(_MORE), i32(0))
                last = functools.partial(load_tile, place, record.first + record.end - 1 - begin, record.end - 1, flags)
                pl.when(warp == 0)(last)

            return at, record.end, *following

        state = lax.while_loop(lambda state: state[1] < state[-1], chunk, (i32(0), i32(0), *first))

        @plgpu.warp_map
        def _(warp):
            pl.when(warp == 1)(lambda: add_item(place, item, done=state[1]))
            for adder in range(adders):
                pl.when(warp == 1 + adder)(lambda: plgpu.wait_smem_to_gmem(0))

    lax.cond(wg < CONSUMERS, consumer, producer)
