"""What the schedule of a ring must look like, as rules over zigzag_jax/hlo.py's reading of it.

P bytes of payload and G of its gradient (float32) a hop, cp steps; in the scheduled HLO, every loop counted as often as
it runs,

    (cp - 1) P                       fly above a forward kernel,
    (cp - 2) P + (cp - 1) G          above a backward kernel,
    P                                above the matmul that makes dout: the backward's first hop, posted early,

and nothing above nothing; a hop sends each array of the payload once, 3 (cp - 1) times in all; each kernel runs cp
times, and nobody gathers keys or values. What is copied, `copied` says.
"""

import math
from collections import defaultdict

from hlo_copies import copies

from zigzag_jax.hlo import Program

KERNELS = ("flash_fwd", "flash_bwd", "matmul")


def flown(program: Program, kernels=KERNELS) -> dict[str, float]:
    """Bytes that a rank permutes, by what runs meanwhile: the first of `kernels` that does, or nothing."""
    found: dict[str, float] = defaultdict(float)
    for flight in program.flights():
        if flight.kind == "collective-permute":
            above = next((kernel for kernel in kernels if kernel in flight.under and flight.asynchronous), "nothing")
            found[above] += flight.times * flight.size
    return dict(found)


def check(program: Program, cp: int, length: int, payload: int, layers: int = 1, arrays: int = 2) -> None:
    """The rules, for forward and backward of `layers` layers with `length` tokens a rank whose hop is of `payload`
    bfloat16 values a token, in so many arrays.
    """
    values = payload * length * layers
    want = {"flash_fwd": 2 * (cp - 1) * values, "flash_bwd": (2 * (cp - 2) + 4 * (cp - 1)) * values}
    assert flown(program) == want | {"matmul": 2 * values}
    sent = sum(flight.times * len(flight.sent) for flight in program.flights() if flight.kind == "collective-permute")
    assert sent == layers * 3 * (cp - 1) * arrays
    kernels = program.kernels()
    assert (kernels["flash_fwd"], kernels["flash_bwd"]) == (layers * cp, layers * cp)
    gathered = [x for f in program.flights() if f.kind == "all-gather" for x in f.got]
    assert not [str(x) for x in gathered if max(x.shape) >= length]  # no weight is as long as a rank's sequence


def copied(program: Program, length: int, *widths: int) -> dict[str, float]:
    """Copies of arrays with `length` rows, in whatever order the axes lie, and so many values in each: how often."""
    found: dict[str, float] = defaultdict(float)
    for copy in copies(program):
        shape = copy.array.shape
        if length in shape and math.prod(shape) // length in widths:
            found[str(copy.array)] += copy.times
    return dict(found)
