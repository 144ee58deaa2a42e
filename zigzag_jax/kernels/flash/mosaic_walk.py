"""What the blocks of Hopper's backward do, in what order: decided from the key ranges, before any of them runs.

An *item* is a tile of keys of one kv head, 128 or 64, with some heads of its group. Its *walk* are the tiles of 64
queries that see any of the keys, head by head or tile by tile. mosaic_bwd.py computes them, mosaic_chunks.py shares
them out.
"""

import jax.numpy as jnp
from jax import lax

from zigzag_jax.kernels.hopper import i32, sm_count
from zigzag_jax.ranges import KeyRange, tile_rows

QUERY_TILE = 64
TOGETHER = 256  # key tiles whose blocks run side by side, of as few kv heads as have so many: what they share is in L2
L2_BYTES = 50 << 20  # of an H100 and an H200: a rough bound, for K and V are there too


def visits(keys: KeyRange, key_rows: int, key_tile: int):
    """[B or 1, key tiles, 4] int32: query tiles lo..hi see some key of the tile, whole_lo..whole_hi all of it.

    In the order lo, whole_lo, whole_hi, hi. In those below whole_lo the ranges of some rows stop before the last key,
    in those from whole_hi on some start after the first: whole_hi is below whole_lo where a tile has both.
    """
    rows = tile_rows(keys, key_tile, key_rows)
    lo = rows.first // QUERY_TILE
    hi = jnp.maximum(-(-rows.end // QUERY_TILE), lo)
    whole_lo = jnp.clip(-(-rows.whole_first // QUERY_TILE), lo, hi)
    whole_hi = jnp.clip(rows.whole_end // QUERY_TILE, lo, hi)
    return jnp.stack([lo, whole_lo, whole_hi, hi], -1)


def first_visitor(visits, query_tiles: int):
    """[B or 1, query tiles] int32: the first key tile that sees each query tile; the others follow without a gap."""
    tile = jnp.arange(query_tiles, dtype=jnp.int32)[None, None]
    return jnp.sum(visits[..., 3, None] <= tile, axis=1, dtype=jnp.int32)


class Items:
    """Which keys, kv head and share of its group each item has, and which way it walks.

    The tiles of some kv heads side by side (see TOGETHER), in the order that `order` says. `head_bytes` are those of a
    query head's Q, dO and dQ; `take_turns`: blocks do, at the tiles of dQ (see Walk).
    """

    def __init__(
        self, batch: int, kv_heads: int, group: int, key_tiles: int, *, head_bytes: int, take_turns: bool
    ) -> None:
        self.kv_heads, self.key_tiles = kv_heads, key_tiles
        self.every = every = batch * kv_heads
        self.together = next(
            n for n in range(1, every + 1) if every % n == 0 and n * key_tiles >= min(TOGETHER, every * key_tiles)
        )
        fill = [n for n in range(1, group + 1) if group % n == 0 and every * key_tiles * n >= sm_count()]
        self.splits = fill[0] if fill else group  # items that share a group's heads: as few as fill the card
        self.group = group // self.splits
        self.count = every * key_tiles * self.splits
        self.take_turns = take_turns
        self.one_way = take_turns or self.together * group * head_bytes <= L2_BYTES

    def at(self, index):
        """(batch row, kv head, place of the key tile in the order, split, first query head) of item `index`."""
        index, split = lax.div(index, i32(self.splits)), lax.rem(index, i32(self.splits))
        index, inner = lax.div(index, i32(self.together)), lax.rem(index, i32(self.together))
        outer, place = lax.div(index, i32(self.key_tiles)), lax.rem(index, i32(self.key_tiles))
        head = outer * self.together + inner
        batch, kv_head = lax.div(head, i32(self.kv_heads)), lax.rem(head, i32(self.kv_heads))
        return batch, kv_head, place, split, (kv_head * self.splits + split) * self.group

    def walks_down(self, index):
        """Whether item `index` walks down through the query tiles: all, or every other wave of those side by side."""
        if self.one_way:
            return True
        beside = self.together * self.key_tiles * self.splits
        wave = lax.div(lax.rem(index, i32(beside)), i32(sm_count()))
        return lax.rem(wave, i32(2)) == 0

    def order(self, visits):
        """int32 [key tiles]: the key tile at each place, the longest walk first; ascending where blocks take turns.

        One order for all batch rows, by the sum of their walks.
        """
        tiles = jnp.arange(self.key_tiles, dtype=jnp.int32)
        if self.take_turns:
            return tiles
        length = jnp.sum(visits[..., 3] - visits[..., 0], axis=0, dtype=jnp.int32)
        unit = 1 << (self.key_tiles - 1).bit_length()
        # One number for both, which one small kernel sorts. It may pass 2^31 (8 rows of a million tokens): then the
        # order is another, but the last bits still are the tile.
        return lax.sort(tiles - length * unit, is_stable=False) & (unit - 1)

    def lengths(self, visits, order):
        """int32 [count]: how long each item's walk is, with `visits` and the key tiles in this order."""
        batch = self.every // self.kv_heads
        length = self._length(visits).at[:, order].get(mode="promise_in_bounds")
        of_heads = jnp.broadcast_to(length[:, None], (batch, self.kv_heads, self.key_tiles))
        of_heads = of_heads.reshape(-1, self.together, self.key_tiles).swapaxes(1, 2)
        return jnp.repeat(of_heads.reshape(-1), self.splits)

    def _length(self, visits):
        return (visits[..., 3] - visits[..., 0]) * self.group

    def sums(self, visits):
        """The sum of `lengths`, float32 for it may pass 2^31, and whether walks go head by head, bool: see Walk.

        By one small kernel. Head by head where the last visitor moves with the key tile.
        """
        hi = visits[..., 3]
        moves = hi != jnp.pad(hi, ((0, 0), (1, 0)), mode="edge")[:, :-1]
        length, moving = jnp.stack([self._length(visits), moves]).astype(jnp.float32).sum((1, 2))
        return length * (self.count / hi.size), 4 * moving > hi.size - hi.shape[0]


class Walk:
    """The order in which an item visits its (head of the group, query tile) pairs.

    Blocks with one kv head should stand at the same tile of the same head at the same time, so that Q, dO and dQ come
    from L2. Where key tiles end at the same query tile (causal, documents) they walk q tiles outside and heads inside.
    Where the end moves with the key tile (a sliding window) each head is walked down by itself.

    Where Q, dO and dQ of the heads side by side do not fit L2, the former go down in one wave of items and up in the
    next, which starts where the sweep of the one before it passes. Else all walk down. So do blocks that take turns at
    the tiles of dQ, in the order of their keys: as they start in that order too, whoever starts later is behind. A
    block that went up would hold up those after it for the length of its walk.
    """

    def __init__(self, lo, hi, by_head, group: int, down) -> None:
        down = by_head | down
        self.by_head = by_head
        self.inside = jnp.where(by_head, lax.max(hi - lo, i32(1)), i32(group))
        self.first, self.inc = jnp.where(down, hi - 1, lo), jnp.where(down, i32(-1), i32(1))

    def at(self, position):
        """The pair at a position of the walk."""
        outside, inside = lax.div(position, self.inside), lax.rem(position, self.inside)
        g = jnp.where(self.by_head, outside, inside)
        return g, self.first + self.inc * jnp.where(self.by_head, inside, outside)
