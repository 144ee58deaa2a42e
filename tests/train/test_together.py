"""Votes of threads, and of JAX's one process."""

from dataclasses import replace

import pytest
from votes import Votes

from zigzag_jax.train.hosts.together import PAUSES, Together


def test_all_decide_alike():
    votes = Votes(3)
    assert votes.all(lambda one: one.lowest(one.process + 4)) == [4, 4, 4]
    assert votes.all(lambda one: one.highest(one.process - 4)) == [-2, -2, -2]
    assert votes.all(lambda one: one.same(7)) == [True] * 3
    assert votes.all(lambda one: one.same(one.process // 2)) == [False] * 3
    assert votes.all(lambda one: one.first(one.process > 0)) == [1, 1, 1]
    assert votes.all(lambda one: one.first(False)) == [None] * 3


@pytest.mark.parametrize(("tries", "who"), [(0, None), (3, None), (4, 1)])
def test_all_wait_until_it_is_so_in_all(tries: int, who: int | None):
    """The last of them needs so many tries more than the others; there are three pauses."""
    left, moved = [0, tries], [0, 0]

    def done(process: int) -> bool:
        left[process] -= 1
        return left[process] < 0

    def moving(process: int) -> None:
        moved[process] += 1

    def act(one: Together) -> int | None:
        return replace(one, moving=lambda: moving(one.process)).until(lambda: done(one.process))

    assert Votes().all(act) == [who, who]
    assert moved == [min(tries, 3) + 1] * 2  # a watchdog hears of each try


def test_one_process_of_jax():
    one = Together()
    assert (one.process, one.lowest(5), one.highest(5), one.first(True), one.pauses) == (0, 5, 5, 0, PAUSES)
    assert one.patience == "90 s"
