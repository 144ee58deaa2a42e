"""The Hopper kernels of the grouped matmul without a GPU: schedules in plain numbers, limits, and what None picks.

What they compute is tested on a GPU (test_grouped_gpu.py), how they compile in test_grouped_mosaic_compiled.py.
"""

# numbers stand in for refs and traced values here
# pyright: reportArgumentType=false

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from zigzag_jax import kernels
from zigzag_jax.kernels import GROUPED, grouped_implementation, grouped_matmul
from zigzag_jax.kernels.grouped import mosaic, mosaic_outer, mosaic_pipeline, mosaic_rows, mosaic_tuning
from zigzag_jax.kernels.grouped.mosaic_pipeline import STEP, TILE, GroupedTuning
from zigzag_jax.kernels.grouped.row_tiles import RowTiles, bounds


def draw_sizes(seed: int, rows: int, count: int) -> list[int]:
    """Sizes of the kinds that share eights of rows, tiles and steps in every way; the sum is at most `rows`."""
    rng = np.random.default_rng(seed)
    if seed % 2:
        sizes = rng.multinomial(rows - seed, rng.dirichlet(np.ones(count)))
    else:
        sizes = rng.choice([0, 0, 1, 2, 7, 8, 63, 64, 65, 127, 128, 129, 200], count)
    return np.where(np.cumsum(sizes) <= rows, sizes, 0).tolist()


CASES = [(1024, draw_sizes(seed, 1024, 12)) for seed in range(8)] + [
    (1024, [0] * 5), (1024, [0, 1024, 0]), (1024, [1] * 300), (8, [3, 0, 5]), (8, [8]), (384, [128, 128, 128]),
    (128 * 7 + 8, [7] * 129),
]  # fmt: skip


def row_tiles(sizes, rows: int, stride: int | None = None):
    """(group, first row of the tile, first and end of its own rows) of every row tile."""
    schedule = mosaic._row_tiles(jnp.asarray(sizes, jnp.int32), rows, stride)
    count = int(schedule.upto[-1])
    assert count <= schedule.group.shape[0], "the table is too short"
    assert len({len(part) for part in schedule[:4]}) == 1
    return [(int(g), 8 * int(e), int(a), int(b)) for g, e, a, b in zip(*(x[:count] for x in schedule[:4]), strict=True)]


@pytest.mark.parametrize(("rows", "sizes"), CASES)
def test_every_row_is_in_one_tile_of_its_group(rows, sizes):
    owner = np.full(rows, -1)
    for g, own in oracle.groups(sizes):
        owner[own] = g
    seen = np.zeros(rows, int)
    for group, row, first, end in row_tiles(sizes, rows):
        assert row <= first < end <= row + TILE
        assert (owner[first:end] == group).all()
        seen[first:end] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize("runs", [1, 2, 5])
