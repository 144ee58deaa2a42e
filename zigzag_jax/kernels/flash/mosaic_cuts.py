"""Items of the forward kernel that two blocks share, so that all end together.

Items of equal length do not fill the last round: a step of 8192 queries and 32 heads has 2048, which is 15.5 rounds of
132 multiprocessors, and takes 16. So of the first items, as many as there are blocks, item p is cut: p / blocks of its
tiles are drawn at the very beginning, the rest after all items of that length, the longest first:

    first parts          whole items                    rests
    sm 0  |              a  |         b  |         c  | ........... |
    sm 1  | ....            d  |         e  |         f  | ....... |
    sm 2  | ........           g  |         h  |          | ... |

The blocks run out of whole items one after the other over the time of an item, and who does so first draws the longest
rest (McNaughton 1959, the wrap-around rule; drawing finds it by itself, also where blocks begin late).

A part is an item with fewer keys (the first has the later ones): its edges say so. The rest continues the result of the
first part as a ring step continues the step before it, and waits for it, which is long done. Where a sum is cut depends
on the item's place and on the number of multiprocessors, and with it the last bits; from run to run they are the same.
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

WHOLE = -1  # the part of an item that is not cut

COST = 4  # what a part costs beside its tiles, in tiles, by counting: its queries, its first scores, the result
_DONE = 8  # every warp of both consumers says that a first part is done


def equal_numbers(items: Items) -> tuple[int, ...]:
    """How many of the first items, if they are equally long, may be cut: all, and half where that is whole query tiles.

    Empty where there are none to whom it would do good: too few, or whole rounds.
    """
    halves = items.query_tiles % 2 == 0 and items.query_tiles // 2 % items.group == 0
    numbers = (items.count, items.count // 2) if halves else (items.count,)
    return tuple(n for n in numbers if n >= 2 * items.sms and n % items.sms)


def neighbours(items: Items, most: int) -> int:
    """How many query tiles of one head can lie side by side among the equal items, `most` at most; 0: none is cut."""
    tiles = [n // (items.batch * items.heads) for n in equal_numbers(items)]
    return max(d for d in range(1, most + 1) if all(n % d == 0 for n in tiles)) if tiles else 0


class Cuts:
    """Which items are cut, and where. All blocks must see the same ranges.

    A *part* is a number: p, the first part of the p-th item that is cut; parts + p, the rest of it; or WHOLE.

    wanted: query tiles of one head side by side in the order of equal items, at most. Blocks that begin one after the
        other read different keys at a time, but for neighbours: these share K and V in L2.
    """

    def __init__(self, items: Items, tile: int, wanted: int) -> None:
        self.items, self.tile = items, tile
        self.parts, self.equal_numbers = items.sms, equal_numbers(items)
        found = neighbours(items, wanted)
        self.group = found or 1
        self.pay = 2 * found >= wanted
        """Without the neighbours cut items were measured to be slower than whole ones (docs/kernels.md)."""

    def is_first(self, part):
        """Whether it is the first part of an item."""
        return (part >= 0) & (part < self.parts)

    def is_rest(self, part):
        """Whether it is the rest of an item."""
        return part >= self.parts

    def equal(self, edges_of):
        """How many items, from the first on, are equally long and worth cutting; 0: none is cut.

        Reads four items' ranges: enough for the steps of a ring, in which all rows, or those of the later half, see the
        same keys. Where they mislead, the parts are balanced worse.
        """
        count, half = self.items.count, self.items.count // 2
        lengths = [Tiles(edges_of(i32(j)), self.tile).count for j in (0, half - 1, half, count - 1)]
        longest, middle, after, last = lengths
        alike = {
            count: (middle == longest) & (after == longest) & (last == longest),
            half: (middle == longest) & (after == 0) & (last == 0),
        }
        found = i32(0)
        for n in self.equal_numbers:
            worth = longest * (-n % self.parts) > COST * self.parts  # tiles that would idle in the last round
            found = jnp.where(alike[n] & worth, i32(n), found)
        return found

    def at(self, number, equal, edges_of):
        """(item, part, and its four edges) of a drawn number; after the last one item >= items.count."""
        parts = jnp.where(equal > 0, i32(self.parts), i32(0))
        first, rest = number < parts, (number >= equal) & (number < equal + parts)
        at = number - jnp.where(number < equal, i32(0), jnp.where(rest, equal, parts))
        item = jnp.where(at < equal, self.items.from_order(at, self.group), at)
        edges = edges_of(lax.min(item, i32(self.items.count - 1)))
        tiles = Tiles(edges, self.tile)
        cut = (tiles.end - lax.div(tiles.count * at, i32(self.parts))) * self.tile
        part = jnp.where(first, at, jnp.where(rest, at + self.parts, i32(WHOLE)))
        start0, start1, stop0, stop1 = edges
        low = jnp.where(first, cut, i32(0))
        high = jnp.where(rest, cut, i32(2**31 - 1))
        return item, part, lax.max(start0, low), lax.max(start1, low), lax.min(stop0, high), lax.min(stop1, high)

    @property
    def counters(self) -> int:
        """How many there are in global memory, int32, zeros at the start; the first is mosaic_drawn's."""
        return 1 + self.parts

    def done(self, counters, part) -> None:
        """Consumers: this first part is in global memory."""
        next_turn(counters, part + 1)

    def wait(self, counters, part) -> None:
        """Producer, before a rest: for its first part."""
        wait_turn(counters, part - self.parts + 1, i32(_DONE))


def results(items: Items, out_dim: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Arrays of the first parts' results (Aside)."""
    return (
        jax.ShapeDtypeStruct((-(-items.sms // items.heads) * QUERY_TILE, items.heads, out_dim), jnp.float32),
        jax.ShapeDtypeStruct((items.sms, QUERY_TILE), jnp.float32),
    )


class Aside(NamedTuple):
    """Results of first parts in arrays of their own: float32, normalised; reference and sum as one lse (base e).

    For calls without a carry that is continued in place.
    """

    out: Any
    lse: Any
    cuts: Cuts

    def _rows(self, at, wg):
        return self._out(at, wg), self.lse.at[at, pl.ds(wg * ROWS, ROWS)]

    def _out(self, at, wg):
        heads = i32(self.out.shape[1])  # rows lie as in the kernel's results, which saves registers
        return self.out.at[pl.ds(lax.div(at, heads) * QUERY_TILE + wg * ROWS, ROWS), lax.rem(at, heads), :]

    def keep(self, part, wg, out, lse) -> None:
        """Consumer `wg`: the result of a first part."""
        for ref, value in zip(self._rows(part, wg), (out, lse), strict=True):
            store(ref, value)

    def continued(self, part, wg, acc, m, l):
        """(acc, m, l) of what has been seen of an item, m in base 2: with the first part, where this is the rest."""

        def with_first():
            columns = acc.shape[1]
            out_ref, lse_ref = self._rows(part - self.cuts.parts, wg)
            lse = plgpu.load(lse_ref, layout=ROW, optimized=False) * LOG2E
            m_new = jnp.maximum(m, lse)
            m_used = jnp.where(m_new == -jnp.inf, 0.0, m_new)
            weight, first_weight = jnp.exp2(m - m_used), jnp.exp2(lse - m_used)
            first = plgpu.load(out_ref, layout=ACC, optimized=False)
            out = acc * across(weight, columns) + first * across(first_weight, columns)
            return out, m_new, l * weight + first_weight

        return lax.cond(self.cuts.is_rest(part), with_first, lambda: (acc, m, l))
