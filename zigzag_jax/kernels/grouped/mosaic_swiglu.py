"""SwiGLU on a grouped matmul's way out, on Hopper: the two `Parts` of swiglu.py.

**Inward**, x to inner. An item is a row tile (row_tiles.py) and 128 columns *of gate and the same of up*: a step
loads a tile of x and two of the matrix, [64, 128] at column c and at f + c, and each consumer has two wgmma of 128
columns in flight where a plain matmul has one of 256. So both halves of every value are in the same thread, and SwiGLU
is arithmetic on registers. The weights stay side by side: interleaved ones would need a layout of their own in the
model, its checkpoints and the optimiser.

**Outward**, dy to dhidden and dscale. The matmul is dx's, z = dy down' in tiles of 128 x 256, and then 4 more steps
bring gate and up, 64 columns of each, *through the slots of the matmul*, so that they are under way while it still
multiplies:

    producer      ... s30 s31 | g0 u0 | g1 u1 | g2 u2 | g3 u3 | s0 s1 ...     a slot has 48 KiB, g and u take 32
    tensor core     ... s30 s31                                   s0 ...
    other units                 dgate dup 0  ..1     ..2     ..3                   registers > shared memory > TMA

z stays float32. dscale is a sum over all f columns, and a block has 256 of them: each column tile writes its own row of
[f / 256, M], which XLA adds up.

    FLOPs and bytes of the matmuls in mosaic_rows.py; what is written between them in swiglu.py
"""

# Pallas' annotations do not know refs, layouts and the inline_mgpu decorator; the compile tests check these calls
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportGeneralTypeIssues=false

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from zigzag_jax.kernels.flash.contract import LOG2E
from zigzag_jax.kernels.grouped.contract import PIECE
from zigzag_jax.kernels.grouped.mosaic_pipeline import (
    CONSUMERS,
    LOADS,
    ROWS,
    STEP,
    TILE,
    GroupedTuning,
    Pipeline,
    Record,
    run,
    send_piece,
)
from zigzag_jax.kernels.grouped.mosaic_rows import Items
from zigzag_jax.kernels.grouped.row_tiles import RowTiles
from zigzag_jax.kernels.hopper import ACC, ROW, across, i32, store_row_values, store_rows


