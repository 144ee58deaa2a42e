"""A rank's work is that of its key ranges, to the last pair."""

import doctest

import numpy as np
import oracle
import pytest

from zigzag_jax import work as module
from zigzag_jax.layout import global_positions
from zigzag_jax.ranges import key_range, live_steps, visible_bounds
from zigzag_jax.work import busiest, lock_step, pairs


def counted(cp, length, layout, positions, window):
    """The work by ranges.py, rank by rank and step by step."""
    work = []
    for step in live_steps(cp, length, window, layout):
        work.append([])
        for rank in range(cp):
            g = global_positions(rank, cp, length, layout)
            own = None if positions is None else positions[:, np.asarray(g)]
            keys = key_range(*visible_bounds(g, own, window), (rank - step) % cp, cp, length, layout)
            work[-1].append(np.maximum(np.asarray(keys.stop) - np.asarray(keys.start), 0).sum())
    return np.array(work)


@pytest.mark.parametrize("window", [None, 1, 7, 40], ids="window-{}".format)
@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("cp", [1, 2, 3, 5])
def test_work_is_that_of_the_key_ranges(cp, layout, packed, window):
    positions = oracle.random_documents(np.random.default_rng(cp), 2, 12 * cp, 3) if packed else None
    got = pairs(cp, 12, layout=layout, positions=positions, window=window)
    np.testing.assert_array_equal(got, counted(cp, 12, layout, positions, window))


@pytest.mark.parametrize("cp", [1, 2, 3, 8, 256])
def test_zigzag_balances_a_plain_causal_mask_exactly(cp):
    work = pairs(cp, 64)
    assert (work == work[:, :1]).all()
    assert (work[1:] == 64 * 64 // 2).all()
    assert work.sum() == 64 * cp * (64 * cp + 1) // 2
    assert lock_step(work) == busiest(work) == 1.0


def test_four_million_tokens_over_256_ranks_are_counted_without_rounding():
    length = 2**14
    assert pairs(256, length).sum() == 256 * length * (256 * length + 1) // 2


def test_the_naive_layout_waits_for_its_last_rank():
    work = pairs(4, 1024, layout="contiguous")
    assert lock_step(work) == pytest.approx(1.75, rel=1e-3)


def test_a_window_leaves_the_steps_that_it_reaches():
    assert pairs(8, 2048, window=1024).shape == (3, 8)  # steps 0, 1 and 7
    work = pairs(2, 4, window=2)  # tokens 0 1 | 6 7 and 2 3 | 4 5, each sees itself and the one before
    np.testing.assert_array_equal(work, [[6, 7], [1, 1]])


def test_two_documents_by_hand():
    positions = np.array([[0, 1, 2, 3, 0, 1, 2, 3]])  # rank 0 has 0 1 | 2 3 of each's ends, rank 1 2 3 | 0 1
    work = pairs(2, 4, positions=positions)
    np.testing.assert_array_equal(work, [[6, 6], [4, 4]])
    one_long = pairs(2, 4, positions=np.array([[0, 0, 0, 0, 0, 0, 0, 1]]))
    np.testing.assert_array_equal(one_long, [[5, 4], [0, 0]])
    assert lock_step(one_long) == 5 / 4.5


def test_positions_must_fit():
    with pytest.raises(ValueError, match=r"positions must be \[B, 16\], got \[1, 8\]"):
        pairs(2, 8, positions=np.zeros((1, 8), int))


def test_the_example():
    assert doctest.testmod(module).failed == 0
