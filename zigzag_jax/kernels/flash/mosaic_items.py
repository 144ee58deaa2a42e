"""The forward kernel's items (128 queries of one head), their order, and the key tiles of each."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from zigzag_jax.kernels.hopper import i32, sm_count

ROWS = 64  # queries of a consumer warpgroup: the M of a wgmma
CONSUMERS = 2
QUERY_TILE = CONSUMERS * ROWS

Edges = Sequence[jax.Array]
"""Start of an item's first and last row, stop of its first and last row; both never decrease from row to row."""


class Items:
    """The items and the order in which the blocks take them."""

    def __init__(self, batch: int, heads: int, query_tiles: int, group: int) -> None:
        self.batch, self.heads, self.query_tiles = batch, heads, query_tiles
        self.group = math.gcd(group, query_tiles)
        self.count = batch * heads * query_tiles
        self.sms = min(sm_count(), self.count)  # every block has an item

    def of_sm(self, sm):
        """How many items SM `sm` has."""
        rounds = -(-self.count // self.sms)
        return jnp.where(self._index(sm, i32(rounds - 1)) < self.count, i32(rounds), i32(rounds - 1))

    def _index(self, sm, j):
        """The j-th item of SM `sm`: back and forth over the SMs, so that the sums of sorted costs come out even.

        With sm = None the j-th of all, in the same order.
        """
        if sm is None:
            return j
        return j * self.sms + jnp.where(lax.rem(j, i32(2)) == 0, sm, self.sms - 1 - sm)

    def _place(self, number, group: int):
        """(batch row and head as one, block of `group` query tiles from the last on, tile of the block) of a number."""
        idx, inner = lax.div(number, i32(group)), lax.rem(number, i32(group))
        return lax.rem(idx, i32(self.batch * self.heads)), lax.div(idx, i32(self.batch * self.heads)), inner

    def at(self, sm, j):
        """(batch row, head, first query) of it: the last queries, which see most under a causal mask, come first."""
        bh, block, inner = self._place(self._index(sm, j), self.group)
        tile = self.query_tiles - 1 - (block * self.group + inner)
        return lax.div(bh, i32(self.heads)), lax.rem(bh, i32(self.heads)), tile * QUERY_TILE

    def from_order(self, number, group: int):
        """The item that is `number` in an order with `group` query tiles of a head side by side.

        The same items up to a number of query tiles that is a multiple of both groups.
        """
        bh, block, inner = self._place(number, group)
        tile = block * group + inner
        block, inner = lax.div(tile, i32(self.group)), lax.rem(tile, i32(self.group))
        return (block * (self.batch * self.heads) + bh) * self.group + inner

    def same_queries(self, j):
        """(batch row, first query, queries, item): what item j has in common with its neighbours up to `item`.

        Those of all heads, in the order in which items are drawn (sm = None).
        """
        bh, block, _ = self._place(j, self.group)
        b, rows = lax.div(bh, i32(self.heads)), self.group * QUERY_TILE
        after = (block * (self.batch * self.heads) + (b + 1) * self.heads) * self.group
        return b, self.query_tiles * QUERY_TILE - (block + 1) * rows, rows, after


class Tiles:
    """The key tiles of an item in the order they are visited."""

    def __init__(self, edges: Edges, tile: int) -> None:
        start0, start1, stop0, stop1 = edges
        first = lax.div(start0, i32(tile))
        end = lax.div(stop1 + (tile - 1), i32(tile))
        self.count = lax.max(end - first, i32(0))
        inside = lax.min(lax.max(lax.div(start1 + (tile - 1), i32(tile)), first), end)
        inside_end = lax.max(lax.min(lax.div(stop0, i32(tile)), end), inside)
        self.first, self.end, self.inside_end = first, end, inside_end
        self.right, self.left = end - inside_end, inside - first  # tiles that an edge cuts
        self.masked = lax.min(self.right + self.left, self.count)

    def at(self, i):
        """Index of the i-th tile."""
        i_inside = i - self.right - self.left
        return jnp.where(
            i < self.right,
            self.end - 1 - i,
            jnp.where(i_inside < 0, self.first + i - self.right, self.inside_end - 1 - i_inside),
        )


def read_edges(starts, stops, bs, q0, rows: int) -> Edges:
    """Edges of the queries [q0, q0 + rows)."""
    last = q0 + rows - 1
    return starts[bs, q0], starts[bs, last], stops[bs, q0], stops[bs, last]
