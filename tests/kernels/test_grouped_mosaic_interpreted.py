"""The grouped matmul's Hopper kernels without a GPU: interpreted (interpreted.py), against float64.

What test_grouped_gpu.py and test_grouped_swiglu_gpu.py ask on a GPU, of the smallest shapes in which it can go wrong.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import test_grouped_gpu
import test_grouped_swiglu_gpu
from test_grouped_gpu import Case, truth

from zigzag_jax.kernels import grouped_matmul, grouped_swiglu

if jax.__version_info__ >= (0, 12):
    pytest.skip("it is the interpreter of the pinned jax that is taught", allow_module_level=True)

from interpreted import cases, interpreted

BAR = test_grouped_gpu.BARS[jnp.bfloat16]

CASES = {
    "mixed": Case([0, 1, 7, 64, 129, 0, 63, 20], 304, 64, 128),  # and rows past the sum
    "wide": Case([130, 0, 3, 60], 193, 128, 320),
    "one-piece-wide": Case([64, 0, 70], 134, 64, 64),
    "none": Case([0, 0], 64, 64, 128),
}


@pytest.mark.parametrize("case", cases(CASES, "mixed"))
def test_grouped_matmul(case):
    x, w, dy = test_grouped_gpu.draw(case)
    matmul = functools.partial(grouped_matmul, group_sizes=jnp.asarray(case.sizes, jnp.int32), implementation="mosaic")
    with interpreted(warps_apart=False):
        y, vjp = jax.vjp(matmul, x, w)
        dx, dw = vjp(dy)
    want = truth(x, w, case.sizes, dy)
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
    with interpreted(warps_apart=False):
        y, vjp = jax.vjp(matmul, x, w)
        dx, dw = vjp(dy)
    part = lambda a, run: a[run * length : (run + 1) * length]
    parts = [truth(part(x, run), w, sizes[run], part(dy, run)) for run in range(2)]
    want = *(np.concatenate([each[i] for each in parts]) for i in (0, 1)), sum(each[2] for each in parts)
    for name, got, right in zip(("y", "dx", "dw"), (y, dx, dw), want, strict=True):
        oracle.check(name, got, right, BAR)


@pytest.mark.parametrize("case", cases(CASES, "mixed"))
def test_grouped_swiglu(case):
    *arrays, dy = test_grouped_swiglu_gpu.draw(case)
    sizes = jnp.asarray(case.sizes, jnp.int32)
    mlp = functools.partial(grouped_swiglu, group_sizes=sizes, fused=True, implementation="mosaic")
    with interpreted(warps_apart=False):
        y, vjp = jax.vjp(mlp, *arrays)
        got = y, *vjp(dy)
    want = test_grouped_swiglu_gpu.truth(arrays, case.sizes, dy)
    for name, a, b in zip(test_grouped_swiglu_gpu.NAMES, got, want, strict=True):
        oracle.check(name, a, b, test_grouped_swiglu_gpu.BARS[jnp.bfloat16])
