"""The triton kernels, interpreted on a CPU, against float64: each point of the contract, in small tiles.

The tiles are 16 to 32 rows, so that some fifty rows are several tiles in both directions and the last one is not full.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from oracle import Heads

from zigzag_jax import zigzag_attention
from zigzag_jax.kernels import FLASH, flash_bwd, flash_fwd
from zigzag_jax.kernels.flash import triton, triton_tiles, triton_tuning
from zigzag_jax.kernels.flash.contract import Implementation, Settings
from zigzag_jax.kernels.flash.triton_tuning import TABLE, Tile, Tuning
from zigzag_jax.ranges import KeyRange

SMALL = Tuning(fwd=Tile(32, 16, 4, 2), dkv=Tile(16, 32, 4, 2), dq=Tile(32, 16, 4, 2))
GQA = Heads(4, 2, 16, 24)
QUICK = {"xla_backend_optimization_level": 0}  # compiling is most of the time of this file
# P and dS are rounded to the inputs' dtype for the tensor cores: one rounding of 2^-9 (bfloat16) or 2^-12 an entry.
NARROW = {"out": 3e-3, "lse": 1e-6, "dq": 4e-3, "dk": 4e-3, "dv": 4e-3}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    small = Implementation(
        functools.partial(triton.flash_fwd, tuning=SMALL),
        functools.partial(triton.flash_bwd, tuning=SMALL),
        triton.limits,
    )
    monkeypatch.setitem(FLASH, "triton", small)


fwd = functools.partial(flash_fwd, implementation="triton")
bwd = functools.partial(flash_bwd, implementation="triton")


def plain(
    q, k, v, dout, dlse, keys, carry=None, dq=None, *, scale=0.3, softcap=None, out_dtype=jnp.float32,
    deterministic=False,
):  # fmt: skip
    """(out, lse, dq, dk, dv) of one call whose softmax is whole."""
    out, lse = fwd(q, k, v, keys, scale=scale, softcap=softcap, carry=carry, out_dtype=out_dtype)
    delta = jnp.einsum("bqhe,bqhe->bhq", dout, out, preferred_element_type=jnp.float32) - dlse
    return (
        out,
        lse,
        *bwd(q, k, v, lse, delta, dout, keys, scale=scale, softcap=softcap, dq=dq, deterministic=deterministic),
    )


both = jax.jit(plain, static_argnames=("scale", "softcap", "out_dtype", "deterministic"), compiler_options=QUICK)


def bounds(start, stop) -> KeyRange:
    return KeyRange(*(jnp.asarray(np.atleast_2d(x), jnp.int32) for x in (start, stop)))


def random_ranges(rng, batch: int, rows: int, keys: int) -> KeyRange:
    """See oracle.random_bounds."""
    return bounds(*oracle.random_bounds(rng, batch, rows, keys))


def causal_ranges(rows: int, keys: int, batch: int = 1) -> KeyRange:
    """The last row sees every key."""
    stop = np.maximum(np.arange(rows) + 1 + keys - rows, 0)
    return bounds(np.zeros((batch, rows)), np.tile(stop, (batch, 1)))


def visible(keys: KeyRange, length: int) -> np.ndarray:
    return oracle.seen(*keys, length)


def draw(rng, heads: Heads, batch: int, rows: int, keys: int, mask, dtype=jnp.float32):
    """(q, k, v, dout, dlse); a row that sees nothing has lse -inf whatever the input: nothing flows back through it."""
    q, k, v, dout = (jnp.asarray(x, dtype) for x in heads.draw(rng, batch, rows, keys))
    dlse = rng.standard_normal((batch, heads.heads, rows)) * mask.any(-1)[:, None, :]
    return q, k, v, dout, jnp.asarray(dlse, jnp.float32)


# ------------------------------------------------------------------------------------------------- values and gradients
CASES: list[tuple[Heads, int, int, int, float | None]] = [
    (Heads(2, 2, 64, 64), 2, 70, 50, None),
    (Heads(4, 1, 64, 64), 1, 37, 70, 2.0),
    (Heads(16, 1, 16, 16), 1, 33, 40, None),
    (Heads(2, 1, 128, 128), 1, 64, 64, None),
    (Heads(4, 2, 192, 128), 1, 40, 35, None),
    (Heads(2, 2, 96, 96), 1, 35, 40, 3.0),
    (Heads(2, 1, 256, 256), 1, 33, 47, None),
    (Heads(6, 2, 24, 40), 1, 50, 33, None),
    (Heads(4, 2, 16, 24), 1, 1, 53, None),
]


@pytest.mark.parametrize(
    ("heads", "batch", "rows", "keys", "softcap"),
    CASES,
    ids=[f"{h}-H{h.heads}-B{b}-{r}x{k}" + ("-softcap" if c else "") for h, b, r, k, c in CASES],
)
def test_values_and_gradients(heads, batch, rows, keys, softcap):
    rng = np.random.default_rng(rows + keys)
    scale = 0.3 if heads.dim < 64 else heads.dim**-0.5
    for ranges in (random_ranges(rng, batch, rows, keys), causal_ranges(rows, keys, batch)):
        mask = visible(ranges, keys)
        q, k, v, dout, dlse = draw(rng, heads, batch, rows, keys, mask)
        want = oracle.attention(q, k, v, mask, scale=scale, dout=dout, dlse=dlse, softcap=softcap)
        got = both(q, k, v, dout, dlse, ranges, scale=scale, softcap=softcap)
        assert [x.dtype for x in got] == [jnp.float32] * 5
        oracle.check_all(got, want, size=float(np.linalg.norm(dout)))


RANGES: dict[str, Any] = {
    "full": lambda rng: bounds(np.zeros(70), np.full(70, 50)),
    "empty": lambda rng: bounds(np.full(70, 20), np.full(70, 20)),
    "backwards": lambda rng: bounds(np.full(70, 30), np.full(70, 10)),
    "window": lambda rng: bounds(np.arange(70) // 2, np.minimum(np.arange(70) // 2 + 3, 50)),
    "tiles": lambda rng: bounds(np.repeat([0, 16, 32], [32, 32, 6]), np.repeat([16, 32, 50], [32, 32, 6])),
    "front-half-empty": lambda rng: bounds(np.full(70, 49), np.repeat([0, 50], [35, 35])),
    "beyond": lambda rng: bounds(np.zeros(70), np.full(70, 1000)),
    "one-row-in-a-tile": lambda rng: bounds(np.zeros(70), np.repeat([0, 50], [63, 7])),
    "batch-rows-differ": lambda rng: bounds(np.zeros((2, 70)), [np.full(70, 50), np.zeros(70)]),
}


@pytest.mark.parametrize("kind", RANGES)
def test_ranges(kind):
    rng = np.random.default_rng(0)
    ranges = RANGES[kind](rng)
    mask = visible(ranges, 50)
    q, k, v, dout, dlse = draw(rng, GQA, 2, 70, 50, mask)
    want = oracle.attention(q, k, v, mask, scale=0.3, dout=dout, dlse=dlse)
    got = both(q, k, v, dout, dlse, ranges)
    oracle.check_all(got, want, size=float(np.linalg.norm(dout)))
    nothing = ~np.broadcast_to(mask.any(-1), (2, 70))
    assert not np.asarray(got[0])[nothing].any()
    assert np.isneginf(np.asarray(got[1]).swapaxes(1, 2)[nothing]).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_narrow_inputs(dtype):
    rng = np.random.default_rng(1)
    ranges = random_ranges(rng, 2, 70, 50)
    mask = visible(ranges, 50)
    q, k, v, dout, dlse = draw(rng, Heads(4, 2, 64, 32), 2, 70, 50, mask, dtype)
    want = oracle.attention(q, k, v, mask, scale=0.125, dout=dout, dlse=dlse)
    got = both(q, k, v, dout, dlse, ranges, scale=0.125)
    assert [x.dtype for x in got] == [jnp.float32] * 5
    for name, g, w in zip(oracle.Attention._fields, got, want, strict=False):
        oracle.check(name, g, w, NARROW[name])
    out, lse = fwd(q, k, v, ranges, scale=0.125, out_dtype=dtype)
    assert (out.dtype, lse.dtype) == (dtype, jnp.float32)
    np.testing.assert_array_equal(out, got[0].astype(dtype))  # rounded once, at the end


def test_tiles_of_the_table():
    # the sizes that GPUs run, on a sequence of two query tiles and several key tiles
    rng = np.random.default_rng(2)
    ranges = causal_ranges(140, 200)
    mask = visible(ranges, 200)
    q, k, v, dout, dlse = draw(rng, Heads(2, 1, 16, 16), 1, 140, 200, mask)
    want = oracle.attention(q, k, v, mask, scale=0.3, dout=dout, dlse=dlse)
    settings = Settings(0.3, None)
    out, lse = triton.flash_fwd(q, k, v, ranges, settings, None, jnp.float32, TABLE[2, 128])
    delta = jnp.einsum("bqhe,bqhe->bhq", dout, out) - dlse
    grads = triton.flash_bwd(q, k, v, lse, delta, dout, ranges, settings, None, False, TABLE[2, 128])
    oracle.check_all((out, lse, *grads), want)


# ---------------------------------------------------------------------------------------------------------------- carry
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_two_calls_with_a_carry_are_one_and_dq_is_added_to(dtype):
    rng = np.random.default_rng(3)
    first, second = (random_ranges(rng, 2, 40, 50) for _ in range(2))
    mask = np.concatenate([visible(first, 50), visible(second, 50)], axis=2)
    assert not mask[:, :, :50].any(-1).all()  # rows whose carry is empty
    q, k, v, dout, dlse = draw(rng, GQA, 2, 40, 50, mask, dtype)
    k2, v2 = draw(rng, GQA, 2, 40, 50, mask, dtype)[1:3]
    both_k, both_v = (np.concatenate(x, axis=1) for x in ((k, k2), (v, v2)))
    want = oracle.attention(q, both_k, both_v, mask, scale=0.25, dout=dout, dlse=dlse)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def two_steps(q, k, v, k2, v2, dout, dlse):
        carry = fwd(q, k, v, first, scale=0.25)
        out, lse = fwd(q, k2, v2, second, scale=0.25, carry=carry)
        last, _ = fwd(q, k2, v2, second, scale=0.25, carry=carry, out_dtype=dtype)
        delta = jnp.einsum("bqhe,bqhe->bhq", dout, out, preferred_element_type=jnp.float32) - dlse
        dq, *one = bwd(q, k, v, lse, delta, dout, first, scale=0.25)
        dq, *two = bwd(q, k2, v2, lse, delta, dout, second, scale=0.25, dq=dq)
        return last, out, lse, dq, *(jnp.concatenate(x, axis=1) for x in zip(one, two, strict=True))

    last, *got = two_steps(q, k, v, k2, v2, dout, dlse)
    for name, g, w in zip(oracle.Attention._fields, got, want, strict=False):
        oracle.check(name, g, w, oracle.FLOAT32 if dtype == jnp.float32 else NARROW[name])
    np.testing.assert_array_equal(last, got[0].astype(dtype))


def test_a_carry_stays_bit_for_bit_where_a_row_sees_nothing():
    rng = np.random.default_rng(4)
    ranges = bounds(np.full(40, 3), np.repeat([0, 50], [20, 20]))
    q, k, v, _, _ = draw(rng, GQA, 2, 40, 50, visible(ranges, 50))
    out0, lse0 = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((2, 40, 4, 24), (2, 4, 40)))
    out0, lse0 = out0.at[:, :5].set(0), lse0.at[:, :, :5].set(-jnp.inf)
    out, lse = fwd(q, k, v, ranges, scale=0.25, carry=(out0, lse0))
    np.testing.assert_array_equal(out[:, :20], out0[:, :20])
    np.testing.assert_array_equal(lse[:, :, :20], lse0[:, :, :20])
    assert np.all(np.asarray(out)[:, 20:] != np.asarray(out0)[:, 20:])


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["plain", "softcap"])
def test_a_sink_is_a_first_carry(softcap):
    rng = np.random.default_rng(5)
    ranges = random_ranges(rng, 2, 40, 50)
    mask = visible(ranges, 50)
    q, k, v, dout, _ = draw(rng, GQA, 2, 40, 50, mask)
    dlse = jnp.asarray(rng.standard_normal((2, 4, 40)), jnp.float32)
    sink = rng.standard_normal(4).astype(np.float32)
    carry = jnp.zeros((2, 40, 4, 24)), jnp.broadcast_to(jnp.asarray(sink)[None, :, None], (2, 4, 40))
    want = oracle.attention(q, k, v, mask, scale=0.3, dout=dout, dlse=dlse, sink=sink, softcap=softcap)
    oracle.check_all(both(q, k, v, dout, dlse, ranges, carry, softcap=softcap), want)


# ------------------------------------------------------------------------------------------------------ tiles and order
def test_tiles_that_no_row_sees_are_not_read():
    rng = np.random.default_rng(7)
    # keys of the first and last tiles (of 16 or 32) are seen by nobody, and queries of the first and last see nothing
    start, stop = (np.clip(np.arange(130) // 2 - 16, 0, 64) + n for n in (32, 41))
    stop[:32], start[96:] = 0, 200
    ranges = bounds(start, np.minimum(stop, 95))
    mask = visible(ranges, 130)
    assert not mask[0, :32].any()
    assert not mask[0, 96:].any()
    assert not mask[0, :, :32].any()
    assert not mask[0, :, 96:].any()
    q, k, v, dout, dlse = draw(rng, GQA, 1, 130, 130, mask)
    clean = both(q, k, v, dout, dlse, ranges)
    hidden = np.r_[0:32, 96:130]
    poison = lambda x: x.at[:, hidden].set(jnp.nan)
    dirty = both(q, poison(k), poison(v), dout, dlse, ranges)
    for name, a, b in zip(oracle.Attention._fields, clean, dirty, strict=False):
        np.testing.assert_array_equal(a, b, err_msg=name)
    # delta of a poisoned row is nan too: what reaches dk and dv must come from no such row
    dk, dv = both(poison(q), k, v, poison(dout), dlse, ranges)[3:]
    np.testing.assert_array_equal(dk, clean[3])
    np.testing.assert_array_equal(dv, clean[4])


def test_two_runs_agree_bit_for_bit_and_dq_only_adds():
    rng = np.random.default_rng(8)
    ranges = random_ranges(rng, 2, 40, 50)
    args = (*draw(rng, GQA, 2, 40, 50, visible(ranges, 50)), ranges)
    dq = jnp.asarray(rng.standard_normal((2, 40, 4, 16)), jnp.float32)
    first, again, added = both(*args, deterministic=True), both(*args, deterministic=True), both(*args, dq=dq)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip((*first[:2], dq + first[2], *first[3:]), added, strict=True):
        np.testing.assert_array_equal(a, b)


# ------------------------------------------------------------------------------------------------------ transformations
@pytest.mark.parametrize("cp", [1, 2])
def test_a_scan_of_checkpointed_layers_on_a_mesh(cp):
    rng = np.random.default_rng(9)
    x = jnp.asarray(rng.standard_normal((1, 64, 2, 16)), jnp.float32)
    weights, cotangent = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((2, 16, 16), x.shape))
    weights = 0.25 * weights
    mesh = Mesh(np.array(jax.devices()[:cp]), ("cp",))

    @functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=QUICK)
    def gradient(implementation, remat: bool):
        def layer(x, w):
            q = x @ w
            out = zigzag_attention(
                q, x[:, :, :1], q[:, :, :1], mesh=mesh, spec=P(None, "cp", None, None), implementation=implementation
            )
            return x + out, None

        def loss(x, weights):
            out, _ = jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, weights)
            return jnp.vdot(out, cotangent)

        return jax.grad(loss, argnums=(0, 1))(x, weights)

    want = gradient("reference", False)
    once, remat = gradient("triton", False), gradient("triton", True)
    for name, w, p, r in zip(("dx", "dw"), want, once, remat, strict=True):
        oracle.check(name, p, w, 1e-5)
        np.testing.assert_allclose(r, p, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
def test_the_platform_is_that_of_the_lowering():
    # a CPU host lowers the compiled kernels for a GPU that it does not have, and the interpreted ones for itself
    card = AbstractMesh((1,), ("x",), abstract_device=AbstractDevice("NVIDIA A100", None, platform="gpu"))
    rng = np.random.default_rng(10)
    ranges = causal_ranges(32, 32)
    args = (*draw(rng, GQA, 1, 32, 32, visible(ranges, 32)), ranges)
    with jax.sharding.use_abstract_mesh(card):
        text = jax.jit(plain).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    for name in ("flash_fwd_triton", "flash_dkv_triton", "flash_dq_triton"):
        assert text.count(f'name = "{name}"') == 1
    assert "xla.gpu.triton" not in jax.jit(plain).lower(*args).as_text()


# ------------------------------------------------------------------------------------------------------ data and limits
def test_a_head_is_cut_in_powers_of_two_that_pad_least():
    for dim in range(1, 257):
        parts = triton_tiles.columns(dim)
        assert parts[0].start == 0
        assert sum(part.live for part in parts) == dim
        assert all(part.width >= 16 and part.width & (part.width - 1) == 0 for part in parts)
        assert triton_tiles.width(dim) <= max(16, 1 << (dim - 1).bit_length())
    widths = {64: 64, 72: 80, 80: 80, 96: 96, 120: 128, 128: 128, 192: 192, 224: 256, 256: 256}
    assert {dim: triton_tiles.width(dim) for dim in widths} == widths


def test_every_head_has_a_tuning_of_powers_of_two():
    for itemsize in (2, 4):
        for width in range(32, 513):
            tuning = triton_tuning.choose(width, itemsize)
            for tile in (tuning.fwd, tuning.dkv, tuning.dq):
                assert all(n >= 16 and n & (n - 1) == 0 for n in (tile.queries, tile.keys))
    assert Tile(128, 64, 4, 2).fit(1, 33) == Tile(16, 64, 4, 2)


def test_limits():
    zeros = lambda rows, dim: jnp.zeros((1, rows, 2, dim))
    ranges = bounds(np.zeros(4), np.zeros(4))
    with pytest.raises(NotImplementedError, match="'triton' needs head_dim <= 256"):
        fwd(zeros(4, 264), zeros(4, 264), zeros(4, 8), ranges, scale=1.0)
    with pytest.raises(NotImplementedError, match="'triton' needs at least one row, head and column"):
        fwd(zeros(4, 8), zeros(0, 8), zeros(0, 8), ranges, scale=1.0)
