"""What a consumer of Hopper's backward does with a tile of queries: the schedules, and what they may differ in.

A consumer has 64 keys in shared memory and, tile by tile, 64 queries: it makes S, P, dP, dS and adds to its dV and dK.
dS goes through shared memory, too, so that each consumer computes half of dQ's columns over all 128 keys. (But for
*columns*, below.) What is in flight at a time:

    overlapped    S dP | P dS | dV dQ dK | dQ out
    serial        S | P | dP | dV dS | dQ dK | dQ out
    columns       S or dP | P | dV dS | dV dQ dK | dQ out

Serial is for where dK and dV leave no registers for S and dP at once (192/128), and in the place of overlapped for a
softcap; dK takes dS from shared memory then. For 192/128 dQ comes a tile *late*: the other consumer's half of dS has
long been there, the two need not meet, and one computes P and dS while the other multiplies. (`deterministic` needs the
named barriers for its turns.)

    consumer 0   S(i) | P | dP(i) dV(i) | dS | dQ(i-1) dK(i) |         S(i+1) ...
    consumer 1   ...    dQ(i-2) dK(i-1) |      S(i) | P | dP(i) dV(i) | dS | dQ(i-1) dK(i) | ...

*Columns* is for where a consumer's registers do not hold dK and dV of 64 keys (256). Both consumers have the same 64
keys then. One makes S and P, the other dP and, from the first one's P, dS; both go through shared memory, and each
consumer computes half of the columns of dV, dK and dQ from them.

    consumer 0   S(i)  | P      | dV(i)       | dV(i) dQ(i) dK(i) | S(i+1) ...
    consumer 1   dP(i) |        | dV(i), dS   | dV(i) dQ(i) dK(i) | dP(i+1) ...

What differs from tile to tile and item to item (is there a mask, is it the last one) the producer leaves in shared
memory as a *note*, so that the consumers need no registers for it.

Shared memory bandwidth is the limit (82% busy): S, dP and dQ read both operands from it and run beside exp2, which
reads none. More wgmma in flight lose (docs/kernels.md). So does another order of statements: ptxas allocates registers
on a knife's edge, and the deviceless compile test holds every configuration to no spill and no serialised wgmma.
"""

# Pallas' annotations do not know refs, layouts and the inline_mgpu decorator; the compile tests check these calls
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportGeneralTypeIssues=false

import dataclasses
import math
from typing import Any, Literal

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from zigzag_jax.kernels.flash import mosaic_chunks
from zigzag_jax.kernels.flash.contract import LOG2E, Settings
from zigzag_jax.kernels.flash.mosaic_walk import QUERY_TILE
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
    remainder,
    smem,
)

CONSUMERS = 2
KEYS = 64  # of a consumer: the M of its wgmmas

# notes, behind the records of chunks: of the item, its first key and the batch row of its ranges; of each tile of Q,
# its first query and, as the lowest bits: some ranges start after the first key, stop before the last, another follows
STARTS, STOPS, MORE = 1, 2, 4
FIRST_KEY, RANGES, STAGE_NOTE = mosaic_chunks.SIZE, mosaic_chunks.SIZE + 1, mosaic_chunks.SIZE + 2

_keep = lax.optimization_barrier  # holds LLVM back from moving a use above the wait that makes the value valid


