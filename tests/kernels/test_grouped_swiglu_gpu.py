"""The experts' MLP by the fused kernels on a GPU: `pytest -m gpu tests/kernels/test_grouped_swiglu_gpu.py`.

Against float64 in the shapes where such kernels go wrong; that no tuning changes a bit; what may be nan and where it
may go; and the transformations that a model wraps around it. The cases are the grouped matmul's.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cards import HOPPER
from test_grouped_gpu import ODD, Case, uneven

from zigzag_jax.kernels import grouped_swiglu
from zigzag_jax.kernels.grouped import mosaic, swiglu
from zigzag_jax.kernels.grouped.mosaic_pipeline import GroupedTuning

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="no Hopper GPU")]

# roundings of hidden, inner, dhidden and the result; z stays float32
BARS = {jnp.bfloat16: 5e-3, jnp.float16: 7e-4}
NAMES = ("y", "dx", "dgate_up", "ddown", "dscale")

CASES = {  # k is d, n is f
    "odd": Case(ODD, 4096, 512, 768),
    "odd-narrow": Case(ODD, 4096, 256, 320),
    "none": Case([0] * 24, 1024),
    "one-row-each": Case([1] * 300, 320),
    "eight-rows": Case([3, 0, 5], 8, 64, 64),
    "one-piece-wide": Case([64, 200, 0, 128], 400, 64, 64),  # narrower than a tile: what is stored past the end
    "one-piece-more": Case(uneven(9, 700), 704, 128, 576),  # the last tile has one piece of gate and of up
    "rows-not-by-eights": Case([*uneven(9, 1000), 13], 1037),
    "rows-past-the-sum": Case(uneven(24, 1000), 1536),
    "float16": Case(ODD, 4096, 256, 320, jnp.float16),
    "many-items": Case(uneven(64, 16384), 16384, 768, 1408),  # several for each multiprocessor
}


def draw(case: Case):
    """x, gate_up, down, scale and dy; rows past the sum of sizes are nan."""
    rng = np.random.default_rng(0)
    normal = lambda *size: rng.standard_normal(size)
    groups, d, f, past = len(case.sizes), case.k, case.n, sum(case.sizes)
    x, gate_up, down = normal(case.rows, d), normal(groups, d, 2 * f) * d**-0.5, normal(groups, f, d) * f**-0.5
    x, gate_up, down, dy = (jnp.asarray(a, case.dtype) for a in (x, gate_up, down, normal(case.rows, d)))
    scale = jnp.asarray(normal(case.rows), jnp.float32)
    cut = lambda a: a.at[past:].set(jnp.nan)
    return cut(x), gate_up, down, cut(scale), cut(dy)


def truth(arrays, sizes, dy):
    x, gate_up, down, scale, dy = (np.nan_to_num(np.asarray(a, np.float64), nan=0.0) for a in (*arrays, dy))
    return oracle.grouped_swiglu(x, gate_up, down, scale, sizes, dy)


@functools.partial(jax.jit, static_argnames="fused")
def run(x, gate_up, down, scale, sizes, dy, fused=True):
    mlp = functools.partial(grouped_swiglu, group_sizes=sizes, fused=fused, implementation="mosaic")
    y, vjp = jax.vjp(mlp, x, gate_up, down, scale)
    return y, *vjp(dy)


@pytest.mark.parametrize("case", CASES)
def test_contract(case):
    case = CASES[case]
    *arrays, dy = draw(case)
    sizes, past = jnp.asarray(case.sizes, jnp.int32), sum(case.sizes)
    want = truth(arrays, case.sizes, dy)
    got = run(*arrays, sizes, dy)
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert a.dtype == (jnp.float32 if name == "dscale" else case.dtype)
        oracle.check(name, a, b, BARS[case.dtype])
    for a in (got[0], got[1], got[4]):
        assert not np.asarray(a[past:], np.float32).any()
    # the forward that keeps nothing is another kernel: the same bits
    forward = jax.jit(functools.partial(grouped_swiglu, group_sizes=sizes, fused=True, implementation="mosaic"))
    np.testing.assert_array_equal(forward(*arrays), got[0])


@pytest.mark.parametrize("case", ["odd", "one-piece-more", "rows-past-the-sum", "many-items"])
def test_no_tuning_changes_a_bit(case):
    case = CASES[case]
    x, gate_up, down, scale, dy = draw(case)
    sizes = jnp.asarray(case.sizes, jnp.int32)
    fixed, drawn = (GroupedTuning(drawn=drawn) for drawn in (False, True))
    for keep in (False, True):
        one, two = (mosaic.inward(x, gate_up, scale, sizes, keep=keep, tuning=tuning) for tuning in (fixed, drawn))
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
            np.testing.assert_array_equal(a, b)
    hidden = two[1]
    want, _ = swiglu.unfused(mosaic.IMPLEMENTATION).inward(x, gate_up, scale, sizes, keep=True)
    own = slice(sum(case.sizes))  # past it the unfused one leaves what it likes
    oracle.check("beside XLA's SwiGLU", two[0][own], np.asarray(want[own], np.float64), 5e-4)  # few are rounded apart
    one, two = (mosaic.outward(dy, down, hidden, scale, sizes, tuning=tuning) for tuning in (fixed, drawn))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)


def test_runs():
    sizes = [uneven(5, 500), [0, 640, 0, 0, 0], uneven(5, 633)]
    case = Case(uneven(5, 1920), 1920, 256, 320)
    *arrays, dy = draw(case)
    x, gate_up, down, scale = arrays
    got = run(*arrays, jnp.asarray(sizes, jnp.int32), dy)
    part = lambda a, r: a[640 * r : 640 * r + 640]
    one = lambda r: oracle.grouped_swiglu(part(x, r), gate_up, down, part(scale, r), sizes[r], part(dy, r))
    for name, a, each in zip(NAMES, got, zip(*map(one, range(3)), strict=True), strict=True):
        want = sum(each) if name in ("dgate_up", "ddown") else np.concatenate(each)
        oracle.check(name, a, want, BARS[jnp.bfloat16])


def test_what_is_not_finite_stays_in_its_group():
    case = CASES["odd-narrow"]
    x, gate_up, down, scale, dy = draw(case)
    sizes = jnp.asarray(case.sizes, jnp.int32)
    clean = run(x, gate_up, down, scale, sizes, dy)
    sick = [g for g, size in enumerate(case.sizes) if size][1::3]
    rows = np.zeros(case.rows, bool)
    for g, own in oracle.groups(case.sizes):
        rows[own] = g in sick
    ill = jnp.asarray(rows)[:, None]
    got = run(jnp.where(ill, jnp.inf, x), gate_up, down, scale, sizes, jnp.where(ill, jnp.nan, dy))
    well, healthy = ~rows & (np.arange(case.rows) < sum(case.sizes)), np.setdiff1d(np.arange(len(case.sizes)), sick)
    for a, b, at in zip(got, clean, (well, well, healthy, healthy, well), strict=True):
        np.testing.assert_array_equal(np.asarray(a)[at], np.asarray(b)[at])
    assert np.isnan(np.asarray(got[4])[rows]).all()


def test_scan_and_remat_do_not_change_the_gradient():
    rng = np.random.default_rng(0)
    rows, d, f, groups = 1536, 256, 320, 12
    sizes = jnp.asarray(uneven(groups, 1500), jnp.int32)
    x, cotangent = (jnp.asarray(rng.standard_normal((rows, d)), jnp.bfloat16) for _ in range(2))
    draw = lambda *size: jnp.asarray(rng.standard_normal((3, groups, *size)) * size[0] ** -0.5, jnp.bfloat16)
    weights = draw(d, 2 * f), draw(f, d), jnp.asarray(rng.standard_normal((3, rows)), jnp.float32)

    named = jax.checkpoint_policies.save_only_these_names
    everything = jax.checkpoint_policies.everything_saveable  # as without jax.checkpoint

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def gradient(fused, policy):
        mlp = functools.partial(grouped_swiglu, group_sizes=sizes, fused=fused, implementation="mosaic")
        layer = lambda x, w: (x + mlp(x, *w), None)
        step = jax.checkpoint(layer, policy=policy)
        loss = lambda x, w: jnp.vdot(jax.lax.scan(step, x, w)[0].astype(jnp.float32), cotangent.astype(jnp.float32))
        return jax.tree.leaves(jax.grad(loss, argnums=(0, 1))(x, weights))

    plain = {fused: gradient(fused, everything) for fused in (True, False)}
    for got, want in zip(plain[True], plain[False], strict=True):
        oracle.check("against the unfused", got, np.asarray(want, np.float64), 2e-2)  # three layers in bfloat16
    for fused, policy in itertools.product((True, False), (named(), named(swiglu.HIDDEN_NAME))):
        for again, got in zip(gradient(fused, policy), plain[fused], strict=True):
            oracle.check("remat", again, np.asarray(got, np.float64), 4e-3)  # XLA may round the residual sum elsewhere
