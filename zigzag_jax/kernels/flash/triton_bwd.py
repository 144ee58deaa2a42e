"""The triton backward: two kernels, so that every sum has one owner and a fixed order, and nothing is atomic.

    dk, dv    a block holds one key tile and walks over the query tiles that see it, of each query head of its group
    dq        a block holds one query tile and walks over the key tiles that it sees

Both recompute p = exp(s - lse) and, with P and dS rounded to the inputs' dtype for the tensor cores,

    dv += p^T dout     ds = p (dout v^T - delta) slope     dk += scale ds^T q     dq += scale ds k

The first works on transposed scores [tk, tq]: P^T and dS^T then are left operands and stay in registers.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from zigzag_jax.kernels.flash import triton_tiles as tiles
from zigzag_jax.kernels.flash.contract import LOG2E, Settings
from zigzag_jax.kernels.flash.triton_tuning import Tile, Tuning
from zigzag_jax.ranges import KeyRange, clip_keys, pad_rows, tile_rows


def _zeros(rows: int, dim: int) -> tuple[jax.Array, ...]:
    return tuple(jnp.zeros((rows, part.width), jnp.float32) for part in tiles.columns(dim))


def _add_product(sums: tuple, left, right: tuple) -> tuple[jax.Array, ...]:
    """Sums += left right, part by part; left goes to the tensor cores in right's dtype."""
    return tuple(x + tiles.matmul(left.astype(y.dtype), y) for x, y in zip(sums, right, strict=True))


def _dkv_kernel(
    q_ref, k_ref, v_ref, lse_ref, delta_ref, dout_ref, start_ref, stop_ref, *refs, tile: Tile,
    settings: Settings, dim: int, out_dim: int, rows: int, key_rows: int, group: int,
):  # fmt: skip
    """One key tile: q [Sq, G, D], k [tk, D], v [tk, E], lse, delta [G, Sq], dout [Sq, G, E], start, stop [Sq], 4 x [1].

    Writes dk [tk, D], dv [tk, E]. The last four are this tile's of `tile_rows`.
    """
    *bounds, dk_ref, dv_ref = refs
    tq, tk = tile.queries, tile.keys
    j = pl.program_id(0)
    limit = None if key_rows % tk == 0 else key_rows - j * tk
    k, v = tiles.load(k_ref, dim, 0, tk, limit), tiles.load(v_ref, out_dim, 0, tk, limit)
    at = (j * tk + jnp.arange(tk))[:, None]
    first, end, whole, whole_end = (ref[0] for ref in bounds)
    visited = tiles.walk(first, end, whole, whole_end, tq)

    def step(g, i, state, masked: bool):
        dk, dv = state
        existing = rows - i * tq if masked and rows % tq else None
        here = pl.ds(i * tq, tq)
        q, dout = (tiles.load(ref, d, i * tq, tq, existing, (g,)) for ref, d in ((q_ref, dim), (dout_ref, out_dim)))
        lse, delta = (tiles.load_row(ref.at[g, here], tq, existing) for ref in (lse_ref, delta_ref))
        s, slope = tiles.scores(k, q, settings)
        p = jnp.exp2(s - (lse * LOG2E)[None, :])
        if masked:
            p = jnp.where((at >= start_ref[here][None, :]) & (at < stop_ref[here][None, :]), p, 0.0)
        dv = _add_product(dv, p, dout)
        ds = p * (tiles.matmul_t(v, dout) - delta[None, :])
        return _add_product(dk, ds if slope is None else ds * slope, q), dv

    def head(g, state):
        return tiles.visit(visited, functools.partial(step, g), state)

    state = _zeros(tk, dim), _zeros(tk, out_dim)
    dk, dv = lax.fori_loop(0, group, head, state)
    tiles.store(dk_ref, dim, [x * settings.scale for x in dk], limit)
    tiles.store(dv_ref, out_dim, dv, limit)


def _dq_kernel(
    q_ref, k_ref, v_ref, lse_ref, delta_ref, dout_ref, start_ref, stop_ref, *refs, tile: Tile, settings: Settings,
    dim: int, out_dim: int, rows: int, key_rows: int,
):  # fmt: skip
    """One query tile: q [tq, D], k [Sk, D], v [Sk, E], lse, delta [tq], dout [tq, E], start, stop [tq], (dq0) -> dq."""
    *added, dq_ref = refs
    tq, tk = tile.queries, tile.keys
    i = pl.cdiv(rows, tq) - 1 - pl.program_id(0)
    limit = None if rows % tq == 0 else rows - i * tq
    keys = clip_keys(KeyRange(start_ref[...], stop_ref[...]), key_rows)
    q, dout = tiles.load(q_ref, dim, 0, tq, limit), tiles.load(dout_ref, out_dim, 0, tq, limit)
    lse, delta = (tiles.load_row(ref, tq, limit) for ref in (lse_ref, delta_ref))
    lse = lse * LOG2E

    def step(j, dq, masked: bool):
        existing = key_rows - j * tk if masked and key_rows % tk else None
        k, v = (tiles.load(ref, d, j * tk, tk, existing) for ref, d in ((k_ref, dim), (v_ref, out_dim)))
        s, slope = tiles.scores(q, k, settings)
        p = jnp.exp2(s - lse[:, None])
        if masked:
            at = (j * tk + jnp.arange(tk))[None, :]
            p = jnp.where((at >= keys.start[:, None]) & (at < keys.stop[:, None]), p, 0.0)
        ds = p * (tiles.matmul_t(dout, v) - delta[:, None])
        return _add_product(dq, ds if slope is None else ds * slope, k)

    dq = tiles.visit(tiles.key_walk(keys, tk), step, _zeros(tq, dim))
    dq = [x * settings.scale for x in dq]
    if added:
        dq = [x + y for x, y in zip(tiles.load(added[0], dim, 0, tq, limit), dq, strict=True)]
    tiles.store(dq_ref, dim, dq, limit)


