"""Attention as the benchmarks see it: sizes, masks, random arrays, what is counted, and the float32 truth."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zigzag_jax.cost import Layer
from zigzag_jax.layout import Layout, global_positions
from zigzag_jax.ranges import KeyRange, key_range, row_bounds, visible_bounds


class Heads(NamedTuple):
    """Sizes of a model's attention."""

    heads: int
    kv_heads: int
    dim: int
    out_dim: int
    shared: int = 0
    """Columns of k that are the same for all heads, and travel once."""

    def smaller(self) -> "Heads":
        """An eighth of the heads, one at least."""
        return self._replace(heads=max(self.heads // 8, 1), kv_heads=max(self.kv_heads // 8, 1))

    def layer(self, itemsize: int = 2) -> Layer:
        """As the cost model sees it: k and v travel, and not a latent that they are made of."""
        hop = self.kv_heads * (self.dim - self.shared + self.out_dim) + self.shared
        return Layer(self.heads, self.dim, self.out_dim, hop, itemsize)


MODELS = {
    "qwen": Heads(32, 4, 128, 128), "mla": Heads(16, 16, 192, 128, 64), "d64": Heads(32, 8, 64, 64),
    "d96": Heads(32, 32, 96, 96), "d256": Heads(16, 4, 256, 256),
}  # fmt: skip
BARS = {"out": 3e-3, "lse": 1e-6, "dq": 4e-3, "dk": 4e-3, "dv": 4e-3}  # relative L2 for bfloat16 with float32 sums
TILE = 128


# ---------------------------------------------------------------------------------------------------- what is counted
def shapes(rank: int, cp: int) -> dict[str, int]:
    """A source rank for each kind of step that `rank` meets: its own, an earlier, a later rank."""
    steps = {"diag": rank, "front": rank - 1, "back": rank + 1}
    return {step: source for step, source in steps.items() if 0 <= source < cp}


def step_range(
    rank: int, source: int, cp: int, length: int, layout: Layout = "zigzag", positions=None, window=None
) -> KeyRange:
    """What the `length` rows of `rank` see of `source`'s keys: int32 [1, length]."""
    lo, hi = visible_bounds(global_positions(rank, cp, length, layout), positions, window)
    return key_range(lo, hi, source, cp, length, layout)


def pairs(keys: KeyRange) -> int:
    """Visible pairs of a query and a key."""
    return int(np.maximum(np.asarray(keys.stop, np.int64) - np.asarray(keys.start), 0).sum())


def flops(heads: Heads, count: int, which: str) -> int:
    """Of the two matmuls of a forward or the five of a backward over `count` pairs."""
    width = 3 * heads.dim + 2 * heads.out_dim if which == "bwd" else heads.dim + heads.out_dim
    return 2 * heads.heads * width * count


def tile_area(keys: KeyRange, tile: int = TILE) -> int:
    """Pairs inside the tiles of tile x tile that hold a visible pair: what a kernel computes that skips the others."""
    first, end = (np.asarray(x, np.int64) for x in row_bounds(keys, tile))
    return int(np.maximum(-(-end // tile) - first // tile, 0).sum()) * tile * tile


def documents(count: int, length: int) -> jax.Array:
    """Positions of `count` documents of random lengths in one row: int32 [1, length]."""
    cuts = np.sort(np.random.default_rng(0).choice(np.arange(1, length), count - 1, replace=False))
    sizes = np.diff(np.concatenate([[0], cuts, [length]]))
    return jnp.asarray(np.concatenate([np.arange(n) for n in sizes])[None], jnp.int32)


class Mask(NamedTuple):
    """What narrows causal attention."""

    positions: np.ndarray | None = None
    """Indices inside documents, int32 [1, S], natural order."""
    window: int | None = None


def masks(length: int) -> dict[str, Mask]:
    """Causal, the measure of the others; documents of random and of equal lengths, and windows."""
    found = {"causal": Mask(), "8 documents": Mask(np.asarray(documents(8, length)))}
    sizes = [length // 16, length // 8, length // 4]
    found |= {f"documents of {n}": Mask(np.arange(length, dtype=np.int32)[None] % n) for n in sizes}
    return found | {f"window {n}": Mask(window=n) for n in sizes}


class Inputs(NamedTuple):
    """Random arrays: q [1, S, H, D], k [1, S, K, D], v [1, S, K, E], dout [1, S, H, E]."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    dout: jax.Array

    @classmethod
    def draw(cls, heads: Heads, length: int, dtype) -> "Inputs":
        """Standard normal numbers."""
        wide = ((heads.heads, heads.dim), (heads.kv_heads, heads.dim), (heads.kv_heads, heads.out_dim))
        sizes = [(1, length, *size) for size in (*wide, (heads.heads, heads.out_dim))]
        seeds = jax.random.split(jax.random.key(0), 4)
        return cls(*(jax.random.normal(seed, size, dtype) for seed, size in zip(seeds, sizes, strict=True)))

    @property
    def scale(self) -> float:
        """Of the scores."""
        return self.q.shape[3] ** -0.5


@functools.partial(jax.jit, static_argnames="scale")
def truth(q, k, v, dout, keys, scale) -> tuple[jax.Array, ...]:
    """(out, lse, dq, dk, dv) in float32 of one kv head: q, dout [S, G, .], k, v [S, .]; blocks of rows, dense."""
    dot = functools.partial(jnp.einsum, precision="highest")
    (rows, group, _), size = q.shape, math.gcd(q.shape[0], 1024)
    split = lambda x: x.astype(jnp.float32).reshape(-1, size, *x.shape[1:])
    q, dout, (start, stop) = split(q), split(dout), (x.reshape(-1, size) for x in keys)
    k, v = k.astype(jnp.float32), v.astype(jnp.float32)

    def block(grads, at):
        q, dout, start, stop = at
        key = jnp.arange(k.shape[0])[None]
        visible = ((key >= start[:, None]) & (key < stop[:, None]))[:, None]
        s = jnp.where(visible, dot("qgd,kd->qgk", q, k) * scale, -jnp.inf)
        lse = jax.nn.logsumexp(s, axis=-1)
        p = jnp.where(visible, jnp.exp(s - jnp.where(jnp.isneginf(lse), 0.0, lse)[..., None]), 0.0)
        out = dot("qgk,ke->qge", p, v)
        ds = p * (dot("qge,ke->qgk", dout, v) - jnp.sum(dout * out, axis=-1, keepdims=True)) * scale
        own = dot("qgk,qgd->kd", ds, q), dot("qgk,qge->ke", p, dout)
        return (grads[0] + own[0], grads[1] + own[1]), (out, lse, dot("qgk,kd->qgd", ds, k))

    (dk, dv), results = jax.lax.scan(block, (jnp.zeros_like(k), jnp.zeros_like(v)), (q, dout, start, stop))
    return *(x.reshape(rows, group, *x.shape[3:]) for x in results), dk, dv


def relative(got, want) -> float:
    """Relative L2; nan where one has -inf (a row that sees nothing) and the other has not."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if not np.array_equal(nothing := np.isneginf(want), np.isneginf(got)):
        return math.nan
    got, want = np.where(nothing, 0.0, got), np.where(nothing, 0.0, want)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))
