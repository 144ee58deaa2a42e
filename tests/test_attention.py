"""The two public functions: meshes and specs of every kind, and each documented error."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import Heads

from zigzag_jax import from_zigzag, ring_attention, to_zigzag, zigzag_attention
from zigzag_jax.kernels import FLASH, flash_fwd
from zigzag_jax.ranges import KeyRange

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
SIZES = {"dp": 2, "cp": 2, "tp": 2}
SPEC, BATCH_SEQUENCE = P("dp", "cp", "tp", None), P("dp", "cp")
HEADS, BATCH, LENGTH = Heads(8, 2, 8, 16), 2, 24


def make_mesh(kind: Any = AUTO, **sizes):
    """A mesh on the first devices; `kind` one type for all axes or one each."""
    kinds = kind if isinstance(kind, tuple) else (kind,) * len(sizes)
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=devices)


@pytest.fixture(scope="module")
def problem():
    """(arrays in zigzag order at cp = 2, oracle's answer) with documents, a window, a sink and a softcap."""
    rng = np.random.default_rng(0)
    q, k, v, dout = (x.astype(np.float32) for x in HEADS.draw(rng, BATCH, LENGTH))
    positions, sink = oracle.random_documents(rng, BATCH, LENGTH, 2), rng.standard_normal(8).astype(np.float32)
    mask = oracle.causal(LENGTH, positions, 9)
    want = oracle.attention(q, k, v, mask, scale=0.3, dout=dout, sink=sink, softcap=2.0)
    return {"sink": sink} | to_zigzag({"q": q, "k": k, "v": v, "positions": positions, "dout": dout}, 2), want


def plain(arrays, window=None) -> oracle.Attention:
    """The oracle's answer for one document a row; arrays in zigzag order."""
    q, k, v, dout = from_zigzag([np.asarray(arrays[name], np.float64) for name in ("q", "k", "v", "dout")], 2)
    return oracle.attention(q, k, v, oracle.causal(LENGTH, None, window), scale=8**-0.5, dout=dout)


def attention(q, k, v, **options):
    """zigzag_attention under jit: an eager shard_map compiles every operation for itself."""
    return jax.jit(lambda q, k, v: zigzag_attention(q, k, v, **options))(q, k, v)


def place(mesh, spec, problem):
    """q, k, v, dout on the mesh."""
    return [jax.device_put(problem[name], NamedSharding(mesh, spec)) for name in ("q", "k", "v", "dout")]


def check(got, want, cp=2):
    """(out, dq, dk, dv[, dsink]) against the oracle's."""
    names = ("out", "dq", "dk", "dv", "dsink")
    for name, g in zip(names, got, strict=False):
        g = np.asarray(g)
        oracle.check(name, g if name == "dsink" else from_zigzag(g, cp), getattr(want, name))


def gradients(attend, q, k, v, dout, sink):
    """(out, dq, dk, dv, dsink)."""
    out, vjp = jax.vjp(attend, q, k, v, sink)
    return out, *vjp(dout)


# ------------------------------------------------------------------------------------------------------ meshes, specs
@pytest.mark.parametrize(
    ("where", "kind", "strategy"),  # each kind of mesh given each way, and each kind with each strategy
    [
        pytest.param("argument", AUTO, None, id="argument-auto-ring"),
        pytest.param("set_mesh", AUTO, "allgather", id="set_mesh-auto-allgather"),
        pytest.param("argument", EXPLICIT, "allgather", id="argument-explicit-allgather"),
        pytest.param("set_mesh", EXPLICIT, None, id="set_mesh-explicit-ring"),
        pytest.param("argument", (EXPLICIT, AUTO, AUTO), None, id="argument-mixed-ring"),
        pytest.param("set_mesh", (EXPLICIT, AUTO, AUTO), "allgather", id="set_mesh-mixed-allgather"),
    ],
)
def test_batch_sequence_and_heads_sharded(problem, kind, where, strategy):
    arrays, want = problem
    mesh = make_mesh(kind, **SIZES)
    q, k, v, dout = place(mesh, SPEC, arrays)

    def attend(q, k, v, sink):
        return zigzag_attention(
            q, k, v, positions=arrays["positions"], window=9, scale=0.3, sink=sink, softcap=2.0, strategy=strategy,
            mesh=mesh if where == "argument" else None, spec=None if kind is EXPLICIT else SPEC,
        )  # fmt: skip

    f = jax.jit(lambda *x: gradients(attend, *x))
    if where == "argument":
        got = f(q, k, v, dout, jnp.asarray(arrays["sink"]))
    else:
        with jax.set_mesh(mesh):
            got = f(q, k, v, dout, jnp.asarray(arrays["sink"]))
    check(got, want)
    for x in got[:4]:
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, SPEC), 4)