@pytest.mark.parametrize("stride", [1000, 1001])
def test_every_row_of_every_run_is_in_one_tile_of_its_group(runs, stride):
    rows = -(-runs * stride // 8) * 8  # as padded for TMA
    sizes = [draw_sizes(seed, stride, 12) for seed in range(runs)]
    owner = np.full(rows, -1)
    for r, own_sizes in enumerate(sizes):
        for g, own in oracle.groups(own_sizes):
            owner[r * stride + own.start : r * stride + own.stop] = g
    seen = np.zeros(rows, int)
    for group, row, first, end in row_tiles(sizes, rows, stride):
        assert row <= first < end <= row + TILE
        assert (owner[first:end] == group).all()
        seen[first:end] += 1
    assert (seen == 1).all()


class Refs:
    """Numbers in the place of a kernel's refs."""

    def __init__(self, x) -> None:
        self.x, self.shape = np.asarray(x), np.shape(x)

    def __getitem__(self, at):
        assert 0 <= int(at) < self.shape[0], "a read past the end"
        return jnp.int32(self.x[int(at)])


@pytest.mark.parametrize(("rows", "sizes"), CASES)
def test_items_of_rows(rows, sizes):
    schedule = mosaic._row_tiles(jnp.asarray(sizes, jnp.int32), rows)
    items = mosaic_rows.Items(RowTiles(*map(Refs, schedule)), 3, 5)
    assert int(items.count) == 3 * len(row_tiles(sizes, rows))
    records = [tuple(map(int, items.at(jnp.int32(i)))) for i in range(6)]
    assert [record[-1] for record in records[:3]] == [0, 1, 2]
    assert len({record[:-1] for record in records[:3]}) == 1
    for record in (records[0], items.at(jnp.int32(items.count - 1))):
        assert int(items.steps(record)) == (1 if int(record[0]) < 0 else 5)
    items.at(jnp.int32(10**6))  # past the end: read ahead, never used


@pytest.mark.parametrize(("rows", "sizes"), CASES)
def test_steps_of_the_outer_product_hold_every_row(rows, sizes):
    items = mosaic_outer._Items(Refs(bounds(jnp.asarray(sizes, jnp.int32), 0, rows)), len(sizes), 1, 2)
    assert int(items.count) == 2 * len(sizes)
    for g, own in itertools.islice(oracle.groups(sizes), 20):
        group, _, column_tile, first, end = (int(x) for x in items.at(jnp.int32(2 * g + 1)))
        assert (group, column_tile, first, end) == (g, 1, own.start, own.stop)
        steps = int(items.steps((group, 0, 0, jnp.int32(first), jnp.int32(end))))
        assert steps >= 1
        assert end - STEP <= first // 8 * 8 + STEP * (steps - 1) <= max(end, first)
    items.at(jnp.int32(10**6))


@pytest.mark.parametrize("count", [1, 131, 132, 133, 1000])
def test_fixed_shares_are_every_item_once(count, monkeypatch):
    class Items:
        def __init__(self) -> None:
            self.count = jnp.int32(count)

        at = staticmethod(int)

    seen = []
    for sm in range(132):
        monkeypatch.setattr(mosaic_pipeline.lax, "axis_index", lambda _, sm=sm: jnp.int32(sm))
        monkeypatch.setattr(mosaic_pipeline, "sm_count", lambda: 132)
        pipeline = mosaic_pipeline.Pipeline(GroupedTuning(drawn=False), Items(), None, None, None)
        seen += [pipeline._mine(j) for j in range(int(pipeline._share()))]
    assert sorted(seen) == list(range(count))


# ---------------------------------------------------------------- what runs


def arrays(k=128, n=192, dtype=jnp.bfloat16, rows=8, groups=2):
    return jnp.zeros((rows, k), dtype), jnp.zeros((groups, k, n), dtype)


LIMITS = {
    "float32": (arrays(dtype=jnp.float32), "bfloat16 or float16"),
    "k": (arrays(k=96), "k and n that are multiples of 64"),
    "n": (arrays(n=100), "k and n that are multiples of 64"),
    "no-rows": (arrays(rows=0), "arrays that are not empty"),
    "no-groups": (arrays(groups=0), "arrays that are not empty"),
}


@pytest.mark.parametrize("case", LIMITS)
def test_limits(case):
    (x, w), words = LIMITS[case]
    assert mosaic.IMPLEMENTATION.limits(x, w) == words
    with pytest.raises(NotImplementedError, match=rf"'mosaic' needs {words}; got .*; implementation='reference' can"):
        grouped_matmul(x, w, jnp.zeros(w.shape[0], jnp.int32), implementation="mosaic")


@pytest.mark.parametrize(("k", "n"), [(2048, 768), (768, 2048), (2048, 1408), (256, 128), (128, 320), (64, 64)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_what_is_within_the_limits(k, n, dtype):
    assert mosaic.IMPLEMENTATION.limits(*arrays(k, n, dtype)) is None


@pytest.mark.parametrize(
    ("preference", "inputs", "picked"),
    [
        (("mosaic", "reference"), arrays(), "mosaic"),
        (("mosaic", "reference"), arrays(dtype=jnp.float32), "reference"),
        (("mosaic", "reference"), arrays(k=96), "reference"),
        (("reference",), arrays(), "reference"),
    ],
)
@pytest.mark.parametrize("backend", ["gpu", "cpu"])
def test_none_picks_by_device_and_shapes_and_says_so_once(preference, inputs, picked, backend, monkeypatch, caplog):
    monkeypatch.setattr(kernels, "_grouped_preference", lambda: preference)
    monkeypatch.setattr(kernels.jax, "default_backend", lambda: backend)
    kernels._say.cache_clear()
    with caplog.at_level("INFO", "zigzag_jax"):
        assert [grouped_implementation(*inputs) for _ in range(2)] == [picked, picked]
    (record,) = caplog.records
    assert f"grouped_matmul by '{picked}'" in record.getMessage()
    passed_over = picked != preference[0]
    assert ("'mosaic' needs" in record.getMessage()) == passed_over
    slow = picked == "reference" and backend == "gpu"  # plain XLA on a GPU is never silent
    assert ("slow" in record.getMessage()) == slow
    assert record.levelname == ("WARNING" if slow or passed_over else "INFO")


@pytest.mark.parametrize(
    ("flash", "preference"),
    [
        (("mosaic", "triton"), ("mosaic", "reference")),
        (("triton",), ("triton", "reference")),
        (("reference",), ("reference",)),
    ],
)
def test_preference_by_device(flash, preference, monkeypatch):
    monkeypatch.setattr(kernels, "_preference", lambda: flash)
    assert kernels._grouped_preference.__wrapped__() == preference
    assert set(preference) <= set(GROUPED)


@pytest.mark.parametrize("remat", [False, True])
def test_a_scan_over_layers_is_traced(remat):
    """With the counter of drawn items: a differentiated scan moves what does not depend on its turn out of its loop."""
    sizes = jnp.asarray([100, 28], jnp.int32)

    def layer(x, weights):
        up, down = weights
        matmul = lambda x, w: grouped_matmul(x, w, sizes, implementation="mosaic")
        return x + matmul(matmul(x, up), down), None

    step = jax.checkpoint(layer) if remat else layer
    gradient = jax.grad(lambda x, w: jnp.sum(jax.lax.scan(step, x, w)[0].astype(jnp.float32)), argnums=(0, 1))
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.bfloat16)
    x, weights = shape(128, 64), (shape(3, 2, 64, 128), shape(3, 2, 128, 64))
    assert jax.tree.map(lambda a: a.shape, jax.eval_shape(gradient, x, weights)) == (
        (128, 64),
        ((3, 2, 64, 128), (3, 2, 128, 64)),
    )


def test_tuning():
    with pytest.raises(ValueError, match=r"columns must be 128 or 256 .*, got 192"):
        GroupedTuning(columns=192)
    assert [mosaic_tuning.rows(k).drawn for k in (768, 1408, 2048)] == [True, True, False]
