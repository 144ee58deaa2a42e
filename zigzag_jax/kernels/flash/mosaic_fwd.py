"""Flash attention forward for Hopper: wgmma, TMA, warp specialisation, in Pallas Mosaic GPU.

An *item* is 128 queries of one head. One block a streaming multiprocessor takes items in turn (persistent): every n-th,
or those that it draws (mosaic_drawn.py, mosaic_cuts.py). In each, the producer streams tiles of K and V through shared
memory and two consumer warpgroups of 64 queries each keep an online softmax (FlashAttention-2; the overlap is
FlashAttention-3's, Shah et al. 2024, section 3.2):

    producer     K0 Q  K1 V0 K2 V1 ...
    tensor core        QK0    QK1 PV0    QK2 PV1    QK3 PV2 ...
    softmax                S0        S1         S2         S3

While the tensor core multiplies P of tile i-1 by V, the other units turn the scores of tile i into P.

Keys in two parts (SplitKeys; MLA) come as two tiles on one signal, and QK is two wgmma on one accumulator.

Ranges are data: the bounds of each row come with Q. A row of tiles is visited in the order: those cut by the right edge
(causal diagonal, end of the chunk), those cut by the left edge (document, window), then the inside, from right to left
and without a mask. Tiles that no row sees are not loaded, an item that sees nothing costs one comparison.

A carry (out, lse) is one more "tile" at the end: m = lse, l = 1, a = out. Where the result is float32 it is written
back in place: two ring steps are merged without a pass of their own. Such a carry comes and goes by TMA through the
buffer in shared memory from which results leave; the producer fetches it while the item is computed (with fixed shares
a second warp of it). Where float32 results do not leave by such a buffer, or the result is narrower than the carry, it
is read into registers while the last PV runs.
"""

# Pallas' annotations do not know refs, layouts and the inline_mgpu decorator; the compile tests check these calls
# and static flags guard the names that pyright takes for unbound
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportPrivateImportUsage=false, reportAbstractUsage=false, reportGeneralTypeIssues=false
# pyright: reportOptionalMemberAccess=false

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from zigzag_jax.kernels.flash import mosaic_cuts, mosaic_drawn, mosaic_numbers
from zigzag_jax.kernels.flash.contract import LOG2E, Carry, Settings
from zigzag_jax.kernels.flash.mosaic_cuts import WHOLE, Aside, Cuts
from zigzag_jax.kernels.flash.mosaic_items import CONSUMERS, QUERY_TILE, ROWS, Items, Tiles, read_edges
from zigzag_jax.kernels.hopper import (
    ACC,
    ROW,
    WARP,
    WARPGROUP,
    NamedBarriers,
    across,
    any_below,
    check_registers,
    fence_smem,
    i32,
    launch,
    remainder,
    smem,
    store,
    where_between,
    with_numbers,
)
from zigzag_jax.ranges import KeyRange

# a row's reference may be below its maximum by so much, in powers of two (FlashAttention-4): P up to 256 is far from
# float16's end, and loses no digit
SLACK = 8