@pytest.mark.parametrize(
    "kind", [pytest.param(AUTO, id="auto", marks=pytest.mark.slow), pytest.param(EXPLICIT, id="explicit")]
)
def test_eager_under_set_mesh(problem, kind):
    arrays, want = problem
    mesh = make_mesh(kind, **SIZES)
    q, k, v, _ = place(mesh, SPEC, arrays)
    with jax.set_mesh(mesh):
        out = zigzag_attention(
            q, k, v, positions=arrays["positions"], window=9, scale=0.3, sink=jnp.asarray(arrays["sink"]), softcap=2.0,
            spec=None if kind is EXPLICIT else SPEC,
        )  # fmt: skip
    check([out], want)
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, SPEC), 4)


def test_numpy_arrays_and_a_short_spec(problem):
    arrays, _ = problem
    q, k, v = (arrays[name] for name in "qkv")
    out = attention(q, k, v, mesh=make_mesh(cp=2), spec=P(None, "cp"))
    want = plain(arrays)
    check([out], want)


def test_another_axis_name_and_an_axis_it_does_not_use(problem):
    arrays, _ = problem
    q, k, v = (arrays[name] for name in "qkv")
    mesh = make_mesh(ring=2, idle=2)
    out = attention(q, k, v, mesh=mesh, spec=P(None, "ring"), axis_name="ring")
    np.testing.assert_array_equal(out, attention(q, k, v, mesh=make_mesh(cp=2), spec=P(None, "cp")))


def test_two_axes_on_the_batch(problem):
    arrays, want = problem
    mesh = make_mesh(dp=2, fsdp=1, cp=2)
    spec = P(("dp", "fsdp"), "cp")
    q, k, v, _ = place(mesh, spec, arrays)
    out = attention(q, k, v, positions=arrays["positions"], window=9, scale=0.3, sink=arrays["sink"],
                           softcap=2.0, mesh=mesh, spec=spec)  # fmt: skip
    check([out], want)


def test_at_cp_1_it_is_flash_attention(problem):
    arrays, _ = problem
    q, k, v = (from_zigzag(arrays[name], 2) for name in "qkv")
    stop = jnp.arange(1, LENGTH + 1, dtype=jnp.int32)[None]
    flash, _ = jax.jit(lambda q, k, v: flash_fwd(q, k, v, KeyRange(0 * stop, stop), scale=8**-0.5))(q, k, v)
    out = attention(q, k, v, mesh=make_mesh(cp=1), spec=P(None, "cp"))
    np.testing.assert_allclose(out, flash, atol=1e-6)
    text = str(jax.make_jaxpr(lambda q: zigzag_attention(q, k, v, mesh=make_mesh(cp=1), spec=P(None, "cp")))(q))
    assert "ppermute" not in text


