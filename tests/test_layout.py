"""Zigzag order is a bijection, whatever the axis, the container and the kind of array."""

import doctest
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zigzag_jax import check_positions, cost, from_zigzag, hops, layout, ranges, to_zigzag
from zigzag_jax.layout import chunk_starts, global_positions, picture, zigzag_chunks, zigzag_indices

CPS = range(1, 10)


@pytest.mark.parametrize("module", [cost, hops, layout, ranges], ids=lambda module: module.__name__)
def test_docstring_examples_run(module):
    result = doctest.testmod(module, extraglobs={"np": np})
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("cp", CPS)
def test_indices_are_a_bijection_and_argsort_inverts(cp):
    length = 2 * cp * 3
    indices = zigzag_indices(length, cp)
    assert sorted(indices) == list(range(length))
    np.testing.assert_array_equal(to_zigzag(np.arange(length), cp, axis=0), indices)
    np.testing.assert_array_equal(from_zigzag(np.arange(length), cp, axis=0), np.argsort(indices))
    np.testing.assert_array_equal(from_zigzag(indices, cp, axis=0), np.arange(length))


@pytest.mark.parametrize("cp", CPS)
def test_every_rank_holds_one_front_and_one_back_chunk(cp):
    held = zigzag_chunks(cp).reshape(cp, 2)
    assert [row.tolist() for row in held] == [[r, 2 * cp - 1 - r] for r in range(cp)]
    assert set(held.sum(1)) == {2 * cp - 1}  # so any two ranks see the same number of keys


@pytest.mark.parametrize("cp", CPS)
def test_global_positions_are_the_slices_of_the_indices(cp):
    length = 10
    indices = zigzag_indices(cp * length, cp)
    for rank in range(cp):
        zigzag = np.asarray(global_positions(rank, cp, length))
        np.testing.assert_array_equal(zigzag, indices[rank * length : (rank + 1) * length])
        contiguous = np.asarray(global_positions(rank, cp, length, "contiguous"))
        np.testing.assert_array_equal(contiguous, rank * length + np.arange(length))
        assert np.all(np.diff(zigzag) > 0)
        assert zigzag.dtype == contiguous.dtype == np.int32


def test_a_rank_may_be_traced():
    traced = jax.jit(lambda rank: global_positions(rank, 4, 6))
    for rank in range(4):
        np.testing.assert_array_equal(traced(rank), global_positions(rank, 4, 6))
    assert chunk_starts(3, 4, 6, "contiguous") == [18]
    assert chunk_starts(3, 4, 6) == [9, 12]


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
def test_any_axis(axis):
    x = np.random.default_rng(0).standard_normal((12, 24, 36))
    moved = to_zigzag(x, 3, axis)
    np.testing.assert_array_equal(moved, np.take(x, zigzag_indices(x.shape[axis], 3), axis))
    np.testing.assert_array_equal(from_zigzag(moved, 3, axis), x)


@pytest.mark.parametrize("cp", [1, 3, 4])
def test_pytrees_keep_structure_and_kind_of_array(cp):
    length = 2 * cp * 2
    tree = {"host": np.arange(2 * length).reshape(2, length), "device": (jnp.ones((1, length, 3)).cumsum(1), None)}
    moved = to_zigzag(tree, cp)
    assert jax.tree.structure(moved) == jax.tree.structure(tree)
    assert type(moved["host"]) is np.ndarray
    assert isinstance(moved["device"][0], jax.Array)
    for before, after in zip(jax.tree.leaves(tree), jax.tree.leaves(from_zigzag(moved, cp)), strict=True):
        np.testing.assert_array_equal(before, after)
        assert before.dtype == after.dtype


def test_to_zigzag_under_jit_and_grad():
    x = jnp.arange(24.0).reshape(2, 12)
    np.testing.assert_array_equal(jax.jit(lambda x: to_zigzag(x, 3))(x), to_zigzag(x, 3))
    w = np.random.default_rng(0).standard_normal((2, 12)).astype(np.float32)
    grad = jax.grad(lambda x: (to_zigzag(x, 3) * w).sum())(x)
    np.testing.assert_array_equal(grad, from_zigzag(w, 3))


def test_picture_has_a_row_a_rank():
    rows = picture(12).splitlines()
    assert len(rows) == 13
    for rank, row in enumerate(rows[1:]):
        marks = [at for at, letter in enumerate(row) if letter == "#"]
        assert [rows[0][: at + 1].split()[-1] for at in marks] == [str(rank), str(23 - rank)]


def test_check_positions_accepts_documents_and_padding():
    check_positions(np.arange(12)[None], 3)
    check_positions(np.array([[0, 1, 2, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 1, 2, 3]], np.int32), 2)
    check_positions(jnp.arange(8)[None], 1)


POSITIONS_RULE = "positions must be 0 at a document's first token and rise by 1 inside it"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: to_zigzag(np.zeros((1, 10)), 3), "sequence length must be divisible by 2 * cp = 6, got 10"),
        (lambda: from_zigzag(np.zeros((1, 10)), 3), "sequence length must be divisible by 2 * cp = 6, got 10"),
        (lambda: zigzag_indices(7, 1), "sequence length must be divisible by 2 * cp = 2, got 7"),
        (lambda: to_zigzag(np.zeros(12), 3), "axis must be an axis of every array, got axis 1 for shape (12,)"),
        (lambda: to_zigzag(np.zeros((2, 12)), 3, axis=-3), "axis must be an axis of every array, got axis -3"),
        (lambda: to_zigzag(np.zeros((1, 12)), 0), "cp must be an int >= 1, got 0"),
        (lambda: zigzag_chunks(-2), "cp must be an int >= 1, got -2"),
        (lambda: zigzag_chunks(2.0), "cp must be an int >= 1, got 2.0"),  # pyright: ignore[reportArgumentType]
        (lambda: zigzag_chunks(True), "cp must be an int >= 1, got True"),
        (lambda: layout.check_layout("spiral"), "layout must be one of zigzag, contiguous, got 'spiral'"),
        (lambda: check_positions(np.arange(8), 2), "positions must be integers [B, S], got int64 [8]"),
        (lambda: check_positions(np.zeros((1, 8)), 2), "positions must be integers [B, S], got float64 [1, 8]"),
        (lambda: check_positions(np.arange(6)[None], 2), "sequence length must be divisible by 2 * cp = 4, got 6"),
        (lambda: check_positions(np.array([[1, 2, 3, 4]]), 1), f"{POSITIONS_RULE}, got 1 after the start of the row"),
        (lambda: check_positions(np.array([[0, 1, 1, 2]]), 1), f"{POSITIONS_RULE}, got 1 after 1 at row 0, token 2"),
        (
            lambda: check_positions(np.array([[0, 1, 2, 3], [0, 1, 0, -1]]), 1),
            f"{POSITIONS_RULE}, got -1 after 0 at row 1, token 3",
        ),
        (  # a zigzagged array is not in natural order
            lambda: check_positions(to_zigzag(np.arange(8)[None], 2), 2),
            f"{POSITIONS_RULE}, got 6 after 1 at row 0, token 2",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_errors_state_rule_and_value(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
