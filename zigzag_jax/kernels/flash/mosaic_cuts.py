"""Items of the forward kernel that two blocks share, so that all end together.

Items of equal length do not fill the last round: a step of 8192 queries and 32 heads has 2048, which is 15.5 rounds of
132 multiprocessors, and takes 16. So of the first items, as many as there are blocks, item p is cut: its first
p / blocks tiles are drawn at the very beginning, the rest after all other items, the longest first:

    first parts          whole items                    rests
    sm 0  |              a  |         b  |         c  | ........... |
    sm 1  | ....            d  |         e  |         f  | ....... |
    sm 2  | ........           g  |         h  |          | ... |

The blocks run out of whole items one after the other over the time of an item, and who does so first draws the longest
rest (McNaughton 1959, the wrap-around rule; drawing finds it by itself, also where blocks begin late).

A part is an item with fewer keys: its edges say so. The rest continues the result of the first part as a ring step
continues the step before it, and waits for it, which is long done.
"""

# pyright: reportArgumentType=false

from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from zigzag_jax.kernels.flash.contract import LOG2E
from zigzag_jax.kernels.flash.mosaic_items import QUERY_TILE, ROWS, Items, Tiles
from zigzag_jax.kernels.hopper import ACC, ROW, across, i32, next_turn, store, wait_turn

WHOLE, FIRST, REST = range(3)

_COST = 4  # what a part costs beside its tiles, in tiles, by counting: its queries, its first scores, the result
_DONE = 8  # every warp of both consumers says that a first part is done


class Cuts:
    """Which items are cut, and where. All blocks must see the same ranges.

    counters: int32 [1 + cuts.parts] in global memory, zeros at the start; the first is mosaic_drawn's.
    """

    def __init__(self, items: Items, tile: int, counters) -> None:
        self.items, self.tile, self.counters = items, tile, counters
        self.parts = items.sms

    def equal(self, edges_of):
        """How many items, from the first on, are as long as that and worth cutting; 0: none is cut.

        Reads four items' ranges: enough for the steps of a ring, in which all rows or the later half of the rows see
        all keys. Where they mislead, the parts are balanced worse.
        """
        count, half = self.items.count, self.items.count // 2
        lengths = [Tiles(edges_of(i32(j)), self.tile).count for j in (0, half - 1, half, count - 1)]
        longest, middle, after, last = lengths
        all_equal = (middle == longest) & (after == longest) & (last == longest)
        half_equal = (middle == longest) & (after == 0) & (last == 0)
        worth = lambda n: n >= 2 * self.parts and longest * (-n % self.parts) > _COST * self.parts
        return jnp.where(all_equal & worth(count), i32(count), jnp.where(half_equal & worth(half), i32(half), i32(0)))

    def at(self, number, equal, edges_of):
        """(item, part, and its four edges) of a drawn number; after the last one the item is items.count."""
        parts = jnp.where(equal > 0, i32(self.parts), i32(0))
        first, rest = number < parts, (number >= equal) & (number < equal + parts)
        item = number - jnp.where(number < equal, i32(0), jnp.where(rest, equal, parts))
        edges = edges_of(lax.min(item, i32(self.items.count - 1)))
        tiles = Tiles(edges, self.tile)
        share = lax.max(lax.div(tiles.count * item, i32(self.parts)), i32(1))
        cut = (tiles.end - lax.min(share, lax.max(tiles.count - 1, i32(0)))) * self.tile  # the first part: later keys
        part = jnp.where(first, i32(FIRST), jnp.where(rest, i32(REST), i32(WHOLE)))
        start0, start1, stop0, stop1 = edges
        low = jnp.where(first, cut, i32(0))
        high = jnp.where(rest, cut, i32(2**31 - 1))
        return item, part, lax.max(start0, low), lax.max(start1, low), lax.min(stop0, high), lax.min(stop1, high)

    def done(self, item) -> None:
        """Consumers: the first part of an item is in global memory."""
        next_turn(self.counters, item + 1)

    def wait(self, item) -> None:
        """Producer, before the rest of an item: for its first part."""
        wait_turn(self.counters, item + 1, i32(_DONE))


def results(items: Items, out_dim: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Arrays of the first parts' results (Aside)."""
    return (
        jax.ShapeDtypeStruct((-(-items.sms // items.heads) * QUERY_TILE, items.heads, out_dim), jnp.float32),
        jax.ShapeDtypeStruct((items.sms, QUERY_TILE), jnp.float32),
    )


class Aside(NamedTuple):
    """Results of first parts in arrays of their own: float32, normalised, and the maximum and sum as one lse (base e).

    For kernels that have no float32 result to be continued in place.
    """

    out: Any
    lse: Any

    def _rows(self, wg):
        return pl.ds(wg * ROWS, ROWS)

    def _out(self, item, wg):
        heads = i32(self.out.shape[1])
        return self.out.at[pl.ds(lax.div(item, heads) * QUERY_TILE + wg * ROWS, ROWS), lax.rem(item, heads), :]

    def keep(self, item, wg, out, lse) -> None:
        """Consumer `wg`: the result of the first part of an item."""
        store(self._out(item, wg), out)
        store(self.lse.at[item, self._rows(wg)], lse)

    def continued(self, item, part, wg, acc, m, l):
        """(acc, m, l) of what has been seen of an item, m in base 2: with the first part, where this is the rest."""

        def with_first():
            columns = acc.shape[1]
            lse = plgpu.load(self.lse.at[item, self._rows(wg)], layout=ROW, optimized=False) * LOG2E
            m_new = jnp.maximum(m, lse)
            m_used = jnp.where(m_new == -jnp.inf, 0.0, m_new)
            weight, first_weight = jnp.exp2(m - m_used), jnp.exp2(lse - m_used)
            first = plgpu.load(self._out(item, wg), layout=ACC, optimized=False)
            out = acc * across(weight, columns) + first * across(first_weight, columns)
            return out, m_new, l * weight + first_weight

        return lax.cond(part == REST, with_first, lambda: (acc, m, l))