def test_a_window_may_differ_per_layer_in_a_scan(problem):
    arrays, _ = problem
    q, k, v = (jnp.asarray(arrays[name]) for name in "qkv")
    mesh, windows = make_mesh(cp=2), [3, 50, 9]
    attend = lambda window: zigzag_attention(q, k, v, window=window, mesh=mesh, spec=P(None, "cp"))
    _, scanned = jax.jit(lambda w: jax.lax.scan(lambda carry, w: (carry, attend(w)), 0, w))(jnp.asarray(windows))
    for window, out in zip(windows, scanned, strict=True):
        check([out], plain(arrays, window))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_out_has_the_dtype_of_q(problem, dtype):
    arrays, _ = problem
    q, k, v = (jnp.asarray(arrays[name], dtype) for name in "qkv")
    out = attention(q, k, v, mesh=make_mesh(cp=2), spec=P(None, "cp"), window=np.int64(5))
    want = plain({"q": q, "k": k, "v": v, "dout": arrays["dout"]}, 5)
    assert out.dtype == dtype
    oracle.check("out", from_zigzag(np.asarray(out), 2), want.out, tolerance=float(jnp.finfo(dtype).eps) / 2)


def test_ring_attention_returns_out_or_out_and_lse():
    f = lambda lse: jax.shard_map(
        lambda q: ring_attention(q, q, q, return_lse=lse), mesh=make_mesh(cp=2), in_specs=P(None, "cp"),
        out_specs=(P(None, "cp"), P(None, None, "cp")) if lse else P(None, "cp"), check_vma=False,
    )  # fmt: skip
    x = jax.ShapeDtypeStruct((1, 8, 2, 4), jnp.bfloat16)
    assert jax.eval_shape(f(False), x) == x
    assert jax.eval_shape(f(True), x) == (x, jax.ShapeDtypeStruct((1, 2, 8), jnp.float32))


# -------------------------------------------------------------------------------------------------------------- errors
def x(*shape, dtype=jnp.float32):
    return jnp.zeros(shape or (2, 24, 8, 8), dtype)


def on(mesh, spec, array=None):
    return jax.device_put(x() if array is None else array, NamedSharding(mesh, spec))


def call(q=None, k=None, v=None, kind: Any = AUTO, mesh: Any = None, spec: Any = SPEC, **options):
    """zigzag_attention on 2 x 2 x 2 devices, one argument changed."""
    q = x() if q is None else q
    k = x(2, 24, 2, 8) if k is None else k
    v = x(2, 24, 2, 16) if v is None else v
    return zigzag_attention(q, k, v, mesh=make_mesh(kind, **SIZES) if mesh is None else mesh, spec=spec, **options)


def traced(name):
    return lambda: jax.jit(lambda value: call(**{name: value}))(1.0)


def explicit_leaves_out(jit):
    mesh = make_mesh(EXPLICIT, **SIZES)
    f = lambda q, k, v: zigzag_attention(q, k, v, mesh=mesh, spec=P("dp", "cp"))
    arguments = on(mesh, SPEC), on(mesh, SPEC, x(2, 24, 2, 8)), on(mesh, SPEC, x(2, 24, 2, 8))
    return (jax.jit(f) if jit else f)(*arguments)


def mixed_leaves_out():
    mesh = make_mesh((EXPLICIT, AUTO, AUTO), **SIZES)
    return jax.jit(lambda q: zigzag_attention(q, q, q, mesh=mesh, spec=P(None, "cp", "tp")))(on(mesh, P("dp")))


