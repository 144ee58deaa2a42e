"""The Hopper kernels' contract without a GPU: interpreted (interpreted.py), against float64 with random cotangents.

Tiles, ranges and columns that are taken for others, sums that lack a part, memory that is overwritten before what reads
it was waited for, barriers that are awaited in vain. test_flash_gpu.py has the same contract on a GPU.
"""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import Heads
from test_flash_gpu import BARS, split

from zigzag_jax.kernels import flash_bwd, flash_fwd
from zigzag_jax.kernels.flash import mosaic_tuning, mosaic_zeros
from zigzag_jax.ranges import KeyRange

if jax.__version_info__ >= (0, 12):
    pytest.skip("it is the interpreter of the pinned jax that is taught", allow_module_level=True)

from interpreted import MULTIPROCESSORS, cases, interpreted


class Case(NamedTuple):
    heads: Heads
    rows: int
    keys: int
    batch: int = 1
    softcap: float | None = None
    shared: int = 0
    dtype: type = jnp.bfloat16
    wide: bool = False
    """Every key tile is seen by all tiles of queries."""


CASES = {
    "D64": Case(Heads(2, 1, 64, 64), 130, 257),
    "D96-E64": Case(Heads(2, 1, 96, 64), 100, 130),
    "D96": Case(Heads(2, 2, 96, 96), 130, 130),
    "gqa4": Case(Heads(4, 1, 128, 128), 192, 384),
    "batch": Case(Heads(1, 1, 128, 128), 130, 150, batch=2),
    "one-row": Case(Heads(2, 1, 128, 128), 1, 129),
    "softcap": Case(Heads(2, 1, 128, 128), 130, 256, softcap=3.0),
    "mla": Case(Heads(2, 2, 192, 128), 256, 300),
    "mla-shared": Case(Heads(2, 2, 192, 128), 130, 200, shared=64),
    "mla-float16": Case(Heads(2, 2, 192, 128), 130, 200, dtype=jnp.float16),
    "mla-softcap": Case(Heads(2, 2, 192, 128), 130, 200, softcap=3.0),
    "D256": Case(Heads(2, 1, 256, 256), 192, 192),
    "D256-batch-softcap": Case(Heads(1, 1, 256, 256), 65, 130, batch=2, softcap=3.0),
}


LONG = {  # two chunks an item, or three: 10 tiles of queries, 12, or 20
    "gqa4": Case(Heads(4, 1, 128, 128), 320, 140, wide=True),
    "mla": Case(Heads(4, 1, 192, 128), 384, 140, wide=True),
    "D256": Case(Heads(4, 1, 256, 256), 320, 140, wide=True),
}


class Drawn(NamedTuple):
    """Arguments of a case and what they give."""

    args: tuple[Any, Any, Any]
    keys: KeyRange
    dout: jax.Array
    dlse: np.ndarray
    options: dict
    want: oracle.Attention


def draw(case: Case) -> Drawn:
    rng = np.random.default_rng(case.rows)
    q, k, v, dout = (jnp.asarray(x, case.dtype) for x in case.heads.draw(rng, case.batch, case.rows, case.keys))
    start, stop = oracle.random_bounds(rng, case.batch, case.rows, case.keys)
    if case.wide:
        start, stop = np.minimum(start, 60), np.maximum(stop, case.keys - 4)
    keys = KeyRange(jnp.asarray(start), jnp.asarray(stop))
    mask = oracle.seen(*keys, case.keys)
    dlse = rng.standard_normal((case.batch, case.heads.heads, case.rows)) * mask.any(-1)[:, None]
    options = dict(scale=case.heads.dim**-0.5, softcap=case.softcap)
    given = k
    if case.shared:
        given = split(k, case.shared)
        k = given.whole()
    want = oracle.attention(q, k, v, mask, dout=dout, dlse=dlse, **options)
    return Drawn((q, given, v), keys, dout, dlse, options | {"implementation": "mosaic"}, want)


