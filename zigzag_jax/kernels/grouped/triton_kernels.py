"""The grouped matmul's two kernels in Triton's language, called by jax-triton; both are of the extra `triton`.

A block of threads computes one tile of the result. In `rows_kernel` that is a row tile (row_tiles.py, align = 1) and
some columns, in `outer_kernel` a part of one group's matrix. Rows are read with whole tiles: what belongs to another
group reaches rows that are not stored (rows_kernel), or is not loaded, for a zero in one operand alone would turn a
neighbour's nan into a nan here (outer_kernel).

Importing jax-triton turns off Triton's cache on disk (TRITON_CACHE_DIR); compiled programs are in JAX's own.
"""

# Triton's language is typed for its compiler
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportMissingImports=false, reportOperatorIssue=false, reportOptionalMemberAccess=false

import jax
import jax_triton
import triton
import triton.language as tl

from zigzag_jax.kernels.grouped.row_tiles import RowTiles


@triton.jit
def rows_kernel(
    rows_ptr, matrices_ptr, group_ptr, first_ptr, end_ptr, upto_ptr, out_ptr,
    ROWS: tl.constexpr, N: tl.constexpr, K: tl.constexpr, COUNTS: tl.constexpr, TRANSPOSED: tl.constexpr,
    TILE: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Out [ROWS, N]; matrices [G, K, N], or [G, N, K] with TRANSPOSED; COUNTS: how many `upto` has."""
    column_tiles: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    t = tl.program_id(0) // column_tiles
    if t >= tl.load(upto_ptr + COUNTS - 1):  # the table is as long as it may ever be
        return
    group, end = tl.load(group_ptr + t), tl.load(end_ptr + t)
    at = tl.load(first_ptr + t) + tl.arange(0, TILE)
    columns = (tl.program_id(0) % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros((TILE, COLUMNS), tl.float32)
    if group >= 0:
        inner = tl.arange(0, STEP)
        a = rows_ptr + tl.minimum(at, ROWS - 1).to(tl.int64)[:, None] * K + inner[None, :]
        b = matrices_ptr + group.to(tl.int64) * (N * K)
        if TRANSPOSED:
            b += columns[None, :] * K + inner[:, None]
        else:
            b += inner[:, None] * N + columns[None, :]
        for _ in range(K // STEP):
            if N % COLUMNS == 0:
                acc = tl.dot(tl.load(a), tl.load(b), acc)
            else:
                acc = tl.dot(tl.load(a), tl.load(b, mask=(columns < N)[None, :], other=0.0), acc)
            a += STEP
            b += STEP if TRANSPOSED else STEP * N
    mine = (at < end)[:, None]
    if N % COLUMNS != 0:
        mine = mine & (columns < N)[None, :]
    out = out_ptr + at.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mine)


@triton.jit
def outer_kernel(
    left_ptr, right_ptr, edges_ptr, out_ptr,
    RUNS: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
    TILE: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Out [GROUPS, K, N] of left [M, K] and right [M, N]; edges [RUNS, GROUPS + 1]: rows of group g in run r."""
    column_tiles: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    tiles: tl.constexpr = (K + TILE - 1) // TILE * column_tiles
    group, place = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    lines = place // column_tiles * TILE + tl.arange(0, TILE)
    columns = place % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, STEP)
    acc = tl.zeros((TILE, COLUMNS), tl.float32)
    for run in range(RUNS):
        edge = edges_ptr + run * (GROUPS + 1) + group
        begin, end = tl.load(edge), tl.load(edge + 1)
        at = (begin + inner).to(tl.int64)
        a = left_ptr + at[None, :] * K + lines[:, None]
        b = right_ptr + at[:, None] * N + columns[None, :]
        for done in range(0, end - begin, STEP):
            mine = inner < end - begin - done
            x = tl.load(a, mask=mine[None, :] & (lines < K)[:, None], other=0.0)
            acc = tl.dot(x, tl.load(b, mask=mine[:, None] & (columns < N)[None, :], other=0.0), acc)
            a += STEP * K
            b += STEP * N
    out = out_ptr + group.to(tl.int64) * (K * N) + lines[:, None] * N + columns[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(lines < K)[:, None] & (columns < N)[None, :])


def _launch(kernel, *arrays, out_shape, blocks: int, tile, **sizes) -> jax.Array:
    return jax_triton.triton_call(
        *arrays, kernel=kernel, out_shape=out_shape, grid=(blocks,), num_warps=tile.warps, num_stages=tile.stages,
        TILE=tile.rows, COLUMNS=tile.columns, STEP=tile.step, **sizes,
    )  # fmt: skip


def product(rows, matrices, tiles: RowTiles, transposed: bool, out_dtype, tile) -> jax.Array:
    """contract.Product where a and b are multiples of `tile.step`; tile: a triton.Tile."""
    count, contraction = rows.shape
    columns = matrices.shape[1 if transposed else 2]
    return _launch(
        rows_kernel, rows, matrices, tiles.group, tiles.first, tiles.end, tiles.upto,
        out_shape=jax.ShapeDtypeStruct((count, columns), out_dtype),
        blocks=tiles.group.shape[0] * triton.cdiv(columns, tile.columns), tile=tile, ROWS=count, N=columns,
        K=contraction, COUNTS=tiles.upto.shape[0], TRANSPOSED=transposed,
    )  # fmt: skip


def outer(left, right, edges, out_dtype, tile) -> jax.Array:
    """contract.OuterProduct; edges int32 [R, G + 1]: where each group of each run begins, and its last one ends."""
    (runs, groups), lines, columns = (edges.shape[0], edges.shape[1] - 1), left.shape[1], right.shape[1]
    return _launch(
        outer_kernel, left, right, edges, out_shape=jax.ShapeDtypeStruct((groups, lines, columns), out_dtype),
        blocks=groups * triton.cdiv(lines, tile.rows) * triton.cdiv(columns, tile.columns), tile=tile, RUNS=runs,
        GROUPS=groups, K=lines, N=columns,
    )  # fmt: skip
