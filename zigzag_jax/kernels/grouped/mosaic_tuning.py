"""What was measured to be fastest on Hopper, as data: the tuning of each matmul.

Measured on an H100, bfloat16, uneven groups (docs/kernels.md has what lost): 65536 rows, 128 groups, 2048 -> 768 and
768 -> 2048; 49152 rows, 64 groups, 2048 -> 1408. Tiles of 128 x 256 and four stages won everywhere, also where 256 does
not divide the columns; the matmuls differ in how items are shared out.
"""

from zigzag_jax.kernels.grouped.mosaic_pipeline import GroupedTuning

OUTER = GroupedTuning(drawn=True)

ROWS_LONG = GroupedTuning(drawn=False)
ROWS_SHORT = GroupedTuning(drawn=True)
LONG = 2048
"""Contractions from here on are long: 2048 is faster with fixed shares, 1408 and less with drawn items or the same."""

# timed as a whole only (docs/kernels.md); in the prototype the counter won where gate and up are kept, 0.745 : 0.794
INWARD = GroupedTuning(drawn=False)
INWARD_KEPT = GroupedTuning(drawn=True)
OUTWARD = GroupedTuning(drawn=True)


def rows(contraction: int) -> GroupedTuning:
    """The tuning of rows times matrices."""
    return ROWS_LONG if contraction >= LONG else ROWS_SHORT
