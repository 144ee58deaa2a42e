"""Ranges against dense masks, exhaustively on small sequences: every visible pair once, at one step, and no other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from zigzag_jax.layout import CHUNKS, global_positions, zigzag_indices
from zigzag_jax.ranges import (
    KeyRange,
    clip_keys,
    key_range,
    live_steps,
    pad_rows,
    row_bounds,
    tile_rows,
    visible_bounds,
)

LAYOUTS = tuple(CHUNKS)


def held(rank, cp, length, layout):
    """Global positions that a rank holds, by the definition and not by the code under test."""
    order = zigzag_indices(cp * length, cp) if layout == "zigzag" else np.arange(cp * length)
    return order[rank * length : (rank + 1) * length]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def all_ranges(cp, length, layout, positions, window) -> KeyRange:
    """Ranges int32 [cp queries' rank, cp step, B, length]; positions [cp, B, length], window an array."""

    def of_rank(rank, positions):
        lo, hi = visible_bounds(global_positions(rank, cp, length, layout), positions, window)
        return jax.vmap(lambda step: key_range(lo, hi, (rank - step) % cp, cp, length, layout))(jnp.arange(cp))

    return jax.vmap(of_rank)(jnp.arange(cp), positions)


def dense(keys: KeyRange, length):
    """Masks [..., rows, length] of ranges [..., rows]."""
    at = np.arange(length)
    return (at >= np.asarray(keys.start)[..., None]) & (at < np.asarray(keys.stop)[..., None])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cp", range(1, 10))
def test_the_steps_cover_the_mask_exactly_once(cp, layout):
    rng = np.random.default_rng(cp)
    for length in (2, 6):
        total, ranks = cp * length, [held(rank, cp, length, layout) for rank in range(cp)]
        cases = [(0, total), (0, 1), (0, 2), (0, length)]
        cases += [(int(rng.integers(1, total)) if total > 1 else 0, int(rng.integers(1, total + 1))) for _ in range(12)]
        for cuts, window in cases:
            natural = oracle.random_documents(rng, 3, total, cuts)
            keys = all_ranges(cp, length, layout, jnp.stack([natural[:, g] for g in ranks]), jnp.int32(window))
            start, stop = (np.asarray(x) for x in keys)
            assert np.all(np.diff(start, axis=-1) >= 0)
            assert np.all(np.diff(stop, axis=-1) >= 0)
            assert start.min() >= 0
            assert stop.max() <= length
            masks, union = dense(keys, length), np.zeros((3, total, total), int)
            for rank in range(cp):
                for step in range(cp):
                    union[:, ranks[rank][:, None], ranks[(rank - step) % cp]] += masks[rank, step]
            np.testing.assert_array_equal(union, oracle.causal(total, natural, window))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_positions_means_one_document_and_a_window_may_be_static(layout):
    cp, length = 3, 8
    natural = np.broadcast_to(np.arange(cp * length, dtype=np.int32), (1, cp * length))
    for rank in range(cp):
        g = global_positions(rank, cp, length, layout)
        for window in (None, 1, 5):
            plain, packed = visible_bounds(g, None, window), visible_bounds(g, natural[:, np.asarray(g)], window)
            traced = visible_bounds(g, None, None if window is None else jnp.int32(window))
            for a, b, c in zip(plain, packed, traced, strict=True):
                assert a.dtype == jnp.int32
                np.testing.assert_array_equal(a, b)
                np.testing.assert_array_equal(a, c)


def work(cp, length, layout) -> np.ndarray:
    """Scores of the plain causal mask, int [rank, step]."""
    g = np.stack([held(rank, cp, length, layout) for rank in range(cp)])[:, None].astype(np.int32)
    return dense(all_ranges(cp, length, layout, jnp.asarray(g), jnp.int32(cp * length)), length).sum((2, 3, 4))


@pytest.mark.parametrize("cp", range(1, 10))
def test_zigzag_ranks_work_alike_at_every_step(cp):
    chunk = 5
    steps = work(cp, 2 * chunk, "zigzag")
    assert np.all(steps[:, 1:] == 2 * chunk * chunk)
    # the diagonal: two triangles and the back chunk over the front one
    assert np.all(steps[:, 0] == chunk * chunk + chunk * (chunk + 1))


def test_contiguous_ranks_do_not_work_alike():
    cp, length = 4, 16
    steps = work(cp, length, "contiguous")
    full, triangle = length * length, length * (length + 1) // 2
    for rank in range(cp):
        assert steps[rank].tolist() == [triangle] + [full if step <= rank else 0 for step in range(1, cp)]
    # lock step: the slowest rank of each step counts. The triangle counted as half a block, design.md's 1.75
    ratio = steps.max(0).sum() / work(cp, length, "zigzag").max(0).sum()
    assert ratio == pytest.approx((cp - 0.5) / (cp / 2), rel=0.02)


def random_ranges(rng, batch, rows, keys) -> KeyRange:
    """Nondecreasing ranges with empty rows among them."""
    start, stop = (np.sort(rng.integers(0, keys + 1, (batch, rows)), axis=1).astype(np.int32) for _ in range(2))
    return KeyRange(jnp.asarray(start), jnp.asarray(stop))


@pytest.mark.parametrize("seed", range(5))
def test_row_bounds_are_those_of_the_rows_that_see_something(seed):
    rng = np.random.default_rng(seed)
    keys, tile = random_ranges(rng, 3, 24, 17), 4
    first, end = row_bounds(keys, tile)
    seen = dense(keys, 17).reshape(3, 6, tile, 17).any(2)
    for b in range(3):
        for i in range(6):
            at = np.flatnonzero(seen[b, i])
            if len(at):
                assert (first[b, i], end[b, i]) == (at[0], at[-1] + 1)
            else:
                assert first[b, i] > end[b, i]


@pytest.mark.parametrize(
    ("key_tile", "queries", "length"), [(1, 30, 18), (4, 30, 18), (5, 30, 18), (32, 30, 18), (128, 300, 520)]
)
def test_tile_rows_hold_every_row_that_sees_the_tile(key_tile, queries, length):
    rng = np.random.default_rng(key_tile)
    for _ in range(5):
        keys = random_ranges(rng, 2, queries, length)
        first, end, whole_first, whole_end = (np.asarray(x) for x in tile_rows(keys, key_tile, length))
        assert first.shape == end.shape == (2, -(-length // key_tile))
        mask = dense(keys, length)
        start, stop = (np.asarray(x) for x in keys)
        for b in range(2):
            for j in range(first.shape[1]):
                k0, k1 = j * key_tile, min((j + 1) * key_tile, length)
                rows = np.flatnonzero(mask[b, :, k0:k1].any(1))
                if len(rows):
                    assert first[b, j] <= rows[0]
                    assert rows[-1] < end[b, j]
                # tight as far as sorted bounds can tell: the rows between end after k0 and start before k1
                between = np.flatnonzero((stop[b] > k0) & (start[b] < k1))
                assert between.tolist() == list(range(first[b, j], end[b, j]))
                whole = np.flatnonzero(mask[b, :, k0:k1].all(1)) if (j + 1) * key_tile <= length else []
                assert list(range(whole_first[b, j], whole_end[b, j])) == list(whole)


def test_ranges_are_clipped_to_the_keys_and_padded_with_the_last_row():
    keys = KeyRange(jnp.array([[-5, 2, 9]], jnp.int32), jnp.array([[3, 4, 99]], jnp.int32))
    clipped = clip_keys(keys, 8)
    assert np.asarray(clipped).tolist() == [[[0, 2, 8]], [[3, 4, 8]]]
    assert np.asarray(pad_rows(clipped, 2)).tolist() == [[[0, 2, 8, 8]], [[3, 4, 8, 8]]]
    assert pad_rows(clipped, 3) is clipped


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cp", range(1, 10))
def test_a_step_is_live_exactly_when_some_rank_sees_some_key(cp, layout):
    for length in (2, 6):
        ranks = [held(rank, cp, length, layout) for rank in range(cp)]
        assert live_steps(cp, length, None, layout) == tuple(range(cp))
        for window in range(1, cp * length + 3):
            mask = oracle.causal(cp * length, None, window)[0]
            seen = {s for s in range(cp) for r in range(cp) if mask[np.ix_(ranks[r], ranks[(r - s) % cp])].any()}
            assert live_steps(cp, length, window, layout) == tuple(sorted(seen)), f"{length=} {window=}"


def test_documents_only_take_steps_away():
    # live_steps knows the window, not the documents: those it leaves out stay dead with any documents
    rng = np.random.default_rng(0)
    cp, length = 5, 6
    ranks = [held(rank, cp, length, "zigzag") for rank in range(cp)]
    for window in (1, 3, 7):
        natural = oracle.random_documents(rng, 4, cp * length, 5)
        keys = all_ranges(cp, length, "zigzag", jnp.stack([natural[:, g] for g in ranks]), jnp.int32(window))
        seen = np.flatnonzero(dense(keys, length).any((0, 2, 3, 4)))
        assert set(seen.tolist()) <= set(live_steps(cp, length, window))


def test_live_steps_raises_on_an_unknown_layout():
    with pytest.raises(ValueError, match="layout must be one of zigzag, contiguous, got 'spiral'"):
        live_steps(4, 8, 3, "spiral")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("length", "window", "message"), [(1, None, "length must be"), (8, 0, "window must be >= 1")])
def test_live_steps_raises_on_numbers_that_no_ring_has(length, window, message):
    with pytest.raises(ValueError, match=f"{message}.*, got {length if window is None else window}"):
        live_steps(4, length, window)
