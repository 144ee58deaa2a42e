"""Experts on several devices are the same function as experts on every device, whatever the routing."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P
from model_helpers import TINY, draw, flat, jit, maker, natural, put, relative, sharding

from zigzag_jax.models import exchange
from zigzag_jax.models.decode import step_rules
from zigzag_jax.models.exchange import Exchange, block_rows, sent_bytes
from zigzag_jax.models.moe import MoE
from zigzag_jax.models.options import KernelOptions
from zigzag_jax.models.router import SoftmaxTopK
from zigzag_jax.models.sharding import Sharding, abstract_state, expert_axes, expert_rules, parameter_shardings

SIZE, INNER, EXPERTS, TOP_K, B, S = 12, 10, 12, 2, 4, 24
BAR = 1e-5  # 2e-7 is usual; the router's gradient cancels where both choices are one expert
MESHES = {  # (dp, fsdp, cp), the axes of the experts, rows of a block
    "dp2-cp2-over-cp": ((2, 1, 2), ("cp",), 7),
    "fsdp2-cp2-over-cp": ((1, 2, 2), ("cp",), 5),
    "fsdp2-cp2-over-fsdp": ((1, 2, 2), ("fsdp",), 48),
    "fsdp2-cp2-over-both": ((1, 2, 2), ("fsdp", "cp"), 5),
    "cp3": ((1, 1, 3), ("cp",), None),
    "dp2-fsdp2-cp2-over-both": ((2, 2, 2), ("fsdp", "cp"), 3),
}


def over(mesh, axes) -> Sharding:
    return Sharding(sharding(*mesh).mesh, expert_rules(axes))


def make(where: Sharding, rows: int | None = None, dtype=jnp.float32):
    options = KernelOptions(exchange_rows=rows)
    return lambda rngs: MoE(SIZE, INNER, EXPERTS, SoftmaxTopK(TOP_K, True), where, std=0.5, options=options, rngs=rngs)


@functools.cache
def drawn():
    return draw(make(sharding()))


@functools.cache
def inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    x, cotangent = rng.standard_normal((2, B, S, SIZE)).astype(np.float32)
    return {"x": x, "cotangent": cotangent, "real": rng.random((B, S)) < 0.8}


def routings() -> dict[str, np.ndarray]:
    """Experts [B, S, k] of every kind; expert e is on device e // (EXPERTS / ep)."""
    rng = np.random.default_rng(2)
    draw = lambda low, high: rng.integers(low, high, (B, S, TOP_K)).astype(np.int32)
    skewed = np.minimum(rng.geometric(0.4, (B, S, TOP_K)) - 1, EXPERTS - 1).astype(np.int32)
    mixed = np.where(np.arange(S)[None, :, None] < S // 2, np.int32(3), draw(0, EXPERTS))
    return {
        "even": draw(0, EXPERTS),
        "uneven": skewed,
        "every token to one expert": np.full((B, S, TOP_K), 7, np.int32),
        "the last device alone": draw(EXPERTS - EXPERTS // 4, EXPERTS),
        "all but the last device": draw(0, EXPERTS // 2),
        "one document to one expert": mixed,
    }


def runner(where: Sharding, rows: int | None = None):
    """run(routes or None) -> y, statistics and gradients in natural order; compiled once."""
    graphdef, shapes = abstract_state(make(where, rows))
    state = jax.device_put(drawn(), parameter_shardings(shapes, where))
    batch = put(inputs(), where)
    on_probs = jnp.asarray(np.random.default_rng(3).standard_normal((B, EXPERTS)), jnp.float32)

    @jit
    def run(state, x, routes):
        def loss(state, x):
            y, stats = nnx.merge(graphdef, state)(x, batch["real"], routes)
            return jnp.sum(y * batch["cotangent"]) + jnp.sum(stats.probs * on_probs), (y, stats)

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(state, x)

    def results(routes) -> dict[str, np.ndarray]:
        (dstate, dx), (y, stats) = run(state, batch["x"], None if routes is None else put(routes, where))
        found = {"y": natural(y, where), "counts": np.asarray(stats.counts), "probs": np.asarray(stats.probs)}
        return found | {"routes": natural(stats.routes, where), "d x": natural(dx, where)} | {
            f"d {name}": value for name, value in flat(dstate).items()
        }  # fmt: skip

    return results


@functools.cache
def one_device(routing: str) -> dict[str, np.ndarray]:
    return on_one_device()(routings()[routing])


on_one_device = functools.cache(lambda: runner(sharding()))


def apart(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> dict[str, float]:
    return {name: relative(got[name], x) for name, x in want.items()}


@pytest.mark.parametrize("mesh", MESHES)
def test_every_routing_is_that_of_one_device(mesh):
    shape, axes, rows = MESHES[mesh]
    run = runner(over(shape, axes), rows)
    for name, routes in routings().items():
        errors = apart(run(routes), one_device(name))
        assert max(errors.values()) < BAR, (name, errors)


def test_the_routers_own_choice():
    """No given routes, and blocks that hold a quarter more than an even share."""
    got, want = runner(over((1, 2, 2), ("fsdp", "cp")))(None), on_one_device()(None)
    np.testing.assert_array_equal(got["routes"], want["routes"])
    errors = apart(got, want)
    assert max(errors.values()) < BAR, errors


def test_a_capacity_would_be_seen(monkeypatch):
    """The negative control: a single round, as if what does not fit were dropped."""
    route = exchange._route
    monkeypatch.setattr(exchange, "_route", lambda *args: route(*args)._replace(rounds=jnp.int32(1)))
    run = runner(over((1, 1, 2), ("cp",)), 48)
    errors = apart(run(routings()["even"]), one_device("even"))  # a few pairs more than 48
    assert errors["d route"] > 1e-2, errors
    errors = apart(run(routings()["every token to one expert"]), one_device("every token to one expert"))
    assert all(errors[name] > 0.1 for name in ("y", "d x", "d gate", "d up", "d down")), errors


@pytest.mark.parametrize("routing", ["even", "every token to one expert"])
def test_rounds_follow_the_largest_range_of_all_devices(routing):
    """As many as are needed anywhere, the same number everywhere; what is sent arrives."""
    where, rows = over((2, 1, 4), ("cp",)), 5
    plan = Exchange(("cp",), ("dp", "fsdp", "cp"), 4, rows, None)
    spec = P(("dp", "fsdp"), "cp", None)

    def local(experts):
        sizes = jnp.bincount(experts.reshape(-1), length=EXPERTS).astype(jnp.int32)
        routing = exchange._route(plan, experts.reshape(-1, TOP_K), sizes)
        return routing.rounds[None, None, None], routing.arriving[None]

    run = jax.shard_map(local, mesh=where.mesh, in_specs=spec, out_specs=(spec, P(("dp", "cp"))), check_vma=False)
    experts = routings()[routing][:, : 4 * (S // 4)]
    rounds, arriving = jit(run)(experts)
    pieces = experts.reshape(2, B // 2, 4, S // 4, TOP_K).transpose(0, 2, 1, 3, 4).reshape(2, 4, -1)
    sent = np.stack([[np.bincount(p // 3, minlength=4) for p in group] for group in pieces])  # [dp, from, to]
    assert set(np.asarray(rounds).flat) == {-(-sent.max() // rows)}
    np.testing.assert_array_equal(np.asarray(arriving).reshape(2, 4, 4, 3).sum(-1), sent.transpose(0, 2, 1))


def test_gradients_of_matrices_are_sums_in_float32():
    """In bfloat16 with many devices: no further from the truth than one device is, and float32 to the last bit."""
    where = over((2, 2, 2), ("fsdp", "cp"))
    routes, wide = routings()["uneven"], one_device("uneven")

    def gradient(where):
        graphdef, shapes = abstract_state(make(where))
        state = jax.device_put(drawn(), parameter_shardings(shapes, where))
        batch = put({**inputs(), "routes": routes}, where)
        half = lambda name: batch[name].astype(jnp.bfloat16)

        def loss(state):
            y, _ = nnx.merge(graphdef, state)(half("x"), batch["real"], batch["routes"])
            return jnp.sum(y.astype(jnp.float32) * half("cotangent"))

        return flat(jit(jax.grad(loss))(state))

    one, many = gradient(sharding()), gradient(where)
    rounded = lambda x: np.array_equal(x, np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32))
    for name in ("gate", "up", "down"):
        assert relative(many[name], wide[f"d {name}"]) < 1.05 * relative(one[name], wide[f"d {name}"]), name
        assert rounded(one[name])  # where all experts are gathered the kernel rounds
        assert not rounded(many[name])


def test_tokens_that_are_on_every_device():
    """A step of decode.py: each device sends all the tokens, and gets all of them back."""
    where = Sharding(sharding(1, 2, 2).mesh, step_rules(expert_rules(("fsdp", "cp"))))
    graphdef, shapes = abstract_state(make(where))
    state = jax.device_put(drawn(), parameter_shardings(shapes, where))
    x = inputs()["x"][:, :1]
    y, _ = jit(nnx.merge(graphdef, state))(x, np.ones((B, 1), bool))
    assert state["gate"].get_value().sharding.shard_shape((EXPERTS, SIZE, INNER)) == (3, SIZE, INNER)
    assert relative(y, on_one_device()(None)["y"][:, :1]) < 1e-6


@functools.cache
def compiled_layers() -> str:
    """The gradient of two layers under jax.checkpoint, as HLO."""
    where = over((1, 1, 3), ("cp",))
    graphdef, state = abstract_state(make(where, rows=9))
    batch = put(inputs(), where)

    def loss(state, x):
        body = lambda x, _: (x + nnx.merge(graphdef, state)(x, batch["real"])[0], None)
        return jnp.sum(lax.scan(jax.checkpoint(body), x, None, length=2)[0] * batch["cotangent"])

    return jit(jax.grad(loss)).lower(state, batch["x"]).compile().as_text() or ""


def exchanges() -> list[tuple[int, ...]]:
    """The shapes of the blocks in each all-to-all, which takes and gives one for each device."""
    return [
        tuple(map(int, shape.split(",")))
        for shape in re.findall(r"= \(f32\[([\d,]+)\].* all-to-all\(", compiled_layers())
    ]


def test_rematerialisation_does_not_send_again():
    """Rows and weights there, results back; then cotangents too, and two gradients back: as many as without it."""
    assert len(exchanges()) == compiled_layers().count(" all-to-all(") == 3 + 5


def test_bytes_are_those_of_the_blocks():
    """The formula against the shapes in the compiled program, of which a device sends all blocks but its own."""
    pairs, size, devices = 4096, 64, 4
    rows = block_rows(pairs, devices)
    assert rows == 1280  # a quarter more than 1024
    assert sent_bytes(pairs, size, devices, 2) == (3 * rows * (2 * size * 2 + 4), 3 * rows * (3 * size * 2 + 8))
    assert sent_bytes(pairs, size, devices, 4, rounds=4).forward == 4 * 3 * rows * (2 * size * 4 + 4)
    assert sent_bytes(pairs, size, 1, 4) == (0, 0)
    assert block_rows(40, 8) == 40  # no more than there are
    small = sent_bytes(9, SIZE, 3, 4)  # blocks of 9 rows, as compiled above
    assert sum(2 * 4 * math.prod(shape) for shape in exchanges()) == small.forward + small.backward


# ---------------------------------------------------------------- where things are, and what is said of it


def test_experts_lie_on_their_axes_and_nowhere_else():
    names, shape = ("layers", "experts", "embed", "mlp"), (2, 12, 16, 8)
    spec = lambda axes, mesh=(1, 2, 4): over(mesh, axes).spec(names, shape)
    assert spec(()) == P(None, None, ("fsdp", "cp"), None)
    assert spec(("cp",)) == P(None, "cp", "fsdp", None)
    assert spec(("fsdp",)) == P(None, "fsdp", "cp", None)
    assert over((1, 2, 2), ("fsdp", "cp")).spec(names, shape) == P(None, ("fsdp", "cp"), None, None)
    assert over((1, 1, 2), ("fsdp", "cp")).expert_axes == ("cp",)
    with pytest.raises(ValueError, match=r"the experts must be divisible by fsdp \* cp = 8, got 12"):
        spec(("fsdp", "cp"))


def test_a_block_of_no_rows():
    with pytest.raises(ValueError, match="exchange_rows must be None or at least 1, got 0"):
        KernelOptions(exchange_rows=0)


def test_fused_kernels_need_all_experts():
    where, options = over((1, 1, 3), ("cp",)), KernelOptions(fused=True)
    make = lambda rngs: MoE(SIZE, INNER, EXPERTS, SoftmaxTopK(TOP_K, True), where, std=0.5, options=options, rngs=rngs)
    graphdef, state = abstract_state(make)
    batch = put(inputs(), where)
    with pytest.raises(ValueError, match="fused must be False where experts are cut over mesh axes, got True and cp"):
        jax.eval_shape(lambda state: nnx.merge(graphdef, state)(batch["x"], batch["real"]), state)


def test_a_cut_mlp_axis_is_refused():
    specs = exchange.Experts(P(None, None, "cp"), P(None, None, "cp"), P(None, "cp", None))
    with pytest.raises(ValueError, match="the mlp axis of the experts' matrices must not be cut, got"):
        exchange.gather_gate_up(specs, specs, jnp.float32)


@pytest.mark.parametrize("remat", ["attention", "matmuls"])
def test_a_model_with_the_kernels_of_a_gpu_is_lowered(remat):
    """Their counters of drawn items inside the rounds' loop, in a scan of recomputed layers; nothing is compiled."""
    sizes = dataclasses.replace(
        TINY, hidden_size=128, head_dim=64, num_attention_heads=2, num_key_value_heads=1, moe_intermediate_size=64,
        num_experts=8,
    )  # fmt: skip
    where, options = over((1, 1, 2), ("cp",)), KernelOptions(implementation="mosaic")
    graphdef, state = abstract_state(maker(sizes, where, dtype=jnp.bfloat16, remat=remat, options=options))
    tokens = put({"tokens": np.zeros((1, 512), np.int32)}, where)["tokens"]
    loss = lambda state: jnp.sum(nnx.merge(graphdef, state)(tokens, tokens)[0].astype(jnp.float32))
    text = jax.jit(jax.grad(loss)).trace(state).lower(lowering_platforms=("cuda",)).as_text()
    # attention twice and once back; experts: two there, and in the backward two again and four gradients of two kinds
    assert text.count("mosaic_gpu_v2") >= 8
    assert text.count("all_to_all") >= 8


def test_a_degree_is_whole_axes():
    assert [expert_axes(ep, fsdp=2, cp=4) for ep in (1, 2, 4, 8)] == [(), ("fsdp",), ("cp",), ("fsdp", "cp")]
    assert expert_axes(3, fsdp=1, cp=3) == ("cp",)
    with pytest.raises(ValueError, match=r"ep must be 1, cp, fsdp or fsdp \* cp = 1, 4, 2 or 8, got 3"):
        expert_axes(3, fsdp=2, cp=4)


def test_a_model_whose_experts_do_not_divide():
    where = over((1, 2, 2), ("fsdp", "cp"))
    _, shapes = abstract_state(maker(TINY, where))
    with pytest.raises(ValueError, match=r"the experts must be divisible by fsdp \* cp = 4, got 6"):
        parameter_shardings(shapes, where)