@dataclasses.dataclass(frozen=True)
class ForwardTuning:
    """What may differ between head dims and masks without changing the kernel's idea."""

    key_tile: int = 128
    """Keys a tile. Scores take key_tile / 2 registers a thread, the output E / 2."""

    stages: int = 2
    """Tiles of K and of V in shared memory."""

    query_group: int = 1
    """Query tiles of one head that are neighbours in the order of items: they share K and V in L2."""

    cut_sharing: int = 8
    """Where items are cut: neighbours in the order that share K and V, of one query head or of several."""

    staged: Literal["none", "16 bit", "all"] = "all"
    """The results that leave through shared memory by TMA, not from the registers: by their dtype."""

    shares: Literal["fixed", "drawn", "cut"] = "fixed"
    """The items of a block: every n-th; those it draws from a counter (mosaic_drawn.py); so, and of some items two
    blocks do a part each, so that all blocks end together (mosaic_cuts.py)."""

    early_keys: bool = False
    """Consumers wait for K of a tile while that of the tile before is multiplied, not before they multiply it."""

    sums_in_turn: bool = False
    """Whether a tile's probabilities are added up one after another, not by halves; slots are found by `&` then.

    The sums differ in their last bits. The time differs by what order of the whole step ptxas makes of it, which only
    a measurement tells.
    """

    registers: tuple[int, int] = (240, 24)
    """Registers a thread of consumers and producer."""

    def __post_init__(self) -> None:
        if self.key_tile not in (64, 128, 256):
            raise ValueError(f"key_tile must be 64, 128 or 256, got {self.key_tile}")
        if self.stages < 2:  # K of the next tile is loaded before this one's slot is free
            raise ValueError(f"stages must be at least 2, got {self.stages}")
        if self.staged not in ("none", "16 bit", "all"):
            raise ValueError(f"staged must be none, 16 bit or all, got {self.staged!r}")
        if self.shares not in ("fixed", "drawn", "cut"):
            raise ValueError(f"shares must be fixed, drawn or cut, got {self.shares!r}")
        check_registers(CONSUMERS, self.registers)


CarryUse = Literal["none", "in place", "read"]


