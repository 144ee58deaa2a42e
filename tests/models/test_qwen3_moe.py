"""One model, any mesh: hidden states, router statistics and gradients do not depend on how the tokens are cut."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_helpers import (
    TINY,
    build,
    document_positions,
    drawn,
    flat,
    jit,
    maker,
    natural,
    put,
    relative,
    sharding,
)

from zigzag_jax.models.balance import load_balancing_loss
from zigzag_jax.models.hf.golden import distances
from zigzag_jax.models.options import KernelOptions
from zigzag_jax.models.qwen3_moe import Qwen3Moe
from zigzag_jax.models.sharding import abstract_state, init_state
from zigzag_jax.models.stack import REMAT

ROWS, LENGTH, SHORT = 4, 48, 44
MESHES = [
    pytest.param((1, 1, 4), id="cp4"),
    pytest.param((2, 2, 2), id="dp2-fsdp2-cp2"),
    pytest.param((1, 1, 3), id="cp3", marks=pytest.mark.slow),
]
BAR = 1e-5  # float32, sums in another order; the HF parity bar


def batch(kind: str, length: int = LENGTH) -> dict:
    """Natural order, on the host. "padded": the last LENGTH - SHORT places hold no token."""
    rng = np.random.default_rng(0)
    starts = [[0, 7, 8], [0, 30], [0], [0, 13, 20, 21]] if kind == "packed" else [[0]] * ROWS
    positions, real = document_positions(LENGTH, starts), np.ones((ROWS, LENGTH), bool)
    if kind == "padded":
        real[:, SHORT:], positions[:, SHORT:] = False, 0
    tokens = rng.integers(0, TINY.vocab_size, (ROWS, LENGTH), np.int32)
    cotangent = rng.standard_normal((ROWS, LENGTH, TINY.hidden_size), np.float32) * real[:, :, None]
    parts = {"tokens": tokens, "positions": positions, "real": real, "cotangent": cotangent}
    return {name: part[:, :length] for name, part in parts.items()}


@functools.cache
def step(mesh: tuple[int, int, int], remat: str = "none"):
    """The model on a mesh and its jitted gradient: (where, state, run)."""
    where = sharding(*mesh)
    graphdef, state = build(TINY, where, remat=remat)

    def loss(state, batch):
        hidden, stats = nnx.merge(graphdef, state)(batch["tokens"], batch["positions"], real=batch["real"])
        return jnp.sum(hidden * batch["cotangent"]) + 100.0 * load_balancing_loss(stats), (hidden, stats)

    return where, state, jit(jax.grad(loss, has_aux=True))


def run(mesh, kind, *, length=LENGTH, remat="none"):
    where, state, gradient = step(mesh, remat)
    gradients, (hidden, stats) = gradient(state, put(batch(kind, length), where))
    return natural(hidden, where), jax.device_get(stats), flat(gradients)


def check(got, want, real):
    assert relative(got[0] * real[:, :, None], want[0] * real[:, :, None]) < BAR
    np.testing.assert_array_equal(got[1].counts, want[1].counts)
    np.testing.assert_array_equal(got[1].tokens, want[1].tokens)
    np.testing.assert_allclose(got[1].probs, want[1].probs, rtol=1e-5)
    errors = distances(got[2], want[2])
    assert max(errors.values()) < BAR, errors


@pytest.mark.parametrize("kind", ["plain", "packed"])
@pytest.mark.parametrize("mesh", MESHES)
def test_the_mesh_changes_nothing(mesh, kind):
    check(run(mesh, kind), run((1, 1, 1), kind), batch(kind)["real"])


def test_padding_changes_nothing():
    """44 tokens do not divide by 2 * cp = 6. Padded to 48 they give what 44 tokens give on one device."""
    hidden, stats, gradients = run((1, 1, 3), "padded")
    want = run((1, 1, 1), "padded", length=SHORT)
    check((hidden[:, :SHORT], stats, gradients), want, np.ones((ROWS, SHORT), bool))


@pytest.mark.parametrize("remat", ["matmuls", "attention", pytest.param("full", marks=pytest.mark.slow), "offload"])
def test_remat_changes_nothing(remat):
    check(run((1, 1, 4), "packed", remat=remat), run((1, 1, 4), "packed"), np.ones((ROWS, LENGTH), bool))


def test_remat_attention_does_not_run_the_ring_again():
    def permutes(remat):
        where, state, gradient = step((1, 1, 4), remat)
        return gradient.lower(state, put(batch("plain"), where)).as_text().count("collective_permute")

    counts = {remat: permutes(remat) for remat in REMAT}
    assert counts["attention"] == counts["matmuls"] == counts["offload"] == counts["none"] < counts["full"]


def test_rope_positions_are_the_models_own():
    """Only differences of angles matter, so a shift does not; a stretch does. The mask stays with `positions`."""
    where = sharding()
    graphdef, state = build(TINY, where)
    x = put(batch("packed"), where)
    hidden = jit(lambda angle: nnx.merge(graphdef, state)(x["tokens"], x["positions"], rope_positions=angle)[0])
    plain = hidden(x["positions"])
    assert relative(hidden(x["positions"] + 5), plain) < 1e-5
    assert relative(hidden(x["positions"] * 3), plain) > 1e-2


def test_bfloat16_computes_in_bfloat16_and_sums_in_float32():
    """Every token through every expert: no routing decision can flip between the two number formats."""
    config = dataclasses.replace(TINY, num_experts=3, num_experts_per_tok=3, num_hidden_layers=1)
    where, results = sharding(fsdp=2), {}
    x = put(batch("packed"), where)
    for dtype in (jnp.float32, jnp.bfloat16):
        graphdef, state = build(config, where, dtype=dtype)

        def loss(state, graphdef=graphdef):
            hidden, _ = nnx.merge(graphdef, state)(x["tokens"], x["positions"])
            return jnp.sum(hidden.astype(jnp.float32) * x["cotangent"]), hidden

        gradients, hidden = jit(jax.grad(loss, has_aux=True))(state)
        assert hidden.dtype == dtype
        assert all(g.dtype == np.float32 for g in flat(gradients).values())
        results[dtype] = {**flat(gradients), "hidden": hidden.astype(jnp.float32)}
    errors = distances(results[jnp.bfloat16], results[jnp.float32])
    assert max(errors.values()) < 5e-2, errors  # 8 bits of mantissa and a dozen roundings
    assert errors["hidden"] > 1e-4


def test_parameters_are_drawn_like_hugging_face_on_the_devices_that_keep_them():
    where = sharding(fsdp=2, cp=2)
    _, state = init_state(maker(TINY, where), where, jax.random.key(0))
    one = flat(drawn(TINY))
    for name, value in flat(state).items():
        np.testing.assert_allclose(value, one[name], rtol=1e-5, err_msg=name)  # compiled twice, rounded twice
        assert np.all(value == 1) if "norm" in name else abs(value.std() / 0.2 - 1) < 0.1, name
    gate = dict(nnx.to_flat_state(state))["groups", 0, "mlp", "gate"].get_value()
    assert gate.addressable_shards[0].data.shape == (2, 6, 24 // 4, 16)
    # the layers are drawn one by one
    assert not np.array_equal(one["groups.0.mlp.gate"][0], one["groups.0.mlp.gate"][1])


def test_kernel_options_reach_both_kernels():
    tokens = jnp.zeros((2, 8), jnp.int32)
    for options, message in (
        (KernelOptions(implementation="no such kernel"), "no such kernel"),
        (KernelOptions(strategy="by mail"), "by mail"),  # pyright: ignore[reportArgumentType]
        (KernelOptions(grad_dtype="int8"), "int8"),
    ):
        graphdef, shapes = abstract_state(maker(TINY, sharding(cp=2), options=options))
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda state, graphdef=graphdef: nnx.merge(graphdef, state)(tokens, tokens), shapes)


def test_bad_arguments():
    with pytest.raises(ValueError, match="remat must be one of none, matmuls, attention, full, offload, got 'some'"):
        init_state(lambda rngs: Qwen3Moe(TINY, sharding(), rngs=rngs, remat="some"), sharding(), jax.random.key(0))
    graphdef, state = build(TINY, sharding(2, 2, 2))
    tokens = jnp.zeros((3, LENGTH), jnp.int32)
    with pytest.raises(ValueError, match=r"the batch must be divisible by dp \* fsdp = 4, got 3"):
        nnx.merge(graphdef, state)(tokens, tokens)
