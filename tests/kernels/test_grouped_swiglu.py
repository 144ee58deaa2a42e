"""The experts' MLP in plain XLA against float64, what a recomputed layer keeps, and every error of the contract.

The fused kernels run on a GPU (test_grouped_swiglu_gpu.py); test_grouped_mosaic_compiled.py compiles them.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hops import equations

from zigzag_jax.kernels import GROUPED, grouped_swiglu
from zigzag_jax.kernels.grouped import mosaic, swiglu
from zigzag_jax.kernels.grouped.mosaic_pipeline import GroupedTuning

M, D, F, G = 120, 24, 40, 4
NAMES = ("y", "dx", "dgate_up", "ddown", "dscale")
SIZES = {"uneven": [3, 70, 0, 47], "rows-past-the-sum": [10, 0, 65, 30], "nothing": [0] * 4}


@jax.jit
def run(x, gate_up, down, scale, sizes, dy):
    call = lambda x, gate_up, down, scale: grouped_swiglu(x, gate_up, down, scale, sizes)
    y, vjp = jax.vjp(call, x, gate_up, down, scale)
    return y, *vjp(dy)


def draw(dtype=jnp.float32):
    """x, gate_up, down, scale, dy."""
    rng = np.random.default_rng(0)
    normal = lambda *size, dtype=dtype: jnp.asarray(rng.standard_normal(size), dtype)
    x, gate_up, down = normal(M, D), normal(G, D, 2 * F) / 2, normal(G, F, D)
    return x, gate_up, down, normal(M, dtype=jnp.float32), normal(M, D)


@pytest.mark.parametrize("case", SIZES)
def test_values_and_gradients(case):
    x, gate_up, down, scale, dy = draw()
    sizes = SIZES[case]
    want = oracle.grouped_swiglu(x, gate_up, down, scale, sizes, dy)
    rest = sum(sizes)  # what lies past the sum may be nan and reaches nothing
    x, scale, dy = (a.at[rest:].set(jnp.nan) for a in (x, scale, dy))
    got = run(x, gate_up, down, scale, jnp.asarray(sizes, jnp.int32), dy)
    for name, a, b in zip(NAMES, got, want, strict=True):
        oracle.check(name, a, b)
    for a in (got[0], got[1], got[4]):
        assert not np.asarray(a)[rest:].any()


def test_runs():
    *arrays, dy = draw()
    sizes, (x, gate_up, down, scale) = [[3, 20, 0, 17], [0, 40, 15, 0]], arrays
    got = run(*arrays, jnp.asarray(sizes, jnp.int32), dy)
    half = lambda a, r: a[60 * r : 60 * r + 60]
    parts = [oracle.grouped_swiglu(half(x, r), gate_up, down, half(scale, r), sizes[r], half(dy, r)) for r in range(2)]
    for i, name in enumerate(NAMES):
        first, second = parts[0][i], parts[1][i]
        oracle.check(name, got[i], first + second if "_up" in name or "down" in name else np.append(first, second, 0))


def test_narrow_inputs():
    """bfloat16 differs from exact arithmetic by a few roundings: of hidden, inner, z, dhidden and the result."""
    x, gate_up, down, scale, dy = draw(jnp.bfloat16)
    sizes = SIZES["uneven"]
    got = run(x, gate_up, down, scale, jnp.asarray(sizes, jnp.int32), dy)
    want = oracle.grouped_swiglu(x, gate_up, down, scale, sizes, dy)
    assert [a.dtype for a in got] == [jnp.bfloat16] * 4 + [jnp.float32]
    for name, a, b in zip(NAMES, got, want, strict=True):
        oracle.check(name, a, b, tolerance=4e-3)


def marked(matmul):
    """The same matmul, with an equation that nothing else brings after each product that is not transposed."""

    def product(rows, matrices, sizes, *, transposed, out_dtype):
        y = matmul.product(rows, matrices, sizes, transposed=transposed, out_dtype=out_dtype)
        return y if transposed else jax.lax.acosh(y)

    return matmul._replace(product=product)


def test_what_a_recomputed_layer_runs():
    """Under a scan with jax.checkpoint gate and up twice, down once; without a gradient nothing is kept."""
    *arrays, _ = draw()
    x, gate_up, down, scale = arrays
    sizes, matmul = jnp.asarray(SIZES["uneven"], jnp.int32), GROUPED["reference"]
    whole = swiglu.unfused(matmul)
    marks = {True: jax.lax.tan, False: jax.lax.asinh}  # equations that nothing else brings

    def inward(x, gate_up, scale, group_sizes, *, keep):
        inner, hidden = whole.inward(x, gate_up, scale, group_sizes, keep=keep)
        return marks[keep](inner), hidden

    parts, product = swiglu.Parts(inward, whole.outward), marked(matmul)
    layer = jax.checkpoint(lambda x, w: (swiglu.differentiable(product, parts, x, w[0], w[1], scale, sizes), None))
    loss = lambda x, w: jnp.sum(jax.lax.scan(layer, x, w)[0])
    stacked = tuple(jnp.stack([w, w, w]) for w in (gate_up, down))
    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(x, stacked)
    times = lambda jaxpr, name: sum(n for eqn, n in equations(jaxpr) if eqn.primitive.name == name)
    assert [times(jaxpr, name) for name in ("tan", "asinh", "acosh")] == [6, 0, 3]
    forward = jax.make_jaxpr(loss)(x, stacked)
    assert [times(forward, name) for name in ("tan", "asinh", "acosh")] == [0, 3, 3]


@pytest.mark.parametrize(("saved", "products"), [((), 9), ((swiglu.HIDDEN_NAME,), 6)])
def test_a_policy_can_spare_the_second_matmul_with_gate_and_up(saved, products):
    """Three layers' products of the forward, and of the recomputation: without the name gate and up once more."""
    *arrays, _ = draw()
    x, gate_up, down, scale = arrays
    sizes, matmul = jnp.asarray(SIZES["uneven"], jnp.int32), marked(GROUPED["reference"])
    layer = lambda x, w: (swiglu.differentiable(matmul, swiglu.unfused(matmul), x, *w, scale, sizes), None)
    layer = jax.checkpoint(layer, policy=jax.checkpoint_policies.save_only_these_names(*saved))
    loss = lambda x, w: jnp.sum(jax.lax.scan(layer, x, w)[0])
    stacked = tuple(jnp.stack([w, w, w]) for w in (gate_up, down))
    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(x, stacked)
    assert sum(n for eqn, n in equations(jaxpr) if eqn.primitive.name == "acosh") == products


