"""The flash kernels on a GPU, each implementation that it has: `pytest -m gpu tests/kernels`.

The contract against float64 with random cotangents in the shapes where kernels go wrong; the transformations that a
model wraps around them; arrays of more than 2**31 elements.
"""

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cards import GPU, HOPPER
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from oracle import Heads

from zigzag_jax import zigzag_attention
from zigzag_jax.kernels import SplitKeys, flash_bwd, flash_fwd, flash_implementation
from zigzag_jax.kernels.flash import mosaic, mosaic_tuning, mosaic_zeros
from zigzag_jax.kernels.flash.contract import Carry, Settings
from zigzag_jax.kernels.flash.mosaic_cuts import Cuts
from zigzag_jax.mla import latent_attention
from zigzag_jax.ranges import KeyRange

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not GPU, reason="no GPU"),
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning"),
]

# P and dS are rounded to the inputs' dtype for the tensor cores: one rounding of 2^-9 (bfloat16) or 2^-12 an entry
BARS = {
    jnp.bfloat16: {"out": 3e-3, "lse": 1e-6, "dq": 4e-3, "dk": 4e-3, "dv": 4e-3},
    jnp.float16: {"out": 5e-4, "lse": 1e-6, "dq": 6e-4, "dk": 6e-4, "dv": 6e-4},
}


class Case(NamedTuple):
    heads: Heads
    rows: int = 256
    keys: int = 256
    batch: int = 1
    dtype: type = jnp.bfloat16
    softcap: float | None = None
    causal: bool = False
    shared: int = 0
    """Columns of k that all heads share: it is given as SplitKeys."""


CASES = {
    "gqa8": Case(Heads(16, 2, 128, 128), 512, 640),
    "mqa16-few-blocks": Case(Heads(16, 1, 128, 128), 256, 384, batch=2),
    "odd-lengths": Case(Heads(4, 2, 128, 128), 333, 517),
    "one-row": Case(Heads(4, 2, 128, 128), 1, 129),
    "float16": Case(Heads(4, 2, 128, 128), dtype=jnp.float16),
    "softcap": Case(Heads(4, 2, 128, 128), softcap=3.0),
    "softcap-50": Case(Heads(4, 2, 128, 128), softcap=50.0),
    # several items a multiprocessor, several waves of blocks, whole groups in a block: as in a model
    "model": Case(Heads(32, 4, 128, 128), 1024, 9216),
    "model-causal": Case(Heads(32, 4, 128, 128), 2560, 2560, causal=True),
    "mla-model": Case(Heads(16, 16, 192, 128), 1536, 1600),
    "mla": Case(Heads(4, 4, 192, 128), 384),
    "mla-many-keys": Case(Heads(4, 4, 192, 128), 512, 16640),  # fewer kv heads side by side than there are
    "mla-one-row": Case(Heads(4, 4, 192, 128), 1, 129),
    "mla-few-tiles": Case(Heads(4, 4, 192, 128), 192, 900),
    "mla-a-tile-behind-a-chunk": Case(Heads(4, 4, 192, 128), 576, 576, causal=True),
    "mla-softcap": Case(Heads(2, 2, 192, 128), softcap=3.0),
    "mla-shared-model": Case(Heads(16, 16, 192, 128), 1536, 1600, shared=64),
    "mla-shared-causal": Case(Heads(16, 16, 192, 128), 2560, 2560, causal=True, shared=64),
    "mla-shared": Case(Heads(4, 4, 192, 128), 384, 517, batch=2, shared=64),
    "mla-shared-float16": Case(Heads(4, 4, 192, 128), dtype=jnp.float16, shared=64),
    "mla-shared-softcap": Case(Heads(2, 2, 192, 128), softcap=3.0, shared=64),
    "mla-shared-groups": Case(Heads(8, 2, 192, 128), 320, 640, shared=64),
    "shared-32": Case(Heads(4, 4, 192, 128), shared=32),  # no kernel reads these two parts: made whole
    "D64": Case(Heads(6, 6, 64, 64), 640, 384, batch=2),
    "D96": Case(Heads(6, 3, 96, 96)),
    "D96-E64": Case(Heads(6, 3, 96, 64)),
    "D256": Case(Heads(4, 2, 256, 256), 256, 512),
    "D256-model": Case(Heads(16, 4, 256, 256), 1024, 4096),
    "D256-causal": Case(Heads(8, 4, 256, 256), 1600, 1600, batch=2, causal=True),
    "D256-batch": Case(Heads(4, 2, 256, 256), 512, 384, batch=2),
    "D256-odd-lengths": Case(Heads(4, 1, 256, 256), 333, 517),
    "D256-one-row": Case(Heads(4, 2, 256, 256), 1, 65),
    "D256-softcap-float16": Case(Heads(4, 2, 256, 256), softcap=3.0, dtype=jnp.float16),
}


