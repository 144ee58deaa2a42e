"""What was measured to be fastest on Hopper, as data: the kernels' tuning by head dims (of q and k, of v).

Measured on an H100 and H200s, which have the same multiprocessors, with the ring's steps at 8192 local tokens, bfloat16
(docs/kernels.md has what lost). dtype does not matter (float16 runs nearly the same instructions) and the mask is
data: the kernels choose the order of their tiles from the ranges themselves.

Items are drawn: Qwen's and MLA's are 0.5 and 1.5% slower so, but beside a hop, whose kernel holds multiprocessors, a
step of Qwen's loses nothing where fixed shares lose 8%; D = 64 and 96 are 9% faster. And some are cut, which saves the
3% that the last round idles in the steps of a ring. 256 columns of v leave no registers for that, and were not timed
drawn.
"""

from typing import NamedTuple

from zigzag_jax.kernels.flash.mosaic_bwd_tiles import BackwardTuning
from zigzag_jax.kernels.flash.mosaic_fwd import ForwardTuning


class Tuning(NamedTuple):
    """A row of the table."""

    forward: ForwardTuning = ForwardTuning()
    backward: BackwardTuning = BackwardTuning()
    shared: int = 0
    """Columns of a SplitKeys' shared part with which the forward reads the two parts where they are; 0: never."""


HOPPER: dict[tuple[int, int], Tuning] = {
    (64, 64): Tuning(ForwardTuning(staged="16 bit", shares="cut")),
    (96, 64): Tuning(ForwardTuning(shares="cut")),
    (96, 96): Tuning(ForwardTuning(shares="cut")),
    (128, 128): Tuning(ForwardTuning(shares="cut", early_keys=True, sums_in_turn=True)),
    (192, 128): Tuning(
        ForwardTuning(query_group=2, cut_sharing=16, staged="none", shares="cut", sums_in_turn=True),
        BackwardTuning(schedule="late", out_stages=1),  # the second dS takes the second dO's memory and barriers
        shared=64,
    ),
    (256, 256): Tuning(
        ForwardTuning(key_tile=64, staged="none"),
        BackwardTuning(schedule="columns", out_stages=1),
    ),
}  # fmt: skip