@pytest.mark.parametrize("saved", [None, (), (swiglu.HIDDEN_NAME,)])
def test_a_scan_over_fused_layers_is_traced(saved):
    """With the counters of drawn items, which a differentiated scan must not move out of its loop."""
    sizes = jnp.asarray([100, 28], jnp.int32)
    mlp = functools.partial(grouped_swiglu, group_sizes=sizes, fused=True, implementation="mosaic")
    layer = lambda x, w: (x + mlp(x, *w), None)
    policy = jax.checkpoint_policies.save_only_these_names(*saved or ())
    step = layer if saved is None else jax.checkpoint(layer, policy=policy)
    gradient = jax.grad(lambda x, w: jnp.sum(jax.lax.scan(step, x, w)[0].astype(jnp.float32)), argnums=(0, 1))
    shape = lambda *size, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(size, dtype)
    arguments = shape(128, 64), (shape(3, 2, 64, 256), shape(3, 2, 128, 64), shape(3, 128, dtype=jnp.float32))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), jax.eval_shape(gradient, *arguments)) == jax.tree.map(
        lambda a: (a.shape, a.dtype), arguments
    )


def test_the_fused_forward_takes_its_columns_by_pairs():
    x, gate_up = jnp.zeros((8, 64), jnp.bfloat16), jnp.zeros((3, 64, 128), jnp.bfloat16)
    with pytest.raises(ValueError, match="columns must be 256, two pieces of gate and two of up, got 128"):
        mosaic.inward(x, gate_up, jnp.zeros(8), jnp.zeros(3, jnp.int32), keep=False, tuning=GroupedTuning(columns=128))


F32 = jnp.float32


def call(x=(6, 4), gate_up=(3, 4, 10), down=(3, 5, 4), scale=(6,), scale_dtype=F32, dtype=F32, **options):
    rows, matrices, last = (jnp.zeros(shape, dtype) for shape in (x, gate_up, down))
    return grouped_swiglu(rows, matrices, last, jnp.zeros(scale, scale_dtype), jnp.zeros(3, jnp.int32), **options)


ERRORS = {
    "inner": (ValueError, {"gate_up": (3, 7, 10)}, "x [M, k] and w [G, k, n] must agree in k, got 4 and 7"),
    "odd": (ValueError, {"gate_up": (3, 4, 9)}, "gate_up [G, d, 2 f] must have an even number of columns, got 9"),
    "down": (
        ValueError,
        {"down": (3, 4, 5)},
        "down must be float32 [G, f, d] = [3, 5, 4], got float32 [3, 4, 5]",
    ),
    "scale": (ValueError, {"scale": (5,)}, "scale must be float32 [M] = [6], got float32 [5]"),
    "scale-dtype": (
        ValueError,
        {"scale_dtype": jnp.bfloat16},
        "scale must be float32 [M] = [6], got bfloat16 [6]",
    ),
    "fused-reference": (
        NotImplementedError,
        {"fused": True, "implementation": "reference"},
        "fused needs an implementation among mosaic, got 'reference'",
    ),
    "fused-inner": (
        NotImplementedError,
        {
            "fused": True, "implementation": "mosaic", "dtype": jnp.bfloat16, "x": (6, 64), "gate_up": (3, 64, 64),
            "down": (3, 32, 64),
        },
        "'mosaic' needs k and n that are multiples of 64; got bfloat16 x [6, 64], w [3, 32, 64]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors_state_rule_and_value(case):
    error, change, message = ERRORS[case]
    with pytest.raises(error, match=re.escape(message)):
        call(**change)
    assert call().shape == (6, 4)
