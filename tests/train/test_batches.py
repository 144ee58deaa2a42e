"""Batches: the same rows on every mesh, labels inside documents, pads that count nowhere."""

import dataclasses
import threading
from concurrent.futures import wait

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from zigzag_jax.layout import check_positions, from_zigzag, padded
from zigzag_jax.train.data.batches import BLANK, FIELDS, Batches
from zigzag_jax.train.data.packing import make_plan
from zigzag_jax.train.data.token_file import TokenStore
from zigzag_jax.train.errors import UserError

END = 0


def make_store(documents=200, mean=30, seed=0):
    """Every token of the store is its own place in it plus one (so a batch tells where it came from); ends are END."""
    lengths = np.maximum(2, np.random.default_rng(seed).exponential(mean, documents).astype(np.int64))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.arange(1, offsets[-1] + 1, dtype=np.uint16)
    tokens[offsets[1:] - 1] = END
    return TokenStore(tokens, offsets)


def make_mesh(dp=1, fsdp=1, cp=1):
    devices = jax.devices()[: dp * fsdp * cp]
    return jax.make_mesh((dp, fsdp, cp), ("dp", "fsdp", "cp"), axis_types=(AxisType.Auto,) * 3, devices=devices)


def at(step, *, seq_len=64, batch=4, seed=5, repeat=True, store=None, **axes):
    """Batch number `step` on a mesh, back in natural order: NumPy [batch, S_pad]."""
    store = store or make_store()
    plan = make_plan(store.lengths, seq_len, seed=seed)
    with Batches(store, plan, batch, make_mesh(**axes), repeat=repeat) as batches:
        arrays = batches.at(step)
    return from_zigzag({name: np.asarray(x) for name, x in arrays.items()}, axes.get("cp", 1))


def test_what_a_batch_is():
    store = make_store()
    with Batches(store, make_plan(store.lengths, 64, seed=5), 4, make_mesh(dp=2, cp=4)) as batches:
        arrays = batches.at(0)
        assert list(arrays) == ["tokens", "labels", "positions", "real"]
        for name, x in arrays.items():
            assert x.shape == (4, 64)
            assert x.dtype == FIELDS[name][0]
            assert x.sharding == NamedSharding(batches.sharding.mesh, P(("dp", "fsdp"), "cp"))
            assert x.addressable_shards[0].data.shape == (2, 16)


@pytest.mark.parametrize(
    "axes",
    [{"cp": 4}, {"cp": 2, "dp": 2}, {"cp": 4, "dp": 2}, {"cp": 2, "dp": 2, "fsdp": 2}, {"cp": 8}, {"fsdp": 4}],
    ids=str,
)
@pytest.mark.parametrize("step", [0, 3, 1000])
def test_every_mesh_sees_the_rows_of_one_device(axes, step):
    one, many = at(step), at(step, **axes)
    for name in one:
        np.testing.assert_array_equal(many[name], one[name])


@pytest.mark.parametrize("cp", [3, 5, 7])
def test_an_odd_cp_pads_and_the_pads_are_nothing(cp):
    one, many = at(2, seq_len=256), at(2, seq_len=256, cp=cp)
    size = padded(256, cp)
    assert size == {3: 258, 5: 260, 7: 266}[cp]
    for name in one:
        assert many[name].shape == (4, size)
        np.testing.assert_array_equal(many[name][:, :256], one[name])
        assert (many[name][:, 256:] == FIELDS[name][1]).all()


def test_padding_is_to_the_next_multiple():
    assert [padded(256, cp) for cp in (1, 3, 4)] == [256, 258, 256]
    assert padded(1, 4) == 8
    assert padded(255, 1) == 256