@dataclasses.dataclass(frozen=True)
class BackwardTuning:
    """What may differ between head dims without changing the kernel's idea."""

    schedule: Literal["overlapped", "late", "columns"] = "overlapped"
    """Of a consumer's tile, see above. Overlapped with a softcap is serial, and late with `deterministic`. Late and
    columns need 2 ds_buffers: what one consumer stores of a tile the other may still multiply of the tile before."""

    stages: int = 2
    """Tiles of Q in shared memory. With those of dO at most 5, with one of dS 4, and late 3, for there are no more
    named barriers."""

    out_stages: int = 2
    """Tiles of dO in shared memory. More than of Q would lie idle."""

    staging: int = 2
    """Buffers of dQ on its way out: one a consumer, or one for both in turn."""

    ds_buffers: int = 2
    """Buffers of dS, and of P where it goes through shared memory."""

    registers: tuple[int, int] = (240, 24)
    """Registers a thread of consumers and producer."""

    def __post_init__(self) -> None:
        check_registers(CONSUMERS, self.registers)
        if self.schedule not in ("overlapped", "late", "columns"):
            raise ValueError(f"schedule must be overlapped, late or columns, got {self.schedule!r}")
        if self.ds_buffers not in ((1, 2) if self.schedule == "overlapped" else (2,)):
            raise ValueError(f"ds_buffers must be 1 or 2, of schedules 'late' and 'columns' 2, got {self.ds_buffers}")
        most = 3 if self.schedule == "late" else 3 + self.ds_buffers
        if not 1 <= self.out_stages <= self.stages or self.stages + self.out_stages > most:
            raise ValueError(
                f"out_stages must be at least 1, at most stages, and both together at most {most} with schedule "
                f"{self.schedule!r} and {self.ds_buffers} ds_buffers, got {self.out_stages} and {self.stages}"
            )

    @property
    def by_columns(self) -> bool:
        """Whether consumers have the same keys and each half of the columns, not all columns of keys of its own."""
        return self.schedule == "columns"

    @property
    def key_tile(self) -> int:
        """Keys of an item."""
        return KEYS if self.by_columns else CONSUMERS * KEYS


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a kernel is made for."""

    dim: int
    """Of q and k."""
    out_dim: int
    """Of v."""
    dtype: Any
    settings: Settings
    deterministic: bool
    tuning: BackwardTuning

    def __post_init__(self) -> None:
        if self.tuning.by_columns and self.dv_columns % self.piece:
            raise ValueError(
                f"half of v's columns must be a multiple of {self.piece}, a piece of dv, got {self.dv_columns}"
            )

    def _shared(self, columns: int) -> int:
        return columns // CONSUMERS if self.tuning.by_columns else columns

    @property
    def dk_columns(self) -> int:
        """Columns of dK that a consumer computes."""
        return self._shared(self.dim)

    @property
    def dv_columns(self) -> int:
        """Columns of dV."""
        return self._shared(self.out_dim)

    @property
    def dq_columns(self) -> int:
        """Columns of dQ."""
        return self.dim // CONSUMERS

    @property
    def piece(self) -> int:
        """Columns in which dQ, dK and dV are handed over."""
        return self._shared(self.dq_columns)

    def first_key(self, consumer):
        """The first key of a consumer among the item's."""
        return consumer * (self.tuning.key_tile - KEYS)

    @property
    def late(self) -> bool:
        """Whether dQ is; turns take the named barriers."""
        return self.tuning.schedule == "late" and not self.deterministic

    @property
    def adders(self) -> int:
        """Warps of the producer that add dQ."""
        return 2 if self.deterministic else 1

    @property
    def scale_in_p(self) -> float:
        """What P, and dS with it, is multiplied by beside its definition: all of the scale where that is faster.

        Then it is in S's starting values, and neither dQ's tiles nor dK need to be scaled; dV is divided by it at the
        end.
        """
        fits = self.dtype == jnp.bfloat16  # in float16 small values of P would lose their bits
        faster = self.tuning.schedule == "late" and self.settings.softcap is None
        return self.settings.scale if fits and faster else 1.0

    def pieces(self) -> list[tuple[int, int]]:
        """What an item's dk and dv are handed over by, as (0 for dk or 1 for dv, first column): as wide as dQ's buffer.

        Of the last piece TMA leaves out the columns that are not there.
        """
        parts = enumerate((self.dk_columns, self.dv_columns))
        return [(x, start) for x, columns in parts for start in range(0, columns, self.piece)]

    def memory(self) -> dict[str, Any]:
        """The shared memory of a block and what TMA signals by, as `Block` takes them."""
        tuning, dt, keys, share = self.tuning, self.dtype, self.tuning.key_tile, self.dq_columns
        scores = smem((tuning.ds_buffers, keys, QUERY_TILE), dt, math.gcd(share, QUERY_TILE))
        return {
            "q_smem": smem((tuning.stages, QUERY_TILE, self.dim), dt, share),
            "do_smem": smem((tuning.out_stages, QUERY_TILE, self.out_dim), dt, self.dv_columns),
            "k_smem": smem((keys, self.dim), dt, share),
            "v_smem": smem((keys, self.out_dim), dt),
            "ds_smem": scores,
            **({"p_smem": scores} if tuning.by_columns else {}),
            "dq_smem": smem((tuning.staging, QUERY_TILE, self.piece), jnp.float32),
            "stats_smem": plgpu.SMEM((tuning.stages, 2, QUERY_TILE), jnp.float32),
            "notes": plgpu.SMEM((STAGE_NOTE + tuning.stages,), jnp.int32),
            "kv_full": plgpu.Barrier(num_arrivals=2),
            "q_full": plgpu.Barrier(num_arrivals=3, num_barriers=tuning.stages),
            "do_full": plgpu.Barrier(num_barriers=tuning.out_stages),
        }


