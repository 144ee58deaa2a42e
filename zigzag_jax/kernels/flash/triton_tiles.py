"""What the triton kernels share: columns of a head, masked loads and stores, scores, and the tiles to visit.

Everything here but `launch` runs inside a kernel.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from zigzag_jax.kernels.flash.contract import LOG2E, Settings
from zigzag_jax.kernels.flash.triton_tuning import MIN_SIDE, Tile
from zigzag_jax.ranges import KeyRange

UNSEEN = jnp.iinfo(jnp.int32).max


# ------------------------------------------------------------------------------------------------------ head columns
class Part(NamedTuple):
    """`width` columns of a head from `start` on, a power of two; only the first `live` exist."""

    start: int
    width: int
    live: int


@functools.cache
def columns(dim: int) -> tuple[Part, ...]:
    """A head of `dim` columns as one or two powers of two, whichever pads less: 192 = 128 + 64, 80 = 64 + 16, 72 -> 80.

    A product over a head is the sum of the products over its parts.
    """
    power = lambda n: max(MIN_SIDE, pl.next_power_of_2(n))
    whole = power(dim)
    first = whole // 2
    if first < MIN_SIDE or first + power(dim - first) >= whole:
        return (Part(0, whole, dim),)
    return Part(0, first, first), Part(first, power(dim - first), dim - first)


def width(dim: int) -> int:
    """Columns that a head of `dim` takes in a tile."""
    return sum(part.width for part in columns(dim))


def _mask(part: Part, rows: int, limit) -> jax.Array | None:
    """Which of a tile's rows and columns exist, broadcastable to [rows, width], or None where all do."""
    below = None if limit is None else (jnp.arange(rows) < limit)[:, None]
    if part.live == part.width:
        return below
    left = (jnp.arange(part.width) < part.live)[None, :]
    return left if below is None else left & below


def load(ref, dim: int, row, rows: int, limit=None, head: tuple = ()) -> tuple[jax.Array, ...]:
    """Rows [row, row + rows) of ref [S, D] or [S, G, D] (then `head` = (g,)), a tile for each part of the head.

    Rows at or after the `limit`-th of the tile are not read and are 0; None says that all exist.
    """
    tiles = []
    for part in columns(dim):
        at, mask = ref.at[(pl.ds(row, rows), *head, pl.ds(part.start, part.width))], _mask(part, rows, limit)
        tiles.append(plgpu.load(at, mask=mask, other=None if mask is None else 0.0))
    return tuple(tiles)


def store(ref, dim: int, tiles, limit=None) -> None:
    """Write a tile, given in parts, to ref [rows, D]."""
    for part, tile in zip(columns(dim), tiles, strict=True):
        rows = tile.shape[0]
        plgpu.store(
            ref.at[pl.ds(0, rows), pl.ds(part.start, part.width)],
            tile.astype(ref.dtype),
            mask=_mask(part, rows, limit),
        )


def load_row(at, rows: int, limit=None) -> jax.Array:
    """A value a row, 0 at or after the `limit`-th."""
    if limit is None:
        return plgpu.load(at)
    return plgpu.load(at, mask=jnp.arange(rows) < limit, other=0.0)


def store_row(ref, values, limit=None) -> None:
    """Write a value a row to ref [rows]."""
    plgpu.store(ref, values, mask=None if limit is None else jnp.arange(values.shape[0]) < limit)


# ---------------------------------------------------------------------------------------------------------- arithmetic
# HIGHEST keeps float32 products in float32: the default would take tf32. Sums are float32 whatever the inputs.
_dot = functools.partial(lax.dot_general, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def matmul(a, b) -> jax.Array:
    """The product of a [m, n] and b [n, w]."""
    return _dot(a, b, (((1,), (0,)), ((), ())))


def matmul_t(a: tuple, b: tuple) -> jax.Array:
    """The product of a [m, D] and b [n, D] transposed, both in parts; b is read transposed from where it lies."""
    return functools.reduce(jnp.add, [_dot(x, y, (((1,), (1,)), ((), ()))) for x, y in zip(a, b, strict=True)])


def scores(a: tuple, b: tuple, settings: Settings) -> tuple[jax.Array, jax.Array | None]:
    """(scores * log2(e), slope of the softcap or None) of a [m, D] against b [n, D], float32 [m, n].

    log2(e) makes e^x a bare exp2 and costs nothing: it is folded into the scale.
    """
    raw = matmul_t(a, b)
    if settings.softcap is None:
        return raw * (settings.scale * LOG2E), None
    t = jnp.tanh(raw * (settings.scale / settings.softcap))
    return t * (settings.softcap * LOG2E), 1 - t * t


# ------------------------------------------------------------------------------------------------------ tiles to visit
class Walk(NamedTuple):
    """Tiles to visit, int32 scalars: `edges` with a mask, first `left` of them from `first` on and then those from
    `whole_end` on, and [whole, whole_end) without.
    """

    first: Any
    left: Any
    edges: Any
    whole: Any
    whole_end: Any


def walk(first, end, whole, whole_end, tile: int) -> Walk:
    """The tiles that hold rows [first, end), of which rows [whole, whole_end) need no mask."""
    first, end = lax.div(first, tile), lax.div(end + (tile - 1), tile)
    whole, whole_end = lax.div(whole + (tile - 1), tile), lax.div(whole_end, tile)
    none = whole >= whole_end
    whole, whole_end = jnp.where(none, end, whole), jnp.where(none, end, whole_end)
    left = jnp.maximum(whole - first, 0)
    return Walk(first, left, left + end - whole_end, whole, whole_end)


def visit(tiles: Walk, step: Callable[[Any, Any, bool], Any], state):
    """Run state = step(tile, state, masked) over the tiles; the mask's arithmetic is only in the loop over edges."""

    def edge(t, state):
        at = jnp.where(t < tiles.left, tiles.first + t, tiles.whole_end + t - tiles.left)
        return step(at, state, True)

    state = lax.fori_loop(0, tiles.edges, edge, state)
    return lax.fori_loop(tiles.whole, tiles.whole_end, lambda j, state: step(j, state, False), state)


def key_walk(keys: KeyRange, tile: int) -> Walk:
    """The key tiles that the rows of a query tile see, and those that every row sees whole; keys int32 [rows].

    A row that sees nothing has start >= stop and so leaves no tile whole; it widens nothing.
    """
    seen = keys.stop > keys.start
    first, end = jnp.min(jnp.where(seen, keys.start, UNSEEN)), jnp.max(jnp.where(seen, keys.stop, 0))
    return walk(first, end, jnp.max(keys.start), jnp.min(keys.stop), tile)


def launch(kernel, args: tuple, *, tile: Tile, name: str, grid, in_specs, out_specs, out_shape, aliases=None):
    """Call a kernel: compiled by Triton, or interpreted where the program is lowered for a CPU.

    The platform is that of the lowering and not the host's: a CPU can compile for GPUs that it does not have.
    """
    call = functools.partial(
        pl.pallas_call,
        kernel,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        input_output_aliases=aliases or {},
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        name=name,
    )
    return lax.platform_dependent(*args, cpu=call(interpret=True), default=call(interpret=False))
