"""The plan of rows: every token once, rows nearly full, the same for everyone, any place found at once."""

import hashlib
import itertools
import time

import numpy as np
import pytest

from zigzag_jax.train.data import packing
from zigzag_jax.train.data.packing import _pack, cut_count, make_plan
from zigzag_jax.train.errors import UserError


def lengths_of(n, mean=200, seed=0):
    return np.maximum(1, np.random.default_rng(seed).lognormal(np.log(mean), 1.2, n).astype(np.int64))


CASES = {
    "long-and-short": (lengths_of(500), 256),
    "all-long": (np.full(20, 1000), 128),
    "exactly-a-row": (np.full(20, 64), 64),
    "a-row-and-one": (np.full(20, 65), 64),
    "one-token-documents": (np.ones(300, np.int64), 7),
    "rows-of-one": (np.array([3, 1, 2]), 1),
    "one-document": (np.array([100_003]), 256),
}


@pytest.mark.parametrize("open_rows", [1, 3, 1024])
@pytest.mark.parametrize(("lengths", "seq_len"), CASES.values(), ids=CASES.keys())
def test_every_token_of_every_document_is_in_the_plan_once(lengths, seq_len, open_rows):
    plan = make_plan(lengths, seq_len, seed=3, open_rows=open_rows)
    seen = np.zeros(lengths.sum(), np.int64)
    for start, size in zip(plan.starts, plan.sizes, strict=True):
        seen[start : start + size] += 1
    assert (seen == 1).all()
    # a piece lies in one document, and `ends` says whether it is the last of it
    bounds = np.cumsum(lengths)
    document = np.searchsorted(bounds, plan.starts, "right")
    assert (plan.starts + plan.sizes <= bounds[document]).all()
    np.testing.assert_array_equal(plan.ends, plan.starts + plan.sizes == bounds[document])
    # only a document longer than a row is cut, and only at whole rows of it
    first = bounds[document] - lengths[document]
    assert ((plan.starts - first) % seq_len == 0).all()
    assert (plan.sizes[~plan.ends] == seq_len).all()


@pytest.mark.parametrize(("lengths", "seq_len"), CASES.values(), ids=CASES.keys())
def test_pieces_stand_side_by_side_in_rows_that_are_not_too_long(lengths, seq_len):
    plan = make_plan(lengths, seq_len, seed=3)
    assert plan.bounds[0] == 0
    assert plan.bounds[-1] == len(plan.starts)
    for row in range(plan.rows):
        here = slice(plan.bounds[row], plan.bounds[row + 1])
        sizes = plan.sizes[here]
        assert 0 < sizes.sum() <= seq_len
        np.testing.assert_array_equal(plan.columns[here], np.cumsum(sizes) - sizes)
    assert plan.fill == lengths.sum() / (plan.rows * seq_len)


def test_rows_are_nearly_full_and_more_open_rows_fill_better():
    lengths = lengths_of(20_000, mean=150)
    fills = [make_plan(lengths, 512, seed=0, open_rows=n).fill for n in (1, 16, 1024)]
    assert fills[0] < fills[1] < fills[2]
    assert fills[2] > 0.99


@pytest.mark.parametrize("open_rows", [1, 5, 1000])
def test_best_fit_against_a_search_of_every_open_row(open_rows):
    sizes, seq_len = np.minimum(lengths_of(400, mean=20), 64), 64
    rows, still_open = [], []  # a row: its pieces
    room = lambda row: seq_len - sum(sizes[row])
    for piece in (p for p in range(len(sizes)) if sizes[p] < seq_len):
        fits = [row for row in still_open if room(row) >= sizes[piece]]
        if not fits:
            if len(still_open) == open_rows:
                still_open.remove(min(still_open, key=room))
            rows.append([])
            still_open.append(rows[-1])
            fits = [rows[-1]]
        best = min(fits, key=room)
        best.append(piece)
        if not room(best):
            still_open.remove(best)
    rows = [[p] for p in range(len(sizes)) if sizes[p] == seq_len] + rows
    order, bounds = _pack(sizes, seq_len, open_rows)
    assert [order[a:b].tolist() for a, b in itertools.pairwise(bounds)] == rows


