"""The grouped matmul against float64 loops, and every error of its contract."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hops import equations

from zigzag_jax.kernels import GROUPED, grouped_matmul
from zigzag_jax.kernels.grouped import reference

M, K, N, G = 200, 24, 40, 5
SIZES = {
    "uneven": [3, 90, 1, 64, 42],
    "even": [40] * 5,
    "zeros": [0, 120, 0, 0, 80],
    "one-takes-all": [0, 0, 200, 0, 0],
    "rows-past-the-sum": [10, 0, 65, 30, 7],
    "blocks": [64, 64, 0, 64, 0],
    "nothing": [0] * 5,
}


@functools.partial(jax.jit, static_argnums=4)
def run(x, w, sizes, dy, out_dtype=None):
    y, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, out_dtype=out_dtype), x, w)
    return y, *vjp(dy.astype(y.dtype))


def draw(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal(s), dtype) for s in ((M, K), (G, K, N), (M, N)))


@pytest.mark.parametrize("case", SIZES)
def test_values_and_gradients(case):
    (x, w, dy), sizes = draw(), SIZES[case]
    got = run(x, w, jnp.asarray(sizes, jnp.int32), dy)
    for name, a, b in zip(("y", "dx", "dw"), got, oracle.grouped(x, w, sizes, dy), strict=True):
        oracle.check(name, a, b)
    rest = sum(sizes)
    assert not np.asarray(got[0])[rest:].any()
    assert not np.asarray(got[1])[rest:].any()


def test_random_sizes():
    rng = np.random.default_rng(1)
    for seed in range(10):
        x, w, dy = draw(seed)
        sizes = np.diff(np.sort(rng.integers(0, M + 1, G + 1)))
        got, want = run(x, w, jnp.asarray(sizes, jnp.int32), dy), oracle.grouped(x, w, sizes, dy)
        for name, a, b in zip(("y", "dx", "dw"), got, want, strict=True):
            oracle.check(name, a, b)


RUNS = {
    "uneven": [[3, 20, 0, 1, 16], [0, 0, 40, 0, 0], [9, 1, 1, 20, 2], [0, 0, 0, 0, 0], [1, 2, 3, 4, 5]],
    "full": [[0, 0, 100, 0, 0], [64, 1, 0, 0, 35]],
    "one": [[3, 90, 1, 64, 30]],
}


@pytest.mark.parametrize("case", RUNS)
def test_runs(case):
    """Each run is a grouped matmul of its own rows; dw is their sum. What lies between them may hold nan."""
    (x, w, dy), sizes = draw(), RUNS[case]
    stride = M // len(sizes)
    between = np.concatenate([np.arange(stride) >= sum(own) for own in sizes])
    got = run(x.at[between].set(jnp.nan), w, jnp.asarray(sizes, jnp.int32), dy.at[between].set(jnp.nan))
    parts = [
        oracle.grouped(x[at : at + stride], w, own, dy[at : at + stride])
        for at, own in zip(range(0, M, stride), sizes, strict=True)
    ]
    y, dx, dw = zip(*parts, strict=True)
    want = np.concatenate(y), np.concatenate(dx), sum(dw)
    for name, a, b in zip(("y", "dx", "dw"), got, want, strict=True):
        oracle.check(name, a, b)
    assert not np.asarray(got[0])[between].any()
    assert not np.asarray(got[1])[between].any()


def test_rows_past_the_sum_may_hold_nan():
    x, w, dy = draw()
    sizes = SIZES["rows-past-the-sum"]
    rest = sum(sizes)
    got = run(x.at[rest:].set(jnp.nan), w, jnp.asarray(sizes, jnp.int32), dy.at[rest:].set(jnp.nan))
    for name, a, b in zip(("y", "dx", "dw"), got, oracle.grouped(x, w, sizes, dy), strict=True):
        oracle.check(name, np.where(np.arange(len(a))[:, None] < rest, a, 0) if name != "dw" else a,
                     np.where(np.arange(len(b))[:, None] < rest, b, 0) if name != "dw" else b)  # fmt: skip
        if name != "dw":
            assert not np.asarray(a)[rest:].any(), "nan reached the rows past the sum"


@pytest.mark.parametrize("where", ["rows", "matrix"])
def test_nan_in_one_group_stays_there(where):
    (x, w, dy), sizes, bad = draw(), SIZES["uneven"], 3
    rows = oracle.groups(sizes)[bad][1]
    if where == "rows":
        x = x.at[rows].set(jnp.nan)
    else:
        w = w.at[bad].set(jnp.nan)
    y, dx, dw = run(x, w, jnp.asarray(sizes, jnp.int32), dy)
    others = np.ones(M, bool)
    others[rows] = False
    assert np.isnan(np.asarray(y)[rows]).all()
    assert np.isfinite(np.asarray(y)[others]).all()
    assert np.isfinite(np.asarray(dx)[others]).all()
    assert np.isfinite(np.delete(np.asarray(dw), bad, 0)).all()
    assert np.isnan(np.asarray(dw)[bad]).all() == (where == "rows")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_narrow_inputs_and_out_dtype(dtype):
    (x, w, dy), sizes = draw(dtype=dtype), SIZES["uneven"]
    want = oracle.grouped(x, w, sizes, dy)
    y, dx, dw = run(x, w, jnp.asarray(sizes, jnp.int32), dy)
    assert [a.dtype for a in (y, dx, dw)] == [dtype] * 3
    # one rounding of the result: half a unit in the last place of 8 or 11 bits
    for name, a, b in zip(("y", "dx", "dw"), (y, dx, dw), want, strict=True):
        oracle.check(name, a, b, tolerance=float(jnp.finfo(dtype).eps) / 2)
    wide = grouped_matmul(x, w, jnp.asarray(sizes, jnp.int32), out_dtype=jnp.float32)
    assert wide.dtype == jnp.float32
    oracle.check("y", wide, want[0])


def test_cost_does_not_depend_on_the_number_of_experts():
    x, rows = jnp.zeros((1024, 8)), 1024
    for experts in (4, 64, 256):
        # a loop over blocks, one matmul of 64 rows each, whatever the number of experts
        jaxpr = jax.make_jaxpr(grouped_matmul)(x, jnp.zeros((experts, 8, 16)), jnp.zeros(experts, jnp.int32))
        dots = [eqn for eqn, _ in equations(jaxpr) if eqn.primitive.name == "dot_general"]
        assert [[v.aval.shape for v in eqn.invars] for eqn in dots] == [[(reference.BLOCK, 8), (8, 16)]]
        # and at most one part-empty block for each expert that has rows at all
        for sizes in ([rows // experts] * experts, [rows] + [0] * (experts - 1), [rows // 2 + 1] * 1 + [0] * experts):
            blocks = int(reference._Blocks(jnp.asarray(sizes, jnp.int32), rows).count)
            assert blocks <= sum(sizes) // reference.BLOCK + np.count_nonzero(sizes)
            assert blocks == sum(-(-size // reference.BLOCK) for size in sizes)


def call(x=(6, 4), w=(3, 4, 5), sizes=(3,), x_dtype=jnp.float32, w_dtype=jnp.float32, size_dtype=jnp.int32, **kw):
    return grouped_matmul(jnp.zeros(x, x_dtype), jnp.zeros(w, w_dtype), jnp.zeros(sizes, size_dtype), **kw)


ERRORS = {
    "rank": (
        {"x": (2, 6, 4)},
        "x, w and group_sizes must be [M, k], [G, k, n] and [G] or [R, G], got shapes [2, 6, 4], [3, 4, 5] and [3]",
    ),
    "inner": ({"w": (3, 7, 5)}, "x [M, k] and w [G, k, n] must agree in k, got 4 and 7"),
    "groups": ({"sizes": (2,)}, "w and group_sizes must agree in G, got 3 and 2"),
    "runs": ({"sizes": (4, 3)}, "the runs of group_sizes [R, G] must divide M = 6, got R = 4"),
    "groups-of-runs": ({"sizes": (3, 2)}, "w and group_sizes must agree in G, got 3 and 2"),
    "size-dtype": ({"size_dtype": jnp.float32}, "group_sizes must be int32, got float32"),
    "dtypes-differ": (
        {"w_dtype": jnp.bfloat16},
        "x and w must both be bfloat16, float16 or float32, got float32 and bfloat16",
    ),
    "int": (
        {"x_dtype": jnp.int32, "w_dtype": jnp.int32},
        "x and w must both be bfloat16, float16 or float32, got int32 and int32",
    ),
    "implementation": (
        {"implementation": "magic"},
        f"implementation must be None or one of {', '.join(GROUPED)}, hopper, got 'magic'",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_state_rule_and_value(case):
    change, message = ERRORS[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        call(**change)
    assert call().shape == (6, 5)