def test_tokens_labels_and_positions_against_the_documents():
    store = make_store(mean=50)  # some documents are longer than a row of 64
    assert store.lengths.max() > 3 * 64
    plan = make_plan(store.lengths, 64, seed=5)
    with Batches(store, plan, 4, make_mesh()) as batches:
        block = batches.natural(np.arange(plan.rows))
    first = np.searchsorted(store.offsets, np.arange(len(store.tokens)), "right") - 1
    targets = 0
    for row in range(plan.rows):
        place = -1
        for tokens, labels, position, real in zip(*(block[n][row] for n in FIELDS), strict=True):
            if not real:
                assert (tokens, labels, position) == (0, -1, 0)
                continue
            # the place in the store: told by the token itself, and for an end by the token before it
            place = int(tokens) - 1 if tokens != END else place + 1
            assert store.tokens[place] == tokens
            index = place - store.offsets[first[place]]
            assert position == index % 64
            last = place + 1 == store.offsets[first[place] + 1]
            assert last == (tokens == END)
            assert labels == (-1 if last else store.tokens[place + 1])
            targets += not last
    assert block["real"].sum() == len(store.tokens)
    assert targets == (block["labels"] >= 0).sum() == len(store.tokens) - len(store.lengths)


def test_a_label_at_the_cut_of_a_long_document_is_the_true_next_token():
    store = TokenStore(np.array([11, 12, 13, 14, 15, 16, 17, END], np.uint16), np.array([0, 8]))
    plan = make_plan(store.lengths, 4, seed=0)
    with Batches(store, plan, 1, make_mesh()) as batches:
        block = batches.natural(np.array(sorted(range(2), key=lambda r: plan.starts[plan.bounds[r]])))
    np.testing.assert_array_equal(block["labels"], [[12, 13, 14, 15], [16, 17, END, -1]])
    np.testing.assert_array_equal(block["positions"], [[0, 1, 2, 3]] * 2)


def test_positions_are_what_attention_asks_for():
    for cp in (1, 3, 4):
        check_positions(at(1, cp=cp)["positions"], cp)


def test_natural_rows_are_those_of_the_batch():
    store = make_store()
    plan = make_plan(store.lengths, 64, seed=5)
    with Batches(store, plan, 4, make_mesh(cp=2)) as batches:
        rows = batches.rows(6)
        natural = batches.natural(rows)
        np.testing.assert_array_equal(rows, plan.stream(24, 4))
    for name, array in at(6, cp=2).items():
        np.testing.assert_array_equal(natural[name], array)
        assert natural[name].dtype == FIELDS[name][0]


