"""Rows times their group's matrix on Hopper: the forward, and with transposed matrices dx.

A *row tile* is up to 128 rows of one group (row_tiles.py); an item is a row tile and 256 columns. A group may begin at
any row, and TMA reads rows by eights, so a group's first tile begins at its first row **rounded down to 8**:

    rows      ...  8   13               136      144   151              two groups: rows 13 to 150, and 151 on
    first          |    [13 ........ 135][136 ........ 150]             loads take whole tiles from 8, 136 | 144,
    second                                        |    [151 ...         stores only what stands in brackets

What a tile reads of its neighbours' rows reaches only rows of the tile that are not stored, nan too. A warpgroup whose
64 rows are all the group's stores by TMA, the others row by row.

The matrices are read where they lie: w[g] as [64, 256] tiles for the forward, as [256, 64] tiles that wgmma transposes
for dx. Column tiles are the fastest, then row tiles, group by group: every matrix comes from memory once.

    FLOPs   2 M k n          bytes   M k + G k n + M n, times 2 (bfloat16)

At 65536 rows, 128 groups, 2048 -> 768 these are 206 GFLOP and 771 MB: 0.26 ms at 3 TB/s, and 0.21 ms at the tensor
core's 989 TF/s. docs/benchmarks.md has what was reached.
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

from zigzag_jax.kernels.grouped.mosaic_pipeline import (
    ROWS,
    STEP,
    TILE,
    GroupedTuning,
    Pipeline,
    Record,
    run,
    send,
)
from zigzag_jax.kernels.grouped.row_tiles import RowTiles
from zigzag_jax.kernels.hopper import ACC, i32, store_rows


def product(rows, matrices, schedule: RowTiles, transposed: bool, out_dtype, tuning: GroupedTuning) -> jax.Array:
    """contract.Product where M is a multiple of 8, a and b of 64."""
    count, contraction = rows.shape
    columns = matrices.shape[1 if transposed else 2]
    matrix_tile = (tuning.columns, STEP) if transposed else (STEP, tuning.columns)
    return run(
        functools.partial(_kernel, transposed, tuning, contraction // STEP), rows, matrices, *schedule,
        out_type=jax.ShapeDtypeStruct((count, columns), out_dtype), tuning=tuning,
        tiles={"rows_smem": (TILE, STEP), "matrix_smem": matrix_tile}, name="grouped_dx" if transposed else "grouped",
    )  # fmt: skip


class Items:
    """Row tiles times column tiles, the latter the faster. A record: a row of `RowTiles`, and the column tile."""

    def __init__(self, schedule: RowTiles, column_tiles: int, steps: int) -> None:
        self.tiles, self.column_tiles, self.all_steps = schedule[:4], column_tiles, steps
        self.count = schedule.upto[schedule.upto.shape[0] - 1] * column_tiles

    def at(self, index) -> Record:
        """Items.at."""
        tile = lax.min(lax.div(index, i32(self.column_tiles)), i32(self.tiles[0].shape[0] - 1))
        return *(ref[tile] for ref in self.tiles), lax.rem(index, i32(self.column_tiles))

    def steps(self, record: Record):
        """Items.steps; rows of no group are only written, so they take one step for form's sake."""
        return jnp.where(record[0] < 0, 1, self.all_steps)


def _kernel(
    transposed: bool, tuning: GroupedTuning, steps: int, rows_ref, matrices_ref, *refs,
    rows_smem, matrix_smem, out_smem, full, records=None,
):  # fmt: skip
    schedule, (*counter, out_ref) = RowTiles(*refs[:5]), refs[5:]
    wg, width, dt = lax.axis_index("wg"), tuning.columns, out_ref.dtype
    items = Items(schedule, -(-out_ref.shape[1] // width), steps)
    pipeline = Pipeline(tuning, items, full, counter[0] if counter else None, records)
    piece = out_smem.shape[-1]
    pieces = width // piece

    def work(slot, record):
        group, eighth, first, end, column_tile = record
        row = (eighth + wg * (ROWS // 8)) * 8

        def put(p, buffer):
            if p * piece >= out_ref.shape[1]:  # TMA knows no place past the end of rows that are one piece wide
                plgpu.commit_smem_to_gmem_group()
                return
            column = (column_tile * pieces + p) * piece

            def whole():  # columns past the end drop
                plgpu.copy_smem_to_gmem(buffer, out_ref.at[pl.ds(row, ROWS), pl.ds(column, piece)])

            def part():
                store_rows(buffer, out_ref, row, column, first, jnp.where(column < out_ref.shape[1], end, first))
                plgpu.commit_smem_to_gmem_group()

            lax.cond((first <= row) & (row + ROWS <= end), whole, part)

        def live():
            def sums(acc):
                def wgmma(s):
                    matrix = matrix_smem.at[s].T if transposed else matrix_smem.at[s]
                    plgpu.wgmma(acc, rows_smem.at[s, pl.ds(wg * ROWS, ROWS)], matrix)

                pipeline.multiply(slot, record, wgmma)
                return acc[...]

            values = pl.run_scoped(sums, plgpu.ACC((ROWS, width), jnp.float32)).astype(dt)
            send(values, out_smem.at[wg], put)

        def zeros():
            pipeline.skip(slot, record)
            send(plgpu.layout_cast(jnp.zeros((ROWS, width), dt), ACC), out_smem.at[wg], put)

        def nothing():
            pipeline.skip(slot, record)

        # two paths and no select on the accumulator: ptxas would run one wgmma after the other
        mine = (row < end) & (row + ROWS > first)
        lax.cond(mine, lambda: lax.cond(group < 0, zeros, live), nothing)

    def load(slot, record, step):
        group, eighth, _, _, column_tile = record
        group, inner = lax.max(group, i32(0)), pl.ds(step * STEP, STEP)
        outer = pl.ds(column_tile * width, width)
        matrix = matrices_ref.at[group, outer, inner] if transposed else matrices_ref.at[group, inner, outer]
        plgpu.copy_gmem_to_smem(matrix, matrix_smem.at[slot], full.at[slot])

        source = rows_ref.at[pl.ds(eighth * 8, TILE), inner]
        plgpu.copy_gmem_to_smem(source, rows_smem.at[slot], full.at[slot])

    pipeline.roles(work, load)
