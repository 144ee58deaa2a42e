"""The plan of rows: which pieces of which documents lie side by side in each row of `seq_len` tokens.

A document longer than a row is cut into pieces; the pieces are shuffled and packed, so that rows are nearly full and a
row's documents have nothing to do with each other. Rows of 16, documents of 20, 5, 3 and 8 tokens; dots are padding:

    aaaaaaaaaaaaaaaa      the first piece of a fills a row
    ddddddddaaaabbb.      no: b has 5 tokens, and a document that fits into a row is never cut
    ddddddddaaaaccc.      so c goes here
    bbbbb...........      and b waits for company

*Best fit, bounded*: pieces arrive one by one; each goes into the open row with the least room that still takes it. At
most `open_rows` rows are open; when none takes a piece and that number is reached, the fullest is closed. On the
default corpus 3 places in a thousand stay empty at rows of 1024; a million pieces take about two seconds.

Packing is done once for (lengths, seq_len, seed); each epoch visits the same rows in another order. The stream of rows
is endless and row number i is known at once: epoch i // rows, place i % rows of that epoch's permutation. Where a
resumed run goes on is therefore step * batch and nothing else, and the plan never asks about the mesh: on any number of
devices step n trains on the same rows.

Shuffling is a sort by a hash of (seed, what, index), spelt out here: the streams of NumPy's generators may change from
one version to the next, and a run must go on with the same rows after an upgrade.
"""

import functools
import hashlib
from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

from zigzag_jax.train.errors import UserError

RULE = "best fit 1"  # of packing; another one, or another shuffle, gets another number: plans are kept (plan_file.py)


@dataclass(frozen=True, eq=False)
class Plan:
    """Rows made of pieces; piece p is tokens[starts[p] : starts[p] + sizes[p]] of the store."""

    seq_len: int
    """Tokens in a row, padding included."""
    seed: int
    """What the shuffles depend on."""
    starts: np.ndarray
    """int64 [P]: where each piece begins in the store. Pieces of one row stand together, in the row's order."""
    sizes: np.ndarray
    """int64 [P]: its tokens, 1 to seq_len."""
    columns: np.ndarray
    """int64 [P]: where in its row it begins."""
    ends: np.ndarray
    """bool [P]: whether the document ends with it (False: the document was cut here and goes on in another piece)."""
    bounds: np.ndarray
    """int64 [R + 1]: row r is made of the pieces bounds[r] : bounds[r + 1]."""

    @property
    def rows(self) -> int:
        """Number of rows R: the length of an epoch."""
        return len(self.bounds) - 1

    @property
    def fill(self) -> float:
        """Share of the places that hold a token, 0 to 1."""
        return float(self.sizes.sum()) / (self.rows * self.seq_len)

    def stream(self, first: int, count: int) -> np.ndarray:
        """Rows number `first` to `first + count` of the endless stream: int64 [count], each in 0 .. rows - 1."""
        return in_order(self.rows, self.seed, np.arange(first, first + count, dtype=np.int64))


def in_order(rows: int, seed: int, numbers: np.ndarray) -> np.ndarray:
    """The rows, of `rows`, that have these int64 [n] numbers in the endless stream: int64 [n]."""
    epochs, places = np.divmod(numbers, rows)
    found = np.empty(len(numbers), np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        found[here] = _epoch_order(rows, seed, int(epoch))[places[here]]
    return found


def cut_count(lengths: np.ndarray, seq_len: int) -> tuple[int, int]:
    """How many documents are longer than a row and so are cut, and into how many pieces all of these."""
    long = lengths[lengths > seq_len]
    return len(long), int((-(-long // seq_len)).sum())


def make_plan(lengths: np.ndarray, seq_len: int, *, seed: int, open_rows: int = 1024) -> Plan:
    """Pack documents of int `lengths` [D], which lie one after another, into rows of `seq_len`.

    Raises UserError("seq-len", ...) for a row of no tokens, ValueError when there is no document or an empty one.
    """
    lengths = np.asarray(lengths, np.int64)
    if seq_len < 1:
        raise UserError("seq-len", "must be at least 1", seq_len)
    if not len(lengths) or lengths.min() < 1:
        raise ValueError(f"lengths must name at least one document and only such with tokens, got {lengths}")
    starts, sizes, ends = _cut(lengths, seq_len)
    shuffled = _shuffle(len(starts), seed, "pieces")
    order, bounds = _pack(sizes[shuffled], seq_len, open_rows)
    order = shuffled[order]
    starts, sizes, ends = starts[order], sizes[order], ends[order]
    before = np.cumsum(sizes) - sizes  # tokens in all pieces before this one; minus that of the row's first: the column
    columns = before - np.repeat(before[bounds[:-1]], np.diff(bounds))
    return Plan(seq_len, seed, starts, sizes, columns, ends, bounds)


def _cut(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pieces of at most seq_len tokens in the order of the store: (starts, sizes, ends)."""
    counts = -(-lengths // seq_len)
    last = np.cumsum(counts) - 1
    first = last - counts + 1
    number = np.arange(counts.sum()) - np.repeat(first, counts)  # of a piece inside its document
    starts = np.repeat(np.cumsum(lengths) - lengths, counts) + number * seq_len
    sizes = np.minimum(seq_len, np.repeat(lengths, counts) - number * seq_len)
    ends = np.zeros(len(starts), bool)
    ends[last] = True
    return starts, sizes, ends


def _pack(sizes: np.ndarray, seq_len: int, open_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Best fit: (order [P] that puts the pieces of each row together, bounds [R + 1] of the rows in it)."""
    row_of = np.empty(len(sizes), np.int64)
    whole = sizes == seq_len  # the pieces of long documents fill a row each: no search
    rows = int(whole.sum())
    row_of[whole] = np.arange(rows)
    rest = np.flatnonzero(~whole)
    placed: list[int] = []
    # Open rows as sorted pairs (room, row): the first with enough room is the best fit, the first of all the fullest.
    rooms: list[tuple[int, int]] = []
    for size in sizes[rest].tolist():
        at = bisect_left(rooms, (size, -1))
        if at < len(rooms):
            room, row = rooms.pop(at)
        else:
            if len(rooms) >= open_rows:
                del rooms[0]
            room, row = seq_len, rows
            rows += 1
        placed.append(row)
        if room > size:
            insort(rooms, (room - size, row))
    row_of[rest] = placed
    order = np.argsort(row_of, kind="stable")
    return order, np.searchsorted(row_of[order], np.arange(rows + 1))


@functools.lru_cache(maxsize=64)
def _newest(rows: int, seed: int) -> dict[int, np.ndarray]:
    """The order of the epoch that was asked for last, by its number; one for each source of a mixture."""
    return {}


def _epoch_order(rows: int, seed: int, epoch: int) -> np.ndarray:
    kept = _newest(rows, seed)
    if (order := kept.get(epoch)) is None:
        kept.clear()  # before the next is made: a run of weeks must not gather them
        order = kept[epoch] = _shuffle(rows, seed, f"epoch {epoch}")
    return order


def _shuffle(n: int, seed: int, what: str) -> np.ndarray:
    """A permutation int64 [n] that depends on the arguments alone: sort by the hash of each index."""
    return np.argsort(hashes(n, seed, what), kind="stable")


def hashes(n: int, seed: int, what: str) -> np.ndarray:
    """uint64 [n]: the splitmix64 hash of each index, salted with the rest."""
    salt = hashlib.blake2b(f"{seed} {what}".encode(), digest_size=8).digest()
    x = np.arange(n, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.frombuffer(salt, "<u8")  # wraps at 2**64
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
