"""The cuDNN adapter: which ranges it recognises, every refusal, and its arithmetic.

cuDNN needs a GPU, so on a CPU `forward` and `backward` are replaced by what cuDNN computes, its rounding included; all
that the adapter adds (cuts, carry, delta, padding) is tested all the same. The test marked gpu is that with cuDNN.
"""

import doctest
import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import Heads

import zigzag_jax.kernels
from zigzag_jax.kernels import FLASH, flash_bwd, flash_fwd
from zigzag_jax.kernels.flash import cudnn
from zigzag_jax.kernels.flash.cudnn import Block, recognise
from zigzag_jax.layout import Layout, global_positions
from zigzag_jax.ranges import KeyRange, key_range, visible_bounds

# relative L2; cuDNN rounds p once and each result once, by 1.7e-3 in bfloat16 and an eighth of it in float16
BARS = {jnp.bfloat16: 4e-3, jnp.float16: 6e-4}


def of(start, stop) -> KeyRange:
    """Ranges from lists, [Sq] or [B, Sq]."""
    start, stop = np.broadcast_arrays(np.asarray(start, np.int32), np.asarray(stop, np.int32))
    return KeyRange(np.atleast_2d(start), np.atleast_2d(stop))  # pyright: ignore[reportArgumentType]


def step(rank: int, source: int, window=None, cp: int = 4, length: int = 16, layout: Layout = "zigzag") -> KeyRange:
    lo, hi = visible_bounds(global_positions(rank, cp, length, layout), window=window)
    return key_range(lo, hi, source, cp, length, layout)


AT = np.arange(8)
RECOGNISED: dict[str, tuple[KeyRange, Block]] = {
    "whole": (of(0, [16] * 8), Block(slice(0, 8), slice(0, 16), False, None)),
    "rectangle": (of(3, [9] * 8), Block(slice(0, 8), slice(3, 9), False, None)),
    "causal": (of(0, AT + 1), Block(slice(0, 8), slice(0, 8), True, None)),
    "causal-window": (of(np.maximum(AT - 2, 0), AT + 1), Block(slice(0, 8), slice(0, 8), True, 3)),
    "window-of-1": (of(AT, AT + 1), Block(slice(0, 8), slice(0, 8), True, 1)),
    "window-of-all": (of(np.maximum(AT - 7, 0), AT + 1), Block(slice(0, 8), slice(0, 8), True, None)),
    "causal-later-keys": (of(4, AT + 5), Block(slice(0, 8), slice(4, 12), True, None)),
    "causal-last-rows": (
        of([9, 0, 7, 4, 4, 4, 4, 4], [9, 0, 2, 5, 6, 7, 8, 9]), Block(slice(3, 8), slice(4, 9), True, None)
    ),
    "rows-in-the-middle": (of(0, [0, 0, 6, 6, 6, 0, 0, 0]), Block(slice(2, 5), slice(0, 6), False, None)),
    "one-row": (of(0, [5]), Block(slice(0, 1), slice(0, 5), False, None)),
    "one-key-each": (of(2, [3] * 8), Block(slice(0, 8), slice(2, 3), False, None)),
    "nothing": (of([3] * 8, [1] * 8), Block(slice(0, 0), slice(0, 0), False, None)),
    "past-the-end": (of(-1, [99] * 8), Block(slice(0, 8), slice(0, 16), False, None)),
    "equal-batch-rows": (of([[0] * 3, [7, 0, 0]], [[0, 4, 4]] * 2), Block(slice(1, 3), slice(0, 4), False, None)),
    "zigzag-diagonal": (step(2, 2), Block(slice(0, 16), slice(0, 16), True, None)),
    "zigzag-front": (step(2, 1), Block(slice(0, 16), slice(0, 8), False, None)),
    "zigzag-back": (step(1, 2), Block(slice(8, 16), slice(0, 16), False, None)),
    "contiguous-past": (step(2, 1, layout="contiguous"), Block(slice(0, 16), slice(0, 16), False, None)),
    "contiguous-future": (step(1, 2, layout="contiguous"), Block(slice(0, 0), slice(0, 0), False, None)),
    "window-cp1": (step(0, 0, window=5, cp=1), Block(slice(0, 16), slice(0, 16), True, 5)),
}  # fmt: skip


@pytest.mark.parametrize("case", RECOGNISED)
def test_recognise(case):
    keys, want = RECOGNISED[case]
    assert recognise(keys, 16) == want
    assert recognise(KeyRange(*(jnp.asarray(x) for x in keys)), 16) == want


