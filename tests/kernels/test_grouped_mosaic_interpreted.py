"""The grouped matmul's Hopper kernels without a GPU: interpreted (interpreted.py), against float64.

What test_grouped_gpu.py and test_grouped_swiglu_gpu.py ask on a GPU, of the smallest shapes in which it can go wrong.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from zigzag_jax.kernels import grouped_matmul, grouped_swiglu

if jax.__version_info__ >= (0, 12):
    pytest.skip("it is the interpreter of the pinned jax that is taught", allow_module_level=True)

from interpreted import interpreted

BAR = 2.5e-3  # bfloat16, one rounding of the result
SWIGLU_BAR = 5e-3  # and of hidden, inner and dhidden
MULTIPROCESSORS = 3


class Case(NamedTuple):
    sizes: list[int]
    rows: int
    k: int = 64
    n: int = 128


CASES = {
    "mixed": Case([0, 1, 7, 64, 129, 0, 63, 20], 304),  # and rows past the sum
    "wide": Case([130, 0, 3, 60], 193, 128, 320),
    "one-piece-wide": Case([64, 0, 70], 134, 64, 64),
    "none": Case([0, 0], 64),
}


def cases(*quick: str):
    """All of them, those but the named ones marked as slow."""
    return [
        pytest.param(case, marks=() if name in quick else pytest.mark.slow, id=name) for name, case in CASES.items()
    ]


def past_the_sum(array, case: Case):
    return array.at[sum(case.sizes) :].set(jnp.nan)


def clean(array):
    return np.nan_to_num(np.asarray(array, np.float64), nan=0.0)


@pytest.mark.parametrize("case", cases("mixed"))
def test_grouped_matmul(case):
    rng = np.random.default_rng(0)
    shapes = (case.rows, case.k), (len(case.sizes), case.k, case.n), (case.rows, case.n)
    x, w, dy = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes)
    x, dy = past_the_sum(x, case), past_the_sum(dy, case)
    matmul = functools.partial(grouped_matmul, group_sizes=jnp.asarray(case.sizes, jnp.int32), implementation="mosaic")
    with interpreted(MULTIPROCESSORS, warps_apart=False):
        y, vjp = jax.vjp(matmul, x, w)
        dx, dw = vjp(dy)
    want = oracle.grouped(clean(x), w, case.sizes, clean(dy))
    for name, got, right in zip(("y", "dx", "dw"), (y, dx, dw), want, strict=True):
        oracle.check(name, got, right, BAR)
    for got in (y, dx):
        assert not np.asarray(got[sum(case.sizes) :], np.float32).any()
    assert not np.asarray(dw, np.float32)[np.asarray(case.sizes) == 0].any()


@pytest.mark.slow
def test_grouped_matmul_of_two_runs():
    sizes, length = np.asarray([[3, 0, 60, 20], [0, 64, 1, 30]]), 96
    rng = np.random.default_rng(0)
    shapes = (2 * length, 64), (4, 64, 128), (2 * length, 128)
    x, w, dy = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes)
    unused = np.concatenate([np.arange(length) >= own.sum() for own in sizes])[:, None]
    x, dy = (jnp.where(unused, jnp.nan, a) for a in (x, dy))
    matmul = functools.partial(grouped_matmul, group_sizes=jnp.asarray(sizes, jnp.int32), implementation="mosaic")
    with interpreted(MULTIPROCESSORS, warps_apart=False):
        y, vjp = jax.vjp(matmul, x, w)
        dx, dw = vjp(dy)
    part = lambda a, run: clean(a[run * length : (run + 1) * length])
    parts = [oracle.grouped(part(x, run), w, sizes[run], part(dy, run)) for run in range(2)]
    want = *(np.concatenate([each[i] for each in parts]) for i in (0, 1)), sum(each[2] for each in parts)
    for name, got, right in zip(("y", "dx", "dw"), (y, dx, dw), want, strict=True):
        oracle.check(name, got, right, BAR)


@pytest.mark.parametrize("case", cases("mixed"))
def test_grouped_swiglu(case):
    rng, d, f = np.random.default_rng(0), case.k, case.n
    normal = lambda *size: rng.standard_normal(size)
    groups = len(case.sizes)
    arrays = (
        normal(case.rows, d),
        normal(groups, d, 2 * f) * d**-0.5,
        normal(groups, f, d) * f**-0.5,
        normal(case.rows, d),
    )
    x, gate_up, down, dy = (jnp.asarray(a, jnp.bfloat16) for a in arrays)
    scale = past_the_sum(jnp.asarray(normal(case.rows), jnp.float32), case)
    x, dy = past_the_sum(x, case), past_the_sum(dy, case)
    sizes = jnp.asarray(case.sizes, jnp.int32)
    mlp = functools.partial(grouped_swiglu, group_sizes=sizes, fused=True, implementation="mosaic")
    with interpreted(MULTIPROCESSORS, warps_apart=False):
        y, vjp = jax.vjp(mlp, x, gate_up, down, scale)
        got = y, *vjp(dy)
    want = oracle.grouped_swiglu(clean(x), gate_up, down, clean(scale), case.sizes, clean(dy))
    for name, a, b in zip(("y", "dx", "dgate_up", "ddown", "dscale"), got, want, strict=True):
        oracle.check(name, a, b, SWIGLU_BAR)