WINDOW = "window must be None, an int or an integer scalar jax.Array, got "
LEFT_OUT = "spec must name every axis that {} is sharded over, got "
SHARDED = "spec must shard the sequence over 'cp' alone and head_dim over nothing, got "
GLOBAL = {
    "rank": (lambda: call(q=x(24, 8, 8)), "q must be [batch, sequence, heads, head_dim], got shape [24, 8, 8]"),
    "int": (lambda: call(q=x(dtype=jnp.int32)), "q must be bfloat16, float16 or float32, got int32"),
    "dtypes": (
        lambda: call(k=x(2, 24, 2, 8, dtype=jnp.bfloat16)),
        "q, k and v must have one dtype, got k bfloat16 beside q float32",
    ),
    "batches": (lambda: call(v=x(4, 24, 2, 8)), "q, k and v must have one batch size, got v 4 beside q 2"),
    "head-dims": (lambda: call(k=x(2, 24, 2, 16)), "q and k must have one head_dim, got 8 and 16"),
    "kv-lengths": (lambda: call(v=x(2, 16, 2, 8)), "k and v must agree in [sequence, heads], got [24, 2] and [16, 2]"),
    "q-and-k-lengths": (
        lambda: call(q=x(2, 16, 8, 8)),
        "q and k must have one sequence length, got 16 and 24",
    ),
    "groups": (
        lambda: call(q=x(2, 24, 6, 8), k=x(2, 24, 4, 8), v=x(2, 24, 4, 8)),
        "q heads must be a multiple of kv heads, got 6 and 4",
    ),
    "length": (
        lambda: call(*[x(2, 22, 2, 8)] * 3),
        "sequence length must be divisible by 4 (2 * cp with zigzag), got 22: pad it",
    ),
    "batch-by-dp": (
        lambda: call(*[x(3, 24, 2, 8)] * 3),
        "batch size must be divisible by the 2 shards of dp, got 3",
    ),
    "kv-heads-by-tp": (
        lambda: call(k=x(2, 24, 1, 8), v=x(2, 24, 1, 8)),
        "kv heads must be divisible by the 2 shards of tp, got 1",
    ),
    "heads-by-tp": (lambda: call(*[x(2, 24, 3, 8)] * 3), "q heads must be divisible by the 2 shards of tp, got 3"),
    "positions-shape": (
        lambda: call(positions=x(2, 12, dtype=jnp.int32)),
        "positions must be int32 [B, S] = [2, 24], got int32 [2, 12]",
    ),
    "positions-dtype": (
        lambda: call(positions=x(2, 24)),
        "positions must be int32 [B, S] = [2, 24], got float32 [2, 24]",
    ),
    "sink-shape": (lambda: call(sink=x(2)), "sink must hold one floating logit a query head, [8], got float32 [2]"),
    "sink-dtype": (
        lambda: call(sink=x(8, dtype=jnp.int32)),
        "sink must hold one floating logit a query head, [8], got int32 [8]",
    ),
    "window-0": (lambda: call(window=0), "window must be >= 1 (a token sees itself and window - 1 before it), got 0"),
    "window-minus-5": (
        lambda: call(window=-5),
        "window must be >= 1 (a token sees itself and window - 1 before it), got -5",
    ),
    "window-float": (lambda: call(window=4.0), WINDOW + "4.0"),
    "window-bool": (lambda: call(window=True), WINDOW + "True"),
    "window-vector": (lambda: call(window=x(2, dtype=jnp.int32)), WINDOW + "Array([0, 0], dtype=int32)"),
    "window-float-array": (lambda: call(window=jnp.float32(4)), WINDOW + "Array(4., dtype=float32)"),
    "window-bool-array": (lambda: call(window=jnp.bool_(True)), WINDOW + "Array(True, dtype=bool)"),
    "scale-inf": (lambda: call(scale=float("inf")), "scale must be a finite number, got inf"),
    "scale-traced": (traced("scale"), "scale must be a static Python number, got a traced value"),
    "softcap-0": (lambda: call(softcap=0), "softcap must be a number > 0 or None, got 0"),
    "softcap-minus": (lambda: call(softcap=-1.5), "softcap must be a number > 0 or None, got -1.5"),
    "softcap-traced": (traced("softcap"), "softcap must be a static Python number, got a traced value"),
    "strategy": (lambda: call(strategy="magic"), "strategy must be one of ring, allgather, got 'magic'"),
    "implementation": (
        lambda: call(implementation="magic"),
        f"implementation must be None or one of {', '.join(FLASH)}, hopper, got 'magic'",
    ),
    "layout": (lambda: call(layout="spiral"), "layout must be one of zigzag, contiguous, got 'spiral'"),
    "grad-dtype-float16": (
        lambda: call(grad_dtype=jnp.float16),
        "grad_dtype must be float32 or bfloat16, got <class 'jax.numpy.float16'>",
    ),
    "grad-dtype-word": (lambda: call(grad_dtype="magic"), "grad_dtype must be float32 or bfloat16, got 'magic'"),
    "no-mesh": (
        lambda: zigzag_attention(x(), x(), x(), spec=SPEC),
        "mesh must be given, or set by jax.set_mesh: got none",
    ),
    "axis-name": (
        lambda: call(axis_name="ring"),
        "axis_name must be an axis of the mesh ['dp', 'cp', 'tp'], got 'ring'",
    ),
    "spec-none-auto": (
        lambda: call(spec=None),
        "spec must be given, P(batch axes, cp axis, head axes, None), unless every mesh axis is Explicit: got None and "
        "axis types ['Auto', 'Auto', 'Auto']",
    ),
    "spec-none-mixed": (lambda: call(kind=(EXPLICIT, AUTO, AUTO), spec=None), "spec must be given"),
    "spec-none-unsharded": (
        lambda: zigzag_attention(*[on(make_mesh(EXPLICIT, **SIZES), P())] * 3, mesh=make_mesh(EXPLICIT, **SIZES)),
        SHARDED + "P(None, None, None, None)",
    ),
    "spec-long": (
        lambda: call(spec=P("dp", "cp", None, None, "tp")),
        "spec must have at most 4 entries, [batch, sequence, heads, head_dim], got P('dp', 'cp', None, None, 'tp')",
    ),
    "spec-unknown-axis": (
        lambda: call(spec=P("data", "cp")),
        "spec must name axes of the mesh ['dp', 'cp', 'tp'], got ['data']",
    ),
    "spec-head-dim": (lambda: call(spec=P("dp", "cp", None, "tp")), SHARDED + "P('dp', 'cp', None, 'tp')"),
    "spec-no-sequence": (lambda: call(spec=P("dp")), SHARDED + "P('dp', None, None, None)"),
    "spec-two-on-sequence": (lambda: call(spec=P(None, ("dp", "cp"))), SHARDED + "P(None, ('dp', 'cp'), None, None)"),
    "left-out-concrete": (
        lambda: call(q=on(make_mesh(**SIZES), SPEC), spec=P("dp", "cp")),
        LEFT_OUT.format("q") + "P('dp', 'cp', None, None), but q is P('dp', 'cp', 'tp', None)",
    ),
    "left-out-k": (
        lambda: call(k=on(make_mesh(**SIZES), P("dp", "cp"), x(2, 24, 2, 8)), spec=P(None, "cp")),
        LEFT_OUT.format("k") + "P(None, 'cp', None, None), but k is P('dp', 'cp')",
    ),
    "left-out-explicit": (lambda: explicit_leaves_out(jit=False), LEFT_OUT.format("q")),
    "left-out-explicit-jit": (lambda: explicit_leaves_out(jit=True), LEFT_OUT.format("q")),
    "left-out-mixed-jit": (mixed_leaves_out, LEFT_OUT.format("q")),
    "another-mesh": (
        lambda: call(q=on(make_mesh(other=8), P(None, "other"))),
        LEFT_OUT.format("q") + "P('dp', 'cp', 'tp', None), but q is P(None, 'other')",
    ),
}


