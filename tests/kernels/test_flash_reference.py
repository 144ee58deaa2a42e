"""The reference flash kernel against float64, over random ranges; and every error of the contract."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import Heads

from zigzag_jax.kernels import FLASH, SplitKeys, check_implementation, flash_bwd, flash_fwd
from zigzag_jax.kernels.flash import reference
from zigzag_jax.ranges import KeyRange

GQA = Heads(4, 2, 16, 24)
QUICK = {"xla_backend_optimization_level": 0}  # compiling is most of the time of this file


@functools.partial(
    jax.jit,
    static_argnames=("scale", "softcap", "out_dtype", "deterministic"),
    compiler_options=QUICK,
)
def both(
    q, k, v, dout, dlse, keys, carry=None, dq=None, *, scale, softcap=None, out_dtype=jnp.float32, deterministic=False
):
    """(out, lse, dq, dk, dv) of one call whose softmax is whole."""
    out, lse = flash_fwd(q, k, v, keys, scale=scale, softcap=softcap, carry=carry, out_dtype=out_dtype)
    delta = jnp.einsum("bqhe,bqhe->bhq", dout, out, preferred_element_type=jnp.float32) - dlse
    grads = flash_bwd(q, k, v, lse, delta, dout, keys, scale=scale, softcap=softcap, dq=dq, deterministic=deterministic)
    return out, lse, *grads


def ranges(rng, kind: str, batch: int, rows: int, keys: int) -> KeyRange:
    start, stop = (np.sort(rng.integers(0, keys + 1, (batch, rows)), axis=1) for _ in range(2))
    if kind == "shared":
        start, stop = start[:1], stop[:1]
    elif kind == "full":
        start, stop = np.zeros((1, rows), int), np.full((1, rows), keys)
    elif kind == "empty":
        stop = start
    elif kind == "causal":
        stop = np.minimum(np.arange(1, rows + 1), keys)[None]
        start = np.zeros_like(stop)
    elif kind == "narrow":
        stop = np.minimum(start + 3, keys)
    elif kind == "first-rows-empty":  # and the start of an empty row points anywhere
        stop = np.where(np.arange(rows) < rows // 2, 0, keys)[None].repeat(batch, 0)
    return KeyRange(jnp.asarray(start, jnp.int32), jnp.asarray(stop, jnp.int32))


def visible(keys: KeyRange, length: int) -> np.ndarray:
    return oracle.seen(*keys, length)


def single(*arrays, dtype=jnp.float32):
    return tuple(jnp.asarray(x, dtype) for x in arrays)


def draw(rng, heads: Heads, batch: int, rows: int, keys: int, dtype=jnp.float32):
    q, k, v, dout = single(*heads.draw(rng, batch, rows, keys), dtype=dtype)
    return q, k, v, dout, jnp.asarray(rng.standard_normal((batch, heads.heads, rows)), jnp.float32)


# with tiles of 128 or 256: 300 x 530 is several uneven ones, 256 x 512 whole ones
SHAPES = [
    (Heads(4, 4, 16, 16), 2, 37, 53, None),
    (GQA, 2, 37, 37, 3.0),
    (Heads(6, 1, 24, 8), 3, 1, 11, None),
    (Heads(4, 2, 8, 16), 1, 300, 530, None),
    (Heads(2, 1, 16, 8), 2, 256, 512, 2.0),
    (Heads(2, 2, 8, 8), 2, 521, 7, None),
]


@pytest.mark.parametrize(
    ("heads", "batch", "rows", "keys", "softcap"),
    SHAPES,
    ids=[f"{h}-B{b}-{r}x{k}" + ("-softcap" if c else "") for h, b, r, k, c in SHAPES],
)
def test_values_and_gradients(heads, batch, rows, keys, softcap):
    rng = np.random.default_rng(rows)
    for kind in ("random", "random", "shared", "full", "causal", "narrow", "empty", "first-rows-empty"):
        q, k, v, dout, dlse = draw(rng, heads, batch, rows, keys)
        bounds = ranges(rng, kind, batch, rows, keys)
        mask = visible(bounds, keys)
        # a row that sees nothing has lse -inf whatever the input: nothing flows back through it
        dlse = dlse * mask.any(-1)[:, None, :]
        want = oracle.attention(q, k, v, mask, scale=0.3, dout=dout, dlse=dlse, softcap=softcap)
        got = both(q, k, v, dout, dlse, bounds, scale=0.3, softcap=softcap)
        assert [x.dtype for x in got] == [jnp.float32] * 5
        oracle.check_all(got, want, size=float(np.linalg.norm(dout)))
        nothing = ~np.broadcast_to(mask.any(-1), (batch, rows))
        assert not np.asarray(got[0])[nothing].any()
        assert np.isneginf(np.asarray(got[1]).swapaxes(1, 2)[nothing]).all()


def test_two_calls_with_a_carry_are_one_and_dq_is_added_to():
    rng = np.random.default_rng(1)
    q, k, v, dout, dlse = draw(rng, GQA, 2, 40, 60)
    first, second = (ranges(rng, "random", 2, 40, 60) for _ in range(2))
    k2, v2 = draw(rng, GQA, 2, 40, 60)[1:3]
    mask = np.concatenate([visible(first, 60), visible(second, 60)], axis=2)
    dlse = dlse * mask.any(-1)[:, None, :]
    both_k, both_v = (np.concatenate(x, axis=1) for x in ((k, k2), (v, v2)))
    want = oracle.attention(q, both_k, both_v, mask, scale=0.25, dout=dout, dlse=dlse)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def two_steps(q, k, v, k2, v2, dout, dlse):
        carry = flash_fwd(q, k, v, first, scale=0.25)
        out, lse = flash_fwd(q, k2, v2, second, scale=0.25, carry=carry)
        delta = jnp.einsum("bqhe,bqhe->bhq", dout, out) - dlse
        dq, *one = flash_bwd(q, k, v, lse, delta, dout, first, scale=0.25)
        dq, *two = flash_bwd(q, k2, v2, lse, delta, dout, second, scale=0.25, dq=dq)
        return out, lse, dq, *(jnp.concatenate(x, axis=1) for x in zip(one, two, strict=True))

    oracle.check_all(two_steps(q, k, v, k2, v2, dout, dlse), want)


def test_keys_in_two_parts_are_those_laid_side_by_side():
    rng = np.random.default_rng(8)
    q, k, v, dout, dlse = draw(rng, GQA, 2, 40, 60)
    split = SplitKeys(k[..., :10], k[:, :, 0, 10:])
    carry, dq0 = (single(rng.standard_normal(shape))[0] for shape in ((2, 40, 4, 24), (2, 40, 4, 16)))
    keys, lse0 = ranges(rng, "random", 2, 40, 60), jnp.full((2, 4, 40), 0.7, jnp.float32)
    got = both(q, split, v, dout, dlse, keys, (carry, lse0), dq0, scale=0.25)
    want = both(q, split.whole(), v, dout, dlse, keys, (carry, lse0), dq0, scale=0.25)
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=True):
        oracle.check(name, a, np.asarray(b, np.float64))
        assert a.dtype == jnp.float32
    own, shared = split.split(want[3])
    np.testing.assert_array_equal(own, want[3][..., :10])
    oracle.check("shared", shared, np.asarray(want[3], np.float64)[..., 10:].sum(2))
    # what each part is, by arithmetic of its own: the shared columns are one key head that all query heads read
    wide = np.concatenate([split.own, np.repeat(np.asarray(split.shared)[:, :, None], 2, 2)], axis=3)
    np.testing.assert_array_equal(split.whole(), wide)
    assert (split.shape, split.ndim, split.dtype) == ((2, 60, 2, 16), 4, jnp.float32)


def test_a_carry_stays_bit_for_bit_where_a_row_sees_nothing():
    rng = np.random.default_rng(2)
    q, k, v, _, _ = draw(rng, GQA, 2, 40, 60)
    carry = jnp.asarray(rng.standard_normal((2, 40, 4, 24)), jnp.float32), jnp.full((2, 4, 40), 0.7, jnp.float32)
    keys = ranges(rng, "first-rows-empty", 2, 40, 60)
    out, lse = flash_fwd(q, k, v, keys, scale=0.25, carry=carry)
    nothing = ~visible(keys, 60).any(-1)
    assert 0 < nothing.sum() < nothing.size
    np.testing.assert_array_equal(np.asarray(out)[nothing], np.asarray(carry[0])[nothing])
    np.testing.assert_array_equal(np.asarray(lse).swapaxes(1, 2)[nothing], np.float32(0.7))
    assert np.all(np.asarray(out)[~nothing] != np.asarray(carry[0])[~nothing])


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["plain", "softcap"])
def test_a_sink_is_a_first_carry(softcap):
    rng = np.random.default_rng(3)
    q, k, v, dout, dlse = draw(rng, GQA, 2, 40, 60)
    sink, keys = rng.standard_normal(4).astype(np.float32), ranges(rng, "random", 2, 40, 60)
    carry = jnp.zeros((2, 40, 4, 24)), jnp.broadcast_to(jnp.asarray(sink)[None, :, None], (2, 4, 40))
    got = both(q, k, v, dout, dlse, keys, carry, scale=0.25, softcap=softcap)
    mask = visible(keys, 60)
    want = oracle.attention(q, k, v, mask, scale=0.25, dout=dout, dlse=dlse, sink=sink, softcap=softcap)
    oracle.check_all(got, want)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_narrow_inputs_are_summed_in_float32(dtype):
    rng = np.random.default_rng(4)
    q, k, v, dout, dlse = draw(rng, GQA, 2, 40, 60, dtype)
    keys = ranges(rng, "full", 2, 40, 60)
    wide_q, wide_k, wide_v = (np.asarray(x, np.float64) for x in (q, k, v))
    want = oracle.attention(
        wide_q, wide_k, wide_v, visible(keys, 60), scale=0.25, dout=np.asarray(dout, np.float64), dlse=dlse
    )
    got = both(q, k, v, dout, dlse, keys, scale=0.25)
    assert [x.dtype for x in got] == [jnp.float32] * 5
    oracle.check_all(got, want)  # the oracle had the same rounded inputs: float32's tolerance holds
    out, lse = flash_fwd(q, k, v, keys, scale=0.25, out_dtype=dtype)
    assert (out.dtype, lse.dtype) == (dtype, jnp.float32)
    np.testing.assert_array_equal(out, got[0].astype(dtype))  # rounded once, at the end


def test_extreme_logits_neither_overflow_nor_lose_digits():
    rng = np.random.default_rng(5)
    _, _, v, dout, dlse = draw(rng, GQA, 2, 40, 60)
    # multiples of 64 and a scale of 1: scores up to 5e5 that float32 holds exactly
    q, k = (jnp.asarray(64 * rng.integers(-3, 4, (2, n, h, 16)), jnp.float32) for n, h in ((40, 4), (60, 2)))
    keys = ranges(rng, "random", 2, 40, 60)
    for sign in (1.0, -1.0):
        mask = visible(keys, 60)
        masked = dlse * mask.any(-1)[:, None, :]
        want = oracle.attention(sign * q, k, v, mask, scale=1.0, dout=dout, dlse=masked)
        assert np.abs(want.lse[np.isfinite(want.lse)]).max() > 1e5
        got = both(sign * q, k, v, dout, masked, keys, scale=1.0)
        oracle.check_all(got[:2], want)
        # the backward has the lse in float32, whose last place is a step of 0.03 here: that much p may be off
        step = float(np.spacing(np.float32(np.abs(want.lse[np.isfinite(want.lse)]).max())))
        oracle.check_all(got, want, tolerance=step, size=float(np.linalg.norm(dout)))


def test_tiles_that_no_row_sees_are_not_read():
    # nan in the first and the last tile of keys must reach nothing
    rng = np.random.default_rng(6)
    heads = Heads(2, 1, 8, 8)
    q, k, v, dout, dlse = draw(rng, heads, 1, 300, 530)
    at = np.arange(300)
    tile, tiles = reference._tiling(530, reference.KEY_TILE)
    assert tiles >= 3
    last = (tiles - 1) * tile
    start, stop = (jnp.asarray(np.minimum(x, last)[None], jnp.int32) for x in (tile + at // 8, tile + 23 + at))
    keys = KeyRange(start, stop)
    clean = both(q, k, v, dout, dlse, keys, scale=0.3)
    hidden = np.r_[0:tile, last:530]
    dirty = both(q, k.at[:, hidden].set(jnp.nan), v.at[:, hidden].set(jnp.nan), dout, dlse, keys, scale=0.3)
    for name, a, b in zip(oracle.Attention._fields, clean, dirty, strict=False):
        np.testing.assert_array_equal(a, b, err_msg=name)
    assert not np.asarray(dirty[3])[:, hidden].any()
    nothing = KeyRange(jnp.zeros((1, 300), jnp.int32), jnp.zeros((1, 300), jnp.int32))
    poison = jnp.full_like(k, jnp.nan)
    out, lse, *grads = both(q, poison, poison, dout, jnp.zeros_like(dlse), nothing, scale=0.3)
    assert np.isneginf(lse).all()
    assert not any(np.asarray(x).any() for x in (out, *grads))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_memory_at_32k_tokens_is_a_few_tiles(backward):
    length = 32768
    x = jax.ShapeDtypeStruct((1, length, 1, 64), jnp.bfloat16)
    row, bound = jax.ShapeDtypeStruct((1, 1, length), jnp.float32), jax.ShapeDtypeStruct((1, length), jnp.int32)
    keys: Any = (bound, bound)
    if backward:
        f = jax.jit(functools.partial(flash_bwd, scale=0.125))
        lowered = f.lower(x, x, x, row, row, x, KeyRange(*keys))
    else:
        lowered = jax.jit(functools.partial(flash_fwd, scale=0.125)).lower(x, x, x, KeyRange(*keys))
    analysis = lowered.compile().memory_analysis()
    assert analysis is not None
    # an array of the sequence is 8 MiB in float32; the scores of one head would be 4 GiB
    assert analysis.temp_size_in_bytes < 64 * 2**20


def test_deterministic_gradients_agree_bit_for_bit():
    rng = np.random.default_rng(7)
    args = (*draw(rng, GQA, 2, 40, 60), ranges(rng, "random", 2, 40, 60))
    for a, b in zip(both(*args, scale=0.25), both(*args, scale=0.25, deterministic=True), strict=True):
        np.testing.assert_array_equal(a, b)


# ------------------------------------------------------------------------------------------------------------- errors
def good() -> dict[str, Any]:
    """Arguments that keep the contract: B 2, Sq 5, Sk 7, H 4, K 2, D 8, E 6."""
    bound = jnp.zeros((2, 5), jnp.int32)
    return {
        "q": jnp.zeros((2, 5, 4, 8)), "k": jnp.zeros((2, 7, 2, 8)), "v": jnp.zeros((2, 7, 2, 6)),
        "keys": KeyRange(bound, bound + 1), "scale": 1.0,
    }  # fmt: skip


def good_backward() -> dict[str, Any]:
    row = jnp.zeros((2, 4, 5))
    return good() | {"lse": row, "delta": row, "dout": jnp.zeros((2, 5, 4, 6))}


def zeros(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


BOUND = zeros(2, 5, dtype=jnp.int32)
INPUTS: dict[str, tuple[dict[str, Any], str]] = {
    "q-rank": ({"q": zeros(5, 4, 8)}, "q must be [batch, sequence, heads, head_dim], got shape [5, 4, 8]"),
    "v-rank": ({"v": zeros(2, 7, 12)}, "v must be [batch, sequence, heads, head_dim], got shape [2, 7, 12]"),
    "int": ({"q": zeros(2, 5, 4, 8, dtype=jnp.int32)}, "q must be bfloat16, float16 or float32, got int32"),
    "k-dtype": (
        {"k": zeros(2, 7, 2, 8, dtype=jnp.bfloat16)},
        "q, k and v must have one dtype, got k bfloat16 beside q float32",
    ),
    "v-dtype": (
        {"v": zeros(2, 7, 2, 6, dtype=jnp.float16)},
        "q, k and v must have one dtype, got v float16 beside q float32",
    ),
    "batch": ({"k": zeros(3, 7, 2, 8)}, "q, k and v must have one batch size, got k 3 beside q 2"),
    "kv-length": ({"v": zeros(2, 6, 2, 6)}, "k and v must agree in [sequence, heads], got [7, 2] and [6, 2]"),
    "kv-heads": ({"v": zeros(2, 7, 1, 6)}, "k and v must agree in [sequence, heads], got [7, 2] and [7, 1]"),
    "head-dim": ({"k": zeros(2, 7, 2, 9)}, "q and k must have one head_dim, got 8 and 9"),
    "groups": ({"q": zeros(2, 5, 3, 8)}, "q heads must be a multiple of kv heads, got 3 and 2"),
    "no-kv-heads": (
        {"k": zeros(2, 7, 0, 8), "v": zeros(2, 7, 0, 6)},
        "q heads must be a multiple of kv heads, got 4 and 0",
    ),
    "own-rank": (
        {"k": SplitKeys(zeros(2, 7, 5), zeros(2, 7, 3))},
        "k.own must be [batch, sequence, heads, columns], got shape [2, 7, 5]",
    ),
    "shared-length": (
        {"k": SplitKeys(zeros(2, 7, 2, 5), zeros(2, 6, 3))},
        "k.shared must be [B, Sk, P] with B, Sk = [2, 7], got [2, 6, 3]",
    ),
    "shared-heads": (
        {"k": SplitKeys(zeros(2, 7, 2, 5), zeros(2, 7, 2, 3))},
        "k.shared must be [B, Sk, P] with B, Sk = [2, 7], got [2, 7, 2, 3]",
    ),
    "shared-dtype": (
        {"k": SplitKeys(zeros(2, 7, 2, 5), zeros(2, 7, 3, dtype=jnp.bfloat16))},
        "k.shared must be float32, got bfloat16",
    ),
    "shared-columns": (
        {"k": SplitKeys(zeros(2, 7, 2, 5), zeros(2, 7, 4))},
        "q and k must have one head_dim, got 8 and 9",
    ),
    "start-dtype": ({"keys": KeyRange(zeros(2, 5), BOUND)}, "keys.start must be int32, got float32"),
    "stop-rows": (
        {"keys": KeyRange(BOUND, BOUND[:, :4])},
        "keys.stop must be [B or 1, Sq] with B = 2, Sq = 5, got [2, 4]",
    ),
    "start-batch": (
        {"keys": KeyRange(zeros(3, 5, dtype=jnp.int32), BOUND)},
        "keys.start must be [B or 1, Sq] with B = 2, Sq = 5, got [3, 5]",
    ),
    "keys-differ": (
        {"keys": KeyRange(BOUND[:1], BOUND)},
        "keys.start and keys.stop must have one shape, got [1, 5] and [2, 5]",
    ),
    "scale-nan": ({"scale": float("nan")}, "scale must be a finite number, got nan"),
    "scale-word": ({"scale": "big"}, "scale must be a finite number, got 'big'"),
    "softcap-0": ({"softcap": 0.0}, "softcap must be a number > 0 or None, got 0.0"),
    "softcap-inf": ({"softcap": float("inf")}, "softcap must be a number > 0 or None, got inf"),
    "implementation": (
        {"implementation": "magic"},
        f"implementation must be None or one of {', '.join(FLASH)}, hopper, got 'magic'",
    ),
}
FORWARD: dict[str, tuple[dict[str, Any], str]] = INPUTS | {
    "out_dtype": ({"out_dtype": jnp.int8}, "out_dtype must be bfloat16, float16 or float32, got int8"),
    "carry-length": ({"carry": (zeros(2, 5, 4, 6),)}, "carry must be (out, lse), got 1 values"),
    "carry-out": (
        {"carry": (zeros(2, 5, 4, 8), zeros(2, 4, 5))},
        "carry out must be [B, Sq, H, E] = [2, 5, 4, 6], got [2, 5, 4, 8]",
    ),
    "carry-lse": (
        {"carry": (zeros(2, 5, 4, 6), zeros(2, 5, 4))},
        "carry lse must be [B, H, Sq] = [2, 4, 5], got [2, 5, 4]",
    ),
    "carry-out-dtype": (
        {"carry": (zeros(2, 5, 4, 6, dtype=jnp.bfloat16), zeros(2, 4, 5))},
        "carry out must be float32, got bfloat16",
    ),
    "carry-lse-dtype": (
        {"carry": (zeros(2, 5, 4, 6), zeros(2, 4, 5, dtype=jnp.float16))},
        "carry lse must be float32, got float16",
    ),
}
BACKWARD: dict[str, tuple[dict[str, Any], str]] = INPUTS | {
    "lse": ({"lse": zeros(2, 5, 4)}, "lse must be [B, H, Sq] = [2, 4, 5], got [2, 5, 4]"),
    "delta-dtype": ({"delta": zeros(2, 4, 5, dtype=jnp.bfloat16)}, "delta must be float32, got bfloat16"),
    "dout": ({"dout": zeros(2, 5, 4, 8)}, "dout must be [B, Sq, H, E] = [2, 5, 4, 6], got [2, 5, 4, 8]"),
    "dout-dtype": ({"dout": zeros(2, 5, 4, 6, dtype=jnp.bfloat16)}, "dout must be float32, got bfloat16"),
    "dq": ({"dq": zeros(2, 5, 2, 8)}, "dq must be [B, Sq, H, D] = [2, 5, 4, 8], got [2, 5, 2, 8]"),
    "dq-dtype": ({"dq": zeros(2, 5, 4, 8, dtype=jnp.bfloat16)}, "dq must be float32, got bfloat16"),
}


@pytest.mark.parametrize("case", FORWARD)
def test_forward_errors(case):
    change, message = FORWARD[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        flash_fwd(**(good() | change))


@pytest.mark.parametrize("case", BACKWARD)
def test_backward_errors(case):
    change, message = BACKWARD[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        flash_bwd(**(good_backward() | change))


@pytest.mark.parametrize("name", ["scale", "softcap"])
def test_settings_are_static(name):
    with pytest.raises(ValueError, match=f"{name} must be a static Python number, got a traced value"):
        jax.jit(lambda x: flash_fwd(**(good() | {name: x})))(1.0)


def test_the_good_arguments_are_good():
    assert flash_fwd(**good())[0].shape == (2, 5, 4, 6)
    assert [x.shape for x in flash_bwd(**good_backward())] == [(2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 2, 6)]


def test_a_known_name_or_none_is_no_error():
    check_implementation(None, FLASH)
    check_implementation("reference", FLASH)
    check_implementation("hopper", FLASH)
