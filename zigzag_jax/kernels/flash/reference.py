"""The flash contract in plain XLA: the implementation for CPU, and the one the others are compared with.

Queries and keys are cut into tiles. A loop over query tiles holds a loop over key tiles whose bounds are *data*: it
runs from the first to the last key tile that any row of the query tile sees, so an empty tile costs nothing and memory
stays at one tile of scores however long the sequence. All arithmetic is float32 whatever the inputs.

The forward is the online softmax (Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022): with row maximum m,
denominator l and unnormalised output a, a tile of scores s updates

    m' = max(m, max s)     l' = l exp(m - m') + sum exp(s - m')     a' = a exp(m - m') + exp(s - m') v

and a carry (out, lse) is the state m = lse, l = 1, a = out. The backward recomputes p = exp(s - lse) tile by tile:

    dv += p^T dout     ds = p (dout v^T - delta)     dq += scale ds k     dk += scale ds^T q
"""

import functools

import jax.numpy as jnp
from jax import lax

from zigzag_jax.kernels.flash.contract import Carry, Implementation, Settings
from zigzag_jax.ranges import KeyRange, clip_keys, row_bounds

QUERY_TILE, KEY_TILE = 128, 128  # least time on two CPU cores: scores of a tile stay in the cache

_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _tiling(length: int, most: int) -> tuple[int, int]:
    """(tile, tiles): as few equal tiles of at most `most` rows as cover `length`."""
    tiles = max(1, -(-length // most))
    return max(1, -(-length // tiles)), tiles


def _pad(x, axis: int, length: int):
    return jnp.pad(x, [(0, length - n if a == axis else 0) for a, n in enumerate(x.shape)])


class _Tiles:
    """q, k, v, their ranges and bounds, padded to whole tiles; query rows that are padding see nothing."""

    def __init__(self, q, k, v, keys: KeyRange, settings: Settings) -> None:
        self.settings, self.kv_heads, self.rows, self.key_rows = settings, k.shape[2], q.shape[1], k.shape[1]
        self.tq, self.nq = _tiling(q.shape[1], QUERY_TILE)
        self.tk, self.nk = _tiling(k.shape[1], KEY_TILE)
        self.q, self.k, self.v = self.pad_rows(q), *(_pad(x, 1, self.nk * self.tk) for x in (k, v))
        self.keys = KeyRange(*(_pad(x, 1, self.nq * self.tq) for x in clip_keys(keys, k.shape[1])))
        first, end = (x for x in row_bounds(self.keys, self.tq))
        # one loop serves the whole batch, so its bounds are those of the batch row that sees most
        self.first_tile, self.end_tile = jnp.min(first, axis=0) // self.tk, -(-jnp.max(end, axis=0) // self.tk)

    def pad_rows(self, x, axis: int = 1):
        return _pad(x, axis, self.nq * self.tq)

    def heads(self, x, i):
        """Query tile i of x [B, Sq, H, D] as float32 [B, K, G, tq, D]."""
        x = lax.dynamic_slice_in_dim(x, i * self.tq, self.tq, axis=1).astype(jnp.float32)
        batch, tq, heads, dim = x.shape
        return x.reshape(batch, tq, self.kv_heads, heads // self.kv_heads, dim).transpose(0, 2, 3, 1, 4)

    def stats(self, x, i):
        """Query tile i of x [B, H, Sq] as [B, K, G, tq]."""
        x = lax.dynamic_slice_in_dim(x, i * self.tq, self.tq, axis=2)
        return x.reshape(x.shape[0], self.kv_heads, -1, self.tq)

    def key_tile(self, x, j):
        """Key tile j of x [B, Sk, K, D], float32."""
        return lax.dynamic_slice_in_dim(x, j * self.tk, self.tk, axis=1).astype(jnp.float32)

    def scores(self, qi, kj, i, j):
        """(scores, slope of the softcap or 1.0, visible), each [B or 1, K or 1, G or 1, tq, tk]."""
        s, slope = _einsum("bkgqd,bskd->bkgqs", qi, kj) * self.settings.scale, 1.0
        if (cap := self.settings.softcap) is not None:
            t = jnp.tanh(s / cap)
            s, slope = cap * t, 1 - t * t
        start, stop = (lax.dynamic_slice_in_dim(x, i * self.tq, self.tq, axis=1)[:, :, None] for x in self.keys)
        at = (j * self.tk + jnp.arange(self.tk))[None, None, :]
        return s, slope, ((at >= start) & (at < stop))[:, None, None]

    def unheads(self, x):
        """Stacked tiles [nq, B, K, G, tq, E] as [B, Sq, H, E]."""
        nq, batch, kv, group, tq, dim = x.shape
        return x.transpose(1, 0, 4, 2, 3, 5).reshape(batch, nq * tq, kv * group, dim)[:, : self.rows]


def flash_fwd(q, k, v, keys: KeyRange, settings: Settings, carry: Carry | None, out_dtype):
    """See contract.py."""
    t = _Tiles(q, k, v, keys, settings)
    if carry is None:
        out0 = lse0 = None
    else:
        out0, lse0 = t.pad_rows(carry.out), t.pad_rows(carry.lse, axis=2)

    def query_tile(i):
        qi = t.heads(t.q, i)
        shape = qi.shape[:-1]
        if out0 is None or lse0 is None:
            state = jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros((*shape, v.shape[3]))
        else:
            m = t.stats(lse0, i)
            state = m, jnp.where(jnp.isneginf(m), 0.0, 1.0), t.heads(out0, i)

        def key_tile(j, state):
            m, l, a = state
            s, _, visible = t.scores(qi, t.key_tile(t.k, j), i, j)
            s = jnp.where(visible, s, -jnp.inf)
            top = jnp.maximum(m, jnp.max(s, axis=-1))
            base = jnp.where(jnp.isneginf(top), 0.0, top)  # a row that saw nothing yet: exp(-inf - 0) = 0, not nan
            p, keep = jnp.exp(s - base[..., None]), jnp.exp(m - base)
            a = a * keep[..., None] + _einsum("bkgqs,bske->bkgqe", p, t.key_tile(t.v, j))
            return top, l * keep + jnp.sum(p, axis=-1), a

        m, l, a = lax.fori_loop(t.first_tile[i], t.end_tile[i], key_tile, state)
        lse = m + jnp.log(l)  # -inf + log(0) = -inf where nothing was seen
        return (a / jnp.where(l > 0, l, 1.0)[..., None]).astype(out_dtype), lse

    out, lse = lax.map(query_tile, jnp.arange(t.nq))
    lse = jnp.moveaxis(lse, 0, 3).reshape(q.shape[0], q.shape[2], -1)[:, :, : t.rows]
    return t.unheads(out), lse


def flash_bwd(q, k, v, lse, delta, dout, keys: KeyRange, settings: Settings, dq, deterministic: bool):
    """See contract.py. The order of the sums is fixed: `deterministic` changes nothing."""
    del deterministic
    t = _Tiles(q, k, v, keys, settings)
    lse, delta, dout = t.pad_rows(lse, axis=2), t.pad_rows(delta, axis=2), t.pad_rows(dout)

    def add_tile(x, j, tile):
        old = lax.dynamic_slice_in_dim(x, j * t.tk, t.tk, axis=1)
        return lax.dynamic_update_slice_in_dim(x, old + tile, j * t.tk, axis=1)

    def query_tile(grads, i):
        qi, di, lse_i, delta_i = t.heads(t.q, i), t.heads(dout, i), t.stats(lse, i), t.stats(delta, i)
        lse_i = jnp.where(jnp.isneginf(lse_i), 0.0, lse_i)[..., None]  # such a row has no visible key

        def key_tile(j, state):
            dqi, dk, dv = state
            kj, vj = t.key_tile(t.k, j), t.key_tile(t.v, j)
            s, slope, visible = t.scores(qi, kj, i, j)
            p = jnp.where(visible, jnp.exp(jnp.where(visible, s, 0.0) - lse_i), 0.0)
            dp = _einsum("bkgqe,bske->bkgqs", di, vj)
            ds = p * (dp - delta_i[..., None]) * slope * settings.scale
            return (
                dqi + _einsum("bkgqs,bskd->bkgqd", ds, kj),
                add_tile(dk, j, _einsum("bkgqs,bkgqd->bskd", ds, qi)),
                add_tile(dv, j, _einsum("bkgqs,bkgqe->bske", p, di)),
            )

        dqi, dk, dv = lax.fori_loop(t.first_tile[i], t.end_tile[i], key_tile, (jnp.zeros_like(qi), *grads))
        return (dk, dv), dqi

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (t.k, t.v))
    (dk, dv), tiles = lax.scan(query_tile, zeros, jnp.arange(t.nq))
    own = t.unheads(tiles)
    return own if dq is None else dq + own, dk[:, : t.key_rows], dv[:, : t.key_rows]


IMPLEMENTATION = Implementation(flash_fwd, flash_bwd)
