"""A picture of the experts' exchange: which rows travel in which round (zigzag_jax.models.exchange)."""

import numpy as np
from canvas import QUIET, RANKS, Canvas

from zigzag_jax.models.exchange import block_rows

DEVICES, PAIRS = 4, 1024


def _routed(favour: float) -> np.ndarray:
    """Rows of one device for each owner: int [DEVICES]; `favour` is the share of the busiest."""
    rest = np.full(DEVICES - 1, (1 - favour) / (DEVICES - 1))
    counts = np.round(PAIRS * np.concatenate([[favour], rest])).astype(int)
    counts[-1] += PAIRS - counts.sum()
    return counts


def expert_exchange() -> Canvas:
    """One device's rows, sorted by owner and cut into blocks: level routing and routing that is not."""
    rows = block_rows(PAIRS, DEVICES)
    canvas = Canvas(820, 340, "Rounds of the experts' exchange, for level and for uneven routing")
    scale = 700 / PAIRS
    for panel, (title, favour) in enumerate((("nearly level routing", 0.28), ("half of all rows to one device", 0.5))):
        top, counts = 30 + 140 * panel, _routed(favour)
        rounds = -(-counts.max() // rows)
        canvas.text(20, top, f"{title}: {rounds} round{'s' if rounds > 1 else ''}", size=15, bold=True)
        at = 20.0
        for owner, count in enumerate(counts):
            canvas.text(at, top + 24, f"to device {owner}: {count}", size=12, fill=QUIET)
            for begin in range(0, count, rows):
                width = scale * (min(begin + rows, count) - begin)
                number = begin // rows + 1
                canvas.rect(at, top + 38, width, 40, RANKS[owner], opacity=1.0 if number == 1 else 0.6)
                if width > 40:
                    canvas.text(at + width / 2, top + 58, f"round {number}", size=12, anchor="middle", fill="#ffffff")
                at += width
    canvas.text(20, 306, f"{PAIRS} (token, choice) pairs of one device, sorted by expert and so by owner; a round has "
                f"room for C = {rows} rows", size=12, fill=QUIET)  # fmt: skip
    canvas.text(20, 324, "to each owner, a quarter more than an even share. Nothing is dropped: what does not fit "
                "waits for the next round.", size=12, fill=QUIET)  # fmt: skip
    return canvas