def flash_fwd(
    q, k, v, keys: KeyRange, settings: Settings, carry: Carry | None, out_dtype, tuning: ForwardTuning
) -> tuple[jax.Array, jax.Array]:
    """The contract's forward where Sq is a multiple of QUERY_TILE and Sk of tuning.key_tile."""
    batch, rows, heads, dim = q.shape
    out_dim, dt = v.shape[3], q.dtype
    k_parts = jax.tree.leaves(k)  # one, or a head's own columns and those of all heads
    columns = [x.shape[-1] for x in k_parts]
    scratch = {
        "q_smem": smem((CONSUMERS, ROWS, dim), dt, math.gcd(*columns)),
        "k_smem": [smem((tuning.stages, tuning.key_tile, n), dt, math.gcd(*columns)) for n in columns],
        "v_smem": smem((tuning.stages, tuning.key_tile, out_dim), dt),
        "bounds_smem": plgpu.SMEM((CONSUMERS, 2, ROWS), jnp.int32),
        "q_full": plgpu.Barrier(num_arrivals=3, num_barriers=CONSUMERS),
        "k_full": plgpu.Barrier(num_arrivals=len(k_parts), num_barriers=tuning.stages),
        "v_full": plgpu.Barrier(num_barriers=tuning.stages),
    }
    if tuning.staged == "all" or (tuning.staged == "16 bit" and jnp.dtype(out_dtype).itemsize == 2):
        scratch["out_smem"] = smem((CONSUMERS, ROWS, out_dim), out_dtype)
        if carry is not None and out_dtype == jnp.float32:
            scratch["carry_full"] = plgpu.Barrier(num_barriers=CONSUMERS)

    items = Items(batch, heads, rows // QUERY_TILE, tuning.query_group)
    if tuning.shares == "cut" and out_dim > 128:
        raise ValueError(f'shares="cut" needs at most 128 columns of v a head, got {out_dim}')
    group = heads // v.shape[2]  # heads that share K and V as neighbouring query tiles do
    cuts = Cuts(items, tuning.key_tile, max(1, tuning.cut_sharing // group)) if tuning.shares == "cut" else None
    cuts = cuts if cuts and cuts.pay else None
    if tuning.shares != "fixed":
        scratch |= mosaic_drawn.SCRATCH
    numbers = (jnp.zeros(cuts.counters if cuts else 1, jnp.int32), *keys)
    shapes = [x.shape for x in numbers]

    def run(use: CarryUse, *refs, out_type=()):
        arrays = with_numbers(mosaic_numbers.join(*numbers), q, k_parts, v)
        return launch(
            functools.partial(_kernel, settings, tuning, items, cuts, use, shapes), *arrays, *refs, out_type=out_type,
            scratch_types=scratch, grid=(items.sms,), grid_names=("sm",), warpgroups=CONSUMERS + 1, name="flash_fwd",
        )  # fmt: skip

    result = (
        jax.ShapeDtypeStruct((batch, rows, heads, out_dim), out_dtype),
        jax.ShapeDtypeStruct((batch, heads, rows), jnp.float32),
    )
    if cuts:
        result += mosaic_cuts.results(items, out_dim)
    if carry is None:
        return run("none", out_type=result)[:2]
    if out_dtype != jnp.float32:
        return run("read", *carry, out_type=result)[:2]
    out_ref, lse_ref = jax.new_ref(carry.out), jax.new_ref(carry.lse)
    run("in place", out_ref, lse_ref)
    return jax.freeze(out_ref), jax.freeze(lse_ref)


def _kernel(
    settings: Settings, tuning: ForwardTuning, items: Items, cuts: Cuts | None, use: CarryUse, shapes,
    q_ref, k_refs, v_ref, numbers_ref, *refs,
    q_smem, k_smem, v_smem, bounds_smem, q_full, k_full, v_full, out_smem=None, carry_full=None,
    records=None, record_full=None,
):  # fmt: skip
    drawing = tuning.shares != "fixed"
    counters, starts, stops = mosaic_numbers.parts(numbers_ref, shapes)
    if use == "in place":
        out_ref, lse_ref = carry_out_ref, carry_lse_ref = refs
    elif use == "read":
        carry_out_ref, carry_lse_ref, out_ref, lse_ref, *part_refs = refs
    else:
        out_ref, lse_ref, *part_refs = refs
    has_carry, fetched = use != "none", carry_full is not None  # fetched: the carry comes by TMA into out_smem
    heads, (kv_heads, out_dim) = q_ref.shape[2], v_ref.shape[2:]
    shared_ranges = starts.shape[0] == 1
    tile, stages, dt = tuning.key_tile, tuning.stages, q_ref.dtype
    # exponents are base 2: scores times this
    to_log2 = LOG2E * (settings.scale if settings.softcap is None else settings.softcap)

    wg, sm = lax.axis_index("wg"), None if drawing else lax.axis_index("sm")
    item_count = items.count if drawing else items.of_sm(sm)
    producer_threads = WARPGROUP if drawing else WARP
    everyone = CONSUMERS * WARPGROUP + producer_threads
    k_free = NamedBarriers(4, stages, everyone)
    v_free = NamedBarriers(k_free.end, stages, everyone)
    q_free = NamedBarriers(v_free.end, CONSUMERS, WARPGROUP + producer_threads)
    carry_free = NamedBarriers(q_free.end, CONSUMERS, WARPGROUP + producer_threads)
    if drawing:
        record_free = NamedBarriers(carry_free.end, mosaic_drawn.RECORDS, everyone)
        drawn = mosaic_drawn.Drawn(counters.numbers, records, record_full, record_free)
    # first parts' results, where they cannot take the place of a carry
    aside = None if cuts is None or use == "in place" else Aside(*part_refs, cuts)
    slot = lambda i: remainder(i, stages) if tuning.sums_in_turn else lax.rem(i, i32(stages))
    widths = [ref.shape[-1] for ref in k_refs]
    k_columns = [slice(None)] if len(widths) == 1 else [slice(0, widths[0]), slice(widths[0], sum(widths))]

    def edges_of(j):
        b, _, q0 = items.at(sm, j)
        return read_edges(starts, stops, 0 if shared_ranges else b, q0, QUERY_TILE)

    def item(j, before, edges, again=None):
        """Consumers: item j; `before` tiles were visited by earlier items. Returns the tiles visited so far.

        again: reads (item, part) from the record (mosaic_drawn.py).
        """
        tiles = Tiles(edges, tile)
        again = again or (lambda: (j, i32(WHOLE)))

        def place():
            """(batch row, head, this warpgroup's rows), made anew: kept from the start they would be spilled."""
            b, h, q0 = items.at(sm, again()[0])
            return b, h, pl.ds(q0 + wg * ROWS, ROWS)

        def add_scores(s_acc, at):
            """Start what makes the scores of the tile in slot `at`."""
            for columns, keys in zip(k_columns, k_smem, strict=True):
                plgpu.wgmma(s_acc, q_smem.at[wg, :, columns], keys.at[at].T)

        def row_bounds():
            """First and end key of each of this warpgroup's rows, which come and go with Q: read before leave_q."""
            return lax.optimization_barrier([plgpu.load(bounds_smem.at[wg, side], layout=ROW) for side in range(2)])

        def leave_q():
            """Let the producer load the next item's Q and bounds over this one's.

            The fence waits for the reads of the bounds, and TMA's writes come after it.
            """
            fence_smem()
            q_free.arrive(wg)

        def leave_q_after(i):
            """The same, if tile i, whose scores are there, is the last. With fixed shares it is done behind the loop.

            There it has not been timed, and costs D = 256 8 bytes of stack with a softcap. The fence also makes a
            branch of it: ptxas puts an arrival under a mere condition behind the whole softmax.
            """
            if drawing:
                pl.when(i == tiles.count - 1)(leave_q)

        def capped(s):
            if settings.softcap is None:
                return s
            # tanh by exp2 and a division: tanh.approx is too coarse for the lse
            return 1 - 2 / (jnp.exp2(s * (2 * LOG2E * settings.scale / settings.softcap)) + 1)

        def masked(s, i, bounds):
            return where_between(s, *(x - tiles.at(i) * tile for x in bounds), -math.inf)

        def softmax(s, m, cut):
            """Unnormalised probabilities, the new reference (times log2 e) and the old ones' weight.

            The reference is a maximum that may be up to 2^SLACK too small (FlashAttention-4): it stays, and so do the
            sums, until the maximum has left it behind. cut: rows may have seen nothing yet.
            """
            m_new = jnp.maximum(m, s.max(axis=1) * to_log2)
            m_new = jnp.where(m_new > m + SLACK, m_new, m)
            m_used = jnp.where(m_new == -jnp.inf, 0.0, m_new) if cut else m_new
            return jnp.exp2(s * to_log2 - across(m_used, tile)), m_new, jnp.exp2(m - m_used)

        def row_sums(p):
            """[64, 8] partial sums: the 8 columns are added once an item, which saves each tile's shuffles."""
            parts = [p[:, j : j + 8] for j in range(0, tile, 8)]
            if tuning.sums_in_turn:
                return functools.reduce(lambda a, b: a + b, parts)
            while len(parts) > 1:
                parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
            return parts[0]

        def await_early(i):
            """Wait for K of tile i, if there is one, while the tensor core is at work on the tile before."""
            if tuning.early_keys:
                pl.when(i < tiles.count)(lambda: plgpu.barrier_wait(k_full.at[slot(before + i)]))

        def run():
            plgpu.barrier_wait(q_full.at[wg])
            first = slot(before)
            plgpu.barrier_wait(k_full.at[first])

            def first_scores(s_acc):
                add_scores(s_acc, first)
                await_early(i32(1))
                return s_acc[...]

            s = pl.run_scoped(first_scores, plgpu.ACC((ROWS, tile), jnp.float32))
            bounds = row_bounds()
            k_free.arrive(first)
            leave_q_after(i32(0))
            none = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), ROW)
            s = capped(s)
            s = lax.cond(tiles.masked > 0, lambda: masked(s, i32(0), bounds), lambda: s)
            p, m, _ = softmax(s, none, cut=True)
            l = row_sums(p)
            acc = plgpu.layout_cast(jnp.zeros((ROWS, out_dim), jnp.float32), ACC)
            if fetched:  # the last item's result has left by now: its buffer is free for this one's carry
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                carry_free.arrive(wg)
            plgpu.barrier_wait(v_full.at[first])

            def step(i, state, cut):
                acc, m, l, p16 = state
                ks, vs = slot(before + i), slot(before + i - 1)
                if not tuning.early_keys:
                    plgpu.barrier_wait(k_full.at[ks])

                def overlap(refs):
                    acc_ref, p_ref, m_ref, l_ref, weight_ref, rescale_ref = refs

                    def with_scores(s_acc):
                        add_scores(s_acc, ks)
                        plgpu.wgmma(acc_ref, p16, v_smem.at[vs])
                        await_early(i + 1)
                        s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
                        bounds = row_bounds() if cut else None
                        k_free.arrive(ks)
                        leave_q_after(i)
                        s = capped(s)
                        if bounds:
                            s = masked(s, i, bounds)
                        p, m, weight = softmax(s, m_ref[...], cut)
                        p_ref[...], m_ref[...], weight_ref[...] = p, m, weight
                        l = l_ref[...] * across(weight, 8) + row_sums(p)
                        l_ref[...] = l
                        # no sum is negative: it stands here because ptxas would add up p behind the wait for PV
                        rescale_ref[...] = any_below((weight, 1.0), (l, 0.0))
                        # V of this tile is waited for here, before PV of the last one is: ptxas moves no work over the
                        # branch of an mbarrier wait; without one it would put the whole softmax behind the wait for PV
                        plgpu.barrier_wait(v_full.at[ks])

                    pl.run_scoped(with_scores, plgpu.ACC((ROWS, tile), jnp.float32))

                unset = plgpu.layout_cast(jnp.zeros((ROWS, tile), jnp.float32), ACC)
                start = plgpu.ACC.init(acc), unset, m, l, m, i  # weight and rescale are set: any row and number do
                acc, p, m, l, weight, rescale = pl.run_state(overlap)(start)
                v_free.arrive(vs)
                acc = lax.cond(rescale > 0, lambda: acc * across(weight, out_dim), lambda: acc)
                return acc, m, l, p.astype(dt)

            state = (acc, m, l, p.astype(dt))
            edge = lax.max(tiles.masked, i32(1))
            state = lax.fori_loop(i32(1), edge, functools.partial(step, cut=True), state)
            state = lax.fori_loop(edge, tiles.count, functools.partial(step, cut=False), state)
            acc, m, l, p16 = state
            if not drawing:
                leave_q()
            b, h, my_rows = place()
            last = slot(before + tiles.count - 1)
            if has_carry:
                lse_carry = plgpu.load(carry_lse_ref.at[b, h, my_rows], layout=ROW, optimized=False)
            # beside acc in registers, loaded while the last PV runs
            carry_early = has_carry and not fetched and out_dim <= 128

            def last_pv(refs):
                acc_ref, *carry_acc = refs
                plgpu.wgmma(acc_ref, p16, v_smem.at[last])
                if carry_early:
                    carry_acc[0][...] = carried_out(0, out_dim)

            unset = [plgpu.layout_cast(jnp.zeros((ROWS, out_dim), jnp.float32), ACC)] if carry_early else []
            acc, *carry_acc = pl.run_state(last_pv)((plgpu.ACC.init(acc), *unset))
            v_free.arrive(last)

            l = l.sum(axis=1)
            if aside:
                acc, m, l = aside.continued(again()[1], wg, acc, m, l)
            if has_carry:
                if aside:
                    lse_carry = lse_carry + without_first()
                unseen, m_carry = l == 0.0, lse_carry * LOG2E  # by l, which a nan reaches: m ignores one
                m_new = jnp.maximum(m, m_carry)
                m_used = jnp.where(m_new == -jnp.inf, 0.0, m_new)
                weight, carry_weight = jnp.exp2(m - m_used), jnp.exp2(m_carry - m_used)
                l, m = l * weight + carry_weight, m_new
            empty = l == 0.0
            inverse = jnp.where(empty, 0.0, 1.0 / l)
            lse = jnp.where(empty, -jnp.inf, m * (1 / LOG2E) + jnp.log(l))
            if has_carry:  # bit for bit what it was, not by way of base 2
                lse = jnp.where(unseen, lse_carry, lse)
            if fetched:
                plgpu.barrier_wait(carry_full.at[wg])
                carry_acc = [plgpu.load(out_smem.at[wg], layout=ACC)]
            if fetched or carry_early:
                out = acc * across(weight * inverse, out_dim) + carry_acc[0] * across(carry_weight * inverse, out_dim)
            elif has_carry:
                for c in range(0, out_dim, 64):
                    columns = acc[:, c : c + 64] * across(weight * inverse, 64)
                    columns += carried_out(c, 64) * across(carry_weight * inverse, 64)
                    store(out_ref.at[b, my_rows, h, pl.ds(c, 64)], columns.astype(out_ref.dtype))
                out = None
            else:
                out = acc * across(inverse, out_dim)
            finish(out, lse)

        def carried_out(column, columns):
            b, h, my_rows = place()
            at = carry_out_ref.at[b, my_rows, h, pl.ds(column, columns)]
            return plgpu.load(at, layout=ACC, optimized=False)

        def without_first():
            """-inf for a first part: the rest continues the carry. Added, as a row has no selection by a scalar."""
            return jnp.where(cuts.is_first(again()[1]), jnp.float32(-jnp.inf), jnp.float32(0))

        def finish(out, lse):
            if aside:
                part = again()[1]
                lax.cond(cuts.is_first(part), lambda: aside.keep(part, wg, out, lse), lambda: write(out, lse))
            else:
                write(out, lse)

        def write(out, lse):
            b, h, my_rows = place()
            store(lse_ref.at[b, h, my_rows], lse)
            if out is None:  # stored before, some columns at a time
                return
            if out_smem is not None:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out_smem[wg] = out.astype(out_ref.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_smem.at[wg], out_ref.at[b, my_rows, h, :])
            else:
                store(out_ref.at[b, my_rows, h, :], out.astype(out_ref.dtype))

        def nothing():
            if use == "in place":
                return
            if use == "read":
                out = carried_out(0, out_dim)
                b, h, my_rows = place()
                lse = plgpu.load(carry_lse_ref.at[b, h, my_rows], layout=ROW, optimized=False)
                if aside:
                    lse = lse + without_first()
            else:
                out = plgpu.layout_cast(jnp.zeros((ROWS, out_dim), jnp.float32), ACC)
                lse = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), ROW)
            finish(out, lse)

        pl.when(tiles.count > 0)(run)
        pl.when(tiles.count == 0)(nothing)
        return before + tiles.count

    def consumer():
        plgpu.set_max_registers(tuning.registers[0], action="increase")
        for s in range(stages):
            k_free.arrive(s)
            v_free.arrive(s)
        q_free.arrive(wg)

        def one(j, state):
            before, *edges = state
            following = edges_of(lax.min(j + 1, item_count - 1))  # read an item ahead
            return (item(j, before, edges), *following)

        def one_drawn(state):
            _, before, at = state
            number, edges = drawn.take(at)
            again = lambda: drawn.again(at)
            before = lax.cond(number < item_count, lambda: item(number, before, edges, again), lambda: before)
            if cuts:
                part = again()[1]

                @pl.when(cuts.is_first(part))
                def _():
                    plgpu.wait_smem_to_gmem(0)  # written, not only read
                    cuts.done(counters.numbers, part)

            drawn.leave(at)
            return number, before, drawn.after(at)

        if drawing:
            for r in range(mosaic_drawn.RECORDS):
                record_free.arrive(r)
            lax.while_loop(lambda state: state[0] < item_count, one_drawn, (i32(0), i32(0), i32(0)))
        else:
            lax.fori_loop(i32(0), item_count, one, (i32(0), *edges_of(i32(0))))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def load_item(j, before, edges=None):
        """Producer: item j. With `edges` its items are drawn: returns the number of the next one too."""
        b, h, q0 = items.at(sm, j)
        bs = 0 if shared_ranges else b
        kh = lax.div(h, i32(heads // kv_heads))
        tiles = Tiles(edges or edges_of(j), tile)
        half = lax.div(tiles.count + 1, i32(2)) if edges else tiles.count

        def load(refs, full, free, to, i):
            s, rows = slot(before + i), pl.ds(tiles.at(i) * tile, tile)
            free.sync(s)
            for ref, slots in zip(refs, to, strict=True):
                at = (b, rows, kh) if len(ref.shape) == 4 else (b, rows)
                plgpu.copy_gmem_to_smem(ref.at[*at, :], slots.at[s], full.at[s])

        load_k = functools.partial(load, k_refs, k_full, k_free, k_smem)
        load_v = functools.partial(load, [v_ref], v_full, v_free, [v_smem])

        def load_kv(i):  # K of the next tile before V of this one: the order in which they are consumed
            pl.when(i + 1 < tiles.count)(lambda: load_k(i + 1))
            load_v(i)

        @pl.when(tiles.count > 0)
        def _():
            load_k(i32(0))  # its slot is free a tile earlier than Q's
            for w in range(CONSUMERS):
                its_rows = pl.ds(q0 + w * ROWS, ROWS)
                q_free.sync(w)
                plgpu.copy_gmem_to_smem(q_ref.at[b, its_rows, h, :], q_smem.at[w], q_full.at[w])
                for side, bound in enumerate((starts, stops)):
                    plgpu.copy_gmem_to_smem(bound.rows(bs, rows=its_rows), bounds_smem.at[w, side], q_full.at[w])

            pl.loop(i32(0), half)(load_kv)

        if edges is None:
            return before + tiles.count
        if fetched:
            fetch_carry(j, tiles)
        following = drawn.draw()  # in the middle of an item, where nobody waits for it
        pl.loop(half, tiles.count)(load_kv)
        return before + tiles.count, following

    def fetch_carry(j, tiles=None):
        b, h, q0 = items.at(sm, j)

        @pl.when((tiles or Tiles(edges_of(j), tile)).count > 0)
        def _():
            for w in range(CONSUMERS):
                carry_free.sync(w)
                carried = carry_out_ref.at[b, pl.ds(q0 + w * ROWS, ROWS), h, :]
                plgpu.copy_gmem_to_smem(carried, out_smem.at[w], carry_full.at[w])

    def producer():
        plgpu.set_max_registers(tuning.registers[1], action="decrease")
        (produce_drawn if drawing else produce_share)()

    def produce_drawn():
        """By the whole warpgroup: a loop of unknown length cannot be one warp's (jax 0.11.2)."""
        equal = cuts.equal(edges_of) if cuts else i32(0)

        def ahead(number):
            if cuts:
                return number, *cuts.at(number, equal, edges_of)
            return number, number, i32(WHOLE), *edges_of(lax.min(number, i32(item_count - 1)))

        def one(state):
            before, at, number, item, part, *edges = state
            if cuts:
                pl.when(cuts.is_rest(part))(lambda: cuts.wait(counters.numbers, part))
            drawn.hand_over(at, item, part, *edges)
            if use == "in place":  # elsewhere an item that sees nothing has a result to write
                pl.when((Tiles(edges, tile).count == 0) & (part == WHOLE) & (number >= equal))(
                    lambda: skip(item, number)
                )
            before, following = load_item(item, before, edges)
            return before, drawn.after(at), *ahead(following)

        begin = (i32(0), i32(0), *ahead(drawn.draw()))
        _, at, _, *record = lax.while_loop(lambda state: state[3] < item_count, one, begin)
        drawn.hand_over(at, *record)  # which says that there are no more

    def skip(j, number):
        """Producer: item j sees nothing; if none with its queries does, none of them need be drawn."""
        b, q0, rows, after = items.same_queries(j)
        bs = 0 if shared_ranges else b
        seen = Tiles(read_edges(starts, stops, bs, q0, rows), tile).count
        pl.when(seen == 0)(lambda: drawn.skip_to(number + after - j))

    def produce_share():
        @plgpu.warp_map
        def _(warp):
            @pl.when(warp == 0)
            def _():
                lax.fori_loop(i32(0), item_count, load_item, i32(0))

            if fetched:

                @pl.when(warp == 1)
                def _():
                    pl.loop(i32(0), item_count)(fetch_carry)

    lax.cond(wg < CONSUMERS, consumer, producer)
