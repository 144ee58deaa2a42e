"""Several sources in one stream of rows, each with the share of the tokens that its weight says.

Every source is packed by itself (packing.py), so a row belongs to one source, and has an endless stream of rows of its
own, epoch after epoch. A mixture deals the rows of these streams out in *blocks* of 65536: the same number of rows of a
source in each block, spread evenly. With three sources that have 4, 2 and 1 rows of a block of 7, each row gets a place
in [0, 1), and the places are sorted:

    a    0.03        0.36        0.55        0.90     at random, but one in each quarter
    b          0.12                    0.70           one in each half
    c                      0.45
         a     b     a     c     a     b     a        the block: any run of rows has nearly the shares of the whole

All blocks are alike. Row number i of the mixture is thus known at once: its block i // 65536 and its place there name
the source k and how many rows of k came before, which is the number of the row in the stream of k. There is no state:
a resumed run, or another mesh, sees the same rows. A source with a large weight and little text comes round more often
than the others.

Weights speak of tokens, blocks of rows. A source whose rows are only 80 % full needs more rows for the same tokens:
rows are dealt in proportion to weight / fill, rounded to whole rows of a block.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from zigzag_jax.train.data.packing import Plan, hashes, in_order, make_plan
from zigzag_jax.train.data.token_file import Tokens
from zigzag_jax.train.errors import UserError

BLOCK = 1 << 16  # rows


@dataclass(frozen=True, eq=False)
class MixedStore:
    """The stores of all sources as one, one after another."""

    stores: tuple[Tokens, ...]
    """Those of the sources, with the same tokenizer."""
    weights: tuple[float, ...]
    """Their shares of the tokens; positive, in any unit."""
    names: tuple[str, ...]
    """What to call them."""

    @property
    def offsets(self) -> np.ndarray:
        """int64 [D + 1]: where each document begins, and N."""
        return self._offsets

    @property
    def lengths(self) -> np.ndarray:
        """int64 [D]: tokens of each document, the end-of-document token included (so never 0)."""
        return np.diff(self.offsets)

    @property
    def size(self) -> int:
        """N: tokens of all documents."""
        return int(self._bases[-1])

    def read(self, begin: int, end: int) -> np.ndarray:
        """tokens[begin : end]."""
        if begin >= end:
            return self.stores[0].read(0, 0)
        first, last = np.searchsorted(self._bases, [begin, end - 1], "right") - 1
        bases = self._bases.tolist()
        parts = [self.stores[k].read(max(0, begin - bases[k]), end - bases[k]) for k in range(first, last + 1)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    @functools.cached_property
    def _offsets(self) -> np.ndarray:
        parts = [store.offsets[:-1] + base for store, base in zip(self.stores, self._bases[:-1], strict=True)]
        return np.concatenate([*parts, self._bases[-1:]])

    @functools.cached_property
    def _bases(self) -> np.ndarray:
        return np.cumsum([0, *(store.size for store in self.stores)])


@dataclass(frozen=True, eq=False)
class MixedPlan(Plan):
    """The plans of all sources as one: rows and pieces one source after another, and a stream that mixes them."""

    first_rows: np.ndarray
    """int64 [K + 1]: source k has the rows first_rows[k] : first_rows[k + 1]."""
    order: np.ndarray
    """int64 [BLOCK]: the source of each row of a block."""

    @property
    def fill(self) -> float:
        """Share of the places that hold a token, 0 to 1, in rows as they are dealt out: by the sources' weights."""
        tokens = np.add.reduceat(self.sizes, self.bounds[:-1])
        means = np.add.reduceat(tokens, self.first_rows[:-1]) / np.diff(self.first_rows)
        return float(self._in_block @ means) / (BLOCK * self.seq_len)

    def stream(self, first: int, count: int) -> np.ndarray:
        """Rows number `first` to `first + count` of the endless stream: int64 [count], each in 0 .. rows - 1."""
        blocks, places = np.divmod(np.arange(first, first + count, dtype=np.int64), BLOCK)
        sources = self.order[places]
        numbers = blocks * self._in_block[sources] + self._before[places]
        rows = np.empty(count, np.int64)
        for k in np.unique(sources):
            here = sources == k
            rows[here] = self.first_rows[k] + in_order(self._rows(k), self.seed, numbers[here])
        return rows

    def row_counts(self, rows: int) -> np.ndarray:
        """int64 [K]: rows of each source among the first `rows` of the stream."""
        rest = np.bincount(self.order[: rows % BLOCK], minlength=len(self._in_block))
        return rows // BLOCK * self._in_block + rest

    def token_counts(self, rows: int) -> np.ndarray:
        """int64 [K]: tokens of each source in the first `rows` rows of the stream, pads left out."""
        tokens = np.add.reduceat(self.sizes, self.bounds[:-1])
        counts = np.zeros(len(self._in_block), np.int64)
        for k, seen in enumerate(self.row_counts(rows)):
            own, size = tokens[self.first_rows[k] : self.first_rows[k + 1]], self._rows(k)
            rest = in_order(size, self.seed, np.arange(seen - seen % size, seen))
            counts[k] = seen // size * own.sum() + own[rest].sum()
        return counts

    def epochs(self, rows: int) -> np.ndarray:
        """float64 [K]: how often each source has been gone through after `rows` rows of the stream."""
        return self.row_counts(rows) / np.diff(self.first_rows)

    def _rows(self, k: int) -> int:
        return int(self.first_rows[k + 1] - self.first_rows[k])

    @functools.cached_property
    def _in_block(self) -> np.ndarray:
        """int64 [K]: rows of each source in a block."""
        return np.bincount(self.order, minlength=len(self.first_rows) - 1)

    @functools.cached_property
    def _before(self) -> np.ndarray:
        """int64 [BLOCK]: how many rows of the same source stand before each in a block."""
        before = np.empty(BLOCK, np.int64)
        for k in range(len(self._in_block)):
            here = self.order == k
            before[here] = np.arange(here.sum())
        return before


