"""A device's time in three, of launches made by hand."""

import doctest

import pytest
from test_scopes import STEP

from zigzag_jax.hlo import Program
from zigzag_jax.train.logs import timeline
from zigzag_jax.train.logs.scopes import Launch
from zigzag_jax.train.logs.timeline import Split, split, words

PROGRAM = Program(STEP)


def launch(name: str, begin: float, end: float, device: str = "0", module: str = "jit_step") -> Launch:
    return Launch(module, name, end - begin, begin, device)


def test_transfers_beside_work_are_not_exposed():
    made = [launch("sum", 0, 4), launch("ar", 3, 6), launch("sum", 7, 9), launch("ar", 7, 8), launch("graph", 8.5, 10)]
    assert split(PROGRAM, made) == Split(computing=7.0, exposed=2.0, nothing=1.0)


def test_each_device_by_itself_and_their_mean():
    made = [launch("sum", 0, 1), launch("ar", 1, 4), launch("sum", 10, 15, "1"), launch("ar", 2, 3, module="jit_other")]
    assert split(PROGRAM, made) == Split(computing=3.0, exposed=1.5, nothing=0.0)
    assert words(split(PROGRAM, made), steps=3) == (
        "of a step a device computed for 1000.000 ms, moved data only for 500.000 ms, did nothing for 0.000 ms"
    )


def test_no_launch_no_time():
    assert split(PROGRAM, [launch("ar", 0, 1, module="jit_other")]) == Split(0.0, 0.0, 0.0)


def test_a_transfer_over_all_of_a_device_that_computes_nothing():
    assert split(PROGRAM, [launch("ar", 1, 3), launch("ar", 2, 4)]) == pytest.approx((0.0, 3.0, 0.0))


def test_the_examples():
    assert doctest.testmod(timeline).failed == 0
