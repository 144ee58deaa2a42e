"""Zigzag order: which tokens of a sequence a context-parallel rank holds.

Under a causal mask the token at place g sees g + 1 keys, so the last tokens of a sequence cost the most. Cut S tokens
into 2 * cp equal chunks and give every rank one cheap chunk from the front and one dear chunk from the back:

    >>> print(picture(cp=4))
    chunk    0 1 2 3 4 5 6 7
    rank 0   #             #
    rank 1     #         #
    rank 2       #     #
    rank 3         # #

Rank r holds chunk r, then chunk 2 * cp - 1 - r: any two such chunks see the same number of keys together. The array
that the mesh shards is the ranks' pieces one after another:

    >>> zigzag_indices(seq_len=16, cp=4)
    array([ 0,  1, 14, 15,  2,  3, 12, 13,  4,  5, 10, 11,  6,  7,  8,  9])
    >>> to_zigzag(np.arange(16)[None], cp=4)[0, 4:8]  # rank 1
    array([ 2,  3, 12, 13])

A rank's rows are sorted by global position. Everything else in the library (one mask rule for every ring step, tiles
that are skipped, documents, windows) follows from that.

The naive layout, rank r holding the r-th of cp equal pieces, is `contiguous`: one chunk a rank instead of two. It is
here because the balance of zigzag has to be measured against something.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

Layout = Literal["zigzag", "contiguous"]
CHUNKS: dict[Layout, int] = {"zigzag": 2, "contiguous": 1}  # chunks that one rank holds


def check_layout(layout: str) -> None:
    """Raise ValueError unless `layout` is one of the two this file knows."""
    if layout not in CHUNKS:
        raise ValueError(f"layout must be one of {', '.join(CHUNKS)}, got {layout!r}")


def check_cp(cp: int) -> None:
    """Raise ValueError unless `cp` is a whole number of at least one."""
    if isinstance(cp, bool) or not isinstance(cp, (int, np.integer)) or cp < 1:
        raise ValueError(f"cp must be an int >= 1, got {cp!r}")


def padded(seq_len: int, cp: int) -> int:
    """The next length that zigzag order can cut: a multiple of 2 * cp.

    >>> padded(256, cp=4), padded(256, cp=3)
    (256, 258)
    """
    return -(-seq_len // (2 * cp)) * 2 * cp


def chunk_length(seq_len: int, cp: int) -> int:
    """Tokens in one of the 2 * cp chunks. ValueError where they do not come out equal."""
    check_cp(cp)
    if seq_len % (2 * cp):
        raise ValueError(f"sequence length must be divisible by 2 * cp = {2 * cp}, got {seq_len}: pad the sequence")
    return seq_len // (2 * cp)


def chunk_starts(rank, cp: int, length: int, layout: Layout = "zigzag") -> list:
    """Global position at which each chunk of a rank starts, in the rank's order.

    rank: int or traced int32 scalar. length: tokens that the rank holds. Returns two ints (or traced scalars) for
    zigzag, one for contiguous; their chunks have length // len(result) tokens.
    """
    if layout == "contiguous":
        return [rank * length]
    chunk = length // 2
    return [rank * chunk, (2 * cp - 1 - rank) * chunk]


def global_positions(rank, cp: int, length: int, layout: Layout = "zigzag") -> jax.Array:
    """Global position of each of the `length` tokens that `rank` (int or traced) holds: int32 [length], increasing."""
    chunk = jnp.arange(length // CHUNKS[layout], dtype=jnp.int32)
    return jnp.concatenate([start + chunk for start in chunk_starts(rank, cp, length, layout)])


def zigzag_chunks(cp: int) -> np.ndarray:
    """Natural chunk number at each place of the zigzag order: int [2 * cp]; its argsort is the way back.

    >>> zigzag_chunks(3)
    array([0, 5, 1, 4, 2, 3])
    """
    check_cp(cp)
    return np.stack([np.arange(cp), 2 * cp - 1 - np.arange(cp)], axis=1).reshape(-1)


def zigzag_indices(seq_len: int, cp: int) -> np.ndarray:
    """Natural place of each token of the zigzag order, int [seq_len]: zigzag = natural[indices]."""
    chunk = chunk_length(seq_len, cp)
    return (zigzag_chunks(cp)[:, None] * chunk + np.arange(chunk)).reshape(-1)


def _move_chunks(tree, cp: int, axis: int, order: np.ndarray):
    def move(x):
        if not -x.ndim <= axis < x.ndim:
            raise ValueError(f"axis must be an axis of every array, got axis {axis} for shape {x.shape}")
        at = axis % x.ndim
        chunk = chunk_length(x.shape[at], cp)
        chunks = x.reshape(*x.shape[:at], 2 * cp, chunk, *x.shape[at + 1 :])
        return chunks[(slice(None),) * at + (order,)].reshape(x.shape)

    return jax.tree.map(move, tree)


def to_zigzag(tree, cp: int, axis: int = 1):
    """Every array of `tree` with `axis` brought from natural into zigzag order; NumPy arrays stay NumPy arrays.

    Do it once, on the host, for tokens, labels and positions: on a device array that is sharded over cp it is an
    all-gather. Shift labels *before* the permutation. ValueError where the axis is not divisible by 2 * cp.
    """
    return _move_chunks(tree, cp, axis, zigzag_chunks(cp))


def from_zigzag(tree, cp: int, axis: int = 1):
    """The inverse of `to_zigzag`: every array of `tree` with `axis` back in natural order."""
    return _move_chunks(tree, cp, axis, np.argsort(zigzag_chunks(cp)))


def check_positions(array, cp: int) -> None:
    """Check on the host that int `array` [B, S], in natural order, holds each token's index inside its document.

    Documents lie one after another, so a row starts at 0 and each value is 0 or one more than the value before it (a
    pad is a document of one token). ValueError names the first place that breaks the rule. Under jit only shape and
    dtype of positions can be checked: call this on real data, before `to_zigzag`.
    """
    array = np.asarray(array)
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"positions must be integers [B, S], got {array.dtype} {list(array.shape)}")
    chunk_length(array.shape[1], cp)
    before = np.concatenate([np.full((array.shape[0], 1), -1, array.dtype), array[:, :-1]], axis=1)
    wrong = np.argwhere((array != 0) & (array != before + 1))
    if len(wrong):
        b, s = wrong[0]
        raise ValueError(
            f"positions must be 0 at a document's first token and rise by 1 inside it, got {array[b, s]} after "
            f"{before[b, s] if s else 'the start of the row'} at row {b}, token {s} (natural order)"
        )


def picture(cp: int) -> str:
    """The zigzag layout drawn, a row a rank."""
    rows = ["chunk    " + " ".join(str(n) for n in range(2 * cp))]
    for rank, held in enumerate(zigzag_chunks(cp).reshape(cp, 2)):
        cells = [("#" if n in held else " ").rjust(len(str(n))) for n in range(2 * cp)]
        rows.append(f"rank {rank:<4}" + " ".join(cells).rstrip())
    return "\n".join(rows)
