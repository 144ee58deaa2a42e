"""What bench_attention.py counts, compares with and takes times by; nothing here calls a kernel."""

import datetime
import functools
import math
import shlex
import statistics
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zigzag_jax.layout import CHUNKS, Layout, global_positions
from zigzag_jax.ranges import KeyRange, key_range, row_bounds, visible_bounds


def facts(script: str, argv: list[str] | None) -> dict[str, Any]:
    """What a benchmark's numbers are worth nothing without: the command, the card, the version, the day."""
    return {
        "command": shlex.join(["python", f"examples/{script}", *(sys.argv[1:] if argv is None else argv)]),
        "card": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
    }


class Heads(NamedTuple):
    """Sizes of a model's attention."""

    heads: int
    kv_heads: int
    dim: int
    out_dim: int

    def smaller(self) -> "Heads":
        """An eighth of the heads, one at least."""
        return self._replace(heads=max(self.heads // 8, 1), kv_heads=max(self.kv_heads // 8, 1))


MODELS = {
    "qwen": Heads(32, 4, 128, 128), "mla": Heads(16, 16, 192, 128), "d64": Heads(32, 8, 64, 64),
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


def verdict(errors: dict[str, float]) -> str:
    """Which of the errors are over their bars (or nan): ok, or FAIL and their names."""
    return " ".join(["FAIL", *short]) if (short := [k for k, bar in BARS.items() if not errors[k] <= bar]) else "ok"


def spread(rows: list[dict]) -> str:
    """What a table of whole rings says of balance, a line an implementation."""
    lines = []
    for name in dict.fromkeys(row["by"] for row in rows):
        zigzag, naive = ([r["both ms"] for r in rows if (r["by"], r["layout"]) == (name, layout)] for layout in CHUNKS)
        lines.append(
            f"{name}: naive / zigzag {naive[0] / max(zigzag):.3f} (by pairs {2 - 1 / len(zigzag):.3f}), "
            f"slowest / fastest zigzag rank {max(zigzag) / min(zigzag):.3f}"
        )
    return "\n".join(lines)


class Clock(NamedTuple):
    """How times are taken."""

    samples: int
    repeats: int
    idle: float
    """Seconds of rest before a sample."""
    matmul: int
    """Rows of the square matmul that is the ceiling."""

    def in_turn(self, functions: dict) -> dict:
        """Median milliseconds of a call of each."""
        samples, result = {key: [] for key in functions}, None
        for _ in range(self.samples):
            for key, call in functions.items():
                time.sleep(self.idle)
                jax.block_until_ready(call())
                begin = time.perf_counter()
                for _ in range(self.repeats):
                    result = call()
                jax.block_until_ready(result)
                samples[key].append((time.perf_counter() - begin) / self.repeats * 1e3)
        return {key: statistics.median(x) for key, x in samples.items()}

    def ceiling(self, dtype):
        """The call whose rate is the most that this card does in `dtype`, and its FLOPs."""
        a = jax.random.normal(jax.random.key(1), (self.matmul, self.matmul), dtype)
        product = jax.jit(jnp.matmul)
        return lambda: product(a, a), 2 * self.matmul**3


def table(rows: list[dict]) -> str:
    """A Markdown table whose columns line up; a key names a column, `%` in it makes a percentage."""
    names = list(rows[0])

    def text(name, x) -> str:
        if x is None or isinstance(x, (str, int)):
            return "" if x is None else str(x)
        if "%" in name:
            return f"{100 * x:.0f}"
        return f"{x:.0f}" if x > 100 else f"{x:.{3 if name.endswith('ms') else 2}f}"

    lines = [names, *([text(name, row[name]) for name in names] for row in rows)]
    widths = [max(len(line[at]) for line in lines) for at in range(len(names))]
    left = [isinstance(rows[0][name], str) for name in names]

    def pad(line):
        cells = (x.ljust(w) if l else x.rjust(w) for x, w, l in zip(line, widths, left, strict=True))
        return "| " + " | ".join(cells) + " |"

    rule = ["-" * w if l else "-" * (w - 1) + ":" for w, l in zip(widths, left, strict=True)]
    return "\n".join([pad(names), "| " + " | ".join(rule) + " |", *(pad(line) for line in lines[1:])])
