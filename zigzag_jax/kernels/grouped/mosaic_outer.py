"""Each group's rows of x, transposed, times its rows of dy on Hopper: the gradient of the matrices.

An item is 128 x 256 of one group's matrix; its steps are the group's rows, 64 at a time, from the first one **rounded
down to 8** (mosaic_rows.py says why). Steps in which other groups' rows lie are *cut*: the first, by up to 7 rows, and
the last:

    rows     8 [13 ....... 71][72 ... 135][136 ... 150] 151 ... 199      of the group: 13 to 150
    steps      cut             whole       cut

Both consumers zero the foreign rows of both tiles in shared memory before they multiply: a zero in one of them alone
would not do, for a neighbour's inf or nan times zero is nan. It costs stores only, by whole rows, while the last step's
wgmma runs.

An empty group runs one step with every row zeroed.

    FLOPs   2 M k n          bytes   M k + M n, times 2, read (n / 256 and k / 128 times, from L2), G k n written
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
    CONSUMERS,
    ROWS,
    STEP,
    TILE,
    GroupedTuning,
    Pipeline,
    Record,
    run,
    send,
)
from zigzag_jax.kernels.hopper import WARPGROUP, NamedBarriers, fence_smem, i32, zero_rows


def outer(left, right, bounds, out_dtype, tuning: GroupedTuning) -> jax.Array:
    """contract.OuterProduct of one run where M is a multiple of 8, a and b of 64.

    bounds: int32 [G + 1], where each group begins and the last one ends.
    """
    shape = (bounds.shape[0] - 1, left.shape[1], right.shape[1])
    return run(
        functools.partial(_kernel, tuning), left, right, bounds,
        out_type=jax.ShapeDtypeStruct(shape, out_dtype), tuning=tuning,
        tiles={"left_smem": (STEP, TILE), "right_smem": (STEP, tuning.columns)}, name="grouped_dw",
    )  # fmt: skip


class _Items:
    """Groups times row tiles times column tiles, the last the fastest. A record: those three, first row, end."""

    def __init__(self, bounds_ref, groups: int, row_tiles: int, column_tiles: int) -> None:
        self.bounds, self.groups, self.row_tiles, self.column_tiles = bounds_ref, groups, row_tiles, column_tiles
        self.count = i32(groups * row_tiles * column_tiles)

    def at(self, index) -> Record:
        """Items.at."""
        index, column_tile = lax.div(index, i32(self.column_tiles)), lax.rem(index, i32(self.column_tiles))
        group = lax.min(lax.div(index, i32(self.row_tiles)), i32(self.groups - 1))
        first, end = self.bounds[group], self.bounds[group + 1]
        return group, lax.rem(index, i32(self.row_tiles)), column_tile, first, end

    def steps(self, record: Record):
        """Items.steps."""
        *_, first, end = record
        return lax.max(lax.div(end - lax.div(first, i32(8)) * 8 + (STEP - 1), i32(STEP)), i32(1))


def _kernel(
    tuning: GroupedTuning, left_ref, right_ref, bounds_ref, *refs, left_smem, right_smem, out_smem, full, records=None
):
    *counter, out_ref = refs
    wg, width, dt = lax.axis_index("wg"), tuning.columns, out_ref.dtype
    groups, a, b = out_ref.shape
    items = _Items(bounds_ref, groups, -(-a // TILE), -(-b // width))
    pipeline = Pipeline(tuning, items, full, counter[0] if counter else None, records)
    zeroed = NamedBarriers(pipeline.free.end, 1, CONSUMERS * WARPGROUP)
    piece = out_smem.shape[-1]
    pieces = width // piece

    def work(slot, record):
        group, row_tile, column_tile, first, end = record

        def zero_foreign_rows(s, step):
            row = lax.div(first, i32(8)) * 8 + step * STEP

            @pl.when((row < first) | (row + STEP > end))
            def _():
                for tile in (left_smem, right_smem):
                    zero_rows(tile.at[s], first - row, end - row, CONSUMERS * WARPGROUP)
                fence_smem()
                zeroed.sync()

        def sums(acc):
            def wgmma(s):
                plgpu.wgmma(acc, left_smem.at[s, :, pl.ds(wg * ROWS, ROWS)].T, right_smem.at[s])

            pipeline.multiply(slot, record, wgmma, before=zero_foreign_rows)
            return acc[...]

        values = pl.run_scoped(sums, plgpu.ACC((ROWS, width), jnp.float32)).astype(dt)
        rows = pl.ds((row_tile * CONSUMERS + wg) * ROWS, ROWS)

        def put(p, buffer):  # what lies past the end of the matrix drops
            if p * piece >= b:  # but TMA knows no place past the end of a matrix that is one piece wide
                plgpu.commit_smem_to_gmem_group()
                return
            columns = pl.ds((column_tile * pieces + p) * piece, piece)
            plgpu.copy_smem_to_gmem(buffer, out_ref.at[group, rows, columns])

        send(values, out_smem.at[wg], put)

    def load(slot, record, step):
        _, row_tile, column_tile, first, _ = record
        rows = pl.ds((lax.div(first, i32(8)) + step * (STEP // 8)) * 8, STEP)
        plgpu.copy_gmem_to_smem(left_ref.at[rows, pl.ds(row_tile * TILE, TILE)], left_smem.at[slot], full.at[slot])
        columns = pl.ds(column_tile * width, width)
        plgpu.copy_gmem_to_smem(right_ref.at[rows, columns], right_smem.at[slot], full.at[slot])

    pipeline.roles(work, load)
