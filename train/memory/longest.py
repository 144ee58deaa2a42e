"""The longest row that fits, by as few measurements as will do: each is a compile of minutes.

What a step holds is close to affine in the length of a row: a part that the length does not touch (parameters, moments,
gradients) and a part for each token. So the line through two measured lengths says where a third should be taken, and
that one confirms it or gives a better line.
"""

from collections.abc import Callable

MOST = 2**24  # tokens of a row: past any use, and what positions and rows are counted in is int32
_SHY = 64  # aim shorter than the line says by this part of the length: a length that just fails costs a measurement


def longest(peak: Callable[[int], int], room: int, fixed: int, start: int, unit: int) -> int | None:
    """The longest multiple of `unit` known to have a peak(length) of at most `room`; None where none has.

    `start` is measured first; `fixed` is a guess of peak(0) that makes a line of it. Where peak grows with the length
    and is near to affine the answer is the true one to a 32nd, mostly after three measurements; ten at most.
    """
    points: list[tuple[int, int]] = []
    fits, fails, at = 0, MOST + 1, start
    for _ in range(10):
        value = peak(at)
        points.append((at, value))
        fits, fails = (max(fits, at), fails) if value <= room else (fits, min(fails, at))
        end = min(_where([(0, fixed), *points], room), fails - 1)
        at = max((end - end // _SHY) // unit, 1) * unit
        if at >= fails or at <= fits or end - fits <= 2 * end // _SHY:
            break
    return fits // unit * unit or None


def _where(points: list[tuple[int, int]], room: int) -> int:
    """The length at which the line through the two points nearest to `room` reaches it; the first one is a guess."""
    points = points[1:] if len(points) > 2 else points
    (a, low), (b, high) = sorted(sorted(points, key=lambda point: (abs(point[1] - room), -point[0]))[:2])
    if high <= low:  # no growth to see: far beyond
        return 8 * b
    return int(a + (room - low) * (b - a) / (high - low))
