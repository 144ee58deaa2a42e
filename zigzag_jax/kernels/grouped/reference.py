"""The grouped matmul in plain XLA: blocks of 64 rows, each with its group's matrix.

The rows of a group are cut into blocks of 64, the last one partly empty; a loop runs over the blocks there really are,
so the cost depends on the rows and (by at most one part-empty block a group) not on the number of groups.
`lax.ragged_dot` on a CPU multiplies every row by every matrix.
"""

import jax.numpy as jnp
from jax import lax

from zigzag_jax.kernels.grouped.contract import Implementation

BLOCK = 64


class _Blocks:
    """Where each block of rows begins, how many of its rows are real, and whose it is."""

    def __init__(self, group_sizes, rows: int) -> None:
        sizes = jnp.atleast_2d(group_sizes)  # [runs, groups]
        runs, self.groups = sizes.shape
        first_row = jnp.cumsum(sizes, axis=1) - sizes + rows // runs * jnp.arange(runs)[:, None]
        self.sizes, self.first_row = sizes.reshape(-1), first_row.reshape(-1)
        blocks = -(-self.sizes // BLOCK)
        self.end_block = jnp.cumsum(blocks)
        self.first_block, self.count = self.end_block - blocks, self.end_block[-1] if len(blocks) else 0

    def at(self, b):
        """(group, first row, mask [64, 1] of the rows that are the group's) of block b."""
        own = jnp.searchsorted(self.end_block, b, side="right", method="compare_all")
        inside = (b - self.first_block[own]) * BLOCK
        mask = (inside + jnp.arange(BLOCK) < self.sizes[own])[:, None]
        return own % self.groups, self.first_row[own] + inside, mask


def _read(x, row, real):
    # where, not a product: the rows of others may hold nan
    return jnp.where(real, lax.dynamic_slice_in_dim(x, row, BLOCK), 0).astype(jnp.float32)


def _spare(x):
    return jnp.pad(x, ((0, BLOCK), (0, 0)))  # so that the last block never reaches past the end


def product(rows, matrices, group_sizes, *, transposed: bool, out_dtype):
    """See contract.py."""
    blocks, padded, axis = _Blocks(group_sizes, rows.shape[0]), _spare(rows), 1 if transposed else 0

    def block(b, y):
        group, row, real = blocks.at(b)
        matrix = lax.dynamic_index_in_dim(matrices, group, keepdims=False).astype(jnp.float32)
        part = lax.dot_general(_read(padded, row, real), matrix, (((1,), (axis,)), ((), ())), precision="highest")
        # blocks come in the order of their rows: what this one writes past its own rows the next ones write again
        return lax.dynamic_update_slice_in_dim(y, jnp.where(real, part, 0).astype(y.dtype), row, axis=0)

    y = jnp.zeros((padded.shape[0], matrices.shape[1 if transposed else 2]), out_dtype)
    return lax.fori_loop(0, blocks.count, block, y)[: rows.shape[0]]


def outer(left, right, group_sizes, *, out_dtype):
    """See contract.py."""
    blocks, left, right = _Blocks(group_sizes, left.shape[0]), _spare(left), _spare(right)

    def block(b, sums):
        group, row, real = blocks.at(b)
        part = jnp.matmul(_read(left, row, real).T, _read(right, row, real), precision="highest")
        old = lax.dynamic_index_in_dim(sums, group, keepdims=False)
        return lax.dynamic_update_index_in_dim(sums, old + part, group, axis=0)

    sums = jnp.zeros((blocks.groups, left.shape[1], right.shape[1]), jnp.float32)
    return lax.fori_loop(0, blocks.count, block, sums).astype(out_dtype)


IMPLEMENTATION = Implementation(product, outer)
