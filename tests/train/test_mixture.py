"""Mixtures: shares by tokens, a stream that is known at any place, rows that each belong to one source."""

import dataclasses
import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from zigzag_jax.layout import from_zigzag
from zigzag_jax.train.data import mixture
from zigzag_jax.train.data.batches import Batches
from zigzag_jax.train.data.mixture import BLOCK, MixedPlan, MixedStore, mix, plan_rows, shares
from zigzag_jax.train.data.packing import in_order, make_plan
from zigzag_jax.train.data.token_file import TokenStore
from zigzag_jax.train.errors import UserError
from zigzag_jax.train.logs.report import HeldOut, prompts

WEIGHTS = (6.0, 3.0, 1.0)


def make_store(first: int, lengths) -> TokenStore:
    """Tokens first, first + 1, ..: each tells where it comes from."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return TokenStore(np.arange(first, first + offsets[-1], dtype=np.uint16), offsets)


def lengths_of(n: int, mean: float, seed: int) -> np.ndarray:
    return np.maximum(2, np.random.default_rng(seed).exponential(mean, n).astype(np.int64))


@pytest.fixture(scope="module")
def store() -> MixedStore:
    """Short documents, long ones, and such that fill 41 places of 64."""
    stores = make_store(1000, lengths_of(300, 20, 0)), make_store(20000, lengths_of(40, 150, 1))
    return MixedStore((*stores, make_store(40000, np.full(30, 41))), WEIGHTS, ("a", "b", "c"))


@pytest.fixture(scope="module")
def plan(store: MixedStore) -> MixedPlan:
    plan = plan_rows(store, 64, seed=5)
    assert isinstance(plan, MixedPlan)
    return plan


def source_of(plan: MixedPlan, rows: np.ndarray) -> np.ndarray:
    return np.searchsorted(plan.first_rows, rows, "right") - 1


def make_mesh(dp=1, fsdp=1, cp=1):
    devices = jax.devices()[: dp * fsdp * cp]
    return jax.make_mesh((dp, fsdp, cp), ("dp", "fsdp", "cp"), axis_types=(AxisType.Auto,) * 3, devices=devices)


def test_the_stores_of_all_sources_read_as_one(store: MixedStore):
    whole = np.concatenate([part.tokens for part in store.stores])  # pyright: ignore[reportAttributeAccessIssue]
    bases = np.cumsum([0, *(part.size for part in store.stores)])
    assert store.size == len(whole) == store.offsets[-1]
    np.testing.assert_array_equal(store.lengths, np.concatenate([part.lengths for part in store.stores]))
    places = sorted({0, 1, len(whole), *(int(base) + d for base in bases[1:-1] for d in (-1, 0, 1))})
    for begin in places:
        for end in places:
            np.testing.assert_array_equal(store.read(begin, end), whole[begin:end])
            assert store.read(begin, end).dtype == np.uint16
    for document in (0, 5, 300, 340, 369):
        begin, end = store.offsets[document : document + 2]
        assert store.read(begin, end)[0] == whole[begin]


def test_every_piece_of_every_source_is_in_the_plan_once(store: MixedStore, plan: MixedPlan):
    seen = np.zeros(store.size, np.int64)
    for start, size in zip(plan.starts, plan.sizes, strict=True):
        seen[start : start + size] += 1
    assert (seen == 1).all()
    bases = np.cumsum([0, *(part.size for part in store.stores)])
    for row in range(plan.rows):
        here = slice(*plan.bounds[row : row + 2])
        assert len(set(np.searchsorted(bases, plan.starts[here], "right"))) == 1
        assert source_of(plan, np.array([row]))[0] == np.searchsorted(bases, plan.starts[here][0], "right") - 1


@pytest.mark.parametrize("rows", [1, 7, 100, 5000, BLOCK, BLOCK + 1, 3 * BLOCK - 1])
def test_any_run_of_rows_has_the_shares_of_the_whole(plan: MixedPlan, rows: int):
    share = plan.row_counts(BLOCK) / BLOCK
    for first in (0, 12345):
        found = np.bincount(source_of(plan, plan.stream(first, rows)), minlength=3)
        # from the block's begin a source is at most K - 1 = 2 rows ahead or behind (all are in [0, 1) of a part); a
        # run is the difference of two such
        assert np.abs(found - rows * share).max() <= 2 * (1 + (first > 0))
    np.testing.assert_array_equal(
        plan.row_counts(rows), np.bincount(source_of(plan, plan.stream(0, rows)), minlength=3)
    )


def test_weights_are_shares_of_the_tokens(store: MixedStore, plan: MixedPlan):
    tokens = plan.token_counts(BLOCK)
    np.testing.assert_allclose(tokens / tokens.sum(), np.array(WEIGHTS) / 10, atol=1e-3)
    rows = plan.row_counts(BLOCK)
    assert rows[2] / rows.sum() > 0.13  # rows that are 64 % full: more of them
    for count in (1, 50, 999):
        of_row = np.add.reduceat(plan.sizes, plan.bounds[:-1])
        drawn = plan.stream(0, count)
        want = np.bincount(source_of(plan, drawn), of_row[drawn], minlength=3)
        np.testing.assert_array_equal(plan.token_counts(count), want)
    lines = shares(store, plan, BLOCK)
    assert [line.split()[1] for line in lines] == ["a:", "b:", "c:"]
    assert "source b: 30.0" in lines[1]
    assert "(weight 30.00%)" in lines[1]
    assert lines[2].endswith(f", {rows[2] / 30:.2f} epochs")
    assert shares(store.stores[0], make_plan(store.stores[0].lengths, 64, seed=5), 9) == []


def test_fill_is_that_of_the_rows_as_they_are_dealt(store: MixedStore, plan: MixedPlan):
    seen = plan.token_counts(BLOCK).sum() / (BLOCK * 64)
    assert plan.fill == pytest.approx(seen, rel=0.01)  # whole epochs in the one, BLOCK rows in the other
    heavy = plan_rows(dataclasses.replace(store, weights=(1.0, 1.0, 1e4)), 64, seed=5)
    assert heavy.fill == pytest.approx(41 / 64, rel=0.001)


def test_each_source_goes_through_its_epochs_in_its_own_order(plan: MixedPlan):
    stream = plan.stream(0, 4000)
    sources = source_of(plan, stream)
    for k, size in enumerate(np.diff(plan.first_rows)):
        mine = stream[sources == k] - plan.first_rows[k]
        np.testing.assert_array_equal(mine, in_order(int(size), 5, np.arange(len(mine))))
        if len(mine) >= size:
            assert sorted(mine[:size]) == list(range(size))
    assert plan.epochs(4000)[2] > 5 > plan.epochs(400)[1]


def test_the_stream_is_known_at_any_place(plan: MixedPlan):
    whole = plan.stream(0, 2 * BLOCK + 100)
    for first in (0, 1, 777, BLOCK - 3, BLOCK, 2 * BLOCK - 1):
        np.testing.assert_array_equal(plan.stream(first, 90), whole[first : first + 90])
    # spelt out in hashes, not drawn from a generator whose stream may change: a run must go on with the same rows
    text = ",".join(map(str, whole[:2000].tolist()))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "995fc4cb089aa392"


def test_seeds_and_weights_are_other_streams(store: MixedStore, plan: MixedPlan):
    for other in (
        plan_rows(store, 64, seed=6),
        plan_rows(dataclasses.replace(store, weights=(5.0, 4.0, 1.0)), 64, seed=5),
    ):
        assert (other.stream(0, 200) != plan.stream(0, 200)).any()
    scaled = plan_rows(dataclasses.replace(store, weights=(0.6, 0.3, 0.1)), 64, seed=5)
    np.testing.assert_array_equal(scaled.stream(0, 2000), plan.stream(0, 2000))


def test_one_source_is_no_mixture(store: MixedStore):
    """The rows in the order of the source's own plan."""
    one = dataclasses.replace(store, stores=store.stores[:1], weights=(0.1,), names=("a",))
    plain = make_plan(store.stores[0].lengths, 64, seed=5)
    np.testing.assert_array_equal(plan_rows(one, 64, seed=5).stream(3, 500), plain.stream(3, 500))