def shares(store: Tokens, plan: Plan, rows: int) -> list[str]:
    """A line for each source of a mixture: what it has of the tokens of the first `rows` rows of the stream."""
    if not (isinstance(store, MixedStore) and isinstance(plan, MixedPlan)):
        return []
    tokens, epochs, whole = plan.token_counts(rows), plan.epochs(rows), sum(store.weights)
    return [
        f"source {name}: {count / tokens.sum():.2%} of the tokens (weight {weight / whole:.2%}), {epoch:.2f} epochs"
        for name, weight, count, epoch in zip(store.names, store.weights, tokens, epochs, strict=True)
    ]


def plan_rows(store: Tokens, seq_len: int, *, seed: int, make: Callable[..., Plan] = make_plan) -> Plan:
    """The plan of a store; of a MixedStore one that mixes it. Raises what `make_plan` and `mix` raise.

    `make` is called as `make_plan`, for each source.
    """
    if not isinstance(store, MixedStore):
        return make(store.lengths, seq_len, seed=seed)
    return mix([make(part.lengths, seq_len, seed=seed) for part in store.stores], store.weights)


def mix(plans: Sequence[Plan], weights: Sequence[float]) -> MixedPlan:
    """One plan of several of equal seq_len and seed, for the tokens of their stores one after another.

    Raises ValueError where these differ, UserError("data", ...) for a weight too small for a single row of a block.
    """
    seq_len, seed = plans[0].seq_len, plans[0].seed
    if len({(plan.seq_len, plan.seed) for plan in plans}) != 1 or len(plans) != len(weights):
        raise ValueError("plans must have one seq_len and one seed, and each a weight")
    tokens = np.cumsum([0, *(plan.sizes.sum() for plan in plans)])
    pieces = np.cumsum([0, *(len(plan.sizes) for plan in plans)])
    counts = _rows_of_block(np.array(weights, np.float64) / [plan.fill for plan in plans])
    return MixedPlan(
        seq_len=seq_len,
        seed=seed,
        starts=np.concatenate([plan.starts + base for plan, base in zip(plans, tokens[:-1], strict=True)]),
        sizes=np.concatenate([plan.sizes for plan in plans]),
        columns=np.concatenate([plan.columns for plan in plans]),
        ends=np.concatenate([plan.ends for plan in plans]),
        bounds=np.concatenate([[0], *(plan.bounds[1:] + base for plan, base in zip(plans, pieces[:-1], strict=True))]),
        first_rows=np.cumsum([0, *(plan.rows for plan in plans)]),
        order=_block(counts, seed),
    )


def _rows_of_block(shares: np.ndarray) -> np.ndarray:
    """int64 [K], together BLOCK, in proportion to `shares`; who loses most by rounding down gets what is left."""
    exact = shares / shares.sum() * BLOCK
    counts = np.floor(exact).astype(np.int64)
    for k in np.argsort(counts - exact, kind="stable")[: BLOCK - counts.sum()]:
        counts[k] += 1
    if counts.min() < 1:
        k = int(counts.argmin())
        rule = f"each weight must be at least about 1 / {BLOCK} of their sum"
        raise UserError("data", rule, f"{shares[k] / shares.sum():.2g} of it for source {k + 1}")
    return counts


def _block(counts: np.ndarray, seed: int) -> np.ndarray:
    """The order of a block: int64 [BLOCK], source k counts[k] times, a row at random in each of counts[k] equal parts.

    At random, so that the sources do not keep step with the rows of a batch, which are dealt to devices in turn.
    """
    places = [
        (np.arange(count) + hashes(count, seed, f"mixture {k}") / 2.0**64) / count for k, count in enumerate(counts)
    ]
    return np.repeat(np.arange(len(counts)), counts)[np.argsort(np.concatenate(places), kind="stable")]