@pytest.mark.parametrize("case", GLOBAL)
def test_zigzag_attention_errors(case):
    f, message = GLOBAL[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        f()


def test_the_unchanged_call_is_good():
    assert jax.eval_shape(call).shape == (2, 24, 8, 16)


def per_shard(q=None, in_specs=BATCH_SEQUENCE, check_vma=False, axis_names=None, k=None, **options):
    f = jax.shard_map(
        lambda q, k: ring_attention(q, k, k, **options), mesh=make_mesh(dp=2, cp=2), in_specs=in_specs,
        out_specs=in_specs, check_vma=check_vma, axis_names=axis_names or {"dp", "cp"},
    )  # fmt: skip
    q = x() if q is None else q
    return jax.eval_shape(f, q, q if k is None else k)


TYPED = "ring_attention needs shard_map(..., check_vma=False), got values typed as varying over ['cp']"
SHARD = {
    "outside": (
        lambda: ring_attention(x(), x(), x()),
        "ring_attention must run inside a shard_map over its axis, got axis_name 'cp' and manual axes []",
    ),
    "other-axis": (
        lambda: per_shard(axis_name="ring"),
        "ring_attention must run inside a shard_map over its axis, got axis_name 'ring' and manual axes ['dp', 'cp']",
    ),
    "checked-types": (lambda: per_shard(check_vma=True), TYPED),
    "checked-types-replicated": (lambda: per_shard(check_vma=True, in_specs=P()), TYPED),
    "partially-manual": (
        lambda: per_shard(in_specs=P(None, "cp"), axis_names={"cp"}),
        "ring_attention needs a shard_map that is manual over every mesh axis, got ['dp'] left out",
    ),
    "odd-length": (
        lambda: per_shard(x(2, 6, 2, 8)),
        "a rank's sequence length must be divisible by 2 (zigzag), got 3",
    ),
    "lengths": (lambda: per_shard(k=x(2, 16, 8, 8)), "q and k must have one sequence length, got 12 and 8"),
    "strategy": (lambda: per_shard(strategy=None), "strategy must be one of ring, allgather, got None"),
    "window": (lambda: per_shard(window=0), "window must be >= 1"),
    "layout": (lambda: per_shard(layout="spiral"), "layout must be one of zigzag, contiguous, got 'spiral'"),
    "grad-dtype": (lambda: per_shard(grad_dtype="int8"), "grad_dtype must be float32 or bfloat16, got 'int8'"),
    "implementation": (lambda: per_shard(implementation="magic"), "implementation must be None or one of"),
    "positions": (lambda: per_shard(positions=x(2, 24, dtype=jnp.int32)), "positions must be int32 [B, S] = [1, 12]"),
    "sink": (lambda: per_shard(sink=x(2)), "sink must hold one floating logit a query head, [8], got float32 [2]"),
}


@pytest.mark.parametrize("case", SHARD)
def test_ring_attention_errors(case):
    f, message = SHARD[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        f()


def test_contiguous_needs_no_even_length():
    assert per_shard(x(2, 6, 2, 8), layout="contiguous").shape == (2, 6, 2, 8)


def test_zigzag_attention_inside_a_shard_map_names_the_other_function():
    mesh = jax.make_mesh((2,), ("cp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    spec = P(None, "cp")
    inside = lambda q: zigzag_attention(q, q, q, mesh=mesh, spec=P(None, "cp", None, None))
    f = jax.shard_map(inside, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    with pytest.raises(ValueError, match=r"outside of any shard_map \(inside one: ring_attention\), got .*\['cp'\]"):
        f(x(1, 8, 2, 8))


def test_shares_of_a_bfloat16_sinks_gradient_are_summed_in_float32():
    mesh = jax.make_mesh((8,), ("cp",), axis_types=(AxisType.Auto,))
    q, k, v, dout = (jax.random.normal(jax.random.key(n), (1, 64, 2, 8), jnp.float32) for n in range(4))
    loss = lambda sink: jnp.sum(zigzag_attention(q, k, v, sink=sink, mesh=mesh, spec=P(None, "cp", None, None)) * dout)
    sink = jnp.array([0.5, -1.0])
    exact, rounded = jax.jit(jax.grad(loss))(sink), jax.jit(jax.grad(loss))(sink.astype(jnp.bfloat16))
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rounded, exact.astype(jnp.bfloat16))  # rounded once, at the end
