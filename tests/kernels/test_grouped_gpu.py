"""The grouped matmul on a GPU, by the kernel that it has: `pytest -m gpu tests/kernels/test_grouped_gpu.py`.

The contract against float64 with random cotangents in the shapes where such kernels go wrong, what may be nan and where
it may go, and the transformations that a model wraps around them.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cards import GPU, HOPPER

from zigzag_jax.kernels import GROUPED, grouped_implementation, grouped_matmul
from zigzag_jax.kernels.grouped import mosaic, mosaic_outer, mosaic_rows, triton
from zigzag_jax.kernels.grouped.mosaic_pipeline import GroupedTuning
from zigzag_jax.kernels.grouped.row_tiles import bounds

MOSAIC = pytest.param("mosaic", marks=pytest.mark.skipif(not HOPPER, reason="no Hopper GPU"))
TRITON = pytest.param("triton", marks=pytest.mark.skipif(bool(triton._missing()), reason="no jax-triton"))

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="no GPU")]
each_kernel = pytest.mark.parametrize("kernel", [MOSAIC, TRITON])
hopper = pytest.mark.skipif(not HOPPER, reason="no Hopper GPU")

# one rounding of the result; a float32 result shows that tensor cores truncate each of up to 256 additions
BARS = {jnp.bfloat16: 2.5e-3, jnp.float16: 3.5e-4, jnp.float32: 5e-5}
ODD = [0, 1, 7, 64, 128, 129, 63, 300, 0, 513, 2, 65, 127, 255, 0, 0, 8, 72, 1000, 3, 0, 191, 1, 0]


class Case(NamedTuple):
    sizes: list[int]
    rows: int
    k: int = 256
    n: int = 320
    dtype: type = jnp.bfloat16


def uneven(count: int, rows: int, seed: int = 0) -> list[int]:
    rng = np.random.default_rng(seed)
    return rng.multinomial(rows, rng.dirichlet(np.ones(count) * 4)).tolist()


CASES = {
    "odd": Case(ODD, 4096, 512, 768),
    "odd-narrow": Case(ODD, 4096),
    "uneven": Case(uneven(24, 1536), 1536, 128, 320),
    "uneven-wide": Case(uneven(24, 1536, 1), 1536, 256, 128),
    "one-takes-all": Case([0] * 11 + [4096] + [0] * 12, 4096),
    "none": Case([0] * 24, 1024),
    "aligned": Case([128] * 8 + [256] * 8 + [64] * 8, 3584),
    "one-row-each": Case([1] * 300, 320),
    "seven-rows-each": Case([7] * 150, 1200, 64, 64),
    "eight-rows": Case([3, 0, 5], 8, 64, 64),
    "one-row": Case([1], 1, 64, 64),
    "one-piece-wide": Case([64, 200, 0, 128], 400, 64, 64),  # narrower than a tile: what is stored past the end
    "rows-not-by-eights": Case([*uneven(9, 1000), 13], 1037),
    "rows-past-the-sum": Case(uneven(24, 1000), 1536),
    "float16": Case(ODD, 4096, 256, 320, jnp.float16),
    "long-contraction": Case(ODD, 4096, 2048, 192),  # fixed shares in the forward, drawn items in dx
    "long-columns": Case(ODD, 4096, 192, 2048),  # the other way round
    "many-items": Case(uneven(64, 16384), 16384, 768, 1408),
}


def draw(case: Case, seed: int = 0):
    """x, w, dy; rows past the sum of sizes are nan in x and dy."""
    rng = np.random.default_rng(seed)
    sizes = (case.rows, case.k), (len(case.sizes), case.k, case.n), (case.rows, case.n)
    x, w, dy = (jnp.asarray(rng.standard_normal(size), case.dtype) for size in sizes)
    total = sum(case.sizes)
    return x.at[total:].set(jnp.nan), w, dy.at[total:].set(jnp.nan)


@functools.partial(jax.jit, static_argnames=("implementation", "out_dtype"))
def run(x, w, sizes, dy, out_dtype=None, implementation="mosaic"):
    f = lambda x, w: grouped_matmul(x, w, sizes, out_dtype=out_dtype, implementation=implementation)
    y, vjp = jax.vjp(f, x, w)
    return y, *vjp(dy.astype(y.dtype))


def truth(x, w, sizes, dy):
    clean = lambda a: np.nan_to_num(np.asarray(a, np.float64), nan=0.0)
    return oracle.grouped(clean(x), w, sizes, clean(dy))


@each_kernel
@pytest.mark.parametrize("case", CASES)
def test_contract(case, kernel):
    case = CASES[case]
    x, w, dy = draw(case)
    sizes, total = jnp.asarray(case.sizes, jnp.int32), sum(case.sizes)
    want = truth(x, w, case.sizes, dy)
    y, dx, dw = run(x, w, sizes, dy, implementation=kernel)
    for name, got, right in zip(("y", "dx", "dw"), (y, dx, dw), want, strict=True):
        assert got.dtype == case.dtype
        oracle.check(name, got, right, BARS[case.dtype])
    assert not np.asarray(y[total:], np.float32).any()
    assert not np.asarray(dx[total:], np.float32).any()
    empty = np.asarray(case.sizes) == 0
    assert not np.asarray(dw, np.float32)[empty].any()
    wide, *_ = run(x, w, sizes, dy, jnp.float32, kernel)
    assert wide.dtype == jnp.float32
    oracle.check("y in float32", wide, want[0], BARS[jnp.float32])
    np.testing.assert_array_equal(wide.astype(case.dtype), y)  # rounded once, at the end
    outer = jax.jit(functools.partial(GROUPED[kernel].outer, out_dtype=jnp.float32))(x, dy, sizes)
    oracle.check("dw in float32", outer, want[2], BARS[jnp.float32])
    np.testing.assert_array_equal(outer.astype(case.dtype), dw)
    for got, again in zip(
        (y, dx, dw), run(x, w, sizes, dy, implementation=kernel), strict=True
    ):  # drawn items come in any order
        np.testing.assert_array_equal(got, again)


@each_kernel
@pytest.mark.parametrize("runs", [2, 3, 8])
def test_runs_that_lie_as_they_arrived(runs, kernel):
    """Group sizes [R, G]: what is past the sum of each run is nan; every run has other sizes, some groups none."""
    rng, groups, length, k, n = np.random.default_rng(runs), 12, 512, 256, 320
    sizes = np.stack([rng.multinomial(length - 60 * r, rng.dirichlet(np.ones(groups) / 2)) for r in range(runs)])
    shape = lambda *size: jnp.asarray(rng.standard_normal(size), jnp.bfloat16)
    x, w, dy = shape(runs * length, k), shape(groups, k, n), shape(runs * length, n)
    unused = np.concatenate([np.arange(length) >= own.sum() for own in sizes])[:, None]
    x, dy = (jnp.where(unused, jnp.nan, a) for a in (x, dy))
    y, dx, dw = run(x, w, jnp.asarray(sizes, jnp.int32), dy, implementation=kernel)
    clean = lambda a, r: np.nan_to_num(np.asarray(a[r * length : (r + 1) * length], np.float64))
    parts = [oracle.grouped(clean(x, r), w, sizes[r], clean(dy, r)) for r in range(runs)]
    want = *(np.concatenate([part[i] for part in parts]) for i in (0, 1)), sum(part[2] for part in parts)
    for name, got, right in zip(("y", "dx", "dw"), (y, dx, dw), want, strict=True):
        oracle.check(name, got, right, BARS[jnp.bfloat16])


@hopper
@pytest.mark.parametrize("drawn", [False, True], ids=["fixed", "drawn"])
@pytest.mark.parametrize("case", ["odd", "uneven", "rows-past-the-sum", "many-items"])
def test_no_tuning_changes_a_bit(case, drawn):
    case = CASES[case]
    x, w, dy = draw(case)
    sizes = jnp.asarray(case.sizes, jnp.int32)
    tuning = GroupedTuning(drawn=drawn)
    schedule = mosaic._row_tiles(sizes, case.rows)
    y, dx, dw = run(x, w, sizes, dy)
    product = jax.jit(functools.partial(mosaic_rows.product, out_dtype=case.dtype, tuning=tuning), static_argnums=3)
    np.testing.assert_array_equal(product(x, w, schedule, False), y)
    np.testing.assert_array_equal(product(dy, w, schedule, True), dx)
    edges = bounds(sizes, 0, case.rows)
    outer = jax.jit(functools.partial(mosaic_outer.outer, out_dtype=case.dtype, tuning=tuning))(x, dy, edges)
    np.testing.assert_array_equal(outer, dw)


@each_kernel
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("sizes", [ODD, [37] * 60, [64] * 40], ids=["odd", "37", "64"])
def test_what_is_not_finite_stays_in_its_group(sizes, bad, kernel):
    case = Case(sizes, 4096)
    x, w, dy = draw(case)
    total, run_sizes = sum(sizes), jnp.asarray(sizes, jnp.int32)
    clean = run(x, w, run_sizes, dy, implementation=kernel)
    sick = [g for g, size in enumerate(sizes) if size][1::3]
    rows = np.zeros(case.rows, bool)
    for g, own in oracle.groups(sizes):
        rows[own] = g in sick
    ill = jnp.asarray(rows)[:, None]
    y, dx, dw = run(jnp.where(ill, bad, x), w, run_sizes, jnp.where(ill, -bad, dy), implementation=kernel)
    well, healthy = ~rows & (np.arange(case.rows) < total), np.setdiff1d(np.arange(len(sizes)), sick)
    for got, want, at in zip((y, dx, dw), clean, (well, well, healthy), strict=True):
        np.testing.assert_array_equal(np.asarray(got)[at], np.asarray(want)[at])
    assert not np.isfinite(np.asarray(y, np.float32)[rows]).any()
    assert not np.isfinite(np.asarray(dw, np.float32)[sick]).any()
    sick_w = run(x, w.at[sick[0]].set(bad), run_sizes, dy, implementation=kernel)
    np.testing.assert_array_equal(np.asarray(sick_w[0])[well], np.asarray(clean[0])[well])


@each_kernel
def test_scan_and_remat_do_not_change_the_gradient(kernel):
    rng = np.random.default_rng(0)
    rows, size, inner, experts = 1536, 256, 320, 12
    sizes = jnp.asarray(uneven(experts, 1500), jnp.int32)
    x, cotangent = (jnp.asarray(rng.standard_normal((rows, size)), jnp.bfloat16) for _ in range(2))
    draw = lambda a, b: jnp.asarray(rng.standard_normal((3, experts, a, b)) * a**-0.5, jnp.bfloat16)
    weights = draw(size, inner), draw(size, inner), draw(inner, size)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def gradient(implementation, remat):
        def layer(x, weights):
            matmul = lambda x, w: grouped_matmul(x, w, sizes, implementation=implementation)
            gate, up, down = weights
            return x + matmul(jax.nn.silu(matmul(x, gate)) * matmul(x, up), down), None

        step = jax.checkpoint(layer) if remat else layer
        loss = lambda x, w: jnp.vdot(jax.lax.scan(step, x, w)[0].astype(jnp.float32), cotangent.astype(jnp.float32))
        return jax.tree.leaves(jax.grad(loss, argnums=(0, 1))(x, weights))

    plain = gradient(kernel, False)
    for got, again, want in zip(plain, gradient(kernel, True), gradient("reference", False), strict=True):
        oracle.check("against the reference", got, np.asarray(want, np.float64), 2e-2)  # three layers in bfloat16
        oracle.check("remat", again, np.asarray(got, np.float64), 4e-3)  # XLA may round silu elsewhere


@each_kernel
def test_offsets_past_two_to_the_31(kernel):
    """2^21 rows of 2048 columns, 4.3e9 values; groups end inside a tile: the last rows are stored one by one."""
    rows, k, n, tail = 2**21, 64, 2048, 300
    rng = np.random.default_rng(0)
    x_tail = jnp.asarray(rng.standard_normal((tail, k)), jnp.bfloat16)
    w = jnp.asarray(rng.standard_normal((3, k, n)), jnp.bfloat16)
    sizes = jnp.asarray([rows - tail, 101, tail - 101], jnp.int32)

    @jax.jit
    def long(x, w):
        y = grouped_matmul(jnp.zeros((rows, k), x.dtype).at[-tail:].set(x), w, sizes, implementation=kernel)
        return y[-tail:], jnp.abs(y[:-tail]).max()

    got, rest = long(x_tail, w)
    assert rest == 0
    want = oracle.grouped(x_tail, w, [0, 101, tail - 101], np.zeros((tail, n)))[0]
    oracle.check("the last rows", got, want, BARS[jnp.bfloat16])


@hopper
def test_what_none_picks():
    x, w = jnp.zeros((8, 128), jnp.bfloat16), jnp.zeros((2, 128, 64), jnp.bfloat16)
    assert grouped_implementation(x, w) == "mosaic"