def test_docstring_examples_run():
    result = doctest.testmod(cudnn)
    assert result.attempted > 0
    assert result.failed == 0


def test_a_block_covers_exactly_the_ranges():
    for keys, block in RECOGNISED.values():
        start, stop = (np.clip(np.asarray(x), 0, 16)[0] for x in keys)
        at = np.arange(16)
        want = (at >= start[:, None]) & (at < stop[:, None])
        cut = np.ones((block.rows.stop - block.rows.start, block.keys.stop - block.keys.start), bool)
        if block.causal:
            cut = oracle.causal(len(cut), window=block.window)[0]
        got = np.zeros_like(want)
        got[block.rows, block.keys] = cut
        np.testing.assert_array_equal(got, want)


RULE = "ranges that are one rectangle, or causal with or without a window, got row "
REFUSED: dict[str, tuple[KeyRange, str]] = {
    "batch": (of([[0, 0]] * 3, [[4, 4], [4, 4], [4, 5]]), "one range for all batch rows, got row 2 unlike row 0"),
    "gap": (of(0, [4, 4, 0, 4]), "rows that see keys to be neighbours, got row 2 that sees none among them"),
    "documents": (
        of([0, 0, 0, 3, 3], [1, 2, 3, 4, 5]),
        RULE + "0 that sees [0, 1), row 3 that sees [3, 4), row 4 that sees [3, 5)",
    ),
    "two-rectangles": (of(0, [0, 4, 4, 6]), RULE + "1 that sees [0, 4), row 3 that sees [0, 6)"),
    "start-moves": (of([0, 0, 1], 8), RULE + "0 that sees [0, 8), row 2 that sees [1, 8)"),
    "causal-then-flat": (of(0, [1, 2, 3, 3]), RULE + "0 that sees [0, 1), row 3 that sees [0, 3)"),
    "window-off-diagonal": (
        step(1, 0, window=6),
        RULE + "0 that sees [3, 8), row 1 that sees [4, 8), row 4 that sees [7, 8)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_ranges_are_refused(case):
    keys, message = REFUSED[case]
    with pytest.raises(NotImplementedError, match=re.escape(f"'cudnn' needs {message}; {cudnn.OTHERS}")):
        recognise(keys, 16)


# ------------------------------------------------------------------------------------------------ cuDNN's arithmetic
einsum = functools.partial(jnp.einsum, precision="highest")


def emulated_scores(q, k, scale, causal, window):
    group = q.shape[2] // k.shape[2]
    s = einsum("bqhd,bkhd->bhqk", *(x.astype(jnp.float32) for x in (q, jnp.repeat(k, group, 2)))) * scale
    if causal:
        assert q.shape[1] == k.shape[1]
        s = jnp.where(oracle.causal(q.shape[1], window=window)[None], s, -jnp.inf)
    return s


def emulated_forward(q, k, v, *, scale, causal, window=None):
    s = emulated_scores(q, k, scale, causal, window)
    lse = jax.nn.logsumexp(s, axis=-1)
    p = jnp.exp(s - lse[..., None]).astype(q.dtype)
    return einsum("bhqk,bkhe->bqhe", p, jnp.repeat(v, q.shape[2] // v.shape[2], 2)), lse


def emulated_backward(q, k, v, out, lse, dout, *, scale, causal, window=None):
    group = q.shape[2] // k.shape[2]
    keys, values = (jnp.repeat(x, group, 2) for x in (k, v))
    wide = [x.astype(jnp.float32) for x in (q, keys, values, out, dout)]
    delta = einsum("bqhe,bqhe->bhq", wide[3], wide[4])
    p = jnp.exp(emulated_scores(q, k, scale, causal, window) - lse[..., None])
    ds = p * (einsum("bqhe,bkhe->bhqk", wide[4], wide[2]) - delta[..., None]) * scale
    p, ds = (x.astype(q.dtype).astype(jnp.float32) for x in (p, ds))
    fold = lambda x: x.reshape(*x.shape[:2], k.shape[2], group, -1).sum(3).astype(q.dtype)
    dk, dv = einsum("bhqk,bqhd->bkhd", ds, wide[0]), einsum("bhqk,bqhe->bkhe", p, wide[4])
    return einsum("bhqk,bkhd->bqhd", ds, wide[1]).astype(q.dtype), fold(dk), fold(dv)


@pytest.fixture(autouse=True)
def registered(monkeypatch, request):
    """The table has 'cudnn'; where the test does not need a GPU, it computes by the emulation."""
    monkeypatch.setitem(zigzag_jax.kernels.FLASH, "cudnn", cudnn.IMPLEMENTATION)
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(cudnn, "forward", emulated_forward)
        monkeypatch.setattr(cudnn, "backward", emulated_backward)


class Call(NamedTuple):
    """One call: its ranges and sizes."""

    keys: KeyRange
    rows: int
    key_rows: int
    heads: Heads
    batch: int = 1


def calls(length: int, heads: Heads) -> dict[str, Call]:
    """Every kind of block with `length` rows."""
    at, half = np.arange(length), length // 2
    return {
        "whole": Call(of(0, [length + 8] * length), length, length + 8, heads, 2),
        "causal": Call(of(0, at + 1), length, length, heads, 2),
        "causal-window": Call(of(np.maximum(at - 20, 0), at + 1), length, length, heads),
        "front": Call(step(2, 1, length=length), length, length, heads),
        "back": Call(step(1, 2, length=length), length, length, heads, 2),
        "rectangle": Call(of(half // 2, np.where(at < half, 0, half)), length, length, heads),
        "causal-part": Call(of(5, np.where(at < half, 0, at - half + 6)), length, length, heads),
        "nothing": Call(of(0, [0] * length), length, length, heads),
    }


def compare(call: Call, dtype):
    """The adapter against float64: out, lse, gradients; with a carry over other keys, a dlse, and a dq to add to."""
    rng = np.random.default_rng(0)
    heads, rows = call.heads, call.rows
    q, k, v, dout = (jnp.asarray(x, dtype) for x in heads.draw(rng, call.batch, rows, call.key_rows))
    k0, v0 = (jnp.asarray(x, dtype) for x in heads.draw(rng, call.batch, rows, 64)[1:3])
    before = jnp.asarray(rng.standard_normal(q.shape), jnp.float32)
    dlse = rng.standard_normal((call.batch, heads.heads, rows)).astype(np.float32)
    dout = dout.at[:, -3].set(0)  # a row whose cotangent is dlse alone
    scale = heads.dim**-0.5
    at = np.arange(call.key_rows)
    seen = (at >= np.asarray(call.keys.start)[..., None]) & (at < np.asarray(call.keys.stop)[..., None])
    wide = lambda x: np.asarray(x, np.float64)

    out, lse = flash_fwd(q, k, v, call.keys, scale=scale, implementation="cudnn")
    alone = oracle.attention(wide(q), wide(k), wide(v), seen, scale=scale, dout=wide(dout))
    assert (out.dtype, lse.dtype) == (jnp.float32, jnp.float32)
    oracle.check("out", out, alone.out, BARS[dtype], floor=1e-6)
    oracle.check("lse", lse, alone.lse, 1e-6, floor=1e-6)
    narrow, _ = flash_fwd(q, k, v, call.keys, scale=scale, out_dtype=dtype, implementation="cudnn")
    np.testing.assert_array_equal(narrow, out.astype(dtype))

    earlier = flash_fwd(q, k0, v0, of(0, [64] * rows), scale=scale, implementation="cudnn")
    out, lse = flash_fwd(q, k, v, call.keys, scale=scale, carry=earlier, implementation="cudnn")
    everything = np.concatenate([np.ones((1, rows, 64), bool), seen], axis=2)
    both_k, both_v = (np.concatenate([wide(y) for y in x], axis=1) for x in ((k0, k), (v0, v)))
    want = oracle.attention(wide(q), both_k, both_v, everything, scale=scale, dout=wide(dout), dlse=dlse)
    oracle.check("carried out", out, want.out, BARS[dtype])
    oracle.check("carried lse", lse, want.lse, 1e-6)
    unseen = ~np.broadcast_to(seen.any(-1), (call.batch, rows))
    np.testing.assert_array_equal(np.asarray(out)[unseen], np.asarray(earlier[0])[unseen])

    lse = jnp.asarray(want.lse, jnp.float32)
    delta = jnp.asarray(np.einsum("bqhe,bqhe->bhq", wide(dout), want.out) - dlse, jnp.float32)
    first = flash_bwd(q, k0, v0, lse, delta, dout, of(0, [64] * rows), scale=scale, dq=before, implementation="cudnn")
    dq, dk, dv = flash_bwd(q, k, v, lse, delta, dout, call.keys, scale=scale, dq=first[0], implementation="cudnn")
    assert {x.dtype for x in (dq, dk, dv)} == {jnp.dtype(jnp.float32)}
    floor = 0.05 * float(np.linalg.norm(wide(dout)))
    for name, got, expected in (("dq", dq - before, want.dq), ("dk", dk, want.dk[:, 64:]), ("dv", dv, want.dv[:, 64:])):
        oracle.check(name, got, expected, BARS[dtype], floor=floor)
    hidden = ~seen.any(1)[0]
    assert not np.asarray(dk)[:, hidden].any()
    assert not np.asarray(dv)[:, hidden].any()
    own, _, _ = flash_bwd(q, k, v, lse, delta, dout, call.keys, scale=scale, implementation="cudnn")
    # cuDNN sums dq in no fixed order, and its dq has the inputs' dtype: some values round the other way
    oracle.check("dq on its own", own, np.asarray(dq - first[0], np.float64), 1e-3, floor=floor)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, jnp.bfloat16) for kind in calls(64, Heads(4, 2, 32, 16))] + [("back", jnp.float16)],
    ids=lambda x: x if isinstance(x, str) else jnp.dtype(x).name,
)
def test_the_adapter_around_an_emulated_cudnn(kind, dtype):
    compare(calls(64, Heads(4, 2, 32, 16))[kind], dtype)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU")
@pytest.mark.parametrize("dtype", BARS, ids=["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("length", "heads"),
    [
        (512, Heads(8, 2, 128, 128)),
        (512, Heads(4, 4, 192, 128)),
        (192, Heads(4, 1, 64, 64)),
        (330, Heads(4, 2, 96, 96)),
    ],
    ids=["gqa-D128", "mla", "mqa-D64-short", "D96-odd"],
)
@pytest.mark.parametrize("kind", calls(64, Heads(4, 2, 16, 16)))
def test_the_adapter_on_a_gpu(kind, length, heads, dtype):
    compare(calls(length, heads)[kind], dtype)


@pytest.mark.parametrize("dtype", BARS, ids=["bfloat16", "float16"])
def test_an_out_with_a_given_delta_is_better_than_an_honest_one(dtype):
    rng = np.random.default_rng(1)
    dout, out = (jnp.asarray(rng.standard_normal((2, 64, 4, 128)), dtype) for _ in range(2))
    exact = rng.standard_normal((2, 64, 4, 128)) * 0.1  # the out that was rounded
    delta = np.einsum("bqhe,bqhe->bhq", np.asarray(dout, np.float64), exact)
    dot = lambda a, b: np.einsum("bqhe,bqhe->bhq", np.asarray(a, np.float64), np.asarray(b, np.float64))
    error = lambda *pair: np.linalg.norm(dot(*pair) - delta) / np.linalg.norm(delta)
    same, out = jax.jit(cudnn.with_delta)(dout, jnp.asarray(delta, jnp.float32))
    np.testing.assert_array_equal(same, dout)
    assert error(dout, out) < error(dout, jnp.asarray(exact, dtype)) / 2
    assert error(dout, out) < {jnp.bfloat16: 2.0**-20, jnp.float16: 2.0**-11}[dtype]


@pytest.mark.parametrize("size", [1e-25, 1.0, 1e20])
def test_the_sum_is_delta_whatever_the_cotangent(size):
    rng = np.random.default_rng(2)
    dout = size * rng.standard_normal((1, 6, 2, 16))
    dout[:, 1], dout[:, 2, :, :8], dout[:, 3, :, 8:], dout[:, 4, :, 1:] = 0, 0, 0, 0
    delta = size * rng.standard_normal((1, 2, 6))
    delta[:, :, 5] = 0
    dout, out = cudnn.with_delta(jnp.asarray(dout, jnp.bfloat16), jnp.asarray(delta, jnp.float32))
    assert np.isfinite(np.asarray(out, np.float32)).all()
    got = np.einsum("bqhe,bqhe->bhq", np.asarray(dout, np.float64), np.asarray(out, np.float64))
    np.testing.assert_allclose(got, delta, rtol=2.0**-8)
    np.testing.assert_allclose(got[:, :, 0], delta[:, :, 0], rtol=2.0**-16)


# ------------------------------------------------------------------------------------------------------- refusals
def good(dtype=jnp.bfloat16, dim: int = 16, out_dim: int = 16) -> dict:
    x = jnp.ones((1, 8, 2, dim), dtype)
    return {"q": x, "k": x, "v": x[..., :1].repeat(out_dim, 3), "keys": of(0, AT + 1), "scale": 1.0}


def good_backward() -> dict:
    row = jnp.zeros((1, 2, 8))
    return good() | {"lse": row, "delta": row, "dout": jnp.ones((1, 8, 2, 16), jnp.bfloat16)}


@pytest.mark.parametrize(
    ("arguments", "needs"),
    [
        (good(jnp.float32), "bfloat16 or float16"),
        (good() | {"softcap": 3.0}, "no softcap"),
        (good(dim=20), "head dims that are multiples of 8 and at most 256"),
        (good(out_dim=12), "head dims that are multiples of 8 and at most 256"),
        (good(dim=264), "head dims that are multiples of 8 and at most 256"),
    ],
    ids=["float32", "softcap", "D20", "E12", "D264"],
)
def test_limits(arguments, needs):
    with pytest.raises(NotImplementedError, match=re.escape(f"'cudnn' needs {needs}; got ")) as error:
        flash_fwd(**arguments, implementation="cudnn")
    assert "reference" in str(error.value)  # and who can


def test_traced_ranges_are_refused_and_constants_under_jit_are_not():
    arguments = good()
    keys = arguments.pop("keys")
    call = lambda keys: flash_fwd(**arguments, keys=keys, implementation="cudnn")
    with pytest.raises(NotImplementedError, match="'cudnn' needs key ranges that are constants, got traced ones"):
        jax.jit(call)(keys)
    constant = KeyRange(*(jnp.asarray(x) for x in keys))
    np.testing.assert_array_equal(jax.jit(lambda: call(constant))()[1], call(keys)[1])


def test_deterministic_gradients_are_refused():
    assert flash_bwd(**good_backward(), implementation="cudnn")[0].shape == (1, 8, 2, 16)
    with pytest.raises(NotImplementedError, match="'cudnn' needs deterministic=False, got True"):
        flash_bwd(**good_backward(), deterministic=True, implementation="cudnn")


def test_the_refusals_reach_the_caller_of_the_public_functions():
    for keys, message in REFUSED.values():
        rows = keys.start.shape[1]
        x = jnp.ones((keys.start.shape[0], rows, 2, 16), jnp.bfloat16)
        k = jnp.ones((keys.start.shape[0], 16, 2, 16), jnp.bfloat16)
        row = jnp.zeros((x.shape[0], 2, rows))
        keys = KeyRange(*(np.asarray(y) for y in keys))  # pyright: ignore[reportArgumentType]
        with pytest.raises(NotImplementedError, match=re.escape(message)):
            flash_fwd(x, k, k, keys, scale=1.0, implementation="cudnn")
        with pytest.raises(NotImplementedError, match=re.escape(message)):
            flash_bwd(x, k, k, row, row, x, keys, scale=1.0, implementation="cudnn")
    assert FLASH["cudnn"].limits is cudnn.limits


@pytest.mark.parametrize(
    ("causal", "window", "mask"), [(False, None, "NO_MASK"), (True, None, "CAUSAL"), (True, 17, "CAUSAL")]
)
def test_it_lowers_for_cuda(monkeypatch, causal, window, mask):
    monkeypatch.undo()  # cuDNN itself: lowering needs no GPU
    at = np.arange(64)
    start = np.maximum(at - window + 1, 0) if window else 0 * at
    keys = of(start, at + 1 if causal else 0 * at + 64)
    q, k, v = (jax.ShapeDtypeStruct((1, 64, h, d), jnp.bfloat16) for h, d in ((4, 192), (2, 192), (2, 128)))
    dout, row = jax.ShapeDtypeStruct((1, 64, 4, 128), jnp.bfloat16), jax.ShapeDtypeStruct((1, 4, 64), jnp.float32)
    settings = zigzag_jax.kernels.flash_contract.Settings(0.25, None)

    def fwd(q, k, v):
        return cudnn.flash_fwd(q, k, v, keys, settings, None, jnp.dtype(jnp.bfloat16))

    def bwd(q, k, v, lse, delta, dout):
        return cudnn.flash_bwd(q, k, v, lse, delta, dout, keys, settings, None, False)

    for f, arguments, target in (
        (fwd, (q, k, v), "__cudnn$fmhaSoftmax("),
        (bwd, (q, k, v, row, row, dout), "__cudnn$fmhaSoftmaxBackward("),
    ):
        text = jax.jit(f).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count(target) == 1
        assert f"mask_type\\22: \\22{mask}\\22" in text
        assert f"sliding_window_length\\22: {window or 0}" in text
