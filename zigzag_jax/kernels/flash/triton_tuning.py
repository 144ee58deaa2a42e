"""Tile sizes of the triton kernels: data, chosen by the widths of K and V and by the dtype's size.

A kernel keeps one tile and streams the other side's tiles through shared memory. With D and E the columns of q/k and v
as the kernels pad them, times the bytes of a value, a block takes

    forward   queries D        + (stages - 1) keys (D + E)        and at times queries * keys more, to turn P or dS
    dk, dv    keys (D + E)     + (stages - 1) queries (D + E)     into an operand of the next product; on Hopper and
    dq        queries (D + E)  + (stages - 1) keys (D + E)        B200 one more stage, of their 227 KiB

and every row of the table fits the 99 KiB of Ada and of consumer Blackwell (A100 has 163): a compile for these cards,
which needs none of them, says so (tests/kernels/test_flash_triton_compiled.py). Registers bound the rest: 255 a thread.
Two accumulators of 64 x 128 and the scores want 8 warps; a row that spills is slower by far than a smaller tile, and
ptxas says which do (XLA's log, subprocess_compilation=3).

Triton wants powers of two, and at least 16 on every side of a product. Float32 products run on the ordinary cores (no
tf32), fully unrolled: small tiles.
"""

from dataclasses import dataclass

MIN_SIDE = 16


@dataclass(frozen=True)
class Tile:
    """One kernel's tile."""

    queries: int
    """Rows of q, a power of two."""
    keys: int
    """Rows of k and v, a power of two."""
    warps: int
    """Warps a block."""
    stages: int
    """Tiles of the streamed side in flight."""

    def fit(self, queries: int, keys: int) -> "Tile":
        """The same, no longer than short sequences need."""
        return Tile(_fit(self.queries, queries), _fit(self.keys, keys), self.warps, self.stages)


@dataclass(frozen=True)
class Tuning:
    """The tiles of the three kernels."""

    fwd: Tile
    """Forward, one query tile a block."""
    dkv: Tile
    """dk and dv, one key tile a block."""
    dq: Tile
    """dq, one query tile a block."""


def _fit(tile: int, length: int) -> int:
    return min(tile, max(MIN_SIDE, 1 << (length - 1).bit_length()))


# (bytes of a value, widest D + E) -> tuning; the first row that is wide enough is taken
TABLE: dict[tuple[int, int], Tuning] = {
    (2, 128): Tuning(fwd=Tile(128, 64, 4, 3), dkv=Tile(64, 128, 8, 2), dq=Tile(128, 64, 8, 2)),
    (2, 256): Tuning(fwd=Tile(64, 64, 4, 3), dkv=Tile(64, 64, 8, 2), dq=Tile(64, 64, 8, 2)),
    (2, 320): Tuning(fwd=Tile(128, 64, 8, 2), dkv=Tile(32, 64, 8, 2), dq=Tile(64, 32, 8, 2)),
    (2, 512): Tuning(fwd=Tile(64, 32, 4, 2), dkv=Tile(32, 32, 4, 2), dq=Tile(32, 32, 4, 2)),
    (4, 128): Tuning(fwd=Tile(32, 32, 4, 2), dkv=Tile(32, 32, 4, 2), dq=Tile(32, 32, 4, 2)),
    (4, 256): Tuning(fwd=Tile(32, 16, 4, 2), dkv=Tile(16, 32, 4, 2), dq=Tile(32, 16, 4, 2)),
    (4, 320): Tuning(fwd=Tile(32, 16, 4, 2), dkv=Tile(16, 16, 4, 2), dq=Tile(16, 16, 4, 2)),
    (4, 512): Tuning(fwd=Tile(32, 16, 4, 2), dkv=Tile(16, 16, 4, 2), dq=Tile(16, 16, 4, 2)),
}


def choose(width: int, itemsize: int) -> Tuning:
    """The tuning for D + E = `width` padded columns of `itemsize` bytes."""
    return next(tuning for (size, widest), tuning in TABLE.items() if size == itemsize and width <= widest)
