"""Pictures of what a rank holds and of what its rows see: from zigzag_jax.layout and zigzag_jax.ranges."""

import numpy as np
from canvas import INK, QUIET, RANKS, Canvas

from zigzag_jax.layout import Layout, global_positions, zigzag_chunks
from zigzag_jax.ranges import key_range, visible_bounds

CP = 4


def zigzag_layout() -> Canvas:
    """The chunks of a sequence as towers of the keys they see, coloured by the rank that holds them."""
    canvas = Canvas(820, 380, "Which chunks each rank holds, naive and zigzag, and how many keys they see")
    owners: dict[str, np.ndarray] = {
        "naive: rank r holds the r-th piece": np.repeat(np.arange(CP), 2),
        "zigzag: rank r holds chunks r and 7 - r": np.argsort(zigzag_chunks(CP)) // 2,
    }
    keys = np.arange(2 * CP) + 0.5  # keys that a chunk's rows see in the mean, in chunks
    for panel, (title, owner) in enumerate(owners.items()):
        left, ground, width = 30 + 400 * panel, 210, 42
        canvas.text(left, 22, title, size=15, bold=True)
        for chunk in range(2 * CP):
            tall = 20 * keys[chunk]
            canvas.rect(left + width * chunk, ground - tall, width, tall, RANKS[owner[chunk]])
            canvas.text(left + width * (chunk + 0.5), ground + 12, str(chunk), size=12, anchor="middle", fill=QUIET)
        canvas.text(left + width * 4, ground + 30, "chunks of the sequence, first to last", size=12, anchor="middle")
        for rank in range(CP):
            y, work = 262 + 26 * rank, keys[owner == rank].sum()
            canvas.text(left, y, f"rank {rank}", size=12)
            at = left + 48.0
            for chunk in np.flatnonzero(owner == rank):
                canvas.rect(at, y - 9, 15 * keys[chunk], 18, RANKS[rank])
                at += 15 * keys[chunk]
            canvas.text(at + 8, y, f"{work:g}", size=12)
    canvas.text(30, 366, "height and length: keys that a chunk's queries see (in chunks, mean over the rows)",
                size=12, fill=QUIET)  # fmt: skip
    return canvas


def _documents(cuts: list[int], length: int) -> np.ndarray:
    """Positions inside the documents that begin at 0 and at `cuts`: int32 [1, length]."""
    starts = np.zeros(length, np.int32)
    for cut in cuts:
        starts[cut:] = cut
    return (np.arange(length, dtype=np.int32) - starts)[None]


def key_ranges() -> Canvas:
    """For every query row and every rank's keys: the one range of keys that the row sees."""
    local, layout = 16, "zigzag"
    masks = {
        "causal": (None, None),
        "three documents": (_documents([23, 46], CP * local), None),
        "window of 12": (None, 12),
    }
    canvas = Canvas(950, 400, "The visible keys of each query row in each rank's part are one range, whatever the mask")
    for panel, (title, (positions, window)) in enumerate(masks.items()):
        _panel(canvas, 110 + 285 * panel, 62, title, local, layout, positions, window)
    canvas.text(12, 62 + 120, "query rows", size=12)
    canvas.text(12, 62 + 136, "by rank", size=12)
    canvas.legend(110, 352, [(RANKS[s], f"step {s}") for s in range(CP)], 80)
    canvas.text(110, 380, "Each block: 16 query rows of one rank over the 16 keys of another, in the order in which "
                "they lie; a bar is one row's range [start, stop).", size=12, fill=QUIET)  # fmt: skip
    return canvas


def _panel(canvas, left, top, title, local, layout: Layout, positions, window) -> None:
    cell = 3.75
    side = cell * local
    canvas.text(left, top - 40, title, size=15, bold=True)
    canvas.text(left, top - 20, "keys of rank", size=12, fill=QUIET)
    for rank in range(CP):
        canvas.text(left + side * (rank + 0.5), top - 8, str(rank), size=11, anchor="middle", fill=QUIET)
        canvas.text(left - 8, top + side * (rank + 0.5), str(rank), size=11, anchor="middle", fill=QUIET)
        g = global_positions(rank, CP, local, layout)
        own = None if positions is None else positions[:, np.asarray(g)]
        lo, hi = visible_bounds(g, own, window)
        for source in range(CP):
            keys = key_range(lo, hi, source, CP, local, layout)
            x, y = left + side * source, top + side * rank
            canvas.rect(x, y, side, side, "#f3f5f7", stroke="#c5ccd3")
            for row, (start, stop) in enumerate(zip(*np.asarray(keys)[:, 0], strict=True)):
                if stop > start:
                    colour = RANKS[(rank - source) % CP]
                    canvas.rect(x + cell * start, y + cell * row, cell * (stop - start), cell, colour, stroke=None)
    canvas.rect(left, top, side * CP, side * CP, "none", stroke=INK)