def test_the_seed_and_the_length_decide_and_nothing_else():
    lengths = lengths_of(400)
    plan, same = make_plan(lengths, 256, seed=1), make_plan(lengths.astype(np.int32), 256, seed=1)
    for name in ("starts", "sizes", "columns", "ends", "bounds"):
        np.testing.assert_array_equal(getattr(plan, name), getattr(same, name))
    np.testing.assert_array_equal(plan.stream(0, 1000), same.stream(0, 1000))
    other = make_plan(lengths, 256, seed=2)
    assert not np.array_equal(plan.starts, other.starts)


def test_the_plan_stays_what_it_was():
    """A run goes on after an upgrade only if these numbers never change: a new order is a new format of checkpoints."""
    plan = make_plan(np.arange(1, 60), 32, seed=7)
    text = " ".join(str(a.tolist()) for a in (plan.starts, plan.sizes, plan.bounds, plan.stream(0, 100)))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "2b1c975e8aca92ab"


def test_each_epoch_visits_every_row_once_in_another_order():
    plan = make_plan(lengths_of(300), 256, seed=0)
    epochs = plan.stream(0, 3 * plan.rows).reshape(3, plan.rows)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(plan.rows))
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[1], epochs[2])
    assert not np.array_equal(epochs[0], np.arange(plan.rows))


def test_only_the_newest_epoch_s_order_is_kept():
    plan = make_plan(lengths_of(300), 256, seed=3)
    plan.stream(0, 5 * plan.rows)
    assert packing._newest(plan.rows, 3).keys() == {4}


def test_any_place_of_the_stream_is_found_without_what_came_before():
    plan = make_plan(lengths_of(300), 256, seed=0)
    whole = plan.stream(0, 5 * plan.rows)
    for first in (0, 1, plan.rows - 1, 3 * plan.rows + 7):
        np.testing.assert_array_equal(plan.stream(first, plan.rows + 5), whole[first : first + plan.rows + 5])
    assert len(plan.stream(10**12, 4)) == 4
    assert len(plan.stream(5, 0)) == 0


def test_a_shuffle_is_fair():
    """Where the first of 8 rows lands in 4000 epochs: each place 500 times, give or take five standard deviations."""
    plan = make_plan(np.full(8, 4), 4, seed=0)
    places = np.argmax(plan.stream(0, 32_000).reshape(4000, 8) == 0, axis=1)
    assert np.abs(np.bincount(places, minlength=8) - 500).max() < 5 * np.sqrt(4000 / 8 * 7 / 8)


def test_a_million_documents_take_seconds():
    begin = time.process_time()
    plan = make_plan(lengths_of(1_000_000, mean=300), 1024, seed=0)
    assert time.process_time() - begin < 10  # measured: 2; the bar leaves room for a slow machine
    assert plan.fill > 0.98


@pytest.mark.parametrize("seq_len", [0, -4])
def test_a_row_of_nothing_is_refused(seq_len):
    with pytest.raises(UserError, match=f"seq-len: must be at least 1, got {seq_len}"):
        make_plan(np.array([3]), seq_len, seed=0)


@pytest.mark.parametrize("lengths", [[], [3, 0]])
def test_documents_of_nothing_are_refused(lengths):
    with pytest.raises(ValueError, match="at least one document"):
        make_plan(np.array(lengths, np.int64), 4, seed=0)


@pytest.mark.parametrize(("lengths", "seq_len"), CASES.values(), ids=CASES.keys())
def test_how_many_documents_are_cut_into_how_many_pieces(lengths, seq_len):
    documents, pieces = cut_count(lengths, seq_len)
    assert documents == (lengths > seq_len).sum()
    assert pieces - documents == len(make_plan(lengths, seq_len, seed=0).sizes) - len(lengths)