@pytest.mark.parametrize(("dp", "fsdp"), [(1, 1), (2, 1), (2, 2)])
def test_micro_batches_are_the_same_rows_on_every_mesh(dp: int, fsdp: int):
    """Piece m of what each device holds is, over all devices, rows m * 4 .. m * 4 + 4 of the step."""
    store, ways = make_store(), dp * fsdp
    plan = make_plan(store.lengths, 64, seed=5)
    with Batches(store, plan, 12, make_mesh(dp=dp, fsdp=fsdp), accumulate=3) as batches:
        rows = batches.rows(2).reshape(ways, 3, 4 // ways)
        for m in range(3):
            np.testing.assert_array_equal(rows[:, m].reshape(-1), plan.stream(24 + 4 * m, 4))
        np.testing.assert_array_equal(np.asarray(batches.at(2)["tokens"]), batches.natural(batches.rows(2))["tokens"])
        assert sum(batches.document_lengths(2)) == np.sum(batches.at(2)["real"])
        assert len(batches.document_lengths(2)) == np.sum((batches.at(2)["positions"] == 0) & batches.at(2)["real"])
        if ways == 4:
            with pytest.raises(UserError, match=r"^batch: must be divisible by accumulate .* = 12, got 8"):
                Batches(store, plan, 8, make_mesh(dp=dp, fsdp=fsdp), accumulate=3)


def test_a_batch_is_a_function_of_the_step_alone():
    store = make_store()
    with Batches(store, make_plan(store.lengths, 64, seed=5), 4, make_mesh(cp=2)) as batches:
        for step in (0, 1, 2, 7, 8, 3, 3, 0):
            for name, array in at(step, cp=2).items():
                np.testing.assert_array_equal(from_zigzag(np.asarray(batches.at(step)[name]), 2), array)


def test_one_pass_scores_each_token_once_and_ends_blank():
    store = make_store()
    plan = make_plan(store.lengths, 64, seed=0)
    batch = 8
    assert plan.rows % batch
    seen = np.zeros(len(store.tokens) + 1, np.int64)
    with Batches(store, plan, batch, make_mesh(dp=2, cp=2), repeat=False) as batches:
        for step in range(len(batches)):
            arrays = {name: np.asarray(x) for name, x in batches.at(step).items()}
            np.add.at(seen, arrays["tokens"][arrays["real"]], 1)
        assert (batches.rows(len(batches) - 1) == BLANK).sum() == batch - plan.rows % batch
        assert (batches.rows(len(batches)) == BLANK).all()
        past = batches.at(len(batches))
        assert not np.asarray(past["real"]).any()
        assert (np.asarray(past["labels"]) == -1).all()
    ordinary = store.tokens[store.tokens != END]
    assert (seen[ordinary] == 1).all()
    assert seen[END] == len(store.lengths)


class Watched(np.ndarray):
    """An array that notes which slices are read."""

    reads: list

    def __getitem__(self, index):
        if isinstance(index, slice):
            self.reads.append((index.start, index.stop))
        return np.asarray(self)[index]


def test_a_device_reads_its_own_two_chunks_once():
    lengths = np.full(4, 64)
    tokens = np.arange(256, dtype=np.uint16).view(Watched)
    tokens.reads = []
    store = TokenStore(tokens, np.concatenate([[0], np.cumsum(lengths)]))
    plan = make_plan(lengths, 64, seed=0)
    batches = Batches(store, plan, 4, make_mesh(dp=2, cp=4))
    block = batches._read(plan.stream(0, 1), batches._order[16:32])  # rank 1: chunks 1 and 6 of 8
    start = int(plan.starts[plan.stream(0, 1)[0]])
    assert tokens.reads == [
        (start + 8, start + 16),
        (start + 9, start + 17),
        (start + 48, start + 56),
        (start + 49, start + 57),
    ]
    np.testing.assert_array_equal(block["positions"][0], [*range(8, 16), *range(48, 56)])
    tokens.reads.clear()
    batches._make(0)
    # 4 rows on 4 ranks, two runs each, tokens and labels: the four arrays share one read (rank 3's runs are neighbours)
    assert len(tokens.reads) == 4 * (3 * 2 + 1) * 2
    batches.close()


def test_the_thread_reads_one_ahead_and_is_gone_after_close():
    store = make_store()
    made = []
    before = threading.active_count()
    with Batches(store, make_plan(store.lengths, 64, seed=5), 4, make_mesh()) as batches:
        make = batches._make
        batches._make = lambda step: (made.append(step), make(step))[1]
        for step in range(3):
            batches.at(step)
            wait([batches._ahead[1]])  # pyright: ignore[reportOptionalSubscript]
            assert made == [*range(step + 2)]
    assert threading.active_count() == before


def test_what_goes_wrong_in_the_thread_is_raised_where_the_batch_is_asked_for():
    store = make_store()
    with Batches(store, make_plan(store.lengths, 64, seed=5), 4, make_mesh()) as batches:
        batches.store = dataclasses.replace(store, tokens=None)
        batches._ahead = (0, batches._thread.submit(batches._make, 0))
        with pytest.raises(TypeError):
            batches.at(0)


@pytest.mark.parametrize(("batch", "rule"), [(0, ">= 1"), (3, r"divisible by dp \* fsdp = 2"), (-2, ">= 1")])
def test_rows_that_do_not_come_out_even_are_refused(batch, rule):
    store = make_store()
    with pytest.raises(UserError, match=f"^batch: must be {rule}, got {batch}"):
        Batches(store, make_plan(store.lengths, 64, seed=0), batch, make_mesh(dp=2))


def test_the_plan_of_another_store_is_refused():
    plan = make_plan(make_store(seed=1).lengths, 64, seed=0)
    with pytest.raises(ValueError, match="this store's"):
        Batches(make_store(), plan, 4, make_mesh())