def inward(x, gate_up, scale, schedule: RowTiles, keep: bool, tuning: GroupedTuning) -> list[jax.Array]:
    """[inner], with `keep` [inner, hidden], where M is a multiple of 8, d and f of 64; scale float32 [M + TILE].

    scale has room for a row tile past the last row: unlike TMA, plain loads must not reach past an array's end.
    """
    if tuning.columns != 4 * PIECE:  # two buffers take turns, and each result of an item begins with the first
        raise ValueError(f"columns must be {4 * PIECE}, two pieces of gate and two of up, got {tuning.columns}")
    rows, inner = x.shape[0], gate_up.shape[2] // 2
    kept = (jax.ShapeDtypeStruct((rows, 2 * inner), x.dtype),) if keep else ()
    return run(
        functools.partial(_inward, tuning, x.shape[1] // STEP, keep), x, gate_up, scale, *schedule,
        out_type=(jax.ShapeDtypeStruct((rows, inner), x.dtype), *kept), tuning=tuning, loads=LOADS + 1,
        tiles={"rows_smem": (TILE, STEP), "matrix_smem": (2, STEP, tuning.columns // 2)}, name="grouped_swiglu",
    )  # fmt: skip


def outward(dy, down, hidden, scale, schedule: RowTiles, tuning: GroupedTuning) -> tuple[jax.Array, jax.Array]:
    """(dhidden, parts of dscale float32 [column tiles, M]); sizes as for `inward`."""
    rows, tiles = dy.shape[0], -(-down.shape[1] // tuning.columns)
    return run(
        functools.partial(_outward, tuning, dy.shape[1] // STEP), dy, down, hidden, scale, *schedule,
        out_type=(
            jax.ShapeDtypeStruct(hidden.shape, hidden.dtype), jax.ShapeDtypeStruct((tiles, rows), jnp.float32)
        ),
        tuning=tuning, tiles={"rows_smem": (TILE, STEP), "matrix_smem": (tuning.columns, STEP)},
        scratch={"sums_smem": plgpu.SMEM((CONSUMERS, ROWS), jnp.float32)}, name="grouped_swiglu_grad",
    )  # fmt: skip


def _sigmoid(x):
    """By exp2 and its inverse: a float32 division is a dozen instructions, and tanh's approximation too coarse."""
    return jnp.exp2(-LOG2E * jnp.log(1 + jnp.exp2(-LOG2E * x)))


def _sender(wg, record: Record):
    """A function (piece [64, 64], buffer, ref, column, end of the columns): writes what is the group's."""
    _, eighth, first, end, _ = record
    row = (eighth + wg * (ROWS // 8)) * 8

    def send(values, buffer, ref, column, columns_end: int):
        def put(buffer):
            def whole():
                plgpu.copy_smem_to_gmem(buffer, ref.at[pl.ds(row, ROWS), pl.ds(column, PIECE)])

            def part():
                store_rows(buffer, ref, row, column, first, jnp.where(column < columns_end, end, first))
                plgpu.commit_smem_to_gmem_group()

            lax.cond((first <= row) & (row + ROWS <= end) & (column < columns_end), whole, part)

        send_piece(values, buffer, put)

    return send


def _branches(wg, record: Record, live, zeros, nothing) -> None:
    """What a consumer does with an item: rows of its group, rows of none, or no rows at all.

    Paths and no select on the accumulator: ptxas would run one wgmma after the other.
    """
    group, eighth, first, end, _ = record
    row = (eighth + wg * (ROWS // 8)) * 8
    mine = (row < end) & (row + ROWS > first)
    lax.cond(mine, lambda: lax.cond(group < 0, zeros, live), nothing)


def _zeros(dtype):
    return plgpu.layout_cast(jnp.zeros((ROWS, PIECE), dtype), ACC)


def _inward(
    tuning: GroupedTuning, steps: int, keep: bool, x_ref, gate_up_ref, scale_ref, *refs,
    rows_smem, matrix_smem, out_smem, full, records=None,
):  # fmt: skip
    schedule, counter, (inner_ref, *kept) = RowTiles(*refs[:5]), refs[5 : -1 - keep], refs[-1 - keep :]
    wg, width, dt = lax.axis_index("wg"), tuning.columns // 2, x_ref.dtype
    inner = inner_ref.shape[1]
    items = Items(schedule, -(-inner // width), steps)
    pipeline = Pipeline(tuning, items, full, counter[0] if counter else None, records, LOADS + 1)

    def work(slot, record):
        send = _sender(wg, record)
        column = record[-1] * width

        def send_all(values, ref, start: int):
            for p in range(width // PIECE):
                at, piece = column + p * PIECE, values(p)
                send(piece, out_smem.at[wg, p % 2], ref, at + start, inner + start)

        def live():
            row = (record[1] + wg * (ROWS // 8)) * 8
            scale = plgpu.load(scale_ref.at[pl.ds(row, ROWS)], layout=ROW, optimized=False)

            def sums(*halves):
                def wgmma(s):
                    for half, acc in enumerate(halves):
                        plgpu.wgmma(acc, rows_smem.at[s, pl.ds(wg * ROWS, ROWS)], matrix_smem.at[s, half])

                pipeline.multiply(slot, record, wgmma, a_step=2)
                return tuple(acc[...] for acc in halves)

            acc = plgpu.ACC((ROWS, width), jnp.float32)
            gate, up = (half.astype(dt) for half in pl.run_scoped(sums, acc, acc))
            of = lambda values: lambda p: values[:, p * PIECE : (p + 1) * PIECE]

            def product(p):
                g, u = (of(half)(p).astype(jnp.float32) for half in (gate, up))  # rounded: what the backward reads
                return (across(scale, PIECE) * (g * _sigmoid(g)) * u).astype(dt)

            send_all(product, inner_ref, 0)
            for hidden_ref in kept:
                send_all(of(gate), hidden_ref, 0)
                send_all(of(up), hidden_ref, inner)

        def zeros():
            pipeline.skip(slot, record)
            none = lambda _: _zeros(dt)
            send_all(none, inner_ref, 0)
            for hidden_ref in kept:
                send_all(none, hidden_ref, 0)
                send_all(none, hidden_ref, inner)

        _branches(wg, record, live, zeros, lambda: pipeline.skip(slot, record))

    def load(slot, record, step):
        group, eighth, _, _, column_tile = record
        group, at = lax.max(group, i32(0)), pl.ds(step * STEP, STEP)
        for half in range(2):
            matrix = gate_up_ref.at[group, at, pl.ds(half * inner + column_tile * width, width)]
            plgpu.copy_gmem_to_smem(matrix, matrix_smem.at[slot, half], full.at[slot])
        plgpu.copy_gmem_to_smem(x_ref.at[pl.ds(eighth * 8, TILE), at], rows_smem.at[slot], full.at[slot])

    pipeline.roles(work, load)


def _outward(
    tuning: GroupedTuning, steps: int, dy_ref, down_ref, hidden_ref, scale_ref, *refs,
    rows_smem, matrix_smem, out_smem, sums_smem, full, records=None,
):  # fmt: skip
    schedule, (*counter, dhidden_ref, dscale_ref) = RowTiles(*refs[:5]), refs[5:]
    wg, width, dt = lax.axis_index("wg"), tuning.columns, dy_ref.dtype
    inner, pieces = hidden_ref.shape[1] // 2, tuning.columns // PIECE
    items = Items(schedule, -(-inner // width), steps + pieces)
    pipeline = Pipeline(tuning, items, full, counter[0] if counter else None, records)

    def work(slot, record):
        _, eighth, first, end, column_tile = record
        row, send = (eighth + wg * (ROWS // 8)) * 8, _sender(wg, record)

        def send_both(p, dgate, dup):
            for half, values in enumerate((dgate, dup)):
                start = half * inner
                at = column_tile * width + p * PIECE + start
                send(values, out_smem.at[wg, half], dhidden_ref, at, inner + start)

        def send_sums(sums):
            sums_smem[wg] = sums
            plgpu.commit_smem()
            store_row_values(sums_smem.at[wg], dscale_ref, column_tile, row, first, end)

        def live():
            scale = plgpu.load(scale_ref.at[pl.ds(row, ROWS)], layout=ROW, optimized=False)

            def multiply(acc):
                def wgmma(s):
                    plgpu.wgmma(acc, rows_smem.at[s, pl.ds(wg * ROWS, ROWS)], matrix_smem.at[s].T)

                return pipeline.multiply(slot, record, wgmma, steps=steps), acc[...]

            at, z = pl.run_scoped(multiply, plgpu.ACC((ROWS, width), jnp.float32))
            sums = plgpu.layout_cast(jnp.zeros((ROWS, 8), jnp.float32), ACC)
            for p in range(pieces):
                plgpu.barrier_wait(full.at[at])
                gate, up = (
                    plgpu.load(tile.at[at, pl.ds(wg * ROWS, ROWS)], layout=ACC).astype(jnp.float32)
                    for tile in (rows_smem, matrix_smem)
                )
                z_piece, sigmoid = z[:, p * PIECE : (p + 1) * PIECE], _sigmoid(gate)
                silu = gate * sigmoid
                dup = z_piece * silu
                dscale = dup * up
                for j in range(0, PIECE, 8):
                    sums = sums + dscale[:, j : j + 8]
                weight = across(scale, PIECE)
                dgate = z_piece * up * (sigmoid + silu * (1 - sigmoid))
                send_both(p, (weight * dgate).astype(dt), (weight * dup).astype(dt))
                pipeline.free.arrive(at)
                at = pipeline.following(at)
            send_sums(sums.sum(axis=1))

        def zeros():
            pipeline.skip(slot, record)
            for p in range(pieces):
                send_both(p, _zeros(dt), _zeros(dt))
            send_sums(plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW))

        _branches(wg, record, live, zeros, lambda: pipeline.skip(slot, record))

    def load(slot, record, step):
        group, eighth, _, _, column_tile = record
        group, rows = lax.max(group, i32(0)), pl.ds(eighth * 8, TILE)

        def matmul():
            at = pl.ds(step * STEP, STEP)
            matrix = down_ref.at[group, pl.ds(column_tile * width, width), at]
            plgpu.copy_gmem_to_smem(matrix, matrix_smem.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(dy_ref.at[rows, at], rows_smem.at[slot], full.at[slot])

        def kept():
            column = column_tile * (width // PIECE) + (step - steps)
            gate = hidden_ref.at[rows, pl.ds(column * PIECE, PIECE)]
            up = hidden_ref.at[rows, pl.ds((column + inner // PIECE) * PIECE, PIECE)]
            plgpu.copy_gmem_to_smem(gate, rows_smem.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(up, matrix_smem.at[slot, pl.ds(0, TILE)], full.at[slot])

        lax.cond(step < steps, matmul, kept)

    pipeline.roles(work, load)