def test_plans_that_do_not_go_together_are_refused(store: MixedStore):
    plans = [make_plan(part.lengths, 64, seed=5) for part in store.stores]
    for those, weights in (
        ([plans[0], make_plan(store.stores[1].lengths, 32, seed=5)], (1.0, 1.0)),
        ([plans[0], make_plan(store.stores[1].lengths, 64, seed=6)], (1.0, 1.0)),
        (plans, (1.0, 1.0)),
    ):
        with pytest.raises(ValueError, match="plans must have one seq_len and one seed"):
            mix(those, weights)


def test_a_weight_without_a_row_in_a_block_is_refused():
    with pytest.raises(UserError, match=r"^data: each weight must be at least about 1 / 65536 .*got 1e-06 .*source 2"):
        mixture._rows_of_block(np.array([1.0, 1e-6]))
    for parts in ([1.0, 1.0, 1.0], [1e300, 3e299], [0.7, 1e-5, 0.3], [5.0]):
        counts = mixture._rows_of_block(np.array(parts))
        assert counts.sum() == BLOCK
        np.testing.assert_allclose(counts / BLOCK, np.array(parts) / sum(parts), atol=1 / BLOCK)


@pytest.mark.parametrize("axes", [{"cp": 4}, {"cp": 2, "dp": 2}, {"cp": 3}, {"fsdp": 4}, {"dp": 2, "cp": 4}], ids=str)
def test_batches_are_the_same_on_every_mesh_and_from_every_start(store: MixedStore, plan: MixedPlan, axes: dict):
    cp = axes.get("cp", 1)
    with Batches(store, plan, 4, make_mesh()) as one, Batches(store, plan, 4, make_mesh(**axes)) as many:
        for step in (0, 17, 40_000):  # the last behind a block's end
            want = one.natural(plan.stream(4 * step, 4))
            got = from_zigzag({name: np.asarray(x) for name, x in many.at(step).items()}, cp)
            for name in want:
                np.testing.assert_array_equal(got[name][:, :64], want[name])
            tokens = got["tokens"][got["real"]]
            rows = np.repeat(source_of(plan, plan.stream(4 * step, 4)), got["real"].sum(axis=1))
            np.testing.assert_array_equal(np.searchsorted([20000, 40000], tokens, "right"), rows)


