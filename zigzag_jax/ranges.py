"""What each row may see: one idea instead of three cases.

Causal attention over packed documents with an optional sliding window W lets the query at global position g see exactly
the keys in [lo, g], lo = max(start of its document, g - W + 1). A rank's keys are sorted by global position
(layout.py), so for every query row and every source rank the visible keys are **one contiguous range of local rows**.
With

    count(x) = number of the source's keys before global position x
             = sum over the source's chunk starts s of clip(x - s, 0, chunk)

that range is [count(lo), count(g + 1)), empty when stop <= start, and start and stop never decrease from row to row.
The diagonal step, the "front half of K" step, the "back half of Q" step, documents, windows and padding are all this
one rule, for two chunks a rank (zigzag) or one (contiguous). Nothing about the mask travels round the ring, and since
ranges are data a window may be a traced value that differs from layer to layer.

    >>> from zigzag_jax.layout import global_positions
    >>> g = global_positions(rank=1, cp=2, length=4)      # rank 1 of 2 holds tokens 2 3 | 4 5, rank 0 holds 0 1 | 6 7
    >>> lo, hi = visible_bounds(g)
    >>> keys = key_range(lo, hi, source=0, cp=2, length=4)
    >>> keys.start, keys.stop                             # every row of rank 1 sees the front chunk of rank 0
    (Array([[0, 0, 0, 0]], dtype=int32), Array([[2, 2, 2, 2]], dtype=int32))
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from zigzag_jax.layout import CHUNKS, Layout, check_layout, chunk_starts


class KeyRange(NamedTuple):
    """Rows of K and V that each query row sees: start <= j < stop, nothing where stop <= start.

    Both are int32 [B, Sq], or [1, Sq] where every batch row has the same; neither may decrease along Sq.
    """

    start: jax.Array
    """First key that a row sees."""
    stop: jax.Array
    """One past the last."""


def visible_bounds(g: jax.Array, positions=None, window=None) -> tuple[jax.Array, jax.Array]:
    """Global bounds [lo, hi) of the keys that queries at global positions g see.

    g: int32 [Sq]. positions: int32 [B, Sq], the tokens' indices inside their documents, or None for one document.
    window: int, int32 scalar array (traced too) or None; a window of W lets a token see itself and the W - 1 before it.
    Returns lo int32 [B or 1, Sq], hi int32 [1, Sq].
    """
    g = g[None, :]
    lo = jnp.zeros_like(g) if positions is None else g - positions
    if window is not None:
        lo = jnp.maximum(lo, g - jnp.asarray(window, jnp.int32) + 1)
    return lo, g + 1


def key_range(lo, hi, source, cp: int, length: int, layout: Layout = "zigzag") -> KeyRange:
    """Local range of the keys of rank `source` (int or traced) inside global [lo, hi).

    lo int32 [B or 1, Sq] and hi int32 [1, Sq] from `visible_bounds`; `length` keys a rank.
    """
    starts = chunk_starts(source, cp, length, layout)
    chunk = length // len(starts)

    def count(x):
        return functools.reduce(jnp.add, [jnp.clip(x - start, 0, chunk) for start in starts])

    return KeyRange(count(lo), jnp.broadcast_to(count(hi), lo.shape))


def row_bounds(keys: KeyRange, tile: int) -> tuple[jax.Array, jax.Array]:
    """First and end key that any row of each tile of `tile` query rows sees: int32 [B or 1, Sq / tile] each.

    First > end where no row sees any. The kernels' query side: rows that see nothing do not widen a tile.
    """
    start, stop = (x.reshape(x.shape[0], -1, tile) for x in keys)
    seen = stop > start
    none = jnp.iinfo(jnp.int32).max
    return jnp.min(jnp.where(seen, start, none), axis=2), jnp.max(jnp.where(seen, stop, 0), axis=2)


class TileRows(NamedTuple):
    """Query rows that concern each tile of keys, int32 [B or 1, tiles] each; none where first >= end."""

    first: jax.Array
    """See end."""
    end: jax.Array
    """Rows first <= i < end see some key of the tile. Rows between may see nothing of it."""
    whole_first: jax.Array
    """See whole_end."""
    whole_end: jax.Array
    """Rows whole_first <= i < whole_end see all of it; a last tile that is not full is never seen whole."""


def tile_rows(keys: KeyRange, key_tile: int, key_length: int) -> TileRows:
    """The kernels' key side: which query rows visit each of the ceil(Sk / key_tile) tiles of keys.

    start and stop never decrease, so the rows that end before a tile come first and those that start after it last.
    """
    k0 = jnp.arange(0, key_length, key_tile, dtype=jnp.int32)
    last = k0 + (key_tile - 1)
    bounds = jnp.stack([k0, jnp.minimum(last, key_length - 1), k0, last]).reshape(2, 1, -1)
    counts = _count(jnp.stack(keys), bounds)
    (starts_by_first, starts_by_last), (stops_by_first, stops_by_last) = (jnp.split(x, 2, axis=-1) for x in counts)
    return TileRows(stops_by_first, starts_by_last, stops_by_last, starts_by_first)


def _count(ascending, bounds) -> jax.Array:
    """How many values of ascending [..., S] are <= each bound [..., n]: int32 [..., n].

    In two levels, whole blocks and then inside of one: on a GPU two small kernels, where comparing every value with
    every bound took 1% of a backward, and a search by halves would be ten.
    """
    block = 128
    missing = -ascending.shape[-1] % block
    pad = [(0, 0)] * (ascending.ndim - 1) + [(0, missing)]
    x = jnp.pad(ascending, pad, constant_values=jnp.iinfo(jnp.int32).max)
    x = x.reshape(*x.shape[:-1], -1, block)
    whole = jnp.sum(x[..., None, :, -1] <= bounds[..., None], axis=-1, dtype=jnp.int32)
    following = jnp.minimum(whole, x.shape[-2] - 1)  # the block that is counted in part, if there is one
    part = jnp.take_along_axis(x, following[..., None], axis=-2, mode="promise_in_bounds") <= bounds[..., None]
    inside = jnp.sum(part, axis=-1, dtype=jnp.int32)
    return whole * block + jnp.where(whole == following, inside, 0)


def clip_keys(keys: KeyRange, key_length: int) -> KeyRange:
    """The same ranges inside [0, Sk], where there are keys."""
    return KeyRange(*(jnp.clip(x, 0, key_length) for x in keys))


def pad_rows(keys: KeyRange, tile: int) -> KeyRange:
    """Ranges for whole tiles of rows: rows that do not exist see what the last one sees (ranges may not decrease)."""
    missing = -keys.start.shape[1] % tile
    return KeyRange(*(jnp.pad(x, ((0, 0), (0, missing)), mode="edge") for x in keys)) if missing else keys


def live_steps(cp: int, length: int, window: int | None, layout: Layout = "zigzag") -> tuple[int, ...]:
    """Ring steps at which any rank sees any key; at step s rank r meets the keys of rank (r - s) % cp.

    length: tokens a rank holds. window: a static int or None (all steps live). A window of W reaches
    m = ceil((W - 1) / chunk) chunks back, so with zigzag only steps {0..m} and {cp - m..cp - 1} do any work, with
    contiguous only {0..m}.

    >>> live_steps(cp=8, length=2048, window=1024)
    (0, 1, 7)
    """
    check_layout(layout)
    if length < CHUNKS[layout]:
        raise ValueError(f"length must be at least the {CHUNKS[layout]} chunks of {layout}, got {length}")
    if window is not None and window < 1:
        raise ValueError(f"window must be >= 1, got {window}")
    if window is None:
        return tuple(range(cp))
    reach = -(-(window - 1) // (length // CHUNKS[layout]))
    back = reach if layout == "zigzag" else 0
    return tuple(s for s in range(cp) if s <= reach or s >= cp - back)


__all__ = [
    "KeyRange",
    "TileRows",
    "clip_keys",
    "key_range",
    "live_steps",
    "pad_rows",
    "row_bounds",
    "tile_rows",
    "visible_bounds",
]
