"""The rows of every group cut into tiles: the schedule of a kernel whose block of threads does a tile of one group."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class RowTiles(NamedTuple):
    """The row tiles of a call; int32, T at most of them."""

    group: jax.Array
    """[T], -1: rows of no group."""

    place: jax.Array
    """[T]: the first row that is loaded / align."""

    first: jax.Array
    """[T]: the first of its rows that is the group's, as a row of all."""

    end: jax.Array
    """[T]: the row after the last one that is."""

    upto: jax.Array
    """[R (G + 1)]: running sum of the groups' tiles. The last is how many of the T there are."""


def row_tiles(group_sizes, rows: int, stride: int | None = None, *, tile: int, align: int) -> RowTiles:
    """Tiles of `tile` rows for groups of these sizes, [G] or one row for each run of `stride` rows.

    A group's first tile begins at its first row rounded down to `align`. What is left of the rows of a run is one more
    group, of none. Sizes that sum to more than there is (the contract forbids it, and nobody can see it under jit) are
    cut: nothing is written past the result.

    Plain XLA (masked sums, for its cumsum is several kernels), and the same for every matmul over the same groups: XLA
    merges the copies inside one jit.
    """
    runs = jnp.atleast_2d(group_sizes)
    count, groups = runs.shape
    stops = [r * (stride or 0) for r in range(1, count)] + [rows]
    each = [bounds(runs[r], r * (stride or 0), stop) for r, stop in enumerate(stops)]
    begin = jnp.concatenate(each)  # [R (G + 1)]
    ends = [jnp.append(b[1:], jnp.int32(stop)) for b, stop in zip(each, stops, strict=True)]
    end = jnp.concatenate(ends)
    owner = jnp.tile(jnp.append(jnp.arange(groups, dtype=jnp.int32), jnp.int32(-1)), count)
    origin = begin // align * align
    tiles = jnp.where(end > begin, -(-(end - origin) // tile), 0)
    upto = running_sum(tiles)
    # a group has at most align - 1 rows before it and one less than a tile after it
    t = jnp.arange((rows + len(begin) * (align - 1 + tile - 1)) // tile, dtype=jnp.int32)
    mine = (upto[None] > t[:, None]) & ((upto - tiles)[None] <= t[:, None])  # [T, R (G + 1)]
    pick = lambda of_group: jnp.where(mine, of_group[None], 0).sum(1, dtype=jnp.int32)
    row = pick(origin - tile * (upto - tiles)) + tile * t
    group = pick(owner)
    return RowTiles(group, row // align, jnp.maximum(row, pick(begin)), jnp.minimum(row + tile, pick(end)), upto)


def run_length(group_sizes, rows: int) -> int:
    """Rows of each of the runs that [G] or [R, G] sizes make of `rows`."""
    return rows // jnp.atleast_2d(group_sizes).shape[0]


def run_bounds(group_sizes, rows: int) -> list[jax.Array]:
    """`bounds` of each run of `rows` rows: R of [G + 1]."""
    stride = run_length(group_sizes, rows)
    return [bounds(own, r * stride, (r + 1) * stride) for r, own in enumerate(jnp.atleast_2d(group_sizes))]


def bounds(group_sizes, start: int, stop: int):
    """Where each group [G] begins if the first begins at `start`, and where the last ends, `stop` at most: [G + 1]."""
    return jnp.minimum(start + running_sum(jnp.pad(group_sizes, (1, 0))), stop)


def running_sum(x):
    """Inclusive running sums of a short int32 vector."""
    at = jnp.arange(x.shape[0])
    return jnp.where(at[:, None] >= at[None], x[None], 0).sum(1, dtype=jnp.int32)