def test_every_head_of_the_table_is_interpreted():
    assert {(case.heads.dim, case.heads.out_dim) for case in CASES.values()} == mosaic_tuning.HOPPER.keys()


@pytest.mark.parametrize("sizes", cases(CASES, "gqa4", "mla-shared"))
def test_forward(sizes):
    case, half = draw(sizes), sizes.keys // 2
    cut = lambda low, high: KeyRange(*(jnp.clip(x, low, high) for x in case.keys))
    with interpreted(warps_apart=False):
        out, lse = flash_fwd(*case.args, case.keys, **case.options)
        first = flash_fwd(*case.args, cut(0, half), **case.options)
        second = flash_fwd(*case.args, cut(half, sizes.keys), carry=first, **case.options)
        last = flash_fwd(*case.args, cut(half, sizes.keys), carry=first, out_dtype=sizes.dtype, **case.options)
    bars = BARS[sizes.dtype]
    oracle.check("out", out, case.want.out, bars["out"])
    oracle.check("lse", lse, case.want.lse, bars["lse"])
    oracle.check("out in two calls", second[0], case.want.out, bars["out"])
    oracle.check("lse in two calls", second[1], case.want.lse, bars["lse"])
    np.testing.assert_array_equal(last[0], second[0].astype(sizes.dtype))
    np.testing.assert_array_equal(last[1], second[1])


@pytest.mark.parametrize("sizes", cases(CASES, "gqa4", "mla", "D256"))
def test_backward(sizes):
    backward(sizes, deterministic=False)


@pytest.mark.parametrize("sizes", cases(CASES, "mla"))
def test_backward_that_is_deterministic(sizes):
    backward(sizes, deterministic=True)


@pytest.mark.parametrize("sizes", cases(CASES, "mla"))
def test_backward_that_begins_dq(sizes):
    backward(sizes, deterministic=False, begun=False)


@pytest.mark.parametrize(("tiles", "columns"), [(1, 64), (MULTIPROCESSORS, 128), (3 * MULTIPROCESSORS + 1, 192)])
def test_zeros_are_everywhere(tiles, columns):
    with interpreted(warps_apart=False):
        np.testing.assert_array_equal(mosaic_zeros.zeros((tiles, 2, 8, columns)), np.zeros((tiles, 2, 8, columns)))


@pytest.mark.parametrize("shape", [(3, 8, 64), (16, 264)])
def test_zeros_of_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=rf"multiple of 16 and the last at most 256, got {re.escape(str(shape))}"):
        mosaic_zeros.zeros(shape)


@pytest.mark.parametrize("sizes", cases(LONG))
def test_backward_of_items_in_several_chunks(sizes):
    backward(sizes, deterministic=False)


@pytest.mark.parametrize("sizes", cases(LONG, "gqa4"))
def test_backward_whose_helpers_do_all_but_the_first_chunk(sizes):
    backward(sizes, deterministic=False, own_claims=False)


def backward(sizes: Case, deterministic: bool, own_claims: bool = True, begun: bool = True) -> None:
    case = draw(sizes)
    q, k, v = case.args
    out, lse = jnp.asarray(case.want.out, jnp.float32), jnp.asarray(case.want.lse, jnp.float32)
    delta = jnp.einsum("bqhe,bqhe->bhq", case.dout.astype(jnp.float32), out) - jnp.asarray(case.dlse, jnp.float32)
    before = jnp.asarray(np.random.default_rng(0).standard_normal(q.shape), jnp.float32) if begun else None
    args = q, k, v, lse, delta, case.dout, case.keys
    with interpreted(warps_apart=True, own_claims=own_claims):
        dq, dk, dv = flash_bwd(*args, dq=before, deterministic=deterministic, **case.options)
    for gradient, got in dict(dq=dq if before is None else dq - before, dk=dk, dv=dv).items():
        oracle.check(gradient, got, getattr(case.want, gradient), BARS[sizes.dtype][gradient])