def split(k, shared: int) -> SplitKeys:
    """k with its last `shared` columns taken from the first head."""
    return SplitKeys(k[..., :-shared], k[:, :, 0, -shared:])


def draw(rng, case: Case):
    """(q, k, v, dout) in the case's dtype, k whole; and k as the case gives it."""
    q, k, v, dout = (jnp.asarray(x, case.dtype) for x in case.heads.draw(rng, case.batch, case.rows, case.keys))
    if not case.shared:
        return (q, k, v, dout), k
    given = split(k, case.shared)
    return (q, given.whole(), v, dout), given


def causal_keys(batch: int, rows: int) -> KeyRange:
    start = jnp.zeros((batch, rows), jnp.int32)
    return KeyRange(start, start + jnp.arange(1, rows + 1, dtype=jnp.int32)[None])


def named(given, dk) -> dict:
    """The gradient of k, whole or split, by the names of its parts."""
    if not isinstance(given, SplitKeys):
        return {"dk": dk}
    dk = given.split(dk)
    return {"dk": dk.own, "dk shared": dk.shared}


def truth(q, k, v, keys, mask, *, scale, dout, dlse, softcap):
    """Float64 on the host; where that takes minutes, the plain implementation in float32 (it is tested against it)."""
    if q.shape[2] * q.shape[1] * k.shape[1] < 2**26:
        return oracle.attention(q, k, v, mask, scale=scale, dout=dout, dlse=dlse, softcap=softcap)
    q, k, v, dout = (x.astype(jnp.float32) for x in (q, k, v, dout))

    @jax.jit
    def run(q, k, v, dout, dlse, keys):
        out, lse = flash_fwd(q, k, v, keys, scale=scale, softcap=softcap, implementation="reference")
        delta = jnp.einsum("bqhe,bqhe->bhq", dout, out, precision="highest") - dlse
        args = q, k, v, lse, delta, dout, keys
        return out, lse, *flash_bwd(*args, scale=scale, softcap=softcap, implementation="reference")

    names = "out", "lse", "dq", "dk", "dv"
    return SimpleNamespace(**dict(zip(names, map(np.asarray, run(q, k, v, dout, dlse, keys)), strict=True)))


@pytest.fixture(params=["mosaic", "triton"])
def implementation(request):
    if request.param == "mosaic" and not HOPPER:
        pytest.skip("mosaic needs a Hopper GPU")
    return request.param