def _dkv(q, k, v, lse, delta, dout, keys: KeyRange, settings: Settings, tile: Tile):
    (batch, rows, heads, dim), (_, key_rows, kv_heads, out_dim) = q.shape, v.shape
    tile, group = tile.fit(rows, key_rows), heads // kv_heads
    padded = pad_rows(keys, tile.queries)
    shared, length = keys.start.shape[0] == 1, padded.start.shape[1]
    # the first key tiles are seen by most queries: the order of the grid is heaviest first as it is
    key_side = lambda d: pl.BlockSpec((None, tile.keys, None, tiles.width(d)), lambda j, h, b: (b, j, h, 0))
    queries = lambda d: pl.BlockSpec((None, length, group, tiles.width(d)), lambda j, h, b: (b, 0, h, 0))
    stats = pl.BlockSpec((None, group, length), lambda j, h, b: (b, h, 0))
    bound = pl.BlockSpec((None, length), lambda j, h, b: (0 if shared else b, 0))
    own = pl.BlockSpec((None, 1), lambda j, h, b: (0 if shared else b, j))
    return tiles.launch(
        functools.partial(
            _dkv_kernel,
            tile=tile, settings=settings, dim=dim, out_dim=out_dim, rows=rows, key_rows=key_rows, group=group,
        ),
        (q, k, v, lse, delta, dout, *padded, *tile_rows(clip_keys(keys, key_rows), tile.keys, key_rows)),
        tile=tile,
        name="flash_dkv_triton",
        grid=(pl.cdiv(key_rows, tile.keys), kv_heads, batch),
        in_specs=[
            queries(dim), key_side(dim), key_side(out_dim), stats, stats, queries(out_dim), bound, bound, *[own] * 4,
        ],
        out_specs=[key_side(dim), key_side(out_dim)],
        out_shape=[jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (k, v)],
    )  # fmt: skip


def _dq(q, k, v, lse, delta, dout, keys: KeyRange, settings: Settings, dq, tile: Tile):
    (batch, rows, heads, dim), (_, key_rows, kv_heads, out_dim) = q.shape, v.shape
    tile, group = tile.fit(rows, key_rows), heads // kv_heads
    blocks = pl.cdiv(rows, tile.queries)
    padded = pad_rows(keys, tile.queries)
    shared = keys.start.shape[0] == 1
    row = lambda i: blocks - 1 - i  # heaviest first, as in the forward
    queries = lambda d: pl.BlockSpec((None, tile.queries, None, tiles.width(d)), lambda i, h, b: (b, row(i), h, 0))
    key_side = lambda d: pl.BlockSpec(
        (None, pl.cdiv(key_rows, tile.keys) * tile.keys, None, tiles.width(d)),
        lambda i, h, b: (b, 0, lax.div(h, group), 0),
    )
    stats = pl.BlockSpec((None, None, tile.queries), lambda i, h, b: (b, h, row(i)))
    bound = pl.BlockSpec((None, tile.queries), lambda i, h, b: (0 if shared else b, row(i)))
    return tiles.launch(
        functools.partial(
            _dq_kernel, tile=tile, settings=settings, dim=dim, out_dim=out_dim, rows=rows, key_rows=key_rows
        ),
        (q, k, v, lse, delta, dout, *padded, *(() if dq is None else (dq,))),
        tile=tile,
        name="flash_dq_triton",
        grid=(blocks, heads, batch),
        in_specs=[queries(dim), key_side(dim), key_side(out_dim), stats, stats, queries(out_dim), bound, bound]
        + ([] if dq is None else [queries(dim)]),
        out_specs=queries(dim),
        out_shape=jax.ShapeDtypeStruct(q.shape, jnp.float32),
        aliases={} if dq is None else {8: 0},
    )


@functools.partial(jax.jit, static_argnames=("settings", "tuning"))
def backward(q, k, v, lse, delta, dout, keys: KeyRange, dq, *, settings: Settings, tuning: Tuning):
    """Float32 (dq, dk, dv) in tiles of `tuning`."""
    dk, dv = _dkv(q, k, v, lse, delta, dout, keys, settings, tuning.dkv)
    return _dq(q, k, v, lse, delta, dout, keys, settings, dq, tuning.dq), dk, dv
