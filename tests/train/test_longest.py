"""The search for the longest row, on memories that are made up."""

from collections.abc import Callable

import pytest

from zigzag_jax.train.memory.longest import MOST, longest

UNIT = 2048
ROOM = 70_000_000


def found(memory: Callable[[int], int], fixed: int, start: int, room: int = ROOM) -> tuple[int | None, int]:
    """The answer, and how many lengths were measured for it."""
    measured: list[int] = []

    def peak(length: int) -> int:
        measured.append(length)
        return memory(length)

    answer = longest(peak, room, fixed, start, UNIT)
    assert len(set(measured)) == len(measured)
    return answer, len(measured)


def truth(memory: Callable[[int], int], room: int = ROOM) -> int:
    """By trying every length."""
    return max((length for length in range(UNIT, 2_000_000, UNIT) if memory(length) <= room), default=0)


def close(answer: int | None, true: int) -> bool:
    """Whether the answer fits and is within a 32nd, or a unit, of the longest."""
    return answer is not None and answer % UNIT == 0 and min(true * 31 // 32, true - UNIT) <= answer <= true


@pytest.mark.parametrize("start", [2048, 8192, 131072, 500_000, 4_000_000])
@pytest.mark.parametrize("fixed", [0, 20_000_000, 30_000_000])
def test_of_a_line_three_measurements_find_the_end(start: int, fixed: int):
    memory = lambda length: 30_000_000 + 310 * length
    answer, count = found(memory, fixed, start)
    assert close(answer, truth(memory))
    assert count <= 3


@pytest.mark.parametrize("start", [2048, 65536, 1_000_000])
@pytest.mark.parametrize("bend", [1e-4, -3e-5])
def test_a_bent_line_takes_a_few_more(start: int, bend: float):
    memory = lambda length: int(30_000_000 + 310 * length + bend * length * abs(length))
    if bend < 0:  # past its top no memory falls
        memory = lambda length: int(30_000_000 + 310 * min(length, 1e6) + bend * min(length, 1e6) ** 2)
    answer, count = found(memory, 25_000_000, start)
    assert close(answer, truth(memory))
    assert count <= 6


def test_what_is_answered_was_measured_and_fits():
    memory = lambda length: 30_000_000 + 310 * length + (length > 100_000) * 5_000_000  # a step, as of another kernel
    answer, _ = found(memory, 30_000_000, 65536)
    assert close(answer, truth(memory))


def test_none_fits():
    assert found(lambda length: ROOM + length, ROOM // 2, 65536)[0] is None


def test_a_start_that_is_no_multiple_is_rounded_down():
    answer, _ = found(lambda length: ROOM - (length <= 5000), 0, 5000)
    assert answer is not None
    assert answer % UNIT == 0


def test_there_is_an_end_where_memory_hardly_grows():
    answer, count = found(lambda length: 1000 + length // 1000, 1000, 65536)
    assert close(answer, MOST // UNIT * UNIT)
    assert count <= 3
    assert close(found(lambda length: 1000, 1000, 65536)[0], MOST // UNIT * UNIT)
