"""The Hopper kernels without a GPU: their schedules in plain numbers, their limits, and what None picks.

What the kernels compute is tested on a GPU (test_flash_gpu.py) and interpreted (.._interpreted.py), how they compile in
test_flash_mosaic_compiled.py.
"""

import heapq
import itertools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from zigzag_jax import kernels
from zigzag_jax.kernels import FLASH, SplitKeys, flash_bwd, flash_fwd, flash_implementation, hopper
from zigzag_jax.kernels.flash import (
    mosaic,
    mosaic_bwd,
    mosaic_chunks,
    mosaic_cuts,
    mosaic_fwd,
    mosaic_items,
    mosaic_numbers,
    mosaic_walk,
)
from zigzag_jax.kernels.flash.contract import Carry, Settings
from zigzag_jax.kernels.flash.mosaic_bwd_tiles import BackwardTuning
from zigzag_jax.kernels.flash.mosaic_tuning import HOPPER
from zigzag_jax.kernels.grouped.mosaic_pipeline import GroupedTuning
from zigzag_jax.ranges import KeyRange

PLAIN = Settings(0.1, None)


def qkv(dim=128, out_dim=128, dtype=jnp.bfloat16, rows=4):
    return (
        jnp.zeros((1, rows, 4, dim), dtype),
        jnp.zeros((1, rows, 2, dim), dtype),
        jnp.zeros((1, rows, 2, out_dim), dtype),
    )


def random_keys(rng, batch: int, rows: int, keys: int) -> KeyRange:
    start, stop = np.sort(rng.integers(0, keys + 1, (2, batch, rows)), axis=2)
    if rng.random() < 0.3:
        start = np.zeros_like(start)
    return KeyRange(jnp.asarray(start, jnp.int32), jnp.asarray(stop, jnp.int32))


