"""Batches: rows of the plan as arrays on the mesh, in zigzag order over `cp`.

A row, natural order (two documents, the second cut by the row's end, then a pad):

    tokens     a  b  c  E  d  e  f  0       E ends a document; a pad is token 0
    labels     b  c  E -1  e  f  g -1       the next token of the same document; -1: nothing to predict
    positions  0  1  2  3  0  1  2  0       index inside the piece; a pad is a document of its own
    real       1  1  1  1  1  1  1  0       False on pads: they count neither in the loss nor in the router's statistics

At the cut the label is g, the true next token, though g itself stands in another row. Labels are shifted here, in
natural order, and only then is the order changed: in zigzag order a token's neighbour may be far from its successor.

Rows are padded to S_pad, the next multiple of 2 * cp, so that the sequence falls into equal chunks; what is trained on
does not change with it. Each process builds only what its own devices hold: for a device, the rows of its (dp, fsdp)
place and the two chunks of its cp rank, read from the memory map as two slices a row.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from zigzag_jax.layout import padded, zigzag_indices
from zigzag_jax.train.data.packing import Plan
from zigzag_jax.train.data.token_file import Tokens
from zigzag_jax.train.mesh import AXES, ROWS, check_batch

FIELDS = {"tokens": (np.int32, 0), "labels": (np.int32, -1), "positions": (np.int32, 0), "real": (np.bool_, False)}
"""The arrays of a batch: dtype, and the value on a pad."""

BLANK = -1  # a row that holds nothing, to fill up a pass's last batch

Block = dict[str, np.ndarray]  # the four arrays [rows, columns] of some rectangle of a batch


def abstract_batch(batch: int, seq_len: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch as shapes with shardings: `batch` rows of seq_len tokens, padded, over the mesh."""
    shape = (batch, padded(seq_len, mesh.shape["cp"]))
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=_over(mesh)) for name, (dtype, _) in FIELDS.items()}


def _over(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P(ROWS, "cp"))