def zero(i):
    """0, but LLVM cannot know: without it the descriptors of operand slices leave the loop and are spilled."""
    return lax.shift_right_logical(i, 30)


def slot(i, count: int):
    """Where the i-th of something is that has `count` places."""
    return zero(i) if count == 1 else remainder(i, count)


class Block:
    """What the warpgroups of a block share: memory, and the signals between them."""

    def __init__(
        self, shape: Shape, *, q_smem, k_smem, v_smem, do_smem, ds_smem, dq_smem, stats_smem, notes,
        kv_full, q_full, do_full, p_smem: Any = None,
    ) -> None:  # fmt: skip
        self.shape, tuning = shape, shape.tuning
        self.q_smem, self.k_smem, self.v_smem, self.do_smem = q_smem, k_smem, v_smem, do_smem
        self.p_smem, self.ds_smem, self.dq_smem = p_smem, ds_smem, dq_smem
        self.stats_smem, self.notes = stats_smem, notes
        self.kv_full, self.q_full, self.do_full = kv_full, q_full, do_full
        everyone = CONSUMERS * WARPGROUP + WARP
        self.q_free = NamedBarriers(4, tuning.stages, everyone)
        self.do_free = NamedBarriers(self.q_free.end, tuning.out_stages, everyone)
        self.ds_full = NamedBarriers(self.do_free.end, 2 * CONSUMERS if shape.late else 1, CONSUMERS * WARPGROUP)
        self.ds_free = NamedBarriers(self.ds_full.end, 2 - tuning.ds_buffers, CONSUMERS * WARPGROUP)
        self.dq_full = NamedBarriers(self.ds_free.end, CONSUMERS * shape.adders, WARPGROUP + WARP)
        self.dq_free = NamedBarriers(self.dq_full.end, CONSUMERS, WARPGROUP + WARP)
        # of a chunk: time to claim the next; the producer's four warps but the adding one, which is no more than
        # stages + 2 tiles behind the loading one, less than the shortest chunk
        self.half_way = NamedBarriers(self.dq_free.end, 0 if shape.deterministic else 1, 3 * WARP)