@pytest.mark.parametrize("case", CASES)
def test_contract(implementation, case):
    heads, rows, key_rows, batch, dtype, softcap, causal, _ = CASES[case]
    rng = np.random.default_rng(rows + key_rows)
    keys = KeyRange(*map(jnp.asarray, oracle.random_bounds(rng, batch, rows, key_rows)))
    if causal:
        keys = causal_keys(batch, rows)
    mask = oracle.seen(*keys, key_rows)
    (q, whole_k, v, dout), k = draw(rng, CASES[case])
    dlse = jnp.asarray(rng.standard_normal((batch, heads.heads, rows)) * mask.any(-1)[:, None], jnp.float32)
    scale = heads.dim**-0.5
    want = truth(q, whole_k, v, keys, mask, scale=scale, dout=dout, dlse=dlse, softcap=softcap)
    want = dict(out=want.out, lse=want.lse, dq=want.dq, dv=want.dv, **named(k, want.dk))
    bars = BARS[dtype] | {"dk shared": BARS[dtype]["dk"]}
    dq0 = jnp.asarray(rng.standard_normal(q.shape), jnp.float32)
    options = dict(scale=scale, softcap=softcap, implementation=implementation)

    @jax.jit
    def forward(q, k, v, keys):
        whole = flash_fwd(q, k, v, keys, **options)
        narrow, _ = flash_fwd(q, k, v, keys, out_dtype=dtype, **options)
        cut = lambda low, high: KeyRange(*(jnp.clip(x, low, high) for x in keys))
        first = flash_fwd(q, k, v, cut(0, key_rows // 2), **options)
        second = flash_fwd(q, k, v, cut(key_rows // 2, key_rows), carry=first, **options)
        last = flash_fwd(q, k, v, cut(key_rows // 2, key_rows), carry=first, out_dtype=dtype, **options)
        return whole, second, last, narrow

    @functools.partial(jax.jit, static_argnames="deterministic")
    def backward(q, k, v, out, lse, dout, dlse, keys, dq0, deterministic=False):
        delta = jnp.einsum("bqhe,bqhe->bhq", dout, out, preferred_element_type=jnp.float32) - dlse
        dq, dk, dv = flash_bwd(q, k, v, lse, delta, dout, keys, dq=dq0, deterministic=deterministic, **options)
        return dict(dq=dq - dq0, dv=dv, **named(k, dk))

    (out, lse), second, last, narrow = forward(q, k, v, keys)
    args = q, k, v, out, lse, dout, dlse, keys, dq0
    for name, x in dict(out=out, lse=lse, **backward(*args)).items():
        assert x.dtype == jnp.float32
        oracle.check(name, x, want[name], bars[name])
    oracle.check("out in two calls", second[0], want["out"], bars["out"])
    oracle.check("lse in two calls", second[1], want["lse"], 1e-6)
    np.testing.assert_array_equal(narrow, out.astype(dtype))  # rounded once, at the end
    np.testing.assert_array_equal(last[0], second[0].astype(dtype))
    np.testing.assert_array_equal(last[1], second[1])
    one, two = (backward(*args, deterministic=True) for _ in range(2))
    for name, x in one.items():
        np.testing.assert_array_equal(x, two[name])
        oracle.check(f"{name} deterministic", x, want[name], bars[name])


def grow(q, k, powers: int, scale: float):
    """q and k so that scores of two rows in three grow by 2^powers a tile of 128 keys, from right to left.

    After six tiles they fall back: maxima leave what the softmax is taken against behind, and then stay near it.
    """
    tile = (k.shape[1] - 1 - jnp.arange(k.shape[1])) // 128
    q = q.at[..., 0].set((jnp.arange(q.shape[1]) % 3 > 0).astype(q.dtype)[None, :, None])
    return q, k.at[..., 0].set((powers * np.log(2) / scale * (tile % 6)).astype(k.dtype)[None, :, None])


@pytest.mark.parametrize("mask", ["all", "random"])
@pytest.mark.parametrize("powers", [3, 20])
@pytest.mark.parametrize("case", ["gqa8", "float16", "softcap-50", "mla", "mla-shared", "D64", "D96-E64", "D256"])
def test_maxima_that_grow_from_tile_to_tile(implementation, case, powers, mask):
    """By 2^3 a tile sums are rescaled now and then, by 2^20 at every tile, the third rows' hardly ever."""
    case = CASES[case]._replace(batch=1, rows=320, keys=1536)
    rng, scale = np.random.default_rng(powers), case.heads.dim**-0.5
    (q, k, v, dout), _ = draw(rng, case)
    q, k = grow(q, k, powers, scale)
    given = split(k, case.shared) if case.shared else k
    bounds = oracle.random_bounds(rng, 1, case.rows, case.keys)
    if mask == "all":
        bounds = np.zeros((1, case.rows)), np.full((1, case.rows), case.keys)
    keys = KeyRange(*(jnp.asarray(x, jnp.int32) for x in bounds))
    visible = oracle.seen(*keys, case.keys)
    want = oracle.attention(q, k, v, visible, scale=scale, dout=dout, softcap=case.softcap)

    @jax.jit
    def forward(q, k, v, keys):
        options = dict(scale=scale, softcap=case.softcap, implementation=implementation)
        run = functools.partial(flash_fwd, q, k, v, **options)
        cut = lambda low, high: KeyRange(*(jnp.clip(x, low, high) for x in keys))
        left, right = cut(0, case.keys // 2), cut(case.keys // 2, case.keys)  # six tiles each: as much weight in both
        narrow, _ = run(left, carry=run(right), out_dtype=case.dtype)
        return (run(keys), run(right, carry=run(left)), run(left, carry=run(right))), narrow

    found, narrow = forward(q, given, v, keys)
    flat = np.arange(case.rows) % 3 == 0
    for out, lse in found:
        for rows in (flat, ~flat):
            oracle.check("out", np.asarray(out)[:, rows], want.out[:, rows], BARS[case.dtype]["out"])
            oracle.check("lse", np.asarray(lse)[..., rows], want.lse[..., rows], 1e-6)
    np.testing.assert_array_equal(narrow, found[-1][0].astype(case.dtype))


def test_a_nan_in_one_tile_of_keys_reaches_all_rows_that_see_it(implementation):
    rng, case = np.random.default_rng(0), CASES["gqa8"]
    (q, k, v, _), _ = draw(rng, case)
    k = k.at[:, 200, 0].set(jnp.nan)
    before = Carry(jnp.zeros(q.shape, jnp.float32), jnp.zeros((1, case.heads.heads, case.rows)))
    seen = np.zeros(before.lse.shape, bool)
    seen[:, : case.heads.heads // 2, 1::2] = True  # the first kv head's queries
    rows = np.arange(case.rows)[None]
    keys = KeyRange(jnp.full(rows.shape, 128), jnp.asarray(np.where(rows % 2, 256, 150)))
    options = dict(scale=0.1, implementation=implementation)
    for carry in (None, before):
        out, lse = jax.jit(lambda *args: flash_fwd(*args, carry=carry, **options))(q, k, v, keys)  # noqa: B023
        np.testing.assert_array_equal(np.isnan(lse), seen)
        np.testing.assert_array_equal(np.isnan(out).all(-1), seen.swapaxes(1, 2))


@pytest.mark.skipif(not HOPPER, reason="no Hopper GPU")
@pytest.mark.parametrize("columns", sorted({dim for dim, _ in mosaic_tuning.HOPPER}))
@pytest.mark.parametrize("rows", [1, 64, 8193])
def test_zeros_that_dq_begins_with(rows, columns):
    assert not jnp.any(mosaic_zeros.zeros((2, rows, 8, columns)))


@pytest.mark.skipif(not HOPPER, reason="no Hopper GPU")
@pytest.mark.parametrize("rows", [64, 128, 448])
def test_dq_that_comes_late_changes_no_bit_of_dk_and_dv(rows):
    """MLA's fast backward multiplies dQ a tile late, the deterministic one does not; one block does all of an item."""
    case = Case(Heads(4, 4, 192, 128), rows, 640)
    assert mosaic_tuning.HOPPER[192, 128].backward.schedule == "late"
    rng = np.random.default_rng(rows)
    (q, k, v, dout), _ = draw(rng, case)
    stop = jnp.asarray(np.sort(rng.integers(0, 640, (1, rows)), axis=1), jnp.int32)  # the last keys are seen by none
    lse, delta = (jnp.asarray(rng.standard_normal((1, 4, rows)), jnp.float32) for _ in range(2))

    @functools.partial(jax.jit, static_argnums=0)
    def run(deterministic):
        keys = KeyRange(0 * stop, stop)
        return flash_bwd(
            q, k, v, lse + 9, delta, dout, keys, scale=0.07, implementation="mosaic", deterministic=deterministic
        )

    late, in_turns = run(False), run(True)
    oracle.check("dq", late[0], in_turns[0], 1e-6)  # sums in an order of chance
    for x, y in zip(late[1:], in_turns[1:], strict=True):
        np.testing.assert_array_equal(x, y)
        assert np.abs(y).max() > 0


@pytest.mark.parametrize("deterministic", [False, True])
def test_scan_and_remat_do_not_change_the_gradient(implementation, deterministic):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, 512, 4, 64)), jnp.bfloat16)
    weights = jnp.asarray(rng.standard_normal((3, 64, 64)) / 8, jnp.bfloat16)
    cotangent = jnp.asarray(rng.standard_normal(x.shape), jnp.bfloat16)
    mesh = Mesh(np.array(jax.devices()[:1]), ("cp",))
    save = jax.checkpoint_policies.save_only_these_names("attn_out", "attn_lse")

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def gradient(implementation, remat):
        def layer(x, w):
            q = x @ w
            kv = x[:, :, :2], q[:, :, :2]
            options = dict(implementation=implementation, deterministic=deterministic)
            return x + zigzag_attention(q, *kv, mesh=mesh, spec=P(None, "cp", None, None), **options), None

        step = {"plain": layer, "all": jax.checkpoint(layer), "saved": jax.checkpoint(layer, policy=save)}[remat]
        loss = lambda x, w: jnp.vdot(jax.lax.scan(step, x, w)[0].astype(jnp.float32), cotangent.astype(jnp.float32))
        return jax.grad(loss, argnums=(0, 1))(x, weights)

    want = gradient("reference", "plain")
    plain = gradient(implementation, "plain")
    for p, w in zip(plain, want, strict=True):
        oracle.check("against the reference", p, np.asarray(w, np.float64), 2e-2)  # three layers in bfloat16
    for remat in ("all", "saved"):
        again = gradient(implementation, remat)
        for p, r in zip(plain, again, strict=True):  # XLA rounds what is around the kernel in other places
            oracle.check("remat", r, np.asarray(p, np.float64), 4e-3)
        if deterministic:
            for first, second in zip(again, gradient(implementation, remat), strict=True):
                np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("deterministic", [False, True])
def test_latent_attention_in_scanned_and_recomputed_layers(implementation, deterministic):
    """The kernels with a shared rotary key, on a ring of one, as a model wraps them."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, 512, 4, 192)), jnp.bfloat16)
    w = jnp.asarray(rng.standard_normal((3, 128, 192)) / 12, jnp.bfloat16)
    kv_b = jnp.asarray(rng.standard_normal((3, 128, 4, 256)) / 12, jnp.float32)
    cotangent = jnp.asarray(rng.standard_normal(x.shape), jnp.float32)
    mesh = Mesh(np.array(jax.devices()[:1]), ("cp",))

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def gradient(implementation, remat):
        def layer(x, weights):
            w, kv_b = weights
            options: dict[str, Any] = dict(mesh=mesh, spec=P(None, "cp", None, None), payload="latent")
            options |= dict(implementation=implementation, deterministic=deterministic)
            return x + latent_attention(x, x[:, :, 0, :128], x[:, :, 1, 128:], kv_b, **options) @ w, None

        step = jax.checkpoint(layer) if remat else layer
        loss = lambda x, *weights: jnp.vdot(jax.lax.scan(step, x, weights)[0].astype(jnp.float32), cotangent)
        return jax.grad(loss, argnums=(0, 1, 2))(x, w, kv_b)

    want, plain, again = (gradient(*call) for call in (("reference", 0), (implementation, 0), (implementation, 1)))
    for name, w, p, r in zip(("x", "w", "kv_b"), want, plain, again, strict=True):
        oracle.check(name, p, np.asarray(w, np.float64), 2e-2)  # three layers in bfloat16
        oracle.check(f"{name} recomputed", r, np.asarray(p, np.float64), 4e-3)
    if deterministic:
        for first, second in zip(again, gradient(implementation, 1), strict=True):
            np.testing.assert_array_equal(first, second)


def test_a_carry_stays_bit_for_bit_where_a_row_sees_nothing(implementation):
    rng = np.random.default_rng(0)
    q, out = (jnp.asarray(rng.standard_normal((1, 256, 4, 128)), dtype) for dtype in (jnp.bfloat16, jnp.float32))
    k, v = (jnp.asarray(rng.standard_normal((1, 256, 2, 128)), jnp.bfloat16) for _ in range(2))
    lse = jnp.asarray(rng.standard_normal((1, 4, 256)) + 9, jnp.float32)
    stop = jnp.where(jnp.arange(256) % 200 < 150, 0, 256).astype(jnp.int32)[None]  # live and idle rows in one tile
    stop = jnp.sort(stop, axis=1)
    new = flash_fwd(q, k, v, KeyRange(0 * stop, stop), scale=0.1, carry=(out, lse), implementation=implementation)
    idle = np.asarray(stop[0]) == 0
    np.testing.assert_array_equal(new[0][:, idle], out[:, idle])
    np.testing.assert_array_equal(new[1][:, :, idle], lse[:, :, idle])
    assert (np.asarray(new[1])[:, :, ~idle] > np.asarray(lse)[:, :, ~idle]).all()


@pytest.mark.skipif(not HOPPER, reason="no Hopper GPU")
@pytest.mark.parametrize("case", CASES)
def test_drawn_items_change_no_bit(case):
    heads, rows, key_rows, batch, dtype, softcap, causal, shared = CASES[case]
    rng = np.random.default_rng(rows + key_rows)
    # random ranges leave rows that see nothing, and items
    start, stop = (jnp.asarray(x).at[:, : rows // 2].set(0) for x in oracle.random_bounds(rng, batch, rows, key_rows))
    keys = causal_keys(batch, rows) if causal else KeyRange(start, stop)
    (q, whole_k, v, _), k = draw(rng, CASES[case])
    table = mosaic_tuning.HOPPER[heads.dim, heads.out_dim]
    k = k if shared == table.shared else whole_k

    @functools.partial(jax.jit, static_argnums=0)
    def forward(tuning, q, k, v, keys):
        call = functools.partial(mosaic.flash_fwd, q, k, v, keys, Settings(heads.dim**-0.5, softcap), tuning=tuning)
        first = call(None, jnp.dtype(jnp.float32))
        carry = Carry(*first)
        return first, call(carry, jnp.dtype(jnp.float32)), call(carry, jnp.dtype(dtype)), call(None, jnp.dtype(dtype))

    tunings = [dataclasses.replace(table.forward, shares=shares) for shares in ("fixed", "drawn", "drawn")]
    results = [jax.tree.leaves(forward(tuning, q, k, v, keys)) for tuning in tunings]
    for fixed, drawn, again in zip(*results, strict=True):
        np.testing.assert_array_equal(drawn, fixed)
        np.testing.assert_array_equal(again, fixed)


# heads, kv heads, and the key tiles that each query tile of each batch row sees: what mosaic_cuts.py takes for equal
# items. With a kv head each, 8 query tiles are neighbours in the order
CUT = {
    "all": (10, 2, [[16] * 16] * 2),
    "later half": (20, 20, [[0] * 8 + [40] * 8] * 2),
    "not equal": (10, 2, [list(range(1, 17))] * 2),
    "in one batch row": (10, 2, [[16] * 16, [16] * 9 + [0] * 7]),
    "in one batch row, or one tile": (10, 2, [[16] * 16, [16] * 9 + [1] * 7]),
    "window": (10, 2, [[16] * 16] * 2),  # moved on by a key a row: both ends of every item cut tiles
}


def cut_keys(case: str) -> tuple[int, int, KeyRange]:
    """Heads, kv heads, and ranges int32 [B, Sq]."""
    heads, kv_heads, tiles = CUT[case]
    count = np.repeat(np.asarray(tiles), 128, axis=1) * 128
    row, most = np.arange(count.shape[1]), int(count.max())
    # a range that ends where it has so many keys, or begins where so many are left: no end and no start decreases
    falls = (np.diff(count) < 0).any()
    start, stop = (most - count, 0 * count + most) if falls else (0 * count, count)
    if case == "window":
        start, stop = (x + row for x in (start, stop))
    return heads, kv_heads, KeyRange(*(jnp.asarray(x, jnp.int32) for x in (start, stop)))


@pytest.fixture
def order(request, monkeypatch):
    """Rests are drawn long after their first parts; or right behind them, so that they find them at work."""
    if request.param == "rests at once":
        plain = Cuts.at

        def at(self, number, equal, edges_of):
            rest = equal + 2 * self.parts - 1 - number
            moved = jnp.where(number < 2 * self.parts, rest, number - self.parts)
            moved = jnp.where((number < self.parts) | (number >= equal + self.parts) | (equal == 0), number, moved)
            return plain(self, moved, equal, edges_of)

        monkeypatch.setattr(Cuts, "at", at)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.skipif(not HOPPER, reason="no Hopper GPU")
@pytest.mark.parametrize("dims", [d for d, row in mosaic_tuning.HOPPER.items() if row.forward.shares == "cut"], ids=str)
@pytest.mark.parametrize(
    ("case", "order"),
    [
        *((case, "in their order") for case in CUT),
        *((case, "rests at once") for case in ("all", "later half", "window")),
    ],
    indirect=["order"],
)
def test_items_that_two_blocks_share(case, dims, order):
    """Against the same items whole, with and without a carry, of which some rows are empty; the same bits ten times."""
    rng, (dim, out_dim) = np.random.default_rng(0), dims
    heads, kv_heads, keys = cut_keys(case)
    (batch, rows), key_rows = keys.start.shape, int(keys.stop.max()) + 37
    normal = lambda *size, dtype=jnp.bfloat16: jnp.asarray(rng.standard_normal(size), dtype)
    q, k = normal(batch, rows, heads, dim), normal(batch, key_rows, kv_heads, dim)
    q, k = grow(q, k, 3, dim**-0.5)
    v, out = normal(batch, key_rows, kv_heads, out_dim), normal(batch, rows, heads, out_dim, dtype=jnp.float32)
    lse = normal(batch, heads, rows, dtype=jnp.float32) + 7
    unseen = jnp.arange(rows) % 5 == 0
    out, lse = jnp.where(unseen[:, None, None], 0.0, out), jnp.where(unseen, -jnp.inf, lse)
    row = mosaic_tuning.HOPPER[dims]
    if row.shared:
        k = split(k, row.shared)

    @functools.partial(jax.jit, static_argnames=("shares", "dtype"))
    def forward(carry, shares, dtype):
        tuning = dataclasses.replace(row.forward, shares=shares)
        return mosaic.flash_fwd(q, k, v, keys, Settings(dim**-0.5, None), carry, jnp.dtype(dtype), tuning=tuning)

    differ = set()
    for carry in (None, Carry(out, lse)):
        for dtype in (jnp.float32, jnp.bfloat16):
            whole = forward(carry, "drawn", dtype)
            first, *others = (forward(carry, "cut", dtype) for _ in range(10))
            for at, name in enumerate(("out", "lse")):
                # a weight of P is rounded against another reference
                bar = {"out": 2e-3, "lse": 1e-6}[name]
                oracle.check(name, np.asarray(first[at], np.float64), np.asarray(whole[at], np.float64), bar)
                differ.add(bool((first[at] != whole[at]).any()))
                for other in others:
                    np.testing.assert_array_equal(other[at], first[at])
    assert (True in differ) == (case != "not equal")


@pytest.mark.parametrize("bounds", [(-3, 10_000), (0, 2**31 - 1)])
def test_bounds_outside_of_the_keys_are_those_of_the_keys(implementation, bounds):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, n, 2, 128)), jnp.bfloat16) for n in (200, 150, 150))
    whole = KeyRange(*(jnp.full((1, 200), n, jnp.int32) for n in (0, 150)))
    beyond = KeyRange(*(jnp.full((1, 200), n, jnp.int32) for n in bounds))
    call = lambda keys: flash_fwd(q, k, v, keys, scale=0.1, implementation=implementation)
    for x, y in zip(call(beyond), call(whole), strict=True):
        np.testing.assert_array_equal(x, y)


def test_what_none_picks():
    q, k = jnp.zeros((1, 8, 4, 128), jnp.bfloat16), jnp.zeros((1, 8, 2, 128), jnp.bfloat16)
    assert flash_implementation(q, k, k, Settings(0.1, None)) == ("mosaic" if HOPPER else "triton")


def test_register_stores_and_loads_past_two_to_the_31(implementation):
    """D = 64 goes from the registers to memory and the carry comes from there: 2^20 rows of 40 heads, 2.7e9 values."""
    rows, key_rows, tail, heads = 2**20, 512, 256, 40
    rng = np.random.default_rng(0)
    q_tail = jnp.asarray(rng.standard_normal((1, tail, heads, 64)), jnp.bfloat16)
    out_tail = jnp.asarray(rng.standard_normal((1, tail, heads, 64)), jnp.float32)
    k, v = (jnp.asarray(rng.standard_normal((1, key_rows, 2, 64)), jnp.bfloat16) for _ in range(2))
    stop = jnp.where(jnp.arange(rows) < rows - tail, 0, key_rows).astype(jnp.int32)[None]
    whole = lambda x: jnp.zeros((1, rows, *x.shape[2:]), x.dtype).at[:, rows - tail :].set(x)
    options = dict(scale=0.125, implementation=implementation)

    @jax.jit
    def long(q, out, k, v):
        carry = whole(out), jnp.zeros((1, heads, rows), jnp.float32)
        out, lse = flash_fwd(whole(q), k, v, KeyRange(0 * stop, stop), carry=carry, **options)
        return out[:, -tail:], lse[:, :, -tail:], jnp.abs(out[:, :-tail]).max()

    keys = KeyRange(*(jnp.full((1, tail), n, jnp.int32) for n in (0, key_rows)))
    want = flash_fwd(q_tail, k, v, keys, carry=(out_tail, jnp.zeros((1, heads, tail), jnp.float32)), **options)
    *got, rest = long(q_tail, out_tail, k, v)
    assert rest == 0
    for x, y in zip(got, want, strict=True):
        np.testing.assert_array_equal(x, y)


def test_offsets_past_two_to_the_31(implementation):
    """A million tokens, 32 heads: out has 4.3e9 elements. The last rows see a few keys, the others none."""
    rows, key_rows, tail = 2**20, 1024, 256
    rng = np.random.default_rng(0)
    q_tail, dout_tail = (jnp.asarray(rng.standard_normal((1, tail, 32, 128)), jnp.bfloat16) for _ in range(2))
    k, v = (jnp.asarray(rng.standard_normal((1, key_rows, 2, 128)), jnp.bfloat16) for _ in range(2))
    stop = jnp.where(jnp.arange(rows) < rows - tail, 0, key_rows).astype(jnp.int32)[None]
    whole = lambda x: jnp.zeros((1, rows, 32, 128), x.dtype).at[:, rows - tail :].set(x)
    options = dict(scale=128**-0.5, implementation=implementation)

    @jax.jit
    def long(q, dout, k, v):
        keys = KeyRange(0 * stop, stop)
        out, lse = flash_fwd(whole(q), k, v, keys, out_dtype=jnp.bfloat16, **options)
        delta = jnp.zeros_like(lse)
        dq, dk, dv = flash_bwd(whole(q), k, v, lse, delta, whole(dout), keys, **options)
        return out[:, -tail:], lse[:, :, -tail:], dq[:, -tail:], dk, dv, jnp.abs(out[:, :-tail]).max()

    @jax.jit
    def short(q, dout, k, v):
        keys = KeyRange(*(jnp.full((1, tail), n, jnp.int32) for n in (0, key_rows)))
        out, lse = flash_fwd(q, k, v, keys, out_dtype=jnp.bfloat16, **options)
        return out, lse, *flash_bwd(q, k, v, lse, jnp.zeros_like(lse), dout, keys, **options)

    *got, rest = long(q_tail, dout_tail, k, v)
    assert rest == 0
    for x, y in zip(got, short(q_tail, dout_tail, k, v), strict=True):
        oracle.check("a million tokens", x, np.asarray(y, np.float64), 1e-3)  # the same kernels, other sums of dQ
