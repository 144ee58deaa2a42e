"""The pictures of these pages, drawn from what the library computes: `python docs/pictures/make.py` writes them.

They are committed, so that the pages read as well without a build; a test draws them again and compares.
"""

import sys
from collections.abc import Callable
from pathlib import Path

from canvas import Canvas
from draw_balance import balance_over_cp, work_per_hop
from draw_experts import expert_exchange
from draw_layout import key_ranges, zigzag_layout
from draw_ring import error_over_cp, latent_hop, ring_schedule

PICTURES: dict[str, Callable[[], Canvas]] = {
    f.__name__: f
    for f in (
        zigzag_layout, work_per_hop, key_ranges, ring_schedule, balance_over_cp, latent_hop, expert_exchange,
        error_over_cp,
    )
}  # fmt: skip


def main() -> int:
    """Write all pictures beside this file."""
    for name, draw in PICTURES.items():
        draw().write(Path(__file__).parent / f"{name}.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