class Consumer:
    """One of the block's consumers, `wg`; bounds: start and stop of the key ranges [B or 1, Sq] in global memory."""

    def __init__(self, block: Block, bounds, wg) -> None:
        self.block, self.shape, self.bounds, self.wg = block, block.shape, bounds, wg
        self.scale, self.cap = self.shape.settings.scale, self.shape.settings.softcap
        self.to_log2 = self.scale * LOG2E

    def run(self, end, dk_acc, dv_acc) -> None:
        """Compute an item, whose first chunk ends at tile `end`, and hand its gradients over."""
        block, shape, tuning = self.block, self.shape, self.shape.tuning
        for s in range(tuning.stages):
            block.q_free.arrive(s)
        for d in range(tuning.out_stages):
            block.do_free.arrive(d)
        if shape.late:  # the first tile multiplies whatever is in the place of a dS before it, and hands nothing over
            block.ds_full.arrive(_done_with(self.wg, -1))
        plgpu.barrier_wait(block.kv_full)
        if tuning.by_columns:
            step = self._by_columns
        else:
            step = self._overlapped if tuning.schedule == "overlapped" and self.cap is None else self._serial

        def tile(state):
            i, _ = state
            return i + 1, step(dk_acc, dv_acc, i)

        done, _ = lax.while_loop(lambda state: state[1] > 0, tile, (i32(0), end))
        if shape.late:
            pl.when(done > 0)(lambda: self._end_late(done))
        in_p = shape.scale_in_p
        results = (
            plgpu.wgmma_accumulator_load(dk_acc) * (self.scale / in_p),
            plgpu.wgmma_accumulator_load(dv_acc) * (1 / in_p),
        )
        for x, start in shape.pieces():
            self._put(results[x][:, start : start + shape.piece], zero(done), 0)

    # ------------------------------------------------------------ schedules: a tile, and whether another follows

    def _overlapped(self, dk_acc, dv_acc, i):
        block, tuning = self.block, self.shape.tuning
        z, s, d = zero(i), slot(i, tuning.stages), slot(i, tuning.out_stages)
        plgpu.barrier_wait(block.q_full.at[s])

        def scores(s_acc, dp_acc):
            s0, dp0 = self._seen(s, _down(self._load(s, 0)), -jnp.inf), _down(self._load(s, 1))
            s_acc[...] = s0  # both before any wgmma is in flight
            dp_acc[...] = dp0
            plgpu.wgmma(s_acc, block.k_smem.at[self._rows(z)], block.q_smem.at[s].T)
            plgpu.barrier_wait(block.do_full.at[d])
            plgpu.wgmma(dp_acc, block.v_smem.at[self._rows(z)], block.do_smem.at[d].T)
            p32 = jnp.exp2(_keep(plgpu.wgmma_accumulator_load(s_acc, wait_n=1)) * self.to_log2)
            p = p32.astype(self.shape.dtype)
            dp = _keep(plgpu.wgmma_accumulator_load(dp_acc, wait_n=0))
            ds = (p32 * dp).astype(self.shape.dtype)
            at = self._put_ds(ds, i)
            plgpu.wgmma(dv_acc, p, block.do_smem.at[d])
            fence_smem()
            block.ds_full.sync()
            return ds, at

        ds, at = pl.run_scoped(scores, _acc(KEYS, QUERY_TILE), _acc(KEYS, QUERY_TILE))

        def gradients(dq_acc):
            self._multiply_dq(dq_acc, at, z)
            plgpu.wgmma(dk_acc, ds, block.q_smem.at[s])
            return self._end(dq_acc, i)

        return pl.run_scoped(gradients, _acc(QUERY_TILE, self.shape.dq_columns))

    def _serial(self, dk_acc, dv_acc, i):
        """Also with the softcap's slope, 1 - tanh^2."""
        block, tuning, dt, cap = self.block, self.shape.tuning, self.shape.dtype, self.cap
        z, s, d = zero(i), slot(i, tuning.stages), slot(i, tuning.out_stages)
        plgpu.barrier_wait(block.q_full.at[s])
        lse = _down(self._load(s, 0))

        def probabilities(s_acc):
            if cap is None:
                s_acc[...] = lse
            plgpu.wgmma(s_acc, block.k_smem.at[self._rows(z)], block.q_smem.at[s].T)
            found = self._exponentials(plgpu.wgmma_accumulator_load(s_acc), lse)
            return [None if x is None else x.astype(dt) for x in found]

        p, slope = pl.run_scoped(probabilities, _acc(KEYS, QUERY_TILE))
        p = self._seen(s, p, jnp.zeros((), dt))
        plgpu.barrier_wait(block.do_full.at[d])

        def dscores(dp_acc):
            dp_acc[...] = _down(self._load(s, 1))
            plgpu.wgmma(dp_acc, block.v_smem.at[self._rows(z)], block.do_smem.at[d].T)
            dp = plgpu.wgmma_accumulator_load(dp_acc)
            plgpu.wgmma(dv_acc, p, block.do_smem.at[d])
            p32, dp = _keep((p, dp))
            ds = p32.astype(jnp.float32) * dp
            return (ds if slope is None else ds * slope.astype(jnp.float32)).astype(dt)

        at = self._put_ds(pl.run_scoped(dscores, _acc(KEYS, QUERY_TILE)), i)
        plgpu.wgmma_wait(0)  # here, that dV multiplies until dS is stored
        block.do_free.arrive(d)
        return (self._gradients_late if self.shape.late else self._gradients)(dk_acc, at, i)

    def _gradients(self, dk_acc, at, i):
        """What serial ends with: dQ and dK, of the dS in buffer `at`."""
        block = self.block
        z, s = zero(i), slot(i, self.shape.tuning.stages)
        fence_smem()
        block.ds_full.sync()

        def multiply(dq_acc):
            self._multiply_dq(dq_acc, at, z)
            plgpu.wgmma(dk_acc, block.ds_smem.at[at, self._rows(z)], block.q_smem.at[s])
            self._put_dq(plgpu.wgmma_accumulator_load(dq_acc, wait_n=1), i, z)
            following = block.notes[STAGE_NOTE + s] & MORE
            plgpu.wgmma_wait(0)
            block.q_free.arrive(s)
            return following

        return pl.run_scoped(multiply, _acc(QUERY_TILE, self.shape.dq_columns))

    def _gradients_late(self, dk_acc, at, i):
        """The same with dQ of the tile before, whose dS the other consumer has had a tile's time for."""
        block = self.block
        z, s = zero(i), slot(i, self.shape.tuning.stages)
        plgpu.commit_smem()  # a fence and a barrier of this consumer: dK reads the dS of its own warps

        def multiply(dq_acc):
            self._multiply_dq(dq_acc, _late_buffer(i - 1), z)
            plgpu.wgmma(dk_acc, block.ds_smem.at[at, self._rows(z)], block.q_smem.at[s])
            dq = _keep(plgpu.wgmma_accumulator_load(dq_acc, wait_n=1))
            block.ds_full.arrive(_done_with(self.wg, i))  # now: the other consumer need not wait for dQ's buffer
            pl.when(i > 0)(lambda: self._put_dq(dq, i - 1, z))
            following = block.notes[STAGE_NOTE + s] & MORE
            plgpu.wgmma_wait(0)
            block.q_free.arrive(s)
            return following

        return pl.run_scoped(multiply, _acc(QUERY_TILE, self.shape.dq_columns))

    def _end_late(self, done) -> None:
        """Multiply dQ of the last tile."""
        block, z = self.block, zero(done)
        block.ds_full.sync(_done_with(1 - self.wg, done - 1))

        def multiply(dq_acc):
            self._multiply_dq(dq_acc, _late_buffer(done - 1), z)
            self._put_dq(_keep(plgpu.wgmma_accumulator_load(dq_acc, wait_n=0)), done - 1, z)

        pl.run_scoped(multiply, _acc(QUERY_TILE, self.shape.dq_columns))

    def _by_columns(self, dk_acc, dv_acc, i):
        """Also with the softcap's slope, which comes with P in the place of dS."""
        block, shape, tuning, dt = self.block, self.shape, self.shape.tuning, self.shape.dtype
        z, s, d, at = zero(i), slot(i, tuning.stages), slot(i, tuning.out_stages), slot(i, tuning.ds_buffers)
        plgpu.barrier_wait(block.q_full.at[s])

        def probabilities():
            lse = _down(self._load(s, 0))

            def scores(s_acc):
                if self.cap is None:
                    s_acc[...] = self._seen(s, lse, -jnp.inf)
                plgpu.wgmma(s_acc, block.k_smem.at[self._rows(z)], block.q_smem.at[s].T)
                return plgpu.wgmma_accumulator_load(s_acc)

            p, slope = self._exponentials(pl.run_scoped(scores, _acc(KEYS, QUERY_TILE)), lse)
            if slope is not None:
                p = self._seen(s, p, jnp.zeros(()))
                block.ds_smem[at] = (p * slope).astype(dt)
            block.p_smem[at] = p.astype(dt)
            fence_smem()
            plgpu.barrier_wait(block.do_full.at[d])  # for dV; each consumer waits for it once a tile
            return p

        def dprobabilities():
            plgpu.barrier_wait(block.do_full.at[d])

            def multiply(dp_acc):
                dp_acc[...] = _down(self._load(s, 1))
                plgpu.wgmma(dp_acc, block.v_smem.at[self._rows(z)], block.do_smem.at[d].T)
                return plgpu.wgmma_accumulator_load(dp_acc)

            return pl.run_scoped(multiply, _acc(KEYS, QUERY_TILE))

        dp = lax.cond(self.wg == 0, probabilities, dprobabilities)  # of consumer 0 it is P, which it needs no more
        block.ds_full.sync()  # P is there, and the slope
        plgpu.wgmma(dv_acc, block.p_smem.at[at], block.do_smem.at[d, :, self._share(z, shape.dv_columns)])

        @pl.when(self.wg == 1)
        def _():
            p = plgpu.load((block.p_smem if self.cap is None else block.ds_smem).at[at], layout=ACC)
            block.ds_smem[at] = (p.astype(jnp.float32) * dp).astype(dt)
            fence_smem()

        block.ds_full.sync()

        def gradients(dq_acc):
            self._multiply_dq(dq_acc, at, z)
            plgpu.wgmma(dk_acc, block.ds_smem.at[at], block.q_smem.at[s, :, self._share(z, shape.dk_columns)])
            return self._end(dq_acc, i)

        return pl.run_scoped(gradients, _acc(QUERY_TILE, shape.dq_columns))

    # ------------------------------------------------------------ what they are made of

    def _load(self, s, which: int):
        """The lse (0) or delta (1) of the queries in slot s."""
        return plgpu.load(self.block.stats_smem.at[s, which], layout=COLUMN)

    def _share(self, z, size: int):
        """Slice of `size` that is the consumer's."""
        return pl.ds(pl.multiple_of((self.wg + z) * size, math.gcd(size, 64)), size)

    def _rows(self, z):
        """Of K and V: this consumer's, or all."""
        return pl.ds(pl.multiple_of(self.shape.first_key(self.wg) + z * KEYS, KEYS), KEYS)

    def _exponentials(self, scores, lse):
        """P of what S's wgmma left, and the softcap's slope or None."""
        if self.cap is None:
            return jnp.exp2(scores * self.to_log2), None
        t = 1 - 2 / (jnp.exp2(scores * (2 * self.to_log2 / self.cap)) + 1)
        return jnp.exp2(t * (self.cap * LOG2E) + lse), 1 - t * t

    def _seen(self, s, x, fill):
        """`x` [keys, queries] where the queries of slot s see the keys, else fill.

        Most tiles that a mask cuts are cut by one side of the ranges: the other is not read.
        """
        notes = self.block.notes
        note, first_key = notes[STAGE_NOTE + s], notes[FIRST_KEY] + self.shape.first_key(self.wg)
        rows = pl.ds(note & -QUERY_TILE, QUERY_TILE)

        def cut(x, side: int, sees):
            bounds = self.bounds[side].rows(notes[RANGES], rows=rows)
            bound = plgpu.load(bounds, layout=COLUMN, optimized=False) - first_key
            key = plgpu.broadcasted_iota(jnp.int32, (KEYS, QUERY_TILE), 0, layout=ACC)
            return jnp.where(sees(key, _down(bound)), x, fill)

        def masked():
            after_start = lax.cond(note & STARTS > 0, lambda: cut(x, 0, jnp.greater_equal), lambda: x)
            return lax.cond(note & STOPS > 0, lambda: cut(after_start, 1, jnp.less), lambda: after_start)

        return lax.cond(note & (STARTS | STOPS) > 0, masked, lambda: x)

    def _multiply_dq(self, dq_acc, at, z) -> None:
        """Start what makes this consumer's columns of dQ of the dS in buffer `at`."""
        block = self.block
        plgpu.wgmma(dq_acc, block.ds_smem.at[at].T, block.k_smem.at[:, self._share(z, self.shape.dq_columns)])

    def _end(self, dq_acc, i):
        """What a tile ends with while its dV, dQ and dK are multiplied, in that order; returns whether one follows."""
        block, tuning = self.block, self.shape.tuning
        z, s, d = zero(i), slot(i, tuning.stages), slot(i, tuning.out_stages)
        following = block.notes[STAGE_NOTE + s] & MORE
        plgpu.wgmma_wait(2)
        block.do_free.arrive(d)
        self._put_dq(_keep(plgpu.wgmma_accumulator_load(dq_acc, wait_n=1)), i, z)
        plgpu.wgmma_wait(0)
        block.q_free.arrive(s)
        return following

    def _put_ds(self, ds, i):
        """Store this consumer's dS of tile i; returns where."""
        block, buffers = self.block, self.shape.tuning.ds_buffers
        if self.shape.late:
            block.ds_full.sync(_done_with(1 - self.wg, i - 1))
        elif buffers == 1:
            block.ds_free.sync()
        at = slot(i, buffers)
        block.ds_smem[at, pl.ds(self.wg * KEYS, KEYS)] = ds
        return at

    def _put(self, x, z, adder) -> None:
        """Hand over [64, columns] to be added."""
        block, w = self.block, self.wg + z
        block.dq_free.sync(w)
        at = w if self.shape.tuning.staging == CONSUMERS else z
        if x.shape[1] == self.shape.piece:
            block.dq_smem[at] = x
        else:
            block.dq_smem[at, :, : x.shape[1]] = x
        fence_smem()
        block.dq_full.arrive(adder * CONSUMERS + w)

    def _put_dq(self, dq, i, z) -> None:
        """Hand over what was multiplied of tile i."""
        dq, adder = dq * (self.scale / self.shape.scale_in_p), 0 if self.shape.adders == 1 else lax.rem(i, i32(2))
        for start in range(0, self.shape.dq_columns, self.shape.piece):
            self._put(dq[:, start : start + self.shape.piece], z, adder)


def _acc(m: int, n: int):
    return plgpu.ACC((m, n), jnp.float32)


def _down(x):
    return down(x, QUERY_TILE)


def _late_buffer(i):
    """Of late: where dS of tile i is, from -1 on."""
    return slot(i + 2, 2)


def _done_with(consumer, i):
    """Of late: which ds_full says that a consumer has stored dS of tile i and has multiplied dQ of tile i - 1."""
    return 2 * consumer + _late_buffer(i)
