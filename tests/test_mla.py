"""Latent attention: both payloads are one attention, at any cp, in values and in every gradient.

By relative L2: a gradient of kv_b that forgets a hop still points almost the right way, so a cosine would not see it.
"""

import functools

import hops
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from zigzag_jax import from_zigzag, to_zigzag
from zigzag_jax.cost import LatentSizes
from zigzag_jax.mla import PAYLOADS, Latent, latent_attention

B, S, H, R, N, ROPE, E = 2, 48, 4, 12, 8, 4, 6
SCALE = 0.2
SPEC = P(None, "cp", None, None)


def mesh(cp):
    return jax.make_mesh((cp,), ("cp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:cp])


def draw(seed=0):
    rng = np.random.default_rng(seed)
    shapes = dict(q=(B, S, H, N + ROPE), latent=(B, S, R), k_pe=(B, S, ROPE), kv_b=(R, H, N + E), dout=(B, S, H, E))
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


@functools.cache
def wanted(packed: bool):
    """(out and gradients in float64, positions in natural order or None)."""
    x = draw()
    positions = oracle.random_documents(np.random.default_rng(1), B, S, 3) if packed else None
    kv = np.einsum("bsr,rhc->bshc", x["latent"], x["kv_b"])
    k = np.concatenate([kv[..., :N], np.broadcast_to(x["k_pe"][:, :, None], (B, S, H, ROPE))], -1)
    a = oracle.attention(x["q"], k, kv[..., N:], oracle.causal(S, positions), scale=SCALE, dout=x["dout"])
    dkv = np.concatenate([a.dk[..., :N], a.dv], -1)
    grads = {
        "q": a.dq,
        "latent": np.einsum("bshc,rhc->bsr", dkv, x["kv_b"]),
        "k_pe": a.dk[..., N:].sum(2),
        "kv_b": np.einsum("bsr,bshc->rhc", x["latent"], dkv),
    }
    return a.out, grads, positions


# the latent's ring at each cp unpacked and packed; of the others each cp and each of the two forms once
CASES = [(cp, "latent", "ring", packed) for cp in (1, 2, 3, 4) for packed in (False, True)]
CASES += [(cp, "latent", "allgather", cp % 2 == 0) for cp in (1, 2, 3, 4)]
CASES += [(cp, "expanded", strategy, cp % 2 == 1) for cp in (2, 3) for strategy in ("ring", "allgather")]


@pytest.mark.parametrize(("cp", "payload", "strategy", "packed"), CASES)
def test_values_and_gradients(cp, payload, strategy, packed):
    want, want_grads, positions = wanted(packed)
    x = {name: jnp.asarray(v, jnp.float32) for name, v in draw().items()}
    shuffle = lambda tree: to_zigzag(tree, cp)
    options = dict(mesh=mesh(cp), spec=SPEC, scale=SCALE, payload=payload, strategy=strategy)
    positions = None if positions is None else shuffle(jnp.asarray(positions))

    @jax.jit
    def run(x):
        def loss(parts):
            out = latent_attention(*(parts[n] for n in ("q", "latent", "k_pe", "kv_b")), positions=positions, **options)
            return jnp.vdot(out, x["dout"]), out

        parts = {name: v for name, v in x.items() if name != "dout"}
        grads, out = jax.grad(loss, has_aux=True)(parts)
        return out, grads

    whole = x.pop("kv_b")
    out, grads = run(shuffle(x) | {"kv_b": whole})
    oracle.check("out", from_zigzag(out, cp), want, 1e-5)
    for name, grad in grads.items():
        oracle.check(name, grad if name == "kv_b" else from_zigzag(grad, cp), want_grads[name], 1e-5)
        assert grad.dtype == jnp.float32


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("cp", [1, 4, 8])
def test_hop_bytes(cp, payload):
    x = {name: jnp.asarray(v, jnp.bfloat16) for name, v in draw().items()}
    run = functools.partial(latent_attention, mesh=mesh(cp), spec=SPEC, payload=payload)
    arguments = x["q"], x["latent"], x["k_pe"], x["kv_b"].astype(jnp.float32)
    both = lambda *arguments: jax.vjp(run, *arguments)[1](x["dout"])
    values = (cp - 1) * B * (S // cp) * LatentSizes(R, ROPE, H, N + ROPE, E).payloads[payload]
    sent = lambda f: hops.sent(hops.collectives(f, *arguments))
    assert sent(run) == ({"bfloat16": 2 * values} if values else {})
    assert sent(both) == ({"bfloat16": 2 * 2 * values, "float32": 4 * values} if values else {})


@pytest.mark.parametrize(("given", "asked"), [(None, "ring"), ("ring", "ring"), ("allgather", "allgather")])
def test_the_cost_rule_is_asked_for_the_strategy(monkeypatch, given, asked):
    """A rule that takes more time for the one than for the other must know which it is."""
    rule = lambda *sizes, strategy: calls.append((sizes, strategy)) or "latent"
    calls = []
    monkeypatch.setattr("zigzag_jax.mla.choose_payload", rule)
    x = {name: jnp.asarray(v, jnp.float32) for name, v in draw().items() if name != "dout"}
    jax.eval_shape(functools.partial(latent_attention, mesh=mesh(4), spec=SPEC, strategy=given), *x.values())
    assert set(calls) == {((4, B, S // 4, LatentSizes(R, ROPE, H, N + ROPE, E), 4), asked)}


def test_bfloat16_error_does_not_grow_with_cp():
    want, want_grads, _ = wanted(False)
    errors = {}
    for cp in (1, 4):
        x = {n: jnp.asarray(v, jnp.float32 if n == "kv_b" else jnp.bfloat16) for n, v in draw().items()}
        dout = to_zigzag(x.pop("dout"), cp)
        whole = x.pop("kv_b")
        x = to_zigzag(x, cp) | {"kv_b": whole}
        run = functools.partial(latent_attention, mesh=mesh(cp), spec=SPEC, scale=SCALE, payload="latent")
        loss = lambda x, run=run, dout=dout: jnp.vdot(
            run(x["q"], x["latent"], x["k_pe"], x["kv_b"]).astype(jnp.float32), dout.astype(jnp.float32)
        )
        grads = jax.jit(jax.grad(loss))(x)
        assert grads["kv_b"].dtype == jnp.float32
        errors[cp] = oracle.relative(grads["kv_b"], want_grads["kv_b"])
    assert errors[4] < 1.2 * errors[1]
    assert errors[4] < 2e-2
    assert np.isfinite(want).all()


GOOD = dict(q=(1, 8, 2, 6), latent=(1, 8, 5), k_pe=(1, 8, 2), kv_b=(5, 2, 7))


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        ({}, {"payload": "both"}, "payload must be None or one of latent, expanded, got 'both'"),
        ({}, {"axis_name": "ring"}, "axis_name must be an axis of the mesh"),
        ({}, {"spec": P(None, "cp", "cp", None)}, "q must be .* with spec"),
        ({"latent": (1, 7, 5)}, {}, "latent must be .* like q"),
        ({"k_pe": (1, 8, 2, 1)}, {}, "k_pe must be .* like q"),
        ({"kv_b": (4, 2, 7)}, {}, "kv_b must be .* R = 5, H = 2"),
        ({"k_pe": (1, 8, 6)}, {}, r"D - P must lie in 1\.\.6, got D = 6, P = 6"),
        ({"q": (1, 7, 2, 6), "latent": (1, 7, 5), "k_pe": (1, 7, 2)}, {}, "divisible by 4"),
    ],
)
def test_errors(shapes, options, message):
    arrays = {name: jnp.zeros(shape) for name, shape in (GOOD | shapes).items()}
    with pytest.raises(ValueError, match=message):
        latent_attention(**arrays, **({"mesh": mesh(2), "spec": SPEC} | options))


def test_expansion_is_the_formula():
    rng = np.random.default_rng(0)
    latent, k_pe, kv_b = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((1, 3, 5), (1, 3, 2), (5, 2, 7)))
    (own, shared), v = Latent(4).fwd(kv_b, (latent, k_pe))
    assert (own.shape, v.shape) == ((1, 3, 2, 4), (1, 3, 2, 3))
    np.testing.assert_allclose(own[0, 1, 1], latent[0, 1] @ kv_b[:, 1, :4], rtol=1e-5)
    np.testing.assert_allclose(v[0, 1, 1], latent[0, 1] @ kv_b[:, 1, 4:], rtol=1e-5)
    assert shared is k_pe
