"""The triton forward: one block holds a tile of queries of one head and walks over the key tiles that it sees.

The state of the online softmax (row maximum m in base 2, denominator l, unnormalised output a) stays in registers; a
carry (out, lse) is the state m = lse, l = 1, a = out, read where the result is written.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from zigzag_jax.kernels.flash import triton_tiles as tiles
from zigzag_jax.kernels.flash.contract import LOG2E, Carry, Settings
from zigzag_jax.kernels.flash.triton_tuning import Tile
from zigzag_jax.ranges import KeyRange, clip_keys, pad_rows


def _kernel(
    q_ref, k_ref, v_ref, start_ref, stop_ref, *refs, tile: Tile, settings: Settings, dim: int, out_dim: int, rows: int,
    key_rows: int,
):  # fmt: skip
    """One query tile: q [tq, D], k [Sk, D], v [Sk, E], start, stop [tq], (out0 [tq, E], lse0 [tq]) -> out, lse."""
    *carry, out_ref, lse_ref = refs
    tq, tk = tile.queries, tile.keys
    i = pl.cdiv(rows, tq) - 1 - pl.program_id(0)
    limit = None if rows % tq == 0 else rows - i * tq
    keys = clip_keys(KeyRange(start_ref[...], stop_ref[...]), key_rows)
    q = tiles.load(q_ref, dim, 0, tq, limit)

    if carry:
        lse0 = tiles.load_row(carry[1], tq, limit)
        a = tiles.load(carry[0], out_dim, 0, tq, limit)
        m, l = lse0 * LOG2E, jnp.where(lse0 == -jnp.inf, 0.0, 1.0)
    else:
        lse0 = m = jnp.full((tq,), -jnp.inf, jnp.float32)
        a = tuple(jnp.zeros((tq, part.width), jnp.float32) for part in tiles.columns(out_dim))
        l = jnp.zeros((tq,), jnp.float32)

    def step(j, state, masked: bool):
        m, l, a = state
        existing = key_rows - j * tk if masked and key_rows % tk else None
        s, _ = tiles.scores(q, tiles.load(k_ref, dim, j * tk, tk, existing), settings)
        if masked:
            at = (j * tk + jnp.arange(tk))[None, :]
            s = jnp.where((at >= keys.start[:, None]) & (at < keys.stop[:, None]), s, -jnp.inf)
        top = jnp.maximum(m, jnp.max(s, axis=1))
        # a row that saw nothing yet: exp2(-inf - 0) = 0, not nan. Without a mask every row has seen something
        base = jnp.where(top == -jnp.inf, 0.0, top) if masked else top
        p, keep = jnp.exp2(s - base[:, None]), jnp.exp2(m - base)
        v = tiles.load(v_ref, out_dim, j * tk, tk, existing)
        a = tuple(x * keep[:, None] + tiles.matmul(p.astype(y.dtype), y) for x, y in zip(a, v, strict=True))
        return top, l * keep + jnp.sum(p, axis=1), a

    m, l, a = tiles.visit(tiles.key_walk(keys, tk), step, (m, l, a))
    scale = 1.0 / jnp.where(l > 0, l, 1.0)
    tiles.store(out_ref, out_dim, [x * scale[:, None] for x in a], limit)
    # a row that sees nothing keeps the lse of its carry bit for bit
    lse = jnp.where(keys.stop > keys.start, m * (1 / LOG2E) + jnp.log(l), lse0)
    tiles.store_row(lse_ref, lse, limit)


@functools.partial(jax.jit, static_argnames=("settings", "out_dtype", "tile"))
def forward(q, k, v, keys: KeyRange, carry: Carry | None, *, settings: Settings, out_dtype, tile: Tile):
    """(out [B, Sq, H, E], lse [B, H, Sq]) in tiles of `tile`."""
    (batch, rows, heads, dim), (_, key_rows, kv_heads, out_dim) = q.shape, v.shape
    tile, group = tile.fit(rows, key_rows), heads // kv_heads
    blocks = pl.cdiv(rows, tile.queries)
    keys = pad_rows(keys, tile.queries)
    shared = keys.start.shape[0] == 1

    # Under a causal mask the last query tile sees most: the first blocks to start are the ones that take longest. The
    # blocks that run together are those of a few heads, so that their K and V stay in the L2 cache.
    row = lambda i: blocks - 1 - i
    queries = lambda d: pl.BlockSpec((None, tile.queries, None, tiles.width(d)), lambda i, h, b: (b, row(i), h, 0))
    key_side = lambda d: pl.BlockSpec(
        (None, pl.cdiv(key_rows, tile.keys) * tile.keys, None, tiles.width(d)),
        lambda i, h, b: (b, 0, lax.div(h, group), 0),
    )
    bound = pl.BlockSpec((None, tile.queries), lambda i, h, b: (0 if shared else b, row(i)))
    stats = pl.BlockSpec((None, None, tile.queries), lambda i, h, b: (b, h, row(i)))
    in_place = carry is not None and out_dtype == jnp.float32
    aliases = {5: 0, 6: 1} if in_place else {6: 1} if carry is not None else {}
    return tiles.launch(
        functools.partial(
            _kernel, tile=tile, settings=settings, dim=dim, out_dim=out_dim, rows=rows, key_rows=key_rows
        ),
        (q, k, v, *keys, *(carry or ())),
        tile=tile,
        name="flash_fwd_triton",
        grid=(blocks, heads, batch),
        in_specs=[queries(dim), key_side(dim), key_side(out_dim), bound, bound]
        + ([] if carry is None else [queries(out_dim), stats]),
        out_specs=[queries(out_dim), stats],
        out_shape=[
            jax.ShapeDtypeStruct((batch, rows, heads, out_dim), out_dtype),
            jax.ShapeDtypeStruct((batch, heads, rows), jnp.float32),
        ],
        aliases=aliases,
    )