def test_what_a_run_needs_beside_batches(store: MixedStore, plan: MixedPlan):
    """Held-out rows are mixed too; prompts are spread over all sources."""
    with Batches(store, plan, 4, make_mesh(), repeat=False) as batches:
        held_out = HeldOut(batches)
        assert (held_out.count, held_out.rows) == (len(batches), plan.rows)
        rows = np.concatenate([batches.rows(n) for n in range(held_out.count)])
        np.testing.assert_array_equal(rows[: plan.rows], plan.stream(0, plan.rows))
        assert (rows[plan.rows :] == -1).all()
    dataset = type("Data", (), {"held_out": store})
    assert len(np.unique(prompts(dataset, 20, 10)[:, 0] // 20000)) == 3  # pyright: ignore[reportArgumentType]


PROCESS = """
import sys
import jax, json
import numpy as np
sys.path.insert(0, sys.argv[1])
from zigzag_jax.train.config import HostsConfig
from zigzag_jax.train.mesh import join
jax.config.update("jax_num_cpu_devices", 2)
join(HostsConfig(sys.argv[2], 2, int(sys.argv[3]), 60))
import test_mixture
print(json.dumps(test_mixture.read_in_a_process()))
"""


class Noted(TokenStore):
    """A store that notes what is read of it."""

    def read(self, begin: int, end: int) -> np.ndarray:
        self.__dict__.setdefault("reads", []).append((int(begin), int(end)))
        return super().read(begin, end)


def noted() -> MixedStore:
    """One document a row, so that what is read tells the row."""
    stores = (make_store(base, np.full(6, 64)) for base in (1000, 2000))
    return MixedStore(tuple(Noted(part.tokens, part.offsets) for part in stores), (2.0, 1.0), ("a", "b"))


def read_in_a_process() -> dict:
    """What this process holds of batch 3 on dp 2 x cp 2, and how many tokens it read for it."""
    store = noted()
    mesh = jax.make_mesh((2, 1, 2), ("dp", "fsdp", "cp"), axis_types=(AxisType.Auto,) * 3)
    with Batches(store, plan_rows(store, 64, seed=5), 4, mesh) as batches:
        tokens = batches._make(3)["tokens"]
    place = lambda s: [part.indices(n)[:2] for part, n in zip(s.index, tokens.shape, strict=True)]
    shards = [[*place(s), np.asarray(s.data).tolist()] for s in tokens.addressable_shards]
    return {"shards": shards, "read": [sum(b - a for a, b in part.__dict__.get("reads", [])) for part in store.stores]}


def test_two_processes_read_their_own_slices_and_no_more():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-c", PROCESS, str(Path(__file__).parent), f"127.0.0.1:{port}"]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    processes = [subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, text=True, env=env) for i in range(2)]
    told = [json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in processes]
    store = noted()
    with Batches(store, plan_rows(store, 64, seed=5), 4, make_mesh(dp=2, cp=2)) as batches:
        want = np.asarray(batches.at(3)["tokens"])
    got = np.zeros_like(want)
    for process, it in enumerate(told):
        for (top, bottom), (left, right), values in it["shards"]:
            assert top // 2 == process  # the first two rows of the batch lie in process 0
            got[top:bottom, left:right] = values
        # two rows of 64 tokens, and their labels: one fewer in each, for nothing follows a document's last token
        assert sum(it["read"]) == 2 * (64 + 63)
    np.testing.assert_array_equal(got, want)