class Batches:
    """The stream of batches of one store: `at(step)` is a pure function of the step.

    Use as a context manager or call `close` when done: one thread reads a batch ahead.
    """

    def __init__(
        self, store: Tokens, plan: Plan, batch: int, mesh: Mesh, *, repeat: bool = True, accumulate: int = 1
    ) -> None:
        """`batch` rows a step over the whole mesh, whose axes are named dp, fsdp and cp.

        With `accumulate` they are dealt out so that the micro-batches of train/accumulate.py, which are pieces of what
        each device holds, are the plan's rows in their order, whatever the mesh.

        With `repeat` the stream goes on epoch after epoch (training). Without, it is one pass over the plan: len(self)
        batches, the last filled up with blank rows, so that each token is scored once (evaluation; of a mixture as
        many rows as its sources have, mixed).
        Raises UserError("batch", ...) where `check_batch` does, ValueError for a plan of another
        store.
        """
        dp, fsdp, self.cp = (mesh.shape[axis] for axis in AXES)
        check_batch(batch, accumulate, (dp, fsdp, self.cp))
        if plan.sizes.sum() != store.size:
            raise ValueError(f"plan must be made of this store's {store.size} tokens, got {plan.sizes.sum()}")
        self.store, self.plan, self.batch, self.repeat = store, plan, batch, repeat
        self.seq_len = padded(plan.seq_len, self.cp)
        self.sharding = _over(mesh)
        # place (device, micro-batch, row) of a batch <- row number (micro-batch, device, row) of the plan
        self._deal = np.arange(batch).reshape(accumulate, dp * fsdp, -1).swapaxes(0, 1).reshape(-1)
        self._order = zigzag_indices(self.seq_len, self.cp)
        self._thread = ThreadPoolExecutor(1, "batches")
        self._ahead: tuple[int, Future[dict[str, jax.Array]]] | None = None

    def __len__(self) -> int:
        """Batches of one pass over the plan, the last perhaps not full."""
        return (self.plan.rows + self.batch - 1) // self.batch

    def rows(self, step: int) -> np.ndarray:
        """Rows of the plan in batch number `step` >= 0: int64 [batch], BLANK where a single pass has run out."""
        first = step * self.batch
        count = self.batch if self.repeat else max(0, min(self.batch, self.plan.rows - first))
        return np.append(self.plan.stream(first, count), np.full(self.batch - count, BLANK))[self._deal]

    def document_lengths(self, step: int) -> np.ndarray:
        """Tokens of each document, or piece of one, in batch number `step`: int64 [n]. Attention stays inside them."""
        bounds = self.plan.bounds
        pieces = [self.plan.sizes[bounds[row] : bounds[row + 1]] for row in self.rows(step) if row != BLANK]
        return np.concatenate([np.zeros(0, np.int64), *pieces])

    def at(self, step: int) -> dict[str, jax.Array]:
        """Batch number `step`, counted from 0: `tokens`, `labels`, `positions` int32 and `real` bool, [batch, S_pad].

        Zigzag order, sharded P(("dp", "fsdp"), "cp"). Meanwhile the thread begins with step + 1.
        """
        if self._ahead is not None and self._ahead[0] == step:
            batch = self._ahead[1].result()
        else:
            batch = self._make(step)
        self._ahead = (step + 1, self._thread.submit(self._make, step + 1))
        return batch

    def natural(self, rows: np.ndarray) -> Block:
        """The same four arrays of these rows of the plan, in natural order and without padding to 2 * cp: [n, S]."""
        return self._read(rows, np.arange(self.plan.seq_len))

    def close(self) -> None:
        """Stop reading ahead; the thread is gone when this returns."""
        self._thread.shutdown(cancel_futures=True)

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _make(self, step: int) -> dict[str, jax.Array]:
        shape = (self.batch, self.seq_len)
        rows = self.rows(step)
        blocks: dict[tuple[slice, ...], Block] = {}  # by the place of a device: read once for all four arrays

        def part(field: str) -> Callable[[tuple[slice, ...] | None], np.ndarray]:
            def read(index: tuple[slice, ...] | None) -> np.ndarray:
                assert index is not None  # JAX's type allows it; it never asks for another process's devices
                if index not in blocks:
                    blocks[index] = self._read(rows[index[0]], self._order[index[1]])
                return blocks[index][field]

            return read

        return {
            field: jax.make_array_from_callback(shape, self.sharding, part(field), dtype=dtype)
            for field, (dtype, _) in FIELDS.items()
        }

    def _read(self, rows: np.ndarray, places: np.ndarray) -> Block:
        """The four arrays [len(rows), len(places)]; `places` are natural, in any order, read run by run."""
        block = {field: np.full((len(rows), len(places)), pad, dtype) for field, (dtype, pad) in FIELDS.items()}
        cuts = np.flatnonzero(np.diff(places) != 1) + 1
        for begin, end in zip([0, *cuts], [*cuts, len(places)], strict=True):
            for i, row in enumerate(rows):
                if row != BLANK:
                    view = {field: array[i, begin:end] for field, array in block.items()}
                    _read_run(self.store, self.plan, int(row), int(places[begin]), view)
        return block


def _read_run(store: Tokens, plan: Plan, row: int, lo: int, out: Block) -> None:
    """Fill `out` (arrays [n] that hold pads) with the places lo .. lo + n of a row, natural order."""
    hi = lo + len(out["tokens"])
    begin, end = plan.bounds[row], plan.bounds[row + 1]
    columns = plan.columns[begin:end]
    pieces = range(begin + np.searchsorted(columns, lo, "right") - 1, begin + np.searchsorted(columns, hi))
    for p in pieces:
        column, size = int(plan.columns[p]), int(plan.sizes[p])
        first, last = max(lo, column), min(hi, column + size)
        if first >= last:  # only padding of this row lies here
            continue
        here = slice(first - lo, last - lo)
        source = int(plan.starts[p]) + first - column
        out["tokens"][here] = store.read(source, source + last - first)
        out["positions"][here] = np.arange(first - column, last - column)
        out["real"][here] = True
        targets = last - first - int(plan.ends[p] and last == column + size)  # nothing follows a document's last token
        out["labels"][here][:targets] = store.read(source + 1, source + 1 + targets)