def visible_tiles(keys: KeyRange, key_rows: int, query_tile: int, key_tile: int):
    """(any pair, every pair) visible, each [B, query tiles, key tiles], by the definition."""
    seen = oracle.seen(*keys, key_rows)
    seen = seen.reshape(seen.shape[0], -1, query_tile, key_rows // key_tile, key_tile)
    return seen.any((2, 4)), seen.all((2, 4))


# ---------------------------------------------------------------- forward


@pytest.mark.parametrize(
    ("batch", "heads", "query_tiles", "group"), [(1, 4, 6, 1), (2, 3, 7, 2), (1, 1, 1, 4), (1, 33, 8, 4)]
)
def test_every_item_has_one_block(batch, heads, query_tiles, group):
    items = mosaic_items.Items(batch, heads, query_tiles, group)
    assert all(int(items.of_sm(jnp.int32(sm))) >= 1 for sm in range(items.sms))  # none reads ranges it does not have
    seen = [
        tuple(int(x) for x in items.at(jnp.int32(sm), jnp.int32(j)))
        for sm in range(items.sms)
        for j in range(int(items.of_sm(jnp.int32(sm))))
    ]
    tiles = range(0, query_tiles * mosaic_items.QUERY_TILE, mosaic_items.QUERY_TILE)
    assert sorted(seen) == sorted(itertools.product(range(batch), range(heads), tiles))


def test_drawn_numbers_are_every_item_in_the_order_of_fixed_shares():
    items = mosaic_items.Items(2, 3, 44, 2)  # two for each multiprocessor
    at = lambda sm, j: tuple(int(x) for x in items.at(sm, jnp.int32(j)))
    drawn = [at(None, number) for number in range(items.count)]
    assert len(set(drawn)) == items.count
    assert drawn[: items.sms] == [at(jnp.int32(sm), 0) for sm in range(items.sms)]
    late = [at(jnp.int32(sm), 1) for sm in reversed(range(items.sms))]
    assert drawn[items.sms :] == late


class Parts(NamedTuple):
    """What the drawn numbers are, in their order."""

    equal: int
    item: list[int]
    part: list[int]
    tiles: list[list[int]]
    """Key tiles in the order in which they are visited."""
    masked: list[int]
    """How many of them, from the first on, have a mask."""


class Drawing:
    """All numbers that blocks draw, of items and their cuts; compiled once for every ranges and lengths."""

    def __init__(self, cuts: mosaic_cuts.Cuts, key_tiles: int) -> None:
        items = cuts.items
        self.cuts = cuts

        @jax.jit
        def run(start, stop, forced):
            def edges_of(j):
                b, _, q0 = items.at(None, j)
                return mosaic_items.read_edges(start, stop, b, q0, mosaic_items.QUERY_TILE)

            equal = jnp.where(forced < 0, cuts.equal(edges_of), forced)
            numbers = jnp.arange(items.count + cuts.parts + 1, dtype=jnp.int32)
            item, part, *edges = jax.vmap(lambda number: cuts.at(number, equal, edges_of))(numbers)
            tiles = mosaic_items.Tiles(edges, cuts.tile)
            visited = jax.vmap(tiles.at, out_axes=1)(jnp.arange(key_tiles + 1, dtype=jnp.int32))
            return equal, item, part, visited, tiles.count, tiles.masked

        self.run = run

    def parts(self, keys: KeyRange, forced: int = -1) -> Parts:
        """keys: int32 [B, Sq]; `forced`, if not negative, in the place of the number of equal items that they say."""
        equal, item, part, visited, count, masked = (np.asarray(x) for x in self.run(*keys, np.int32(forced)))
        total = self.cuts.items.count + (self.cuts.parts if equal else 0)
        assert (item[total:] >= self.cuts.items.count).all()  # there are no more
        tiles = [row[:c].tolist() for row, c in zip(visited[:total], count[:total], strict=True)]
        return Parts(int(equal), item[:total].tolist(), part[:total].tolist(), tiles, masked[:total].tolist())


def places_of(items: mosaic_items.Items) -> list[tuple[int, int, int]]:
    """(batch row, head, query tile) of each item."""
    b, h, q0 = jax.jit(jax.vmap(lambda j: items.at(None, j)))(jnp.arange(items.count, dtype=jnp.int32))
    return list(zip(b.tolist(), h.tolist(), (q0 // mosaic_items.QUERY_TILE).tolist(), strict=True))


def step_of(kind: str, batch: int, query_tiles: int, key_tiles: int) -> KeyRange:
    """Ranges of whole tiles, int32 [B, Sq]."""
    n = np.arange(query_tiles)
    stop = {
        "all": np.full((batch, query_tiles), key_tiles),
        "later half": np.tile(np.where(n < query_tiles // 2, 0, key_tiles), (batch, 1)),
        "causal": np.tile(np.minimum(n + 1, key_tiles), (batch, 1)),
        "first rows": np.where(np.arange(batch)[:, None] * 2 < batch, key_tiles, 0) + 0 * n,
    }[kind]
    stop = np.repeat(stop, mosaic_items.QUERY_TILE, axis=1) * 128
    return KeyRange(jnp.zeros(stop.shape, jnp.int32), jnp.asarray(stop, jnp.int32))


@pytest.mark.parametrize(
    ("batch", "heads", "query_tiles", "group", "cut_group"),
    [(1, 32, 24, 1, 1), (2, 10, 32, 2, 16), (1, 40, 15, 1, 16), (2, 64, 6, 2, 16), (3, 25, 12, 4, 3)],
)
def test_the_parts_of_cut_items_are_whole_items(batch, heads, query_tiles, group, cut_group):
    """For what the ranges make of it, and where they mislead: every number of equal items that there can be."""
    items = mosaic_items.Items(batch, heads, query_tiles, group)
    cuts = mosaic_cuts.Cuts(items, 128, cut_group)
    key_tiles = 16
    drawing, places = Drawing(cuts, key_tiles), places_of(items)
    rows, key_rows = query_tiles * mosaic_items.QUERY_TILE, key_tiles * 128
    random = random_keys(np.random.default_rng(0), batch, rows, key_rows)
    assert cuts.equal_numbers
    for keys in (*(step_of(kind, batch, query_tiles, key_tiles) for kind in ("later half", "first rows")), random):
        _, whole = visible_tiles(keys, key_rows, mosaic_items.QUERY_TILE, cuts.tile)
        uncut = drawing.parts(keys, 0)
        assert uncut.item == list(range(items.count))
        for equal in (-1, *cuts.equal_numbers):
            found = drawing.parts(keys, equal)
            assert found.part[: cuts.parts] == list(range(cuts.parts)) or not found.equal
            parts: list[list[int]] = [[] for _ in range(items.count)]
            seen: list[list[int]] = [[] for _ in range(items.count)]
            for item, part, tiles, masked in zip(found.item, found.part, found.tiles, found.masked, strict=True):
                b, _, query_tile = places[item]
                assert whole[b, query_tile, tiles[masked:]].all()
                parts[item].append(part)
                seen[item] += tiles
            assert [sorted(tiles) for tiles in seen] == [sorted(tiles) for tiles in uncut.tiles]
            for first, *rest in parts:  # drawn in this order
                assert rest == ([] if first == mosaic_cuts.WHOLE else [first + cuts.parts])


@pytest.mark.parametrize(
    ("heads", "query_tiles", "most", "found"),
    [(32, 64, 16, 16), (32, 64, 5, 4), (32, 20, 8, 5), (32, 20, 4, 2), (32, 65, 4, 1), (16, 16, 8, 0)],
)
def test_neighbours_lie_whole_among_the_items_that_are_cut(heads, query_tiles, most, found):
    assert mosaic_cuts.neighbours(mosaic_items.Items(1, heads, query_tiles, 1), most) == found


@pytest.mark.parametrize(
    ("heads", "query_tiles", "everything", "later_half"),
    [
        (32, 64, 2048, 1024),  # a ring's steps
        (16, 16, 0, 0), (12, 32, 384, 0), (33, 16, 0, 0), (40, 31, 1240, 0),  # few, half is few, whole rounds, no half
    ],
)  # fmt: skip
def test_which_items_are_cut(heads, query_tiles, everything, later_half):
    cuts = mosaic_cuts.Cuts(mosaic_items.Items(1, heads, query_tiles, 1), 128, 1)
    drawing = Drawing(cuts, 64)
    for kind, equal in {"all": everything, "later half": later_half, "causal": 0}.items():
        found = drawing.parts(step_of(kind, 1, query_tiles, 64))
        assert found.equal == equal
        if equal:
            rests = [len(tiles) for tiles in found.tiles[equal : equal + cuts.parts]]
            assert rests == sorted(rests, reverse=True)
        assert drawing.parts(step_of(kind, 1, query_tiles, 4)).equal == 0  # not worth it


def test_blocks_that_share_items_end_together():
    """By a schedule of their tiles in which whoever is free draws."""
    items = mosaic_items.Items(1, 32, 64, 1)
    drawing = Drawing(mosaic_cuts.Cuts(items, 128, 1), 64)
    for kind, idle in {"all": 0.03, "later half": 0.03, "causal": 0.0}.items():
        keys = step_of(kind, 1, 64, 64 if kind != "all" else 32)
        ends = {}
        for forced in (0, -1):
            costs = [len(tiles) + mosaic_cuts.COST * bool(tiles) for tiles in drawing.parts(keys, forced).tiles]
            free = [0.0] * items.sms
            for cost in costs:
                heapq.heapreplace(free, free[0] + cost)
            ends[forced] = max(free) / (sum(costs) / items.sms)  # of the last block, over the mean
        assert ends[0] >= 1 + idle
        assert ends[-1] <= 1.005


@pytest.mark.parametrize("form", ["plain", "carry"])
def test_drawn_items_in_a_scan_are_traced(form):
    """A differentiated scan moves a counter that begins at 0 out of its loop, if it can."""
    tuning, keys = mosaic_fwd.ForwardTuning(shares="cut"), rows_of("causal", 256)

    @jax.custom_jvp
    def attend(q):
        kv = q[:, :, :2]
        wide, carry, dtype = q.astype(jnp.float32), None, jnp.dtype(q.dtype)
        if form == "carry":
            carry, dtype = Carry(wide, wide[:, :, :, 0].swapaxes(1, 2)), jnp.dtype(jnp.float32)
        return mosaic.flash_fwd(q, kv, kv, keys, PLAIN, carry, dtype, tuning=tuning)[0].astype(q.dtype)

    attend.defjvp(lambda primals, tangents: (attend(*primals), tangents[0]))
    layer = jax.checkpoint(lambda x, _: (attend(x), None))
    gradient = jax.grad(lambda x: jnp.sum(jax.lax.scan(layer, x, None, length=3)[0].astype(jnp.float32)))
    q = jax.ShapeDtypeStruct((1, 256, 4, 128), jnp.bfloat16)
    assert jax.eval_shape(gradient, q).shape == q.shape


def test_the_last_queries_come_first():
    items = mosaic_items.Items(1, 2, 4, 1)
    assert [int(items.at(jnp.int32(sm), jnp.int32(0))[2]) for sm in (0, 7)] == [3 * 128, 0]


@pytest.mark.parametrize("seed", range(4))
def test_forward_visits_what_is_visible_and_masks_what_is_cut(seed):
    rng = np.random.default_rng(seed)
    query_tile, key_tile, key_rows = mosaic_items.QUERY_TILE, 128, 1024
    keys = random_keys(rng, 1, 4 * query_tile, key_rows)
    some, whole = visible_tiles(keys, key_rows, query_tile, key_tile)
    for n in range(4):
        rows = slice(n * query_tile, (n + 1) * query_tile)
        start, stop = np.asarray(keys.start)[0, rows], np.asarray(keys.stop)[0, rows]
        tiles = mosaic_items.Tiles([jnp.int32(x) for x in (start[0], start[-1], stop[0], stop[-1])], key_tile)
        order = [int(tiles.at(jnp.int32(i))) for i in range(int(tiles.count))]
        assert len(set(order)) == len(order)
        assert set(np.flatnonzero(some[0, n])) <= set(order)
        inside = order[int(tiles.masked) :]
        assert all(whole[0, n, t] for t in inside)
        assert set(np.flatnonzero(whole[0, n])) <= set(inside)


# ---------------------------------------------------------------- both


def test_what_is_joined_is_found_again():
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 99, shape) for shape in ((3,), (), (2, 5), (1, 2, 4), (1,))]
    joined = mosaic_numbers.join(*map(jnp.asarray, arrays))
    assert joined.dtype == jnp.int32
    assert joined.size % 4 == 0

    def kernel(joined_ref, *refs):
        for part, ref in zip(mosaic_numbers.parts(joined_ref, [ref.shape for ref in refs]), refs, strict=True):
            for index in np.ndindex(ref.shape):
                ref[index] = part[index]

    shapes = [jax.ShapeDtypeStruct(x.shape, jnp.int32) for x in arrays]
    for array, found in zip(arrays, pl.pallas_call(kernel, out_shape=shapes, interpret=True)(joined), strict=True):
        np.testing.assert_array_equal(found, array)


def test_a_part_gives_some_of_its_rows():
    array = jnp.arange(10, dtype=jnp.int32).reshape(2, 5)

    def kernel(joined_ref, out_ref):
        _, part = mosaic_numbers.parts(joined_ref, [(3,), array.shape])
        out_ref[...] = part.rows(1, rows=pl.ds(2, 3))[...]

    run = pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((3,), jnp.int32), interpret=True)
    np.testing.assert_array_equal(run(mosaic_numbers.join(jnp.zeros(3, jnp.int32), array)), array[1, 2:])


# ---------------------------------------------------------------- backward


KEY_TILE = 128  # of all heads but those of 256


@pytest.mark.parametrize("key_tile", [64, KEY_TILE])
@pytest.mark.parametrize("seed", range(4))
def test_visits_are_the_visible_tiles(seed, key_tile):
    rng = np.random.default_rng(seed)
    query_tile, key_rows = mosaic_walk.QUERY_TILE, 768
    keys = random_keys(rng, 2, 8 * query_tile, key_rows)
    some, whole = visible_tiles(keys, key_rows, query_tile, key_tile)
    visits = np.asarray(mosaic_walk.visits(keys, key_rows, key_tile))
    first = np.asarray(mosaic_walk.first_visitor(jnp.asarray(visits), 8))
    for b, t in itertools.product(range(2), range(key_rows // key_tile)):
        lo, whole_lo, whole_hi, hi = visits[b, t]
        assert set(np.flatnonzero(some[b, :, t])) <= set(range(lo, hi))
        assert set(range(whole_lo, whole_hi)) == set(np.flatnonzero(whole[b, :, t]))
        for q in range(lo, hi):  # what cuts the tile: ranges that stop before its last key, that start after its first
            start, stop = (np.asarray(x)[b, q * query_tile : (q + 1) * query_tile] for x in keys)
            assert (q < whole_lo) == (stop < (t + 1) * key_tile).any()
            assert (q >= whole_hi) == (start > t * key_tile).any()
    for b, q in itertools.product(range(2), range(8)):  # the visitors of a query tile are neighbours
        visitors = [t for t in range(key_rows // key_tile) if visits[b, t, 0] <= q < visits[b, t, 3]]
        assert visitors == list(range(first[b, q], first[b, q] + len(visitors)))


def rows_of(kind: str, rows: int):
    i = np.arange(rows)
    start = {"causal": 0 * i, "window": np.maximum(i - 511, 0), "documents": i // 512 * 512}[kind]
    return KeyRange(jnp.asarray(start[None], jnp.int32), jnp.asarray(i[None] + 1, jnp.int32))


@pytest.mark.parametrize(
    ("kinds", "by_head"),
    [
        (["causal"], False),
        (["window"], True),
        (["documents"], False),
        (["documents", "window"], True),  # the ends of more than a quarter of all key tiles move
        (["causal", "documents"], False),
    ],
)
def test_a_window_is_walked_by_head(kinds, by_head):
    visits = jnp.concatenate([mosaic_walk.visits(rows_of(kind, 4096), 4096, KEY_TILE) for kind in kinds])
    assert bool(head_items(2, 3, 4, 32).sums(visits)[1]) == by_head
    assert not head_items(2, 3, 4, 1).sums(visits[:, :1])[1]


@pytest.mark.parametrize("kinds", [["causal"], ["window"], ["documents"], ["causal", "documents"]])
def test_the_longest_walk_comes_first_and_equal_ones_ascend(kinds):
    visits = jnp.concatenate([mosaic_walk.visits(rows_of(kind, 4096), 4096, KEY_TILE) for kind in kinds])
    order = np.asarray(head_items(2, 3, 4, 32).order(visits))
    length = np.sum(visits[..., 3] - visits[..., 0], axis=0)
    np.testing.assert_array_equal(order, np.argsort(-length, kind="stable"))
    ascending = head_items(2, 3, 4, 32, take_turns=True).order(visits)
    np.testing.assert_array_equal(ascending, range(32))


@pytest.mark.parametrize("key_tiles", [1, 2, 31, 1000])
def test_an_order_of_walks_too_long_to_sort_still_has_every_tile(key_tiles):
    hi = np.random.default_rng(0).integers(0, 1 << 30, (1, key_tiles, 1))
    visits = jnp.asarray(np.concatenate([np.zeros((1, key_tiles, 3)), hi], -1), jnp.int32)
    assert sorted(np.asarray(head_items(1, 2, 4, key_tiles).order(visits))) == list(range(key_tiles))


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize(("lo", "hi", "group"), [(3, 8, 4), (5, 6, 1), (0, 7, 1), (2, 2, 3)])
def test_a_walk_visits_every_pair_once(lo, hi, group, down, by_head):
    walk = mosaic_walk.Walk(jnp.int32(lo), jnp.int32(hi), jnp.bool_(by_head), group, down)
    seen = [tuple(int(x) for x in walk.at(jnp.int32(i))) for i in range(group * (hi - lo))]
    assert sorted(seen) == list(itertools.product(range(group), range(lo, hi)))
    slow = [pair[0 if by_head else 1] for pair in seen]  # what changes only when the other has been through
    assert len(list(itertools.groupby(slow))) == len(set(slow))
    tiles = [tile for _, tile in seen]
    if by_head:
        assert seen == sorted(seen, key=lambda pair: (pair[0], -pair[1]))
    else:
        assert tiles == sorted(tiles, reverse=down)


def head_items(batch, kv_heads, group, key_tiles, head_bytes=1 << 30, take_turns=False):
    return mosaic_walk.Items(batch, kv_heads, group, key_tiles, head_bytes=head_bytes, take_turns=take_turns)


def test_what_does_not_fit_l2_is_walked_down_and_up_and_else_down():
    def down(*sizes, **kwargs):
        items = head_items(1, *sizes, **kwargs)
        return np.broadcast_to(items.walks_down(jnp.arange(items.count, dtype=jnp.int32)), items.count).tolist()

    sizes = 8, 2, 128  # two kv heads side by side: 256 items, a full wave and one less
    per_head = mosaic_walk.L2_BYTES // 4  # two kv heads of two query heads
    assert down(*sizes, head_bytes=per_head + 1) == ([True] * 132 + [False] * 124) * 4
    assert all(down(*sizes, head_bytes=per_head))
    assert all(down(*sizes, take_turns=True))  # one that went up would hold up those after it for its whole walk
    one_head = [True] * 132 + [False] * 132 + [True] * 132 + [False] * 116
    assert down(8, 2, 512) == one_head * 8
    # 32 key tiles in all: the group of 8 is split in eight, and all its heads count
    assert down(1, 8, 32, head_bytes=mosaic_walk.L2_BYTES // 8 + 1) == [True] * 132 + [False] * 124
    assert all(down(1, 8, 32, head_bytes=mosaic_walk.L2_BYTES // 8))


@pytest.mark.parametrize(
    ("batch", "kv_heads", "group", "key_tiles", "together"),
    [(1, 1, 16, 4, 1), (2, 4, 8, 3, 8), (1, 8, 1, 20, 8), (1, 6, 1, 100, 3), (1, 4, 2, 256, 1)],
)
def test_every_key_tile_and_head_has_one_item(batch, kv_heads, group, key_tiles, together):
    items = head_items(batch, kv_heads, group, key_tiles)
    assert items.together == together  # heads whose 256 key tiles or more run side by side
    seen = []
    at = jax.jit(jax.vmap(items.at))(jnp.arange(items.count, dtype=jnp.int32))
    for b, kv_head, place, _, head in zip(*(np.asarray(x).tolist() for x in at), strict=True):
        for h in range(head, head + items.group):
            assert h // group == kv_head
            seen.append((b, place, h))
    every = itertools.product(range(batch), range(key_tiles), range(kv_heads * group))
    assert sorted(seen) == sorted(every)
    if kv_heads == 1:
        assert items.count >= 64  # 4 tiles alone would leave the card idle: the group's heads are shared out


@pytest.mark.parametrize("take_turns", [True, False])
@pytest.mark.parametrize(("batch_rows", "kv_heads"), [(1, 3), (2, 2)])
def test_an_item_is_as_long_as_its_walk(batch_rows, kv_heads, take_turns):
    keys = random_keys(np.random.default_rng(0), batch_rows, 512, 768)
    visits = mosaic_walk.visits(keys, 768, KEY_TILE)
    items = head_items(2, kv_heads, 4, 6, take_turns=take_turns)
    order = items.order(visits)
    lengths = np.asarray(items.lengths(visits, order))
    assert lengths.shape == (items.count,)
    assert items.sums(visits)[0] == lengths.sum()
    assert lengths.max() <= 512 // mosaic_walk.QUERY_TILE * items.group  # what flash_bwd gives as the longest
    for item, length in enumerate(lengths.tolist()):
        b, _, place, *_ = (int(x) for x in items.at(jnp.int32(item)))
        lo, *_, hi = np.asarray(visits)[b % batch_rows, order[place]]
        assert length == (hi - lo) * items.group


@pytest.mark.parametrize(
    ("tiles", "longest", "blocks", "whole", "chunk"),
    [
        ([1000] * 256, 1000, 132, False, 60),  # 32 chunks a block
        ([100, 7, 0, 8, 9], 128, 132, False, mosaic_chunks.SHORTEST),
        ([1 << 17] * 32768, 1 << 17, 132, False, mosaic_chunks.LONGEST),  # a million tokens: the sum passes 2^31
        ([1 << 22, 5], 1 << 22, 132, False, 129),  # a counter holds 2^15 chunks
        ([100, 7, 0], 128, 2, True, 128),
        ([0, 0], 128, 2, True, 128),
    ],
)
def test_chunks_are_the_whole_of_each_item(tiles, longest, blocks, whole, chunk):
    lengths, total = jnp.asarray(tiles, jnp.int32), jnp.float32(sum(tiles))
    pitch = -(-len(tiles) // 4) * 4  # four are read at once
    counters, lengths = np.split(mosaic_chunks.shares(lengths, total, longest, blocks, whole), [3 * pitch])
    assert [*lengths] == [*tiles, chunk]
    left, ended, stored = counters.reshape(3, -1)
    assert not ended.any()
    assert not stored.any()
    # the owner has the first chunk from the beginning: the next is number 1, so many are left
    assert [*left[: len(tiles)]] == [max(-(-n // chunk) - 1, 0) * 2**16 + 1 for n in tiles]
    assert not left[len(tiles) :].any()


def test_the_adding_warp_has_read_a_record_before_it_is_overwritten():
    """It happens half a chunk after the next one has begun; the warp is stages + 2 tiles behind at most."""
    assert all(tuning.backward.stages + 2 <= mosaic_chunks.SHORTEST for tuning in HOPPER.values())


# ---------------------------------------------------------------- what runs


@pytest.mark.parametrize(
    ("arrays", "settings", "words"),
    [
        (qkv(dtype=jnp.float32), PLAIN, "bfloat16 or float16"),
        (qkv(80, 80), PLAIN, "(128, 128)"),
        (qkv(), Settings(0.0, None), "a scale > 0"),
        (qkv(), Settings(-0.1, None), "a scale > 0"),
        (qkv(rows=0), PLAIN, "not empty"),
    ],
)
def test_limits(arrays, settings, words):
    q, k, v = arrays
    assert words in (mosaic.limits(q, k, v, settings) or "")


def test_every_row_of_the_table_is_within_the_limits():
    for dims in HOPPER:
        assert mosaic.limits(*qkv(*dims), PLAIN) is None
        assert mosaic.limits(*qkv(*dims, dtype=jnp.float16), PLAIN) is None


@pytest.mark.parametrize(
    ("name", "dims", "shared", "apart"),
    [
        ("mosaic", (192, 128), 64, True),
        ("mosaic", (192, 128), 32, False),
        ("mosaic", (128, 128), 64, False),
        ("triton", (192, 128), 64, False),
        ("cudnn", (192, 128), 64, False),
        ("reference", (192, 128), 64, False),
    ],
)
def test_keys_in_two_parts_are_made_whole_where_no_kernel_reads_them(name, dims, shared, apart, monkeypatch):
    q, k, v = qkv(*dims)
    split = SplitKeys(k[..., shared:], k[:, :, 0, :shared])
    assert flash_implementation(q, split, v, PLAIN, name) == name
    given = {}
    forward = lambda q, k, *_: given.update(forward=k) or (q, q)
    backward = lambda q, k, *_: given.update(backward=k) or (q, k, q)
    monkeypatch.setitem(FLASH, name, FLASH[name]._replace(fwd=forward, bwd=backward))
    keys, stats = KeyRange(*jnp.zeros((2, 1, q.shape[1]), jnp.int32)), jnp.zeros((*q.shape[:1], q.shape[2], q.shape[1]))
    flash_fwd(q, split, v, keys, scale=1.0, implementation=name)
    _, dk, _ = flash_bwd(
        q, split, v, stats, stats, jnp.zeros((*q.shape[:3], v.shape[3]), q.dtype), keys, scale=1.0, implementation=name
    )
    assert (given["forward"] is split) == apart
    assert given["forward"].shape == given["backward"].shape == k.shape
    assert jax.tree.map(jnp.shape, split.split(dk)) == jax.tree.map(jnp.shape, split)


def test_an_implementation_that_cannot_says_which_can():
    q, k, v = qkv(80, 80)
    keys = KeyRange(jnp.zeros((1, 4), jnp.int32), jnp.zeros((1, 4), jnp.int32))
    pattern = r"'mosaic' needs .*got bfloat16 q \[1, 4, 4, 80\].*'triton' or 'reference' can"
    with pytest.raises(NotImplementedError, match=pattern):
        flash_fwd(q, k, v, keys, scale=1, implementation="mosaic")
    stats = jnp.zeros((1, 4, 4))
    with pytest.raises(NotImplementedError, match=pattern):
        flash_bwd(q, k, v, stats, stats, q, keys, scale=1, implementation="mosaic")


@pytest.mark.parametrize(
    ("preference", "arrays", "picked"),
    [
        (("mosaic", "triton"), qkv(), "mosaic"),
        (("mosaic", "triton"), qkv(80, 80), "triton"),
        (("mosaic", "triton"), qkv(dtype=jnp.float32), "triton"),
        (("triton",), qkv(), "triton"),
        (("reference",), qkv(), "reference"),
    ],
)
def test_none_picks_by_device_and_shapes_and_says_so_once(preference, arrays, picked, monkeypatch, caplog):
    monkeypatch.setattr(kernels, "_preference", lambda: preference)
    kernels._say.cache_clear()
    q, k, v = arrays
    with caplog.at_level("INFO", "zigzag_jax"):
        assert [flash_implementation(q, k, v, PLAIN) for _ in range(2)] == [picked, picked]
    (record,) = caplog.records
    assert f"by '{picked}'" in record.getMessage()
    passed_over = picked != preference[0]  # then it says why, where everybody sees it
    assert (record.levelname, "needs" in record.getMessage()) == (("WARNING", True) if passed_over else ("INFO", False))


@pytest.mark.parametrize(("arrays", "picked"), [(qkv(), "mosaic"), (qkv(dtype=jnp.float32), "triton")])
def test_hopper_picks_on_any_host_what_none_picks_there(arrays, picked):
    q, k, v = arrays
    assert flash_implementation(q, k, v, PLAIN, kernels.HOPPER) == picked


def test_none_never_falls_back_to_a_slow_path(monkeypatch):
    monkeypatch.setattr(kernels, "_preference", lambda: ("mosaic", "triton"))
    with pytest.raises(NotImplementedError, match=r"'mosaic' needs .*; 'triton' needs .*'reference' can"):
        flash_implementation(*qkv(512, 512), PLAIN)


class Gpu:
    def __init__(self, compute_capability: str) -> None:
        self.compute_capability = compute_capability


@pytest.mark.parametrize(
    ("backend", "capability", "preference"),
    [
        ("gpu", "9.0", ("mosaic", "triton")),
        ("gpu", "8.0", ("triton",)),
        ("gpu", "10.0", ("triton",)),
        ("cpu", "", ("reference",)),
        ("tpu", "", ("reference",)),
    ],
)
def test_preference_by_device(backend, capability, preference, monkeypatch, caplog):
    monkeypatch.setattr(kernels.jax, "default_backend", lambda: backend)
    monkeypatch.setattr(kernels.jax, "devices", lambda: [Gpu(capability)])
    assert kernels._preference.__wrapped__() == preference
    assert set(preference) <= set(FLASH)
    assert ("slow" in caplog.text) == (backend == "tpu")


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_a_remainder_of_what_is_not_negative(count):
    i = np.concatenate([np.arange(13, dtype=np.int32), np.array([2**31 - 2, 2**31 - 1], np.int32)])
    np.testing.assert_array_equal(jax.vmap(lambda n: hopper.remainder(n, count))(i), i % count)


def test_tuning_and_barriers_name_their_rules():
    with pytest.raises(ValueError, match="key_tile must be 64, 128 or 256, got 96"):
        mosaic_fwd.ForwardTuning(key_tile=96)
    with pytest.raises(ValueError, match="stages must be at least 2, got 1"):
        mosaic_fwd.ForwardTuning(stages=1)
    with pytest.raises(ValueError, match="staged must be none, 16 bit or all, got 'float32'"):
        mosaic_fwd.ForwardTuning(staged="float32")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"shares must be fixed, drawn or cut, got 'all'"):
        mosaic_fwd.ForwardTuning(shares="all")  # pyright: ignore[reportArgumentType]
    wide, tuning = qkv(256, 256, rows=128), mosaic_fwd.ForwardTuning(key_tile=64, shares="cut")
    with pytest.raises(ValueError, match=r'shares="cut" needs at most 128 columns of v a head, got 256'):
        mosaic.flash_fwd(*wide, rows_of("causal", 128), PLAIN, None, jnp.bfloat16, tuning=tuning)
    with pytest.raises(ValueError, match="schedule must be overlapped, late or columns, got 'Late'"):
        BackwardTuning(schedule="Late")  # pyright: ignore[reportArgumentType]
    make: Any = BackwardTuning
    for wrong in dict(ds_buffers=3), *[dict(ds_buffers=1, schedule=s, out_stages=1) for s in ("late", "columns")]:
        with pytest.raises(
            ValueError, match=r"ds_buffers must be 1 or 2, of schedules 'late' and 'columns' 2, got [13]"
        ):
            make(**wrong)
    for wrong, most in (
        (dict(stages=1), "5 with schedule 'overlapped' and 2 ds_buffers, got 2 and 1"),
        (dict(out_stages=0), "5 with schedule 'overlapped' and 2 ds_buffers, got 0 and 2"),
        (dict(stages=3, out_stages=3), "5 with schedule 'overlapped' and 2 ds_buffers, got 3 and 3"),
        (dict(ds_buffers=1, stages=3), "4 with schedule 'overlapped' and 1 ds_buffers, got 2 and 3"),
        (dict(schedule="late"), "3 with schedule 'late' and 2 ds_buffers, got 2 and 2"),
    ):
        rule = f"out_stages must be at least 1, at most stages, and both together at most {most}"
        with pytest.raises(ValueError, match=f"^{rule}$"):
            make(**wrong)
    q, k, v = qkv(192, 128)
    stats, keys = jnp.zeros((1, 4, 128)), KeyRange(*jnp.zeros((2, 1, 128), jnp.int32))
    with pytest.raises(ValueError, match="half of v's columns must be a multiple of 48, a piece of dv, got 64"):
        mosaic_bwd.flash_bwd(q, k, v, stats, stats, v, keys, PLAIN, None, False, BackwardTuning(schedule="columns"))
    with pytest.raises(ValueError, match=r"named barriers must lie in 4\.\.15, got 15\.\.16"):
        hopper.NamedBarriers(15, 2, 128)
    for tuning in (mosaic_fwd.ForwardTuning, BackwardTuning, GroupedTuning):
        with pytest.raises(ValueError, match=r"registers of 2 consumers .* must be at most 3 x 168, got \(240, 32\)"):
            tuning(registers=(240, 32))
    with pytest.raises(ValueError, match=r"named barriers must lie in 4\.\.15, got 3\.\.3"):
        hopper.NamedBarriers(3, 1, 128)
    with pytest.raises(ValueError, match=r"named barriers must lie in 4\.\.15, got 9\.\.7"):
        hopper.NamedBarriers(9, -1, 128)
    with pytest.raises(ValueError, match="multiples of 32 bytes, got 24 columns of bfloat16"):
        hopper.smem((64, 24), jnp.bfloat16)
    assert [hopper.swizzle(n, jnp.bfloat16) for n in (64, 96, 48)] == [128, 64, 32]


@pytest.mark.parametrize(
    ("version", "installed", "library", "named"),
    [
        ((0, 11, 2), ["nvidia-nvjitlink"], "libnvJitLink.so.13", None),
        ((0, 12, 0), ["nvidia-nvjitlink"], None, "nvidia-nvjitlink 1.2"),
        ((0, 12, 0), ["nvidia-nvjitlink-cu12"], None, "nvidia-nvjitlink-cu12 1.2"),
        ((0, 13, 0), [], "libnvJitLink.so.13", "libnvJitLink.so.13"),
        ((0, 12, 0), [], None, None),
    ],
)
def test_a_jax_that_takes_the_kernels_registers_is_warned_of(version, installed, library, named, monkeypatch, caplog):
    def found(name):
        if name in installed:
            return "1.2"
        raise hopper.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(jax, "__version_info__", version)
    monkeypatch.setattr(hopper.importlib.metadata, "version", found)
    monkeypatch.setattr(hopper.ctypes.util, "find_library", lambda name: library)
    hopper.warn_of_nvjitlink.__wrapped__()
    assert bool(caplog.records) == bool(named)
    assert (named or "") in caplog.text


# ---------------------------------------------------------------- lowering


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="the pinned jax compiles them all: ..._compiled.py")
def test_a_newer_jax_lowers_all_heads_of_the_table():
    """It may refuse what the pinned one takes."""

    def array(*shape: int, dtype=jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct((1, *shape), dtype)

    rows = 12288  # items enough that some are cut
    assert mosaic_cuts.equal_numbers(mosaic_items.Items(1, 4, rows // mosaic_items.QUERY_TILE, 1))
    settings, keys = Settings(0.1, 30.0), KeyRange(*[array(rows, dtype=jnp.int32)] * 2)
    stats = array(4, rows, dtype=jnp.float32)
    lower = lambda f, *args: jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    for (dim, out_dim), tuning in HOPPER.items():
        q, k, v = array(rows, 4, dim), array(rows, 2, dim), array(rows, 2, out_dim)
        split = SplitKeys(array(rows, 2, dim - tuning.shared), array(rows, tuning.shared)) if tuning.shared else k
        carry = Carry(array(rows, 4, out_dim, dtype=jnp.float32), stats)
        uses = (None, carry) if tuning.forward.shares == "cut" else (carry,)  # a part's result lies elsewhere
        for use, dtype in itertools.product(uses, (jnp.bfloat16, jnp.float32)):
            forward = lambda q, k, v, keys, carry, d=dtype: mosaic.flash_fwd(q, k, v, keys, settings, carry, d)
            assert "mosaic_gpu_v2" in lower(forward, q, split, v, keys, use)
        for fixed in (False, True) if dim == 128 else (False,):
            backward = lambda q, k, v, keys, dq, dout, lse, delta, d=fixed: mosaic.flash_bwd(
                q, k, v, lse, delta, dout, keys, settings, dq, d
            )
            gradient, dout = array(rows, 4, dim, dtype=jnp.float32), array(rows, 4, out_dim)
            for dq in (gradient, None):
                assert "mosaic_gpu_v2" in lower(backward, q, k, v, keys, dq, dout, stats, stats)
